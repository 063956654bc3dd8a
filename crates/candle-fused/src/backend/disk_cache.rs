//! Compiled kernels on disk, one file for each text, compiler and set of options.
//!
//! A file's name is a hash of what it was made from, and it begins with a hash of that name and its content: one that is
//! cut, altered or copied to another name is ignored, and compiled again. The cache is a convenience: where it cannot be
//! read or written, kernels are compiled at every start.
//!
//! The folder is `$CANDLE_FUSED_CACHE` if that is set (set and empty: no cache), else `candle-fused` in the user's cache
//! folder.

#![cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "tests alone, without a compiler"))]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

use sha2::{Digest, Sha256};

/// The length of a hash.
const HASH: usize = 32;

/// The name of what is made from these parts.
pub(super) fn key(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        // With their lengths, so that no other division into parts has the same hash.
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    format!("{:x}", hash.finalize())
}

/// What was stored under a name, if it is there and whole.
pub(super) fn load(key: &str) -> Option<Vec<u8>> {
    load_from(&folder()?, key)
}

/// Stores what belongs to a name.
pub(super) fn store(key: &str, content: &[u8]) {
    let Some(folder) = folder() else { return };
    if let Err(error) = store_in(&folder, key, content) {
        tracing::debug!(folder = %folder.display(), %error, "a compiled kernel is not kept");
    }
}

fn load_from(folder: &Path, key: &str) -> Option<Vec<u8>> {
    let bytes = fs::read(folder.join(key)).ok()?;
    let (hash, content) = bytes.split_at_checked(HASH)?;
    (hash == seal(key, content)).then(|| content.to_vec())
}

fn store_in(folder: &Path, key: &str, content: &[u8]) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    // Another process sees the whole file or none.
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(&seal(key, content))?;
    file.write_all(content)?;
    file.persist(folder.join(key))?;
    Ok(())
}

fn seal(key: &str, content: &[u8]) -> [u8; HASH] {
    Sha256::new().chain_update(key.as_bytes()).chain_update(content).finalize().into()
}

fn folder() -> Option<PathBuf> {
    match env::var_os("CANDLE_FUSED_CACHE") {
        Some(folder) if folder.is_empty() => None,
        Some(folder) => Some(folder.into()),
        None => Some(dirs::cache_dir()?.join("candle-fused")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_stored_is_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("kernels");
        let (one, other) = (key(&["NVRTC 13.0", "text"]), key(&["NVRTC 13.1", "text"]));
        assert_ne!(one, other);
        assert_ne!(key(&["ab", "c"]), key(&["a", "bc"]));
        assert_eq!(load_from(&folder, &one), None);
        store_in(&folder, &one, b"image").unwrap();
        assert_eq!(load_from(&folder, &one).unwrap(), b"image");
        assert_eq!(load_from(&folder, &other), None);

        let whole = fs::read(folder.join(&one)).unwrap();
        fs::write(folder.join(&other), &whole).unwrap();
        assert_eq!(load_from(&folder, &other), None, "a file under another name");
        for len in [0, HASH - 1, HASH, whole.len() - 1] {
            fs::write(folder.join(&one), &whole[..len]).unwrap();
            assert_eq!(load_from(&folder, &one), None, "{len} bytes of a file");
        }
        for at in [0, whole.len() - 1] {
            let mut altered = whole.clone();
            altered[at] ^= 1;
            fs::write(folder.join(&one), altered).unwrap();
            assert_eq!(load_from(&folder, &one), None, "an altered byte {at}");
        }
    }
}
