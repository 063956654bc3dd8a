//! The next token: greedy, or drawn from the distribution that temperature, top-k and top-p leave.

use rand::SeedableRng;
use rand::distr::Distribution;
use rand::distr::weighted::WeightedIndex;
use rand_chacha::ChaCha8Rng;

use crate::{Error, Result};

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest token; otherwise logits are divided by it.
    pub temperature: f32,
    /// Only the k likeliest tokens; 0 for all.
    pub top_k: usize,
    /// Only the likeliest tokens that together reach this probability (nucleus sampling, Holtzman et al. 2019); 1 for all.
    pub top_p: f32,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 }
    }
}

/// Draws tokens, reproducibly.
pub(super) struct Sampler {
    sampling: Sampling,
    rng: ChaCha8Rng,
}

impl Sampler {
    pub(super) fn new(sampling: Sampling) -> Result<Self> {
        if !(sampling.temperature >= 0.0 && sampling.temperature.is_finite()) {
            return Err(Error::Config(format!(
                "temperature must be 0 or more, got {}",
                sampling.temperature
            )));
        }
        if !(sampling.top_p > 0.0 && sampling.top_p <= 1.0) {
            return Err(Error::Config(format!(
                "top-p must be above 0 and at most 1, got {}",
                sampling.top_p
            )));
        }
        Ok(Self { sampling, rng: ChaCha8Rng::seed_from_u64(sampling.seed) })
    }

    /// A token for these logits. Of equal logits, the lower token goes first.
    pub(super) fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        if logits.iter().any(|logit| logit.is_nan()) {
            return Err(Error::Config("the model's logits are not numbers; its weights are damaged".into()));
        }
        let mut order: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
        if self.sampling.temperature == 0.0 {
            return order
                .into_iter()
                .reduce(|best, next| if next.1 > best.1 { next } else { best })
                .map(|(token, _)| token)
                .ok_or_else(|| Error::Config("the model has no vocabulary".into()));
        }
        order.sort_by(|a, b| b.1.total_cmp(&a.1));
        if self.sampling.top_k > 0 {
            order.truncate(self.sampling.top_k);
        }
        let highest = order.first().map_or(0.0, |(_, logit)| *logit);
        let weights: Vec<f32> =
            order.iter().map(|(_, logit)| ((logit - highest) / self.sampling.temperature).exp()).collect();
        let threshold = self.sampling.top_p * weights.iter().sum::<f32>();
        let mut reached = 0.0;
        let kept = weights
            .iter()
            .take_while(|weight| {
                let keep = reached < threshold;
                reached += **weight;
                keep
            })
            .count();
        let draw = WeightedIndex::new(&weights[..kept.max(1)])
            .map_err(|e| Error::Config(format!("sampling: {e}")))?;
        Ok(order[draw.sample(&mut self.rng)].0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(sampling: Sampling, logits: &[f32]) -> Vec<u32> {
        let mut sampler = Sampler::new(sampling).unwrap();
        (0..200).map(|_| sampler.sample(logits).unwrap()).collect()
    }

    #[test]
    fn greedy_takes_the_first_of_the_likeliest() {
        assert_eq!(draws(Sampling::default(), &[0.0, 2.0, 2.0, -1.0])[0], 1);
    }

    #[test]
    fn top_k_and_top_p_leave_only_the_likeliest() {
        let warm = Sampling { temperature: 1.0, ..Sampling::default() };
        let logits = [1.0, 3.0, 2.0, -30.0];
        let seen = |sampling| {
            let mut seen = draws(sampling, &logits);
            seen.sort_unstable();
            seen.dedup();
            seen
        };
        assert_eq!(seen(warm), [0, 1, 2]);
        assert_eq!(seen(Sampling { top_k: 2, ..warm }), [1, 2]);
        // e³ / (e³ + e² + e¹) = 0.665
        assert_eq!(seen(Sampling { top_p: 0.6, ..warm }), [1]);
        assert_eq!(seen(Sampling { top_p: 0.7, ..warm }), [1, 2]);
    }

    #[test]
    fn one_seed_draws_the_same_tokens() {
        let warm = Sampling { temperature: 1.0, ..Sampling::default() };
        let logits = [0.0; 50];
        assert_eq!(draws(warm, &logits), draws(warm, &logits));
        assert_ne!(draws(warm, &logits), draws(Sampling { seed: 1, ..warm }, &logits));
    }
}
