//! NVIDIA's run-time compiler: a kernel's text to machine code, kept on disk between runs.

use std::ffi::{CString, c_int};

use candle_core::cuda_backend::cudarc::nvrtc::{result, sys};

use super::disk_cache;
use crate::DeviceError;

/// What to compile to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Code {
    /// Machine code of this architecture, as in `sm_90`.
    Machine(c_int),
    /// Machine code of this architecture with what no later one has, as in `sm_90a`.
    Specific(c_int),
    /// The virtual architecture's, as in `compute_90`, which the driver translates when it loads it.
    Virtual(c_int),
}

impl Code {
    fn option(self) -> String {
        match self {
            Self::Machine(arch) => format!("--gpu-architecture=sm_{arch}"),
            Self::Specific(arch) => format!("--gpu-architecture=sm_{arch}a"),
            Self::Virtual(arch) => format!("--gpu-architecture=compute_{arch}"),
        }
    }
}

/// What this compiler can make of a kernel for a device of compute capability `arch` (90 for 9.0), best first.
pub(super) fn codes(kernel: &str, arch: c_int) -> Result<Vec<Code>, DeviceError> {
    let unusable = |error: result::NvrtcError| failed(kernel, &error.to_string());
    let mut count = 0;
    // SAFETY: NVRTC writes one integer.
    unsafe { sys::nvrtcGetNumSupportedArchs(&raw mut count) }.result().map_err(unusable)?;
    let mut supported = vec![0; usize::try_from(count).unwrap_or(0)];
    // SAFETY: there is room for as many integers as NVRTC has just announced.
    unsafe { sys::nvrtcGetSupportedArchs(supported.as_mut_ptr()) }.result().map_err(unusable)?;
    Ok(choose(arch, &supported))
}

/// Machine code where the compiler knows the device, and PTX of the newest architecture that the device can run.
fn choose(arch: c_int, supported: &[c_int]) -> Vec<Code> {
    let machine = supported.contains(&arch).then_some(Code::Machine(arch));
    let newest = supported.iter().copied().filter(|&known| known <= arch).max().map(Code::Virtual);
    machine.into_iter().chain(newest).collect()
}

/// Compiles a text, or finds it compiled before by the same compiler with the same options.
///
/// # Errors
/// [`DeviceError::Compilation`] with the compiler's log.
pub(super) fn compile(kernel: &str, text: &str, code: Code) -> Result<Vec<u8>, DeviceError> {
    let options = [code.option(), "--std=c++17".to_owned()];
    let (mut major, mut minor) = (0, 0);
    // SAFETY: NVRTC writes two integers.
    let version = unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) };
    version.result().map_err(|error| failed(kernel, &error.to_string()))?;
    let key = disk_cache::key(&[&format!("NVRTC {major}.{minor}"), &options.join(" "), text]);
    if let Some(image) = disk_cache::load(&key) {
        return Ok(image);
    }
    let image = Program::new(kernel, text)?.compile(kernel, &options, code)?;
    disk_cache::store(&key, &image);
    Ok(image)
}

fn failed(kernel: &str, log: &str) -> DeviceError {
    DeviceError::Compilation { name: kernel.to_owned(), log: log.to_owned() }
}

/// A text that NVRTC holds.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the program was created by `Program::new` and is destroyed here alone.
        let destroyed = unsafe { result::destroy_program(self.0) };
        // It can only fail for what is not a program.
        debug_assert!(destroyed.is_ok());
    }
}

impl Program {
    fn new(kernel: &str, text: &str) -> Result<Self, DeviceError> {
        let text = CString::new(text).map_err(|error| failed(kernel, &error.to_string()))?;
        let program =
            result::create_program(&text, None).map_err(|error| failed(kernel, &error.to_string()))?;
        Ok(Self(program))
    }

    fn compile(self, kernel: &str, options: &[String], code: Code) -> Result<Vec<u8>, DeviceError> {
        // SAFETY: the program lives until `self` is dropped.
        if let Err(error) = unsafe { result::compile_program(self.0, options) } {
            // SAFETY: as above.
            let log = unsafe { result::get_program_log(self.0) }.unwrap_or_default();
            let log: Vec<u8> = log.into_iter().map(i8::cast_unsigned).take_while(|&byte| byte != 0).collect();
            return Err(failed(kernel, &format!("{error}\n{}", String::from_utf8_lossy(&log))));
        }
        let image = match code {
            Code::Machine(_) | Code::Specific(_) => self.cubin(),
            Code::Virtual(_) => self.ptx(),
        };
        image.map_err(|error| failed(kernel, &error.to_string()))
    }

    /// A text that ends with a zero, as the driver wants it.
    fn ptx(&self) -> Result<Vec<u8>, result::NvrtcError> {
        // SAFETY: the program lives as long as `self`.
        let ptx = unsafe { result::get_ptx(self.0) }?;
        Ok(ptx.into_iter().map(i8::cast_unsigned).collect())
    }

    fn cubin(&self) -> Result<Vec<u8>, result::NvrtcError> {
        let mut size = 0;
        // SAFETY: the program lives as long as `self`; NVRTC writes one size.
        unsafe { sys::nvrtcGetCUBINSize(self.0, &raw mut size) }.result()?;
        let mut cubin = vec![0u8; size];
        // SAFETY: there is room for as many bytes as NVRTC has just announced.
        unsafe { sys::nvrtcGetCUBIN(self.0, cubin.as_mut_ptr().cast()) }.result()?;
        Ok(cubin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_code_comes_first_and_ptx_is_the_way_out() {
        assert_eq!(choose(90, &[75, 80, 90, 100]), [Code::Machine(90), Code::Virtual(90)]);
        assert_eq!(choose(103, &[75, 80, 90, 100]), [Code::Virtual(100)]);
        assert_eq!(choose(70, &[75, 80]), []);
    }
}
