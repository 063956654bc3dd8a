//! Dropout of LoRA's input: what of it is kept. The processor's masks are made by `cpu/mask.rs`, a GPU's by `common/philox.h`.

use candle_core::{Device, Result, Tensor, bail};

use crate::philox::{halves, philox4x32};

/// Dropout of LoRA's input: each element is zeroed with probability `p`, the others are scaled by `1/(1 − p)`.
///
/// The mask is a function of the seed and the element's row-major index `i` alone: with Philox4x32-10 under the key
/// `seed` at the counter `i/4`, element `i` is kept iff word `i % 4` is at least `round(p·2³²)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// The probability of zero, in `0..1`.
    pub p: f32,
    /// Selects the mask. Give every step and every layer its own.
    pub seed: u64,
}

impl Dropout {
    pub(super) fn check(self, op: &str) -> Result<()> {
        if !(0.0..1.0).contains(&self.p) {
            bail!("{op}: dropout must be in 0..1, got {}", self.p);
        }
        Ok(())
    }

    /// What multiplies the elements `4·block..4·block + 4`.
    pub(crate) fn factors(self, block: u64) -> [f32; 4] {
        let (threshold, [low, high]) = (self.threshold(), halves(block));
        philox4x32([[low], [high], [0], [0]], halves(self.seed))
            .map(|[word]| if word >= threshold { self.kept() } else { 0.0 })
    }

    /// The smallest random word that keeps an element.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "p is in 0..1")]
    pub(crate) fn threshold(self) -> u32 {
        (f64::from(self.p) * 4_294_967_296.0).round() as u32
    }

    /// What multiplies the elements that are kept.
    pub(crate) fn kept(self) -> f32 {
        1.0 / (1.0 - self.p)
    }

    /// The factors of a whole `[rows, columns]` matrix, in f32.
    pub(super) fn mask(self, (rows, columns): (usize, usize), device: &Device) -> Result<Tensor> {
        let count = rows * columns;
        let factors = (0..count.div_ceil(4) as u64).flat_map(|block| self.factors(block)).take(count);
        Tensor::from_vec(factors.collect::<Vec<f32>>(), (rows, columns), device)
    }
}
