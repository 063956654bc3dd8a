//! Fused training kernels, written once in a dialect that Metal, CUDA and a simulator understand, with their launches.
//!
//! This crate is text and arithmetic on shapes: it knows neither Candle nor a GPU API.
//! [`launch`] describes what to run; one module per op turns shapes into such a description.

pub mod launch;

pub use launch::{Buffer, Element, KernelFile, Launch, Plan, PlanError, Role, Storage, Target};
