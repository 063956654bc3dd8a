//! Quantiles.

use crate::ops::as_f64;

/// The median; NaN of nothing.
pub fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// What so large a share of the values is below, between two of them in proportion; NaN of nothing.
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let place = share.clamp(0.0, 1.0) * as_f64(last);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 0 and the last index"
    )]
    let below = place.floor() as usize;
    let above = sorted[last.min(below + 1)];
    sorted[below] + (place - as_f64(below)) * (above - sorted[below])
}

/// The distance from the greatest to the least, relative to the median.
pub fn spread(values: &[f64]) -> f64 {
    let low = values.iter().copied().fold(f64::INFINITY, f64::min);
    let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    (high - low) / median(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_between_values() {
        assert!(median(&[]).is_nan());
        for (values, share, expected) in [
            (&[3.0][..], 0.1, 3.0),
            (&[4.0, 1.0], 0.5, 2.5),
            (&[5.0, 1.0, 3.0], 0.5, 3.0),
            (&[5.0, 1.0, 3.0], 0.1, 1.4),
            (&[5.0, 1.0, 3.0], 1.0, 5.0),
        ] {
            assert!((quantile(values, share) - expected).abs() < 1e-12, "{values:?} {share}");
        }
    }
}
