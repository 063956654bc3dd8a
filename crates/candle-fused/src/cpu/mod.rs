//! The loops: rows over [`lanes`], written once for every instruction set, and blocked matrix products.

pub(crate) mod attention;
pub(crate) mod cross_entropy;
pub(crate) mod dispatch;
pub(crate) mod elements;
pub(crate) mod gated;
pub(crate) mod gemm;
#[cfg(all(test, unix))]
mod guarded;
pub(crate) mod lanes;
pub(crate) mod low_rank;
pub(crate) mod low_rank_pairs;
pub(crate) mod mask;
pub(crate) mod norm;
pub(crate) mod rope;
pub(crate) mod rows;
pub(crate) mod softmax;
pub(crate) mod spread;
#[cfg(all(test, unix))]
mod tests;
