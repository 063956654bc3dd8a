//! Tensors as bytes: made-up values in a storage type, and back.

use candlewick_kernels::{Element, Storage};
use half::{bf16, f16};

/// Values that a tensor of some storage type holds exactly.
#[derive(Clone)]
pub struct Tensor {
    pub values: Vec<f64>,
    pub bytes: Vec<u8>,
}

impl Tensor {
    /// Rounds values to a storage type.
    pub fn new(values: impl IntoIterator<Item = f64>, element: Element) -> Self {
        let bytes = encode(values, element);
        Self { values: decode(&bytes, element), bytes }
    }

    /// `len` values between -`magnitude` and `magnitude`, the same for the same seed.
    pub fn random(seed: u64, len: usize, magnitude: f64, storage: Storage) -> Self {
        let mut state = seed.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1;
        let mut next = || {
            // xorshift64 (Marsaglia, 2003); the upper 53 bits as a fraction.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1_u64 << 53) as f64
        };
        Self::new((0..len).map(|_| (2.0 * next() - 1.0) * magnitude), storage.element())
    }
}

pub fn encode(values: impl IntoIterator<Item = f64>, element: Element) -> Vec<u8> {
    let mut bytes = Vec::new();
    for value in values {
        match element {
            Element::F32 => bytes.extend((value as f32).to_ne_bytes()),
            Element::F16 => bytes.extend(f16::from_f64(value).to_ne_bytes()),
            Element::BF16 => bytes.extend(bf16::from_f64(value).to_ne_bytes()),
            Element::U32 | Element::I64 => unreachable!("integers are not rounded"),
        }
    }
    bytes
}

pub fn decode(bytes: &[u8], element: Element) -> Vec<f64> {
    let chunks = bytes.chunks_exact(element.bytes());
    let value = |chunk: &[u8]| match element {
        Element::F32 => f64::from(f32::from_ne_bytes(chunk.try_into().unwrap())),
        Element::F16 => f16::from_ne_bytes(chunk.try_into().unwrap()).to_f64(),
        Element::BF16 => bf16::from_ne_bytes(chunk.try_into().unwrap()).to_f64(),
        Element::U32 | Element::I64 => unreachable!("no kernel returns integers"),
    };
    chunks.map(value).collect()
}

/// Half the distance between 1 and the next value: the largest relative error of rounding.
pub fn roundoff(element: Element) -> f64 {
    match element {
        Element::F32 => 2_f64.powi(-24),
        Element::F16 => 2_f64.powi(-11),
        Element::BF16 => 2_f64.powi(-8),
        Element::U32 | Element::I64 => 0.0,
    }
}
