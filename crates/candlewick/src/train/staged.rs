//! Folders that appear whole or not at all, as [`files`](crate::files) has it for single files.
//!
//! What is written goes to a hidden neighbour first and is flushed to the disk; one rename then makes it visible,
//! which the file system does entirely or not at all. Whoever is killed in between leaves what was there before, and
//! perhaps a hidden `.….tmp` that the next writer removes.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// A folder that is complete and on the disk, but not visible yet. Dropped, it is removed again.
#[derive(Debug)]
pub struct Staged {
    temporary: PathBuf,
    path: PathBuf,
    published: bool,
}

impl Staged {
    /// Prepares a folder for `path`: `fill` writes files into the folder it is given.
    pub fn folder(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<Self> {
        let temporary = hidden(path, ".new")?;
        remove_if_present(&temporary)?;
        fs::create_dir_all(&temporary).map_err(Error::io(&temporary))?;
        let staged = Self { temporary, path: path.to_path_buf(), published: false };
        let temporary = &staged.temporary;
        fill(temporary)?;
        for entry in fs::read_dir(temporary).map_err(Error::io(temporary))? {
            sync(&entry.map_err(Error::io(temporary))?.path())?;
        }
        sync_folder(temporary)?;
        Ok(staged)
    }

    /// Makes it visible. Fails when there is already something at its path.
    pub fn publish(mut self) -> Result<()> {
        fs::rename(&self.temporary, &self.path).map_err(Error::io(&self.path))?;
        self.published = true;
        sync_parent(&self.path)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.published {
            // Hidden, and removed by the next writer if not now.
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}

/// Removes a folder: it disappears whole, then its files are deleted.
pub fn remove_folder(path: &Path) -> Result<()> {
    let temporary = hidden(path, ".old")?;
    remove_if_present(&temporary)?;
    fs::rename(path, &temporary).map_err(Error::io(path))?;
    remove_if_present(&temporary)
}

/// Removes what interrupted calls left in `folder` for names that begin with `prefix`.
pub fn remove_leftovers(folder: &Path, prefix: &str) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
        let entry = entry.map_err(Error::io(folder))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(&format!(".{prefix}")) && name.ends_with(".tmp") {
            remove_if_present(&entry.path())?;
        }
    }
    Ok(())
}

/// `folder/name` becomes `folder/.name.new.tmp`: on the same file system, so that it can be renamed.
fn hidden(path: &Path, purpose: &str) -> Result<PathBuf> {
    let Some(name) = path.file_name() else {
        let error = io::Error::new(io::ErrorKind::InvalidInput, "not the name of a file or folder");
        return Err(Error::io(path)(error));
    };
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(purpose);
    hidden.push(".tmp");
    Ok(path.with_file_name(hidden))
}

fn remove_if_present(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(Error::io(folder)),
    }
}

fn sync(file: &Path) -> Result<()> {
    // Writable, because Windows flushes no other handle.
    let open = File::options().read(true).write(true).open(file);
    open.and_then(|file| file.sync_all()).map_err(Error::io(file))
}

/// A rename is on the disk once its folder is.
fn sync_parent(path: &Path) -> Result<()> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync_folder(parent),
        _ => sync_folder(Path::new(".")),
    }
}

fn sync_folder(folder: &Path) -> Result<()> {
    // Windows cannot open a folder as a file; its renames are journalled.
    if cfg!(unix) {
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io(folder))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::write_atomically;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn failure(path: &Path) -> Result<()> {
        fs::write(path, "half").unwrap();
        Err(Error::Config("the disk is full".to_owned()))
    }

    #[test]
    fn a_folder_appears_when_published() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        let fill = |text: &'static str| move |to: &Path| write_atomically(&to.join("file"), text.as_bytes());
        assert!(Staged::folder(&path, |to| failure(&to.join("file"))).is_err());
        assert!(names(folder.path()).is_empty());
        let staged = Staged::folder(&path, fill("whole")).unwrap();
        assert_eq!(names(folder.path()), [".a.new.tmp"]);
        staged.publish().unwrap();
        assert!(Staged::folder(&path, fill("again")).unwrap().publish().is_err());
        assert_eq!(fs::read(path.join("file")).unwrap(), b"whole");
        // The old one can be removed while the new one waits.
        let staged = Staged::folder(&path, fill("again")).unwrap();
        remove_folder(&path).unwrap();
        staged.publish().unwrap();
        assert_eq!(fs::read(path.join("file")).unwrap(), b"again");
        assert_eq!(names(folder.path()), ["a"]);
        remove_folder(&path).unwrap();
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn leftovers_are_removed_by_prefix() {
        let folder = tempfile::tempdir().unwrap();
        for name in [".a-1.tmp", ".b-1.tmp", "a-2"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        remove_leftovers(folder.path(), "a-").unwrap();
        assert_eq!(names(folder.path()), [".b-1.tmp", "a-2"]);
        assert!(remove_folder(Path::new("/")).is_err());
    }
}
