//! Dropout of a row.

use crate::ops::lora_linear::Dropout;

/// Multiplies a row, whose first element has the index `first`, by the mask.
pub(crate) fn drop(dropout: Dropout, first: usize, row: &mut [f32]) {
    let mut index = first;
    let mut rest = row;
    while !rest.is_empty() {
        let lane = index % 4;
        let factors = dropout.factors(index as u64 / 4);
        let here = rest.split_off_mut(..rest.len().min(4 - lane)).unwrap_or_default();
        index += here.len();
        for (x, factor) in here.iter_mut().zip(&factors[lane..]) {
            *x *= factor;
        }
    }
}
