//! Every text through NVRTC: to machine code for `sm_90` (those for Hopper alone for `sm_90a`), and one of each kind to PTX
//! for an old device, with no header and no warning.
//!
//! NVRTC needs neither a GPU nor a driver. It is looked for in `NVRTC_LIBRARY`, then among the system's libraries,
//! then where pip's `nvidia-cuda-nvrtc` puts it in a virtual environment that `VIRTUAL_ENV` names or that is active.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use candlewick_kernels::Target;
use candlewick_kernels::hopper;
use libloading::{Library, Symbol};
use std::ffi::{CString, c_char, c_int, c_void};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::ptr::{null, null_mut};

type Program = *mut c_void;
type Create = unsafe extern "C" fn(
    *mut Program,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> c_int;
type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Text = unsafe extern "C" fn(Program, *mut c_char) -> c_int;
type Destroy = unsafe extern "C" fn(*mut Program) -> c_int;

struct Nvrtc(Library);

impl Nvrtc {
    fn find() -> Option<Self> {
        let mut candidates: Vec<PathBuf> =
            std::env::var_os("NVRTC_LIBRARY").into_iter().map(PathBuf::from).collect();
        if let Some(environment) = std::env::var_os("VIRTUAL_ENV") {
            candidates.extend(in_environment(Path::new(&environment)));
        }
        for folder in std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()) {
            candidates.extend(folder.parent().into_iter().flat_map(in_environment));
        }
        candidates.extend(["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"].map(PathBuf::from));
        candidates.into_iter().find_map(|path| {
            // SAFETY: NVRTC's initialisers do nothing beyond the library itself.
            unsafe { Library::new(path) }.ok().map(Self)
        })
    }

    fn function<F>(&self, name: &str) -> Symbol<'_, F> {
        // SAFETY: the callers' types are those of nvrtc.h.
        unsafe { self.0.get(name.as_bytes()) }.unwrap()
    }

    /// Compiles a text, and returns the size of the result in bytes, or the log.
    fn compile(&self, text: &str, options: &[&str], result_size: &str) -> Result<usize, String> {
        let text = CString::new(text).unwrap();
        let options: Vec<_> = options.iter().map(|&option| CString::new(option).unwrap()).collect();
        let option_pointers: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();
        let mut program: Program = null_mut();
        // SAFETY: strings outlive the calls, the buffer has the size that NVRTC asks for, and `program` is destroyed
        // after its last use.
        unsafe {
            let created = self.function::<Create>("nvrtcCreateProgram")(
                &raw mut program,
                text.as_ptr(),
                c"kernel".as_ptr(),
                0,
                null(),
                null(),
            );
            assert_eq!(created, 0);
            let count = c_int::try_from(option_pointers.len()).unwrap();
            let compiled =
                self.function::<Compile>("nvrtcCompileProgram")(program, count, option_pointers.as_ptr());
            let mut log_size = 0;
            self.function::<Size>("nvrtcGetProgramLogSize")(program, &raw mut log_size);
            let mut log = vec![0_u8; log_size.max(1)];
            self.function::<Text>("nvrtcGetProgramLog")(program, log.as_mut_ptr().cast());
            let log = String::from_utf8_lossy(&log).trim_end_matches('\0').to_owned();
            let mut bytes = 0;
            self.function::<Size>(result_size)(program, &raw mut bytes);
            self.function::<Destroy>("nvrtcDestroyProgram")(&raw mut program);
            // A warning is a failure too: the kernels have none.
            if compiled == 0 && log.is_empty() && bytes > 0 { Ok(bytes) } else { Err(log) }
        }
    }
}

/// pip's places for NVRTC below a virtual environment.
fn in_environment(environment: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for python in std::fs::read_dir(environment.join("lib")).into_iter().flatten().flatten() {
        let nvidia = python.path().join("site-packages/nvidia");
        for package in ["cuda_nvrtc", "cu13"] {
            for version in ["12", "13"] {
                found.push(nvidia.join(package).join(format!("lib/libnvrtc.so.{version}")));
            }
        }
    }
    found.retain(|path| path.exists());
    found
}

#[test]
fn nvrtc_accepts_every_text() {
    let Some(nvrtc) = Nvrtc::find() else {
        // Not println!, which the test runner keeps to itself when a test passes.
        std::io::stderr().write_all(b"skipped: NVRTC not found (set NVRTC_LIBRARY)\n").unwrap();
        return;
    };
    // SAFETY: this function is the library's own and takes two integers' addresses.
    let version = unsafe {
        let (mut major, mut minor) = (0, 0);
        nvrtc.function::<unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int>("nvrtcVersion")(
            &raw mut major,
            &raw mut minor,
        );
        format!("{major}.{minor}")
    };
    let texts = common::texts(Target::Cuda);
    let mut failures = common::failures(&texts, |_, text| {
        // Machine code comes by way of PTX; PTX for a device without bf16 instructions takes the dialect's other path,
        // which differs by op and storage alone.
        nvrtc.compile(&text.source, &["--gpu-architecture=sm_90", "--std=c++17"], "nvrtcGetCUBINSize")?;
        if text.first_of_its_kind && !text.launch.file.needs_matrix_units() {
            let options = ["--gpu-architecture=compute_75", "--std=c++17"];
            nvrtc.compile(&text.source, &options, "nvrtcGetPTXSize")?;
        }
        Ok(())
    });
    let kinds =
        texts.iter().filter(|text| text.first_of_its_kind && !text.launch.file.needs_matrix_units()).count();
    let specific = hopper::Text::all();
    for &text in &specific {
        let options = ["--gpu-architecture=sm_90a", "--std=c++17"];
        if let Err(log) = nvrtc.compile(&text.source(), &options, "nvrtcGetCUBINSize") {
            failures.push(format!("{text:?}\n{log}"));
        }
    }
    let (all, special, bad) = (texts.len(), specific.len(), failures.len());
    println!(
        "NVRTC {version}: {all} texts to sm_90 machine code, {kinds} of them to PTX for sm_75, \
         {special} for sm_90a alone, {bad} rejected"
    );
    assert!(failures.is_empty(), "{}", failures[..failures.len().min(5)].join("\n"));
}
