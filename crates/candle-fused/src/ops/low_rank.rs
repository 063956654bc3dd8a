//! What the linear operations share: `y = x·Wᵀ + bias + s·D(x)·Aᵀ·Bᵀ`, each part optional, `D` the dropout.
//!
//! With the rows `x [n, in]`, `h = s·D(x)·Aᵀ [n, r]` saved by the forward and `e = s·g·B [n, r]`:
//! `dB = gᵀ·h`, `dA = eᵀ·D(x)`, `dx = g·W + D(e·A)`, where `D` recomputes its mask. Nothing computes a gradient of `W`
//! or the bias. `x·Aᵀ` is one product for all columns of the output, never once for each.
//!
//! The low-rank products run in the dtype of A and B: `x`'s, or f32 beside a 16-bit `x`.

use candle_core::{D, DType, Device, Result, Tensor, bail};

use crate::backend::cpu::{map_rows, to_vec};
use crate::backend::{self, Kernel};
use crate::check;
use crate::cpu::dropout as row;
use crate::graph::{self, Backward};
use crate::philox::{halves, philox4x32};

/// How A and B lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoraLayout {
    /// `A [r, in]`, `B [out, r]`: as PEFT keeps them.
    Peft,
    /// `A [in, r]`, `B [r, out]`.
    Seed,
}

impl LoraLayout {
    /// A matrix of this layout as one of PEFT's, and the reverse.
    pub(super) fn turn(self, matrix: &Tensor) -> Result<Tensor> {
        match self {
            Self::Peft => Ok(matrix.clone()),
            Self::Seed => matrix.t(),
        }
    }
}

/// Dropout of LoRA's input: each element is zeroed with probability `p`, the others are scaled by `1/(1 − p)`.
///
/// The mask is a function of the seed and the element's row-major index `i` alone: with Philox4x32-10 under the key
/// `seed` at the counter `i/4`, element `i` is kept iff word `i % 4` is at least `round(p·2³²)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// The probability of zero, in `0..1`.
    pub p: f32,
    /// Selects the mask. Give every step and every layer its own.
    pub seed: u64,
}

impl Dropout {
    pub(super) fn check(self, op: &str) -> Result<()> {
        if !(0.0..1.0).contains(&self.p) {
            bail!("{op}: dropout must be in 0..1, got {}", self.p);
        }
        Ok(())
    }

    /// What multiplies the elements `4·block..4·block + 4`.
    pub(crate) fn factors(self, block: u64) -> [f32; 4] {
        let threshold = (f64::from(self.p) * 4_294_967_296.0).round();
        let [low, high] = halves(block);
        let kept = 1.0 / (1.0 - self.p);
        philox4x32([low, high, 0, 0], halves(self.seed))
            .map(|word| if f64::from(word) >= threshold { kept } else { 0.0 })
    }

    /// The factors of a whole `[rows, columns]` matrix, in f32.
    fn mask(self, (rows, columns): (usize, usize), device: &Device) -> Result<Tensor> {
        let count = rows * columns;
        let factors = (0..count.div_ceil(4) as u64).flat_map(|block| self.factors(block)).take(count);
        Tensor::from_vec(factors.collect::<Vec<f32>>(), (rows, columns), device)
    }
}

