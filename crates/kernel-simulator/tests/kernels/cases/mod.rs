//! Every op at one size, forward and backward. An oracle is the op's formula in its simplest form.

pub mod adam;
pub mod add;
pub mod attention;
pub mod cross_entropy;
pub mod gated;
pub mod layer_norm;
pub mod lora;
pub mod rms_norm;
pub mod rope;
pub mod softmax;

use crate::case::{Case, Size};

/// An op's cases at one size.
pub type Cases = fn(Size) -> Vec<Case>;

/// Every op.
pub const ALL: [(&str, Cases); 12] = [
    ("adam", adam::cases),
    ("add", add::cases),
    ("attention", attention::cases),
    ("cross_entropy", cross_entropy::cases),
    ("gelu_mul", gated::gelu_cases),
    ("layer_norm", layer_norm::cases),
    ("lora_delta", lora::delta_cases),
    ("lora_linear", lora::linear_cases),
    ("rms_norm", rms_norm::cases),
    ("rope", rope::cases),
    ("silu_mul", gated::silu_cases),
    ("softmax", softmax::cases),
];
