//! How much memory training has used.

use candle_core::Device;

use crate::Result;

/// The most memory at any moment, in bytes: on a GPU, of its tensors; else of the process. `None` where nobody tells.
pub fn peak_memory(device: &Device) -> Result<Option<u64>> {
    if device.is_cpu() { Ok(peak_resident_bytes()) } else { Ok(candle_fused::peak_memory(device)?) }
}

/// The most memory that was resident at any moment, in bytes; `None` where the system does not tell.
#[must_use]
pub fn peak_resident_bytes() -> Option<u64> {
    #[cfg(unix)]
    {
        use nix::sys::resource::{UsageWho, getrusage};
        let peak = u64::try_from(getrusage(UsageWho::RUSAGE_SELF).ok()?.max_rss()).ok()?;
        // Linux counts KiB, macOS bytes.
        Some(if cfg!(target_os = "macos") { peak } else { peak * 1024 })
    }
    #[cfg(not(unix))]
    None
}