/// A frozen weight `[out, in]` and bias `[out]` match `x [..., in]`.
pub(super) fn check_base(op: &str, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<()> {
    check::float(op, "x", x)?;
    let columns = check::last_dim(op, "x", x)?;
    check::rank(op, "weight", weight, 2)?;
    let out = weight.dim(0)?;
    check::like(op, "weight", weight, x, &[out, columns])?;
    bias.map_or(Ok(()), |bias| check::like(op, "bias", bias, x, &[out]))
}

/// `a [r, in]` and `b [out, r]`, or these turned, match `x [..., in]`; the columns of the result.
pub(super) fn check_adapter(
    op: &str,
    x: &Tensor,
    a: &Tensor,
    b: &Tensor,
    scaling: f32,
    layout: LoraLayout,
) -> Result<usize> {
    check::float(op, "x", x)?;
    let columns = check::last_dim(op, "x", x)?;
    check::rank(op, "a", a, 2)?;
    check::rank(op, "b", b, 2)?;
    let (r, out) = match layout {
        LoraLayout::Peft => (a.dim(0)?, b.dim(0)?),
        LoraLayout::Seed => (a.dim(1)?, b.dim(1)?),
    };
    let (a_dims, b_dims) = match layout {
        LoraLayout::Peft => ([r, columns], [out, r]),
        LoraLayout::Seed => ([columns, r], [r, out]),
    };
    check::shape(op, "a", a, &a_dims)?;
    check::shape(op, "b", b, &b_dims)?;
    if a.dtype() != DType::F32 {
        check::dtype(op, "a", a, x.dtype())?;
    }
    check::dtype(op, "b", b, a.dtype())?;
    check::device(op, "a", a, x.device())?;
    check::device(op, "b", b, x.device())?;
    check::finite(op, "scaling", scaling)?;
    Ok(out)
}

/// `x [..., d]` as the matrix `[n, d]` of its rows.
fn rows(x: &Tensor) -> Result<Tensor> {
    let (n, d) = (x.dims().iter().rev().skip(1).product::<usize>(), x.dim(D::Minus1)?);
    x.reshape((n, d))
}

/// The rows `y [n, out]` in the shape `[..., out]` of an `x [..., in]`.
fn like_rows(y: &Tensor, x: &Tensor) -> Result<Tensor> {
    let mut dims = x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = y.dim(1)?;
    }
    y.reshape(dims)
}

/// `t` for a matrix product: off the graph, and copied only if neither its rows nor its columns are contiguous.
fn operand(t: &Tensor) -> Result<Tensor> {
    match t.stride() {
        [_, 1] | [1, _] => Ok(t.detach()),
        _ => t.detach().contiguous(),
    }
}

/// `D(term) + base + bias` for matrices, rounded once to `dtype`.
struct Sum<'a> {
    term: &'a Tensor,
    dropout: Option<Dropout>,
    base: Option<&'a Tensor>,
    bias: Option<&'a Tensor>,
    dtype: DType,
}

impl Sum<'_> {
    fn compute(&self) -> Result<Tensor> {
        if self.dropout.is_none() && self.base.is_none() && self.bias.is_none() {
            return self.term.to_dtype(self.dtype);
        }
        backend::run(self.term.device(), self)
    }
}

impl Kernel for Sum<'_> {
    type Output = Tensor;

    fn cpu(&self) -> Result<Tensor> {
        let bias = self.bias.map(to_vec).transpose()?;
        let add = |i: usize, term: &[f32], base: Option<&[f32]>, sum: &mut [f32]| {
            sum.copy_from_slice(term);
            if let Some(dropout) = self.dropout {
                row::drop(dropout, i * term.len(), sum);
            }
            for addend in [base, bias.as_deref()].into_iter().flatten() {
                row::add(addend, sum);
            }
        };
        let ([sum], _) = match self.base {
            Some(base) => map_rows([self.term, base], self.dtype, |i, [term, base], [sum]| {
                add(i, term, Some(base), sum);
            }),
            None => map_rows([self.term], self.dtype, |i, [term], [sum]| add(i, term, None, sum)),
        }?;
        Ok(sum)
    }

    /// On the graph, where the terms are.
    fn composed(&self) -> Result<Tensor> {
        let mut sum = self.term.to_dtype(DType::F32)?;
        if let Some(dropout) = self.dropout {
            sum = (sum * dropout.mask(self.term.dims2()?, self.term.device())?)?;
        }
        if let Some(base) = self.base {
            sum = (sum + base.to_dtype(DType::F32)?)?;
        }
        if let Some(bias) = self.bias {
            sum = sum.broadcast_add(&bias.detach().to_dtype(DType::F32)?)?;
        }
        sum.to_dtype(self.dtype)
    }
}

/// `x·Wᵀ + bias`, recorded.
pub(super) fn frozen(op: &'static str, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let weight = operand(weight)?;
    let product = rows(&x.detach())?.matmul(&weight.t()?)?;
    let y = Sum { term: &product, dropout: None, base: None, bias, dtype: x.dtype() }.compute()?;
    graph::record1(x, like_rows(&y, x)?, FrozenBackward { op, weight })
}

struct FrozenBackward {
    op: &'static str,
    weight: Tensor,
}

impl Backward<1> for FrozenBackward {
    fn op(&self) -> &'static str {
        self.op
    }

    fn backward(&self, [x]: [&Tensor; 1], _: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 1]> {
        if !x.track_op() {
            return Ok([None]);
        }
        Ok([Some(rows(grad)?.matmul(&self.weight)?.reshape(x.shape())?)])
    }
}

