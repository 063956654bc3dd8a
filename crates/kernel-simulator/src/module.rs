//! A compiled text in memory: its kernels, and the lines its addresses come from.

use crate::hooks::{self, Hooks};
use crate::index;
use crate::machine::Context;
use crate::report::Site;
use candlewick_kernels::Launch;
use libloading::Library;
use std::ffi::{c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr::null;

/// A kernel: the addresses of its arguments, and who the thread is.
pub(crate) type Entry = unsafe extern "C" fn(*mut usize, &Context);

/// A kernel and what it takes.
pub(crate) struct Kernel {
    pub(crate) entry: Entry,
    /// Buffers, before the parameters.
    buffers: u32,
    /// The size of its PARAM struct.
    param_bytes: u32,
}

impl Kernel {
    /// What the launch gives it that is not what it takes.
    pub(crate) fn disagreements(&self, launch: &Launch) -> Vec<String> {
        let compare = |what: &str, takes: u32, given: usize| {
            (index(takes) != given)
                .then(|| format!("the kernel takes {takes} {what}, and the launch gives {given}"))
        };
        let buffers = compare("buffers", self.buffers, launch.arguments.len());
        let params = compare("bytes of parameters", self.param_bytes, launch.params.len());
        buffers.into_iter().chain(params).collect()
    }
}

/// One text, compiled and loaded.
#[derive(Debug)]
pub(crate) struct Module {
    path: PathBuf,
    library: Library,
}

impl Module {
    /// Loads an image that [`Toolchain`](crate::toolchain::Toolchain) made, and gives it the hooks.
    pub(crate) fn load(path: &Path) -> Result<Self, String> {
        let failed = |error: libloading::Error| format!("{}: {error}", path.display());
        // SAFETY: the image was made from a kernel's text and our hooks. All that runs while it is loaded is
        // `__tsan_init`, which does nothing.
        let library = unsafe { Library::new(path) }.map_err(failed)?;
        // SAFETY: `runtime/hooks.cpp` declares the function so, and the table has its fields in the same order.
        // It copies the table.
        unsafe {
            let attach = library.get::<unsafe extern "C" fn(*const Hooks)>("simulator_attach");
            attach.map_err(failed)?(&raw const hooks::TABLE);
        }
        Ok(Self { path: path.to_owned(), library })
    }

    /// The kernel of that name.
    pub(crate) fn kernel(&self, name: &str) -> Option<Kernel> {
        let entry = format!("simulator_kernel_{name}");
        let signature = format!("simulator_kernel_{name}_signature");
        // SAFETY: the dialect's `KERNEL` exports a function and an array of these types under these names.
        unsafe {
            let entry = self.library.get::<Entry>(entry).ok()?;
            let signature = self.library.get::<*const [u32; 2]>(signature).ok()?;
            let [buffers, param_bytes] = **signature;
            Some(Kernel { entry: *entry, buffers, param_bytes })
        }
    }

    /// The lines in the kernel's text that lead to each stack's innermost address: one list for each stack, from
    /// the innermost line outwards, without the dialect's own. Empty where the host has no `addr2line`.
    pub(crate) fn sites(&self, stacks: &[&[usize]]) -> Vec<Vec<Site>> {
        let addresses: Vec<usize> = stacks.iter().flat_map(|stack| stack.iter().copied()).collect();
        let mut lines = self.lines(&addresses).unwrap_or_default().into_iter();
        let site = |line: Option<Site>| line.filter(|site| is_kernel_text(&site.file));
        stacks.iter().map(|stack| lines.by_ref().take(stack.len()).filter_map(site).collect()).collect()
    }

    /// The line of each address, which is one that a call returns to.
    fn lines(&self, addresses: &[usize]) -> Option<Vec<Option<Site>>> {
        let (&first, _) = addresses.split_first()?;
        let base = Image::of(first)?.base;
        let mut command = Command::new("addr2line");
        command.arg("-s").arg("-e").arg(&self.path);
        for address in addresses {
            // One byte back, into the call itself. An address outside the image, whose caller is the simulator,
            // becomes one that has no line.
            command.arg(format!("{:#x}", address.wrapping_sub(base + 1)));
        }
        let output = command.output().ok().filter(|output| output.status.success())?;
        let lines = String::from_utf8(output.stdout).ok()?;
        let site = |line: &str| {
            let (file, line) = line.rsplit_once(':')?;
            let line = line.split(' ').next()?.parse().ok()?;
            Some(Site { file: file.to_owned(), line })
        };
        Some(lines.lines().map(site).collect())
    }
}

/// Whether a reader of kernels knows this file: not the dialect's own header (which GCC, before the first `#line`,
/// takes for the whole text's file), and not what `addr2line` calls the unknown.
fn is_kernel_text(file: &str) -> bool {
    let whole_text = Path::new(file).extension().is_some_and(|extension| extension == "cpp");
    !whole_text && !["simulator.h", "??"].contains(&file)
}

/// Whether an address lies in the loaded image that the code at `code` belongs to.
pub(crate) fn same_image(address: usize, code: usize) -> bool {
    match (Image::of(address), Image::of(code)) {
        (Some(a), Some(b)) => a.base == b.base,
        _ => false,
    }
}

/// A loaded image, as the dynamic linker knows it.
struct Image {
    base: usize,
}

impl Image {
    fn of(address: usize) -> Option<Self> {
        #[repr(C)]
        struct Info {
            file: *const c_char,
            base: *const c_void,
            symbol: *const c_char,
            symbol_address: *const c_void,
        }
        unsafe extern "C" {
            fn dladdr(address: *const c_void, info: *mut Info) -> c_int;
        }
        let mut info = Info { file: null(), base: null(), symbol: null(), symbol_address: null() };
        // SAFETY: `dladdr` takes any address and fills in its four fields, on Linux as on macOS.
        let found = unsafe { dladdr(std::ptr::without_provenance(address), &raw mut info) };
        (found != 0).then(|| Self { base: info.base.addr() })
    }
}
