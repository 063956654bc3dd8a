//! Whose operations are called.

use candle_core::{D, DType, Tensor};
use candle_fused::ops as fused;
use candle_fused::{LoraLayout, LoraLinearOptions, Mask, RopeLayout, SoftmaxOptions};
use candle_nn::{loss, ops as nn, rotary_emb};

use super::call::Arguments;
use crate::Result;
use crate::case::{Case, Mode, Op};
use crate::ops::{EPS, SCALING, attention_scale};

/// A set of operations on Candle tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Library {
    /// candle-fused: `fused`, and its `reference`.
    Ours,
    /// Candle as it is: its fused operation in a forward pass where it has one, composed where gradients are asked for,
    /// because its fused operations have none.
    Candle,
}

impl Library {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::Candle => "candle",
        }
    }

    pub const fn variants(self) -> &'static [&'static str] {
        match self {
            Self::Ours => &["fused", "reference"],
            Self::Candle => &["candle"],
        }
    }

    /// Why a case cannot run.
    pub fn lacks(self, case: &Case, variant: &str) -> Option<String> {
        let known = self.variants().contains(&variant);
        (!known).then(|| format!("{} has no variant {variant} for {}", self.name(), case.op.name()))
    }

    /// An argument as the library wants it.
    pub fn argument(self, case: &Case, name: &str, given: &Tensor) -> Result<Tensor> {
        Ok(match (self, case.op, name) {
            (Self::Candle, _, "targets") => given.to_dtype(DType::U32)?,
            // Heads after tokens, as a model's projections leave them.
            (Self::Ours, Op::Attention, _) => given.transpose(1, 2)?.contiguous()?,
            _ => given.clone(),
        })
    }

    /// A result or gradient, back from how the library has it.
    pub fn result(self, case: &Case, tensor: Tensor) -> Result<Tensor> {
        Ok(match (self, case.op) {
            (Self::Ours, Op::Attention) => tensor.transpose(1, 2)?,
            _ => tensor,
        })
    }

    /// The result of the operation.
    pub fn call(self, case: &Case, is_reference: bool, arguments: &Arguments) -> Result<Tensor> {
        match (self, is_reference) {
            (Self::Ours, false) => ours(case, arguments),
            (Self::Ours, true) => reference(case, arguments),
            (Self::Candle, _) => candle(case, arguments),
        }
    }
}

const LORA: LoraLinearOptions = LoraLinearOptions { scaling: SCALING, dropout: None };

fn causal(case: &Case) -> SoftmaxOptions {
    SoftmaxOptions { scale: attention_scale(case), mask: Mask::Causal }
}

/// As Candle's models write it.
fn composed_attention(case: &Case, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let ((_, heads, tokens, _), (_, kv_heads, ..)) = (q.dims4()?, k.dims4()?);
    let repeated = |x: &Tensor| -> Result<Tensor> {
        let (b, g, t, d) = x.dims4()?;
        let shared = heads / kv_heads;
        Ok(x.unsqueeze(2)?.expand((b, g, shared, t, d))?.reshape((b, heads, t, d))?)
    };
    let scores = (q.matmul(&repeated(k)?.t()?)? * f64::from(attention_scale(case)))?;
    let visible = Tensor::tril2(tokens, DType::U8, q.device())?.broadcast_as(scores.shape())?;
    let hidden = Tensor::new(f32::NEG_INFINITY, q.device())?.to_dtype(q.dtype())?;
    let scores = visible.where_cond(&scores, &hidden.broadcast_as(scores.shape())?)?;
    let weights = if case.mode == Mode::Forward {
        nn::softmax_last_dim(&scores)?
    } else {
        nn::softmax(&scores, D::Minus1)?
    };
    Ok(weights.matmul(&repeated(v)?)?)
}