/// The constants of a low-rank product.
pub(super) struct LowRank {
    pub(super) op: &'static str,
    /// The frozen weight `[out, in]`, where there is one.
    pub(super) weight: Option<Tensor>,
    pub(super) scaling: f32,
    pub(super) dropout: Option<Dropout>,
    pub(super) layout: LoraLayout,
}

impl LowRank {
    /// `x·Wᵀ + bias + s·D(x)·Aᵀ·Bᵀ`, recorded.
    pub(super) fn forward(
        mut self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        self.weight = self.weight.as_ref().map(operand).transpose()?;
        let (a_matrix, b_matrix) = self.matrices(a, b)?;
        let x_rows = rows(&x.detach())?;
        let h = (self.input(&x_rows, a.dtype())?.matmul(&a_matrix.t()?)? * f64::from(self.scaling))?;
        let low = h.matmul(&b_matrix.t()?)?;
        let base = self.weight.as_ref().map(|weight| x_rows.matmul(&weight.t()?)).transpose()?;
        let y = Sum { term: &low, dropout: None, base: base.as_ref(), bias, dtype: x.dtype() };
        let y = y.compute()?;
        graph::record3(x, a, b, like_rows(&y, x)?, LowRankBackward { h, call: self })
    }

    /// `D(x)` in the dtype of the low-rank products.
    fn input(&self, x_rows: &Tensor, dtype: DType) -> Result<Tensor> {
        Sum { term: x_rows, dropout: self.dropout, base: None, bias: None, dtype }.compute()
    }

    /// A and B as `[r, in]` and `[out, r]`, ready for products.
    fn matrices(&self, a: &Tensor, b: &Tensor) -> Result<(Tensor, Tensor)> {
        Ok((operand(&self.layout.turn(a)?)?, operand(&self.layout.turn(b)?)?))
    }
}

struct LowRankBackward {
    call: LowRank,
    /// `s·D(x)·Aᵀ`.
    h: Tensor,
}

impl Backward<3> for LowRankBackward {
    fn op(&self) -> &'static str {
        self.call.op
    }

    fn backward(&self, [x, a, b]: [&Tensor; 3], _: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 3]> {
        let call = &self.call;
        let (a_matrix, b_matrix) = call.matrices(a, b)?;
        let grad = rows(grad)?;
        let low_grad = grad.to_dtype(a.dtype())?;
        let mut gradients = [None, None, None];
        if b.track_op() {
            gradients[2] = Some(call.layout.turn(&low_grad.t()?.matmul(&self.h)?)?);
        }
        if !(x.track_op() || a.track_op()) {
            return Ok(gradients);
        }
        let e = (low_grad.matmul(&b_matrix)? * f64::from(call.scaling))?;
        if a.track_op() {
            let input = call.input(&rows(&x.detach())?, a.dtype())?;
            gradients[1] = Some(call.layout.turn(&e.t()?.matmul(&input)?)?);
        }
        if x.track_op() {
            let base = call.weight.as_ref().map(|weight| grad.matmul(weight)).transpose()?;
            let term = &e.matmul(&a_matrix)?;
            let (dropout, base) = (call.dropout, base.as_ref());
            let sum = Sum { term, dropout, base, bias: None, dtype: x.dtype() };
            gradients[0] = Some(sum.compute()?.reshape(x.shape())?);
        }
        Ok(gradients)
    }
}

/// `x·Wᵀ + bias` in plain Candle operations.
pub(super) fn reference_base(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = like_rows(&rows(x)?.matmul(&weight.detach().contiguous()?.t()?)?, x)?;
    match bias {
        Some(bias) => y.broadcast_add(&bias.detach()),
        None => Ok(y),
    }
}

/// `s·D(x)·Aᵀ·Bᵀ` in plain Candle operations.
pub(super) fn reference_delta(
    x: &Tensor,
    a: &Tensor,
    b: &Tensor,
    scaling: f32,
    dropout: Option<Dropout>,
    layout: LoraLayout,
) -> Result<Tensor> {
    let (a, b) = (layout.turn(a)?.contiguous()?, layout.turn(b)?.contiguous()?);
    let input = Sum { term: &rows(x)?, dropout, base: None, bias: None, dtype: a.dtype() };
    let input = input.composed()?;
    let y = (input.matmul(&a.t()?)?.matmul(&b.t()?)? * f64::from(scaling))?;
    like_rows(&y.to_dtype(x.dtype())?, x)
}
