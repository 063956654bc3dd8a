//! Rotary frequencies: `inv_freq[i] = theta^(-2i / rotary_dim)`, with Llama 3's scaling for long contexts.
//!
//! The tables are made for the positions of each call; they are small beside the work of the layers that share them.

use std::f64::consts::TAU;

use candle_core::{Device, Tensor};

use super::config::{ModelConfig, RopeScaling, to_f64};
use crate::Result;

/// The inverse frequency of each rotated pair.
#[derive(Debug, Clone)]
pub(super) struct Rotary {
    inverse_frequencies: Vec<f64>,
}

impl Rotary {
    pub(super) fn new(config: &ModelConfig) -> Self {
        let inverse_frequencies = (0..config.rotary_dim)
            .step_by(2)
            .map(|i| config.rope_theta.powf(-to_f64(i) / to_f64(config.rotary_dim)))
            .map(|frequency| scale(frequency, config.rope_scaling))
            .collect();
        Self { inverse_frequencies }
    }

    /// Cosines and sines `[length, rotary_dim / 2]` in f32 for positions `start..start + length`.
    ///
    /// The angle is the f32 product of position and frequency, as in transformers, so that long contexts agree with it.
    pub(super) fn tables(&self, start: usize, length: usize, device: &Device) -> Result<(Tensor, Tensor)> {
        let pairs = self.inverse_frequencies.len();
        let (mut cos, mut sin) = (Vec::with_capacity(length * pairs), Vec::with_capacity(length * pairs));
        #[expect(
            clippy::cast_possible_truncation,
            reason = "rounding to the f32 that transformers computes in"
        )]
        for position in start..start + length {
            let position = to_f64(position) as f32;
            for &frequency in &self.inverse_frequencies {
                let (s, c) = f64::from(position * frequency as f32).sin_cos();
                cos.push(c as f32);
                sin.push(s as f32);
            }
        }
        let shape = (length, pairs);
        Ok((Tensor::from_vec(cos, shape, device)?, Tensor::from_vec(sin, shape, device)?))
    }
}

/// One frequency under the scaling. Llama 3's rule is that of transformers' `_compute_llama3_parameters`.
fn scale(frequency: f64, scaling: RopeScaling) -> f64 {
    match scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            let turns = original_max_position_embeddings * frequency / TAU;
            let smooth = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
            (1.0 - smooth) * frequency / factor + smooth * frequency
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_keeps_fast_turns_and_divides_slow_ones() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192.0,
        };
        assert!((scale(1.0, scaling) - 1.0).abs() < 1e-15);
        assert!((scale(1e-5, scaling) - 1.25e-6).abs() < 1e-18);
        let between = TAU * 2.0 / 8192.0;
        let expected = (2.0 / 3.0) * between / 8.0 + between / 3.0;
        assert!((scale(between, scaling) - expected).abs() < 1e-15);
    }
}
