//! Which path the operations took: counted always, and traced once for each distinct fallback.
//!
//! ```
//! # use candle_core::{Device, Tensor};
//! use candle_fused::telemetry::{self, Path};
//! telemetry::reset();
//! candle_fused::softmax(&Tensor::zeros((2, 8), candle_core::DType::F32, &Device::Cpu)?, Default::default())?;
//! let counts = telemetry::snapshot();
//! assert!(counts.iter().any(|c| c.op == "softmax" && c.path == Path::Fused && c.count >= 1));
//! # Ok::<(), candle_core::Error>(())
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::DType;

use crate::DeviceError;
use crate::backend::DeviceKind;

/// The path an operation took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Path {
    /// The fused kernels.
    Fused,
    /// The plain Candle composition.
    Fallback {
        /// Why there was nothing better.
        reason: &'static str,
    },
}

/// How often an operation took a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpCount {
    /// The operation's name.
    pub op: &'static str,
    /// Where it ran.
    pub device: DeviceKind,
    /// The dtype of its first argument.
    pub dtype: DType,
    /// The path.
    pub path: Path,
    /// How often since the start, or since [`reset`].
    pub count: u64,
}

type Key = (&'static str, DeviceKind, &'static str, Path);

static COUNTS: Mutex<BTreeMap<Key, (DType, u64)>> = Mutex::new(BTreeMap::new());

fn counts() -> MutexGuard<'static, BTreeMap<Key, (DType, u64)>> {
    COUNTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All counts, in order of operation, device, dtype and path.
#[must_use]
pub fn snapshot() -> Vec<OpCount> {
    let count = |(&(op, device, _, path), &(dtype, count)): (&Key, &(DType, u64))| OpCount {
        op,
        device,
        dtype,
        path,
        count,
    };
    counts().iter().filter(|(_, (_, count))| *count > 0).map(count).collect()
}

/// Sets every count to zero. A fallback already traced is not traced again.
pub fn reset() {
    counts().values_mut().for_each(|(_, count)| *count = 0);
}

pub(crate) fn count(op: &'static str, device: DeviceKind, dtype: DType, path: Path) {
    let mut counts = counts();
    let entry = counts.entry((op, device, dtype.as_str(), path)).or_insert_with(|| {
        if let Path::Fallback { reason } = path {
            tracing::warn!(op, %device, dtype = dtype.as_str(), reason, "not fused: running the reference");
        }
        (dtype, 0)
    });
    entry.1 += 1;
}

/// Traces why a kernel does not run: once for each operation and reason, however often it is called.
pub(crate) fn warn_once(op: &'static str, device: DeviceKind, error: &DeviceError) {
    static TRACED: Mutex<BTreeSet<(&'static str, DeviceKind, String)>> = Mutex::new(BTreeSet::new());
    let mut traced = TRACED.lock().unwrap_or_else(PoisonError::into_inner);
    if traced.insert((op, device, error.to_string())) {
        tracing::warn!(op, %device, %error, "a kernel does not run");
    }
}
