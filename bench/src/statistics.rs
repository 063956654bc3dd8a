//! Medians, and what noise that only slows leaves.

use crate::ops::as_f64;

/// The median; NaN of nothing.
pub fn median(values: &[f64]) -> f64 {
    let sorted = sorted(values);
    let n = sorted.len();
    match n {
        0 => f64::NAN,
        _ if n.is_multiple_of(2) => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
        _ => sorted[n / 2],
    }
}

/// The mean of the least quarter of the values, of one at least; NaN of nothing.
pub fn least_quarter(values: &[f64]) -> f64 {
    let sorted = sorted(values);
    let least = &sorted[..sorted.len().div_ceil(4)];
    least.iter().sum::<f64>() / as_f64(least.len())
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
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
    fn the_least_quarter_has_one_value_at_least() {
        assert!(least_quarter(&[]).is_nan() && median(&[]).is_nan());
        for (values, expected) in
            [(&[3.0][..], 3.0), (&[9.0, 2.0, 4.0, 8.0], 2.0), (&[9.0, 2.0, 4.0, 8.0, 7.0], 3.0)]
        {
            assert!((least_quarter(values) - expected).abs() < 1e-12, "{values:?}");
        }
        assert!((median(&[4.0, 1.0]) - 2.5).abs() < 1e-12);
    }
}
