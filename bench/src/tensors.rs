//! Named tensors between the programs: drawn from a seed, written and read as safetensors.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::tensor::TensorView;
use safetensors::{Dtype as FileDtype, SafeTensors};

use crate::case::{Case, Dtype};
use crate::ops::{self, Input, Values, as_f64};
use crate::{Error, Result};

/// A tensor as its stored bytes.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    pub dtype: FileDtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Stored {
    /// The element at a flat index, exactly.
    pub fn at(&self, index: usize) -> f64 {
        fn take<const N: usize>(bytes: &[u8], index: usize) -> [u8; N] {
            bytes.as_chunks::<N>().0[index]
        }
        match self.dtype {
            FileDtype::F32 => f32::from_le_bytes(take(&self.bytes, index)).into(),
            FileDtype::F16 => f16::from_le_bytes(take(&self.bytes, index)).into(),
            FileDtype::BF16 => bf16::from_le_bytes(take(&self.bytes, index)).into(),
            FileDtype::F64 => f64::from_le_bytes(take(&self.bytes, index)),
            #[expect(clippy::cast_precision_loss, reason = "targets are small integers")]
            FileDtype::I64 => i64::from_le_bytes(take(&self.bytes, index)) as f64,
            _ => f64::NAN,
        }
    }

    /// Consecutive elements, exactly.
    pub fn range(&self, range: std::ops::Range<usize>) -> Vec<f64> {
        range.map(|i| self.at(i)).collect()
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The tensors of a file, by name.
pub type Tensors = BTreeMap<String, Stored>;

/// Draws the inputs of a case: the same for the same seed, whatever the number of threads.
pub fn draw(case: &Case, seed: u64) -> Tensors {
    let tensors = ops::inputs(case).into_iter().zip(1u64..);
    tensors
        .map(|(input, stream)| (input.name.to_owned(), draw_one(&input, case, mix(seed, stream))))
        .collect()
}

fn draw_one(input: &Input, case: &Case, seed: u64) -> Stored {
    let count = input.shape.iter().product::<usize>();
    let value = |index: usize| -> f64 {
        match input.values {
            Values::Normal { mean, deviation } => mean + deviation * normal(mix(seed, index as u64)),
            Values::Cos => angle(input, index).cos(),
            Values::Sin => angle(input, index).sin(),
            Values::Targets => {
                as_f64(usize::try_from(mix(seed, index as u64) >> 1).unwrap_or(0) % case.size.cols)
            }
        }
    };
    #[expect(clippy::cast_possible_truncation, reason = "rounding into the stored dtype")]
    let (dtype, bytes) = match (input.values, case.dtype) {
        (Values::Targets, _) => (FileDtype::I64, fill(count, |i| (value(i) as i64).to_le_bytes())),
        (_, Dtype::F32) => (FileDtype::F32, fill(count, |i| (value(i) as f32).to_le_bytes())),
        (_, Dtype::F16) => (FileDtype::F16, fill(count, |i| f16::from_f64(value(i)).to_le_bytes())),
        (_, Dtype::Bf16) => (FileDtype::BF16, fill(count, |i| bf16::from_f64(value(i)).to_le_bytes())),
    };
    Stored { dtype, shape: input.shape.clone(), bytes }
}

fn fill<const N: usize>(count: usize, value: impl Fn(usize) -> [u8; N] + Sync + Send) -> Vec<u8> {
    (0..count).into_par_iter().with_min_len(4096).map(value).collect::<Vec<_>>().into_flattened()
}

/// The rotary angle of an element of a table `[tokens, half]`.
fn angle(input: &Input, index: usize) -> f64 {
    let half = input.shape.last().copied().unwrap_or(1).max(1);
    as_f64(index / half) * 10_000f64.powf(-as_f64(index % half) / as_f64(half))
}

/// One step of `SplitMix64` (Steele, Lea and Flood, 2014) at a counter.
fn mix(seed: u64, counter: u64) -> u64 {
    let mut z = seed.wrapping_add(counter.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Mean 0, deviation 1: the sum of four uniform 16-bit numbers, normal enough and bounded.
fn normal(bits: u64) -> f64 {
    let uniform = |shift: u32| f64::from(u16::try_from((bits >> shift) & 0xFFFF).unwrap_or(0)) / 65_535.0;
    (uniform(0) + uniform(16) + uniform(32) + uniform(48) - 2.0) * 3f64.sqrt()
}

/// Writes a file.
pub fn write(path: &Path, tensors: &Tensors) -> Result<()> {
    let mut views = HashMap::new();
    for (name, t) in tensors {
        let view = TensorView::new(t.dtype, t.shape.clone(), &t.bytes).map_err(|e| Error::at(path, e))?;
        views.insert(name.clone(), view);
    }
    safetensors::serialize_to_file(views, None, path).map_err(|e| Error::at(path, e))
}

/// Reads a file.
pub fn read(path: &Path) -> Result<Tensors> {
    let bytes = std::fs::read(path).map_err(|e| Error::at(path, e))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| Error::at(path, e))?;
    let stored = |(name, view): (String, TensorView<'_>)| {
        (name, Stored { dtype: view.dtype(), shape: view.shape().to_vec(), bytes: view.data().to_vec() })
    };
    Ok(file.tensors().into_iter().map(stored).collect())
}
