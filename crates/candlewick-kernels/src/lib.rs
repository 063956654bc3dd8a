//! Fused training kernels, written once in a dialect that Metal, CUDA and a simulator understand, with their launches.
//!
//! This crate is text and arithmetic on shapes: it knows neither Candle nor a GPU API.
//! [`launch`] describes what to run; one module per op turns shapes into such a description; [`source`] puts the
//! text together that a launch is compiled from.

pub mod adam;
pub mod add;
pub mod attention;
mod column_sum;
pub mod cross_entropy;
mod flat;
pub mod gated;
pub mod hopper;
pub mod launch;
pub mod layer_norm;
pub mod lora;
pub mod ops;
mod params;
pub mod rms_norm;
pub mod rope;
mod rows;
pub mod softmax;
pub mod source;

pub use launch::{Buffer, Element, KernelFile, Launch, Plan, PlanError, Role, Storage, Target};
pub use ops::{Op, launch_named, ops};
pub use params::Tuning;
pub use source::assemble;
