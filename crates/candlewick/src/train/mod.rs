//! stub
use candle_core::{Tensor,Var};
/// p
#[derive(Debug,Clone)]
pub struct Parameter { /// n
 pub name: String, /// v
 pub var: Var, /// z
 pub zero_first_gradient: bool }
/// p
pub enum Pass { /// t
 Train { /// s
 seed: u64 }, /// e
 Evaluate }
/// b
pub struct Batch { /// i
 pub input_ids: Tensor, /// t
 pub targets: Tensor, /// n
 pub tokens: usize }
/// t
pub trait Trainable { /// p
 fn parameters(&self) -> &[Parameter]; /// l
 fn loss(&self, batch: &Batch, pass: Pass) -> crate::Result<Tensor>; }
