//! The loops: one row of f32 at a time, written so that the compiler vectorises them.

pub(crate) mod attention;
pub(crate) mod cross_entropy;
mod dispatch;
pub(crate) mod dropout;
pub(crate) mod gated;
pub(crate) mod gemm;
mod lanes;
pub(crate) mod norm;
pub(crate) mod rope;
pub(crate) mod softmax;
