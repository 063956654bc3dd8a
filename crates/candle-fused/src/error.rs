//! Errors of the methods on tensors and of the devices beneath them.

use thiserror::Error;

/// Why a device cannot run a kernel.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// A kernel's text does not compile.
    #[error("compiling the kernel {name:?} failed: {log}")]
    Compilation {
        /// The kernel's name.
        name: String,
        /// What the device's compiler said.
        log: String,
    },
    /// The compiled kernels hold no function of this name.
    #[error("there is no kernel {name:?}")]
    UnknownKernel {
        /// The name asked for.
        name: String,
    },
    /// The device does not take a compiled function.
    #[error("the device rejects the kernel {name:?}: {reason}")]
    Pipeline {
        /// The function's name.
        name: String,
        /// What the device said.
        reason: String,
    },
    /// The device has no such thing.
    #[error("the device does not support {what}")]
    Unsupported {
        /// What it lacks.
        what: String,
    },
}

/// Why a fused method of a tensor failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TrainingError {
    /// The operation rejects its arguments, or Candle failed in it.
    #[error(transparent)]
    Operation(#[from] candle_core::Error),
    /// The device cannot run it.
    #[error(transparent)]
    Device(#[from] DeviceError),
}
