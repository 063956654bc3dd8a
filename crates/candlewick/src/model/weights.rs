//! A model folder's files: memory-mapped, sharded safetensors, and the texts beside them.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Deserialize;

use super::ParameterSource;
use crate::files::write_atomically;
use crate::{Error, Result};

const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// Where a model's files are: a Hugging Face folder, or files compiled into the program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelFiles {
    /// A folder with `config.json`, `tokenizer.json` and safetensors.
    Folder(PathBuf),
    /// The same files, in memory.
    Embedded(&'static [(&'static str, &'static [u8])]),
}

impl ModelFiles {
    /// The path of one file, for errors and messages.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        match self {
            Self::Folder(folder) => folder.join(name),
            Self::Embedded(_) => Path::new("(embedded)").join(name),
        }
    }

    /// Whether the file exists.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        match self {
            Self::Folder(folder) => folder.join(name).is_file(),
            Self::Embedded(files) => files.iter().any(|(file, _)| *file == name),
        }
    }

    /// A whole file.
    ///
    /// # Errors
    /// The file is missing or cannot be read.
    pub fn read(&self, name: &str) -> Result<Cow<'static, [u8]>> {
        match self {
            Self::Folder(folder) => {
                let path = folder.join(name);
                std::fs::read(&path).map(Cow::Owned).map_err(Error::io(path))
            }
            Self::Embedded(files) => files
                .iter()
                .find(|(file, _)| *file == name)
                .map(|(_, bytes)| Cow::Borrowed(*bytes))
                .ok_or_else(|| Error::model(self.path(name), "there is no such file")),
        }
    }

    /// A whole text file.
    ///
    /// # Errors
    /// The file is missing, cannot be read, or is not UTF-8.
    pub fn text(&self, name: &str) -> Result<String> {
        String::from_utf8(self.read(name)?.into_owned()).map_err(|e| Error::model(self.path(name), e))
    }

    /// The names of all files, sorted; folders within the folder are left out.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn names(&self) -> Result<Vec<String>> {
        match self {
            Self::Folder(folder) => {
                let mut names = Vec::new();
                for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
                    let entry = entry.map_err(Error::io(folder))?;
                    // Followed, as the files of a downloaded snapshot are links.
                    if entry.path().is_file() {
                        names.extend(entry.file_name().into_string());
                    }
                }
                names.sort_unstable();
                Ok(names)
            }
            Self::Embedded(files) => Ok(files.iter().map(|(name, _)| (*name).to_string()).collect()),
        }
    }

    /// Copies every file that holds no weights into another folder; what is there already stays.
    ///
    /// # Errors
    /// A file cannot be read or written.
    pub fn copy_texts(&self, folder: &Path) -> Result<()> {
        const WEIGHTS: [&str; 5] = ["safetensors", "bin", "pt", "pth", "gguf"];
        for name in self.names()? {
            let extension = Path::new(&name).extension();
            let is_weights = WEIGHTS.iter().any(|weights| extension.is_some_and(|e| e == *weights));
            if !is_weights && name != INDEX && !folder.join(&name).exists() {
                write_atomically(&folder.join(&name), &self.read(&name)?)?;
            }
        }
        Ok(())
    }

    /// The names of the safetensors files, in a fixed order; empty if the folder holds no weights.
    ///
    /// # Errors
    /// A malformed index, or one that names a file outside the folder.
    pub fn weight_files(&self) -> Result<Vec<String>> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        if self.has(SINGLE) {
            return Ok(vec![SINGLE.into()]);
        }
        if !self.has(INDEX) {
            return Ok(Vec::new());
        }
        let index: Index =
            serde_json::from_str(&self.text(INDEX)?).map_err(|e| Error::model(self.path(INDEX), e))?;
        let files: BTreeSet<String> = index.weight_map.into_values().collect();
        for file in &files {
            let mut parts = Path::new(file).components();
            if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
                return Err(Error::model(
                    self.path(INDEX),
                    format!("a shard must be a file of this folder, got {file:?}"),
                ));
            }
        }
        Ok(files.into_iter().collect())
    }

    /// Opens one safetensors file.
    ///
    /// # Errors
    /// The file is missing, truncated, or malformed.
    pub fn open(&self, name: &str) -> Result<TensorFile> {
        match self {
            Self::Folder(folder) => TensorFile::open(&folder.join(name)),
            Self::Embedded(_) => TensorFile::parse(self.path(name), Bytes::Read(self.read(name)?)),
        }
    }
}

/// One open safetensors file.
#[derive(Debug, Clone)]
pub struct TensorFile {
    path: PathBuf,
    bytes: Arc<Bytes>,
    metadata: Arc<Metadata>,
    data_start: usize,
}

#[derive(Debug)]
enum Bytes {
    Mapped(memmap2::Mmap),
    Read(Cow<'static, [u8]>),
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Read(bytes) => bytes,
        }
    }
}