fn ours(case: &Case, arguments: &Arguments) -> Result<Tensor> {
    let get = |name| arguments.get(name);
    Ok(match case.op {
        Op::Attention => candle_fused::attention(get("q")?, get("k")?, get("v")?, causal(case))?,
        Op::Softmax => candle_fused::softmax(get("x")?, SoftmaxOptions::default())?,
        Op::RmsNorm => candle_fused::rms_norm(get("x")?, Some(get("w")?), EPS)?,
        Op::LayerNorm => candle_fused::layer_norm(get("x")?, Some(get("w")?), Some(get("b")?), EPS)?,
        Op::Rope => candle_fused::rope(get("x")?, get("cos")?, get("sin")?, RopeLayout::Half)?,
        Op::SiluMul => candle_fused::silu_mul(get("gate")?, get("up")?)?,
        Op::GeluMul => candle_fused::gelu_mul(get("gate")?, get("up")?)?,
        Op::CrossEntropy => candle_fused::cross_entropy(get("x")?, get("targets")?, None)?,
        Op::FrozenLinear => candle_fused::frozen_linear(get("x")?, get("w")?, None)?,
        Op::LoraDelta => {
            candle_fused::lora_delta(get("x")?, get("a")?, get("b")?, SCALING, LoraLayout::Peft)?
        }
        Op::LoraLinear => candle_fused::lora_linear(get("x")?, get("w")?, None, get("a")?, get("b")?, LORA)?,
    })
}

fn reference(case: &Case, arguments: &Arguments) -> Result<Tensor> {
    let get = |name| arguments.get(name);
    Ok(match case.op {
        Op::Attention => fused::attention::reference(get("q")?, get("k")?, get("v")?, causal(case))?,
        Op::Softmax => fused::softmax::reference(get("x")?, SoftmaxOptions::default())?,
        Op::RmsNorm => fused::rms_norm::reference(get("x")?, Some(get("w")?), EPS)?,
        Op::LayerNorm => fused::layer_norm::reference(get("x")?, Some(get("w")?), Some(get("b")?), EPS)?,
        Op::Rope => fused::rope::reference(get("x")?, get("cos")?, get("sin")?, RopeLayout::Half)?,
        Op::SiluMul => fused::silu_mul::reference(get("gate")?, get("up")?)?,
        Op::GeluMul => fused::gelu_mul::reference(get("gate")?, get("up")?)?,
        Op::CrossEntropy => fused::cross_entropy::reference(get("x")?, get("targets")?, None)?,
        Op::FrozenLinear => fused::frozen_linear::reference(get("x")?, get("w")?, None)?,
        Op::LoraDelta => {
            fused::lora_delta::reference(get("x")?, get("a")?, get("b")?, SCALING, LoraLayout::Peft)?
        }
        Op::LoraLinear => {
            fused::lora_linear::reference(get("x")?, get("w")?, None, get("a")?, get("b")?, LORA)?
        }
    })
}

fn candle(case: &Case, arguments: &Arguments) -> Result<Tensor> {
    let get = |name| arguments.get(name);
    let composed = case.mode != Mode::Forward;
    let product = |x: &Tensor, w: &Tensor| x.matmul(&w.t()?);
    let delta = |x: &Tensor, a: &Tensor, b: &Tensor| product(&product(x, a)?, b)? * f64::from(SCALING);
    Ok(match case.op {
        Op::Attention => composed_attention(case, get("q")?, get("k")?, get("v")?)?,
        Op::Softmax if composed => nn::softmax(get("x")?, D::Minus1)?,
        Op::Softmax => nn::softmax_last_dim(get("x")?)?,
        Op::RmsNorm if composed => nn::rms_norm_slow(get("x")?, get("w")?, EPS)?,
        Op::RmsNorm => nn::rms_norm(get("x")?, get("w")?, EPS)?,
        Op::LayerNorm if composed => nn::layer_norm_slow(get("x")?, get("w")?, get("b")?, EPS)?,
        Op::LayerNorm => nn::layer_norm(get("x")?, get("w")?, get("b")?, EPS)?,
        Op::Rope if composed => rotary_emb::rope_slow(get("x")?, get("cos")?, get("sin")?)?,
        Op::Rope => rotary_emb::rope(get("x")?, get("cos")?, get("sin")?)?,
        Op::SiluMul => (nn::silu(get("gate")?)? * get("up")?)?,
        Op::GeluMul => (get("gate")?.gelu()? * get("up")?)?,
        Op::CrossEntropy => loss::cross_entropy(get("x")?, get("targets")?)?,
        Op::FrozenLinear => product(get("x")?, get("w")?)?,
        Op::LoraDelta => delta(get("x")?, get("a")?, get("b")?)?,
        Op::LoraLinear => (product(get("x")?, get("w")?)? + delta(get("x")?, get("a")?, get("b")?)?)?,
    })
}
