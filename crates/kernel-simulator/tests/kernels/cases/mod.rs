//! Every op at one size, forward and backward. An oracle is the op's formula, in the simplest form.

mod rms_norm;

use crate::case::Case;
use candlewick_kernels::Storage;

/// An op's cases for a storage type and a number of columns, on few rows.
pub type Cases = fn(Storage, usize) -> Vec<Case>;

/// Every op.
pub const ALL: [(&str, Cases); 1] = [("rms_norm", rms_norm::cases)];
