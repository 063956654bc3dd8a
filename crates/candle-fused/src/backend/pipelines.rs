//! What was compiled on a device, by the launch it was compiled for.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use candlewick_kernels::{KernelFile, Launch, Storage};

use crate::DeviceError;

/// The compiled kernels of one device. What was refused once is refused again, without asking the compiler.
pub(super) struct Pipelines<P>(Mutex<HashMap<Name, Vec<Variant<P>>>>);

/// An entry point of a file, for a storage type; its variants differ in their defines.
type Name = (&'static str, KernelFile, Storage);
type Variant<P> = (Vec<(&'static str, String)>, Result<P, DeviceError>);

impl<P> Default for Pipelines<P> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<P: Clone> Pipelines<P> {
    /// The kernel of a launch, compiled now if it never was.
    pub(super) fn get(
        &self,
        launch: &Launch,
        compile: impl FnOnce() -> Result<P, DeviceError>,
    ) -> Result<P, DeviceError> {
        let mut names = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let variants = names.entry((launch.kernel, launch.file, launch.storage)).or_default();
        if let Some((_, known)) = variants.iter().find(|(defines, _)| *defines == launch.defines) {
            return known.clone();
        }
        let compiled = compile();
        variants.push((launch.defines.clone(), compiled.clone()));
        compiled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_compiled_once_and_refused_once() {
        let launches: Vec<Launch> = candlewick_kernels::ops()
            .iter()
            .flat_map(|op| Storage::ALL.map(|storage| op.sample_launches(storage).unwrap()))
            .flatten()
            .collect();
        let pipelines = Pipelines::default();
        for (index, launch) in launches.iter().enumerate() {
            // Ops may share a kernel.
            let first = launches.iter().position(|other| same(other, launch)).unwrap();
            let expected = if first.is_multiple_of(2) { Ok(first) } else { Err(refused()) };
            let compile = || if index.is_multiple_of(2) { Ok(index) } else { Err(refused()) };
            assert_eq!(pipelines.get(launch, compile), expected, "{launch:?}");
            assert_eq!(pipelines.get(launch, || unreachable!("{launch:?}")), expected);
        }
    }

    fn same(a: &Launch, b: &Launch) -> bool {
        (a.kernel, a.file, a.storage, &a.defines) == (b.kernel, b.file, b.storage, &b.defines)
    }

    fn refused() -> DeviceError {
        DeviceError::Unsupported { what: "odd kernels".into() }
    }
}