impl TensorFile {
    /// Maps a safetensors file into memory and validates its header.
    ///
    /// # Errors
    /// The file is missing, truncated, or malformed.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        // SAFETY: the map is only read, and every read is bounded by the length seen here. Truncating the file while
        // it is mapped would end the process with SIGBUS, as for every program that maps weights; the writers of this
        // crate never truncate a file in place, they rename a new one over it.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(Error::io(path))?;
        Self::parse(path.to_path_buf(), Bytes::Mapped(map))
    }

    fn parse(path: PathBuf, bytes: Bytes) -> Result<Self> {
        let (header, metadata) = SafeTensors::read_metadata(bytes.as_ref())
            .map_err(|e| Error::model(&path, format!("not a whole safetensors file: {e}")))?;
        Ok(Self {
            path,
            bytes: Arc::new(bytes),
            metadata: Arc::new(metadata),
            data_start: size_of::<u64>() + header,
        })
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of its tensors, sorted.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        let mut names = self.metadata.offset_keys();
        names.sort_unstable();
        names
    }

    /// The free-form metadata of the header, `format` for one.
    #[must_use]
    pub fn header(&self) -> Option<std::collections::HashMap<String, String>> {
        self.metadata.metadata().clone()
    }

    /// The tensor's dtype, shape and place, or an error that names it.
    fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.metadata.info(name).ok_or_else(|| Error::model(&self.path, format!("tensor {name} is missing")))
    }

    /// The tensor's shape.
    ///
    /// # Errors
    /// There is no such tensor.
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.info(name)?.shape)
    }

    /// Copies one tensor to the device, in the dtype it is stored in.
    ///
    /// # Errors
    /// There is no such tensor, or its dtype is not one of Candle's.
    pub fn load(&self, name: &str, device: &Device) -> Result<Tensor> {
        let info = self.info(name)?;
        let dtype = DType::try_from(info.dtype)
            .map_err(|e| Error::model(&self.path, format!("tensor {name}: {e}")))?;
        let (start, end) = info.data_offsets;
        let data = self
            .bytes
            .as_ref()
            .as_ref()
            .get(self.data_start + start..self.data_start + end)
            .ok_or_else(|| Error::model(&self.path, format!("tensor {name} reaches past the end")))?;
        Ok(Tensor::from_raw_buffer(data, dtype, &info.shape, device)?)
    }
}

/// All tensors of a model, handed out once each, so that what is left over can be named.
pub struct Weights {
    files: Vec<TensorFile>,
    place: BTreeMap<String, usize>,
    dtype: Option<DType>,
    narrow_matrices: bool,
    device: Device,
}

impl Weights {
    /// Opens every safetensors file of a model. Tensors are converted to `dtype`, or kept as stored.
    ///
    /// # Errors
    /// No weights, a missing, truncated or malformed file, or a tensor that two files hold.
    pub fn open(files: &ModelFiles, dtype: Option<DType>, device: &Device) -> Result<Self> {
        let names = files.weight_files()?;
        if names.is_empty() {
            return Err(Error::model(files.path(SINGLE), format!("there is neither this file nor {INDEX}")));
        }
        let opened = names.iter().map(|name| files.open(name)).collect::<Result<Vec<_>>>()?;
        let mut place = BTreeMap::new();
        for (index, file) in opened.iter().enumerate() {
            for name in file.names() {
                if let Some(other) = place.insert(name.clone(), index) {
                    return Err(Error::model(
                        file.path(),
                        format!("tensor {name} is also in {}", opened[other].path().display()),
                    ));
                }
            }
        }
        Ok(Self { files: opened, place, dtype, narrow_matrices: false, device: device.clone() })
    }

    /// On a CPU, leaves matrices as they are stored where that is 16 bits and f32 is wanted: what is frozen is read so by the
    /// products and rows of f32, which are the same, in half the memory.
    #[must_use]
    pub fn narrow_matrices(self) -> Self {
        Self { narrow_matrices: self.device.is_cpu(), ..self }
    }

    /// Ends the reading: every tensor must have been taken.
    ///
    /// # Errors
    /// Names the tensors that nothing asked for.
    pub fn finish(self) -> Result<()> {
        if self.place.is_empty() {
            return Ok(());
        }
        let named: Vec<_> = self.place.keys().take(5).map(String::as_str).collect();
        let more = self.place.len() - named.len();
        let rest = if more == 0 { String::new() } else { format!(" and {more} more") };
        Err(Error::model(
            self.folder(),
            format!("unknown tensors: {}{rest}; config.json describes another model", named.join(", ")),
        ))
    }

    fn folder(&self) -> PathBuf {
        let parent = self.files.first().and_then(|file| file.path().parent());
        parent.map(Path::to_path_buf).unwrap_or_default()
    }
}

impl ParameterSource for Weights {
    /// Takes one tensor; one that is no float of 16 or 32 bits is an error, too.
    fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let Some(index) = self.place.remove(name) else {
            return Err(Error::model(self.folder(), format!("tensor {name} is missing")));
        };
        let file = &self.files[index];
        let got = file.shape(name)?;
        if got != shape {
            return Err(Error::model(file.path(), format!("tensor {name} must be {shape:?}, got {got:?}")));
        }
        let tensor = file.load(name, &self.device)?;
        if !matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16) {
            return Err(Error::model(
                file.path(),
                format!("tensor {name} must be f32, f16 or bf16, got {}", tensor.dtype().as_str()),
            ));
        }
        let narrow = self.narrow_matrices && shape.len() == 2 && self.dtype == Some(DType::F32);
        Ok(match self.dtype {
            Some(dtype) if !narrow => tensor.to_dtype(dtype)?,
            _ => tensor,
        })
    }

    fn forget(&mut self, names: &[String]) {
        for name in names {
            self.place.remove(name);
        }
    }
}
