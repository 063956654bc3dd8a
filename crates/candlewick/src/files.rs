//! Files that appear whole or not at all: written beside their place, flushed to the disk, then renamed.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;

use candle_core::{Device, Tensor};
use safetensors::SafeTensorError;
use tempfile::NamedTempFile;

use crate::{Error, Result};

/// Writes a file through `write`; an old file of that name stays untouched until the new one is on the disk.
///
/// # Errors
/// The file cannot be written: the disk is full, say. The temporary file is removed.
pub fn replace(path: &Path, write: impl FnOnce(&NamedTempFile) -> Result<()>) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let file = NamedTempFile::new_in(folder).map_err(Error::io(path))?;
    write(&file)?;
    make_readable(file.as_file()).map_err(Error::io(path))?;
    file.as_file().sync_all().map_err(Error::io(path))?;
    file.persist(path).map_err(|e| Error::io(path)(e.error))?;
    // The rename itself must survive a power cut, too.
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io(folder))
}

/// Writes a file from memory; see [`replace`].
///
/// # Errors
/// The file cannot be written.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    replace(path, |file| file.as_file().write_all(bytes).map_err(Error::io(path)))
}

/// Writes tensors as safetensors, one after the other; see [`replace`].
///
/// # Errors
/// The file cannot be written, or a tensor cannot be copied from its device.
pub fn write_safetensors(
    path: &Path,
    tensors: Vec<(String, Tensor)>,
    header: impl IntoIterator<Item = (String, String)>,
) -> Result<()> {
    let tensors = tensors
        .into_iter()
        .map(|(name, tensor)| Ok((name, tensor.to_device(&Device::Cpu)?.contiguous()?)))
        .collect::<Result<Vec<_>>>()?;
    replace(path, |file| {
        safetensors::serialize_to_file(
            tensors,
            Some(header.into_iter().collect::<HashMap<_, _>>()),
            file.path(),
        )
        .map_err(|e| match e {
            SafeTensorError::IoError(source) => Error::io(path)(source),
            other => Error::model(path, format!("cannot be written: {other}")),
        })
    })
}

/// A temporary file is private to its owner; a finished one has a new file's usual permissions.
#[cfg(unix)]
fn make_readable(file: &File) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(std::fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
fn make_readable(_: &File) -> std::io::Result<()> {
    Ok(())
}
