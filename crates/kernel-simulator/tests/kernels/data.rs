//! Tensors as bytes: made-up values in a storage type, and back.

use candlewick_kernels::{Element, Storage};
use half::{bf16, f16};

/// Values that some element type holds exactly, with their bytes.
#[derive(Clone)]
pub struct Tensor {
    pub values: Vec<f64>,
    pub bytes: Vec<u8>,
}

impl Tensor {
    /// Rounds values to an element type.
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
        // The first numbers of small seeds are small.
        for _ in 0..8 {
            let _ = next();
        }
        Self::new((0..len).map(|_| (2.0 * next() - 1.0) * magnitude), storage.element())
    }
}

/// The bytes of values, each rounded to the nearest.
pub fn encode(values: impl IntoIterator<Item = f64>, element: Element) -> Vec<u8> {
    let mut bytes = Vec::new();
    for value in values {
        match element {
            Element::F32 => bytes.extend((value as f32).to_ne_bytes()),
            Element::F16 => bytes.extend(f16::from_f64(value).to_ne_bytes()),
            Element::BF16 => bytes.extend(bf16::from_f64(value).to_ne_bytes()),
            Element::U32 => bytes.extend((value as u32).to_ne_bytes()),
            Element::I64 => bytes.extend((value as i64).to_ne_bytes()),
        }
    }
    bytes
}

/// The values of bytes.
pub fn decode(bytes: &[u8], element: Element) -> Vec<f64> {
    let value = |chunk: &[u8]| match element {
        Element::F32 => f32::from_ne_bytes(chunk.try_into().unwrap()).into(),
        Element::F16 => f16::from_ne_bytes(chunk.try_into().unwrap()).to_f64(),
        Element::BF16 => bf16::from_ne_bytes(chunk.try_into().unwrap()).to_f64(),
        Element::U32 => u32::from_ne_bytes(chunk.try_into().unwrap()).into(),
        Element::I64 => i64::from_ne_bytes(chunk.try_into().unwrap()) as f64,
    };
    bytes.chunks_exact(element.bytes()).map(value).collect()
}

/// The largest relative error of rounding to an element type.
pub fn roundoff(element: Element) -> f64 {
    match element {
        Element::F32 => 2_f64.powi(-24),
        Element::F16 => 2_f64.powi(-11),
        Element::BF16 => 2_f64.powi(-8),
        Element::U32 | Element::I64 => 0.0,
    }
}
