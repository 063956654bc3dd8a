//! From text to an image: the host's C++ compiler, and a folder of what it made before.
//!
//! A text is compiled once. The image is kept under a hash of everything that made it (the text, the hooks it is
//! linked with, the compiler and its flags), so that nothing stale is ever found.

use crate::Error;
use crate::module::Module;
use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// The kernel's side of the simulator.
const HOOKS: &str = include_str!("../runtime/hooks.cpp");

/// How kernels are compiled.
///
/// Optimisation keeps scalars in registers, so that only memory is checked; inlining and the merging or copying
/// of branches are off, because a barrier must stay the one place it is in the text. Private variables start
/// with a pattern that makes a use of them show in the result.
const KERNEL_FLAGS: [&str; 13] = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-w",
    "-fPIC",
    "-fno-inline",
    "-fno-builtin",
    "-fno-strict-aliasing",
    "-fno-exceptions",
    "-ffp-contract=off",
    "-ftrivial-auto-var-init=pattern",
    "-fsanitize=thread",
    "-fsanitize=shift,integer-divide-by-zero,signed-integer-overflow",
];
/// GCC copies code behind a branch into both arms when it can.
const GCC_FLAGS: [&str; 2] = ["-fsanitize=bounds", "-fno-thread-jumps"];
/// clang leaves out the check of a read that a write to the same place follows, and its `bounds` would trap.
const CLANG_FLAGS: [&str; 3] = ["-fsanitize=array-bounds", "-mllvm", "-tsan-instrument-read-before-write"];
const HOOKS_FLAGS: [&str; 5] = ["-std=c++17", "-O2", "-fPIC", "-fno-exceptions", "-fno-rtti"];

/// A compiled text, or the compiler's complaint; made by whoever asks first while the others wait.
type Slot = Arc<OnceLock<Result<Arc<Module>, String>>>;

/// A C++ compiler with its cache.
pub(crate) struct Toolchain {
    program: OsString,
    /// What the compiler says it is.
    version: String,
    cache: PathBuf,
    hooks: OnceLock<Result<PathBuf, String>>,
    modules: Mutex<HashMap<Key, Slot>>,
}

impl Toolchain {
    /// The compiler that `CXX` names, or `c++`, with its images in `cache`.
    pub(crate) fn new(cache: PathBuf) -> Result<Self, Error> {
        let program = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
        let asked = Command::new(&program).arg("--version").output();
        let version = match asked {
            Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).into_owned(),
            Ok(output) => return Err(Error::NoCompiler { program, reason: output.status.to_string() }),
            Err(error) => return Err(Error::NoCompiler { program, reason: error.to_string() }),
        };
        fs::create_dir_all(&cache).map_err(|source| Error::Cache { folder: cache.clone(), source })?;
        Ok(Self { program, version, cache, hooks: OnceLock::new(), modules: Mutex::default() })
    }

    /// The image of `text`.
    pub(crate) fn module(&self, text: &str) -> Result<Arc<Module>, String> {
        let key = self.key(text);
        let slot = {
            let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(modules.entry(key).or_default())
        };
        slot.get_or_init(|| self.load(key, text)).clone()
    }

    fn key(&self, text: &str) -> Key {
        let flags = self.kernel_flags();
        let parts = [self.version.as_str(), HOOKS, text];
        Key::of(flags.into_iter().chain(HOOKS_FLAGS).chain(parts))
    }

    fn kernel_flags(&self) -> Vec<&'static str> {
        let own = if self.version.contains("clang") { &CLANG_FLAGS[..] } else { &GCC_FLAGS[..] };
        KERNEL_FLAGS.iter().chain(own).copied().collect()
    }

    fn load(&self, key: Key, text: &str) -> Result<Arc<Module>, String> {
        let image = self.cache.join(format!("{key}.so"));
        if !image.exists() {
            self.build(key, text, &image)?;
        }
        Module::load(&image).map(Arc::new)
    }

    fn build(&self, key: Key, text: &str, image: &Path) -> Result<(), String> {
        let hooks = self.hooks.get_or_init(|| self.build_hooks()).clone()?;
        let source = self.temporary(key, "cpp");
        fs::write(&source, text).map_err(|error| format!("{}: {error}", source.display()))?;
        let object = self.temporary(key, "o");
        let mut compile = Command::new(&self.program);
        compile.args(self.kernel_flags()).arg("-c").arg(&source).arg("-o").arg(&object);
        output(compile)?;
        // Linked apart from the compilation, and without the sanitizers' libraries: the hooks stand in for them.
        let linked = self.temporary(key, "so");
        let mut link = Command::new(&self.program);
        link.arg("-shared").args([&object, &hooks]).arg("-o").arg(&linked);
        output(link)?;
        // Another process may have made the same image: either of them will do.
        fs::rename(&linked, image).map_err(|error| format!("{}: {error}", image.display()))?;
        for path in [object, source] {
            // What remains only takes room.
            let _ = fs::remove_file(path);
        }
        Ok(())
    }

    fn build_hooks(&self) -> Result<PathBuf, String> {
        let key = Key::of([self.version.as_str(), HOOKS].into_iter().chain(HOOKS_FLAGS));
        let object = self.cache.join(format!("{key}.o"));
        if !object.exists() {
            let source = self.temporary(key, "cpp");
            fs::write(&source, HOOKS).map_err(|error| format!("{}: {error}", source.display()))?;
            let made = self.temporary(key, "o");
            let mut compile = Command::new(&self.program);
            compile.args(HOOKS_FLAGS).arg("-c").arg(&source).arg("-o").arg(&made);
            output(compile)?;
            fs::rename(&made, &object).map_err(|error| format!("{}: {error}", object.display()))?;
            let _ = fs::remove_file(source);
        }
        Ok(object)
    }

    /// A path in the cache that nobody else writes, in this process or another.
    fn temporary(&self, key: Key, extension: &str) -> PathBuf {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        self.cache.join(format!("{key}.{}-{count}.{extension}", std::process::id()))
    }
}

/// Runs a command; what it complained about if it failed.
fn output(mut command: Command) -> Result<Output, String> {
    let output = command.output().map_err(|error| format!("{}: {error}", command.get_program().display()))?;
    if output.status.success() {
        Ok(output)
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

/// FNV-1a over 128 bits: the same in every build of this crate, and wide enough for a name.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key(u128);

impl Key {
    fn of<'a>(parts: impl IntoIterator<Item = &'a str>) -> Self {
        let mut hash: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
        for part in parts {
            // The zero byte, which no part contains, keeps the parts apart.
            for &byte in part.as_bytes().iter().chain(&[0]) {
                hash = (hash ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
            }
        }
        Self(hash)
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}
