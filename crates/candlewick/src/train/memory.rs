//! How much memory the process has used.

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
