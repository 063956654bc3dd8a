//! What the linear operations share: `y = x·Wᵀ + bias + s·D(x)·Aᵀ·Bᵀ`, each part optional, `D` the dropout.
//!
//! With the rows `x [n, in]`, `h = s·D(x)·Aᵀ [n, r]` saved by the forward and `e = s·g·B [n, r]`:
//! `dB = gᵀ·h`, `dA = eᵀ·D(x)`, `dx = g·W + D(e·A)`. The factor of what `D` keeps is part of `s`, and its mask is kept by the
//! processor, a bit for each element of `x`, and made again by a GPU. Nothing computes a gradient of `W`
//! or the bias. `x·Aᵀ` is one product for all columns of the output, never once for each.
//!
//! The low-rank products run in the dtype of A and B: `x`'s, or f32 beside a 16-bit `x`. Large ones on a device whose
//! products add to what is there are [`low_rank_products`]', those beside a base on a processor's matrix unit
//! [`low_rank_pairs`]'.

use std::borrow::Cow;

use candle_core::{D, DType, Device, Result, Shape, Tensor};
use candlewick_kernels::lora::{self, FactorStrides, Lora as Plans, LoraGradients};

use crate::backend::cpu::{map_element, to_vec};
use crate::backend::products::{self, LowRankGradients, product, with_matrices};
use crate::backend::{self, Attempt, Kernel, fewest_for_products, gpu};
use crate::check;
use crate::cpu::gemm::{Left, Matrix, Product, Start, sum_of_products};
use crate::cpu::low_rank_pairs::Update;
use crate::cpu::mask::{Mask, Masked};
use crate::graph::{self, Backward, Reads};
use crate::ops::dropout::Dropout;
use crate::ops::{low_rank_pairs, low_rank_products};

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

/// A frozen weight `[out, in]`, of 16 bits beside an f32 `x` if not of its dtype, and a bias `[out]` match `x [..., in]`.
pub(super) fn check_base(op: &str, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<()> {
    check::float(op, "x", x)?;
    let columns = check::last_dim(op, "x", x)?;
    check::rank(op, "weight", weight, 2)?;
    let out = weight.dim(0)?;
    check::shape(op, "weight", weight, &[out, columns])?;
    if x.dtype() != DType::F32 || !matches!(weight.dtype(), DType::F16 | DType::BF16) {
        check::dtype(op, "weight", weight, x.dtype())?;
    }
    check::device(op, "weight", weight, x.device())?;
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

/// `x [..., d]` as the matrix `[n, d]` of its rows, contiguous.
pub(super) fn rows(x: &Tensor) -> Result<Tensor> {
    if x.rank() == 2 && x.is_contiguous() {
        return Ok(x.clone());
    }
    let (n, d) = (x.dims().iter().rev().skip(1).product::<usize>(), x.dim(D::Minus1)?);
    x.reshape((n, d))
}

/// The rows `y [n, out]` in the shape `[..., out]` of an `x [..., in]`.
pub(super) fn like_rows(y: &Tensor, x: &Tensor) -> Result<Tensor> {
    if x.rank() == 2 {
        return Ok(y.clone());
    }
    let mut dims = x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = y.dim(1)?;
    }
    y.reshape(dims)
}

/// `t` for a matrix product of Candle's: off the graph, and copied only if neither it nor its transpose is contiguous.
fn operand(t: &Tensor) -> Result<Tensor> {
    match (t.dims(), t.stride()) {
        (&[rows, _], &[1, stride]) if stride == rows => Ok(t.detach()),
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
    /// In plain Candle operations, on the graph where the terms are.
    fn composed(&self) -> Result<Tensor> {
        if self.dropout.is_none() && self.base.is_none() && self.bias.is_none() {
            return self.term.to_dtype(self.dtype);
        }
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

/// `left·right + bias` of matrices.
pub(super) struct Base<'a> {
    pub(super) left: &'a Tensor,
    pub(super) right: &'a Tensor,
    pub(super) bias: Option<&'a Tensor>,
}

impl Base<'_> {
    /// What is narrower is widened for every product where that multiplies matrices of one dtype.
    fn right_like_left(&self) -> Result<Tensor> {
        operand(self.right)?.to_dtype(self.left.dtype())
    }

    fn composed(&self) -> Result<Tensor> {
        let term = &operand(self.left)?.matmul(&self.right_like_left()?)?;
        Sum { term, dropout: None, base: None, bias: self.bias, dtype: self.left.dtype() }.composed()
    }
}

impl Kernel for Base<'_> {
    type Output = Tensor;

    fn cpu(&self) -> Result<Tensor> {
        let bias = self.bias.map(to_vec).transpose()?;
        let start = bias.as_deref().map_or(Start::Zero, Start::Row);
        with_matrices([self.left, self.right], |[left, right]| {
            product(self.left.dtype(), [left.rows, right.columns], start, &[Product { left, right }])
        })
    }

    /// The device's own product is the kernel.
    fn gpu(&self) -> Attempt<Tensor> {
        let Self { left, right, bias } = *self;
        let adds = fewest_for_products(left.device()).is_some();
        if adds && left.elem_count() > 0 && right.elem_count() > 0 {
            let right = if right.dtype() == left.dtype() { right } else { &self.right_like_left()? };
            return Ok(low_rank_products::base(left, right, bias)?);
        }
        Ok(self.composed()?)
    }
}

/// The constants of a low-rank product.
#[derive(Clone)]
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
    ) -> Attempt<Tensor> {
        self.weight = self.weight.map(|weight| weight.detach());
        let (y, kept) = {
            let (x, a, b) = (&rows(&x.detach())?, &self.a_matrix(a)?, &self.b_matrix(b)?);
            backend::run(x.device(), &Forward { call: &self, x, a, b, bias })?
        };
        Ok(graph::record3(x, a, b, like_rows(&y, x)?, LowRankBackward { kept, call: self })?)
    }

    /// With a weight in the dtype of `x`, as a GPU multiplies it: a narrower one is widened for every product.
    fn like(&self, x: &Tensor) -> Result<Cow<'_, Self>> {
        match &self.weight {
            Some(weight) if weight.dtype() != x.dtype() => {
                let weight = Some(operand(weight)?.to_dtype(x.dtype())?);
                Ok(Cow::Owned(Self { weight, ..self.clone() }))
            }
            _ => Ok(Cow::Borrowed(self)),
        }
    }

    /// What of `x` is kept, where there is a dropout, on the processor.
    fn mask(&self, x: &Tensor) -> Option<Mask> {
        self.dropout.map(|dropout| Mask::new(dropout, x.elem_count()))
    }

    /// `scaling`, and the dropout's factor.
    pub(super) fn factor(&self) -> f32 {
        self.dropout.map_or(self.scaling, |dropout| self.scaling * dropout.kept())
    }

    /// A as `[r, in]`, ready for products.
    fn a_matrix(&self, a: &Tensor) -> Result<Tensor> {
        operand(&self.layout.turn(a)?)
    }

    /// B as `[out, r]`, ready for products.
    fn b_matrix(&self, b: &Tensor) -> Result<Tensor> {
        operand(&self.layout.turn(b)?)
    }

    /// The plans for `x [n, in]`, A and B, with a base product or not.
    pub(super) fn plans(&self, x: &Tensor, a: &Tensor, b: &Tensor) -> Result<Plans> {
        let ((rows, inputs), (outputs, rank)) = (x.dims2()?, b.dims2()?);
        let (a_strides, b_strides) = (a.stride(), b.stride());
        Ok(Plans {
            rows,
            inputs,
            outputs,
            rank,
            storage: gpu::storage(x)?,
            adapter: gpu::storage(a)?,
            a: FactorStrides { rank: a_strides[0], column: a_strides[1] },
            b: FactorStrides { rank: b_strides[1], column: b_strides[0] },
            scaling: self.scaling,
            dropout: self.dropout.map(|Dropout { p, seed }| lora::Dropout { p, seed }),
            base: self.weight.is_some(),
        })
    }
}

/// Whether a product of `x [n, in]` and `b [out, r]` has nothing to compute, or nothing to compute it from.
pub(super) fn is_empty(x: &Tensor, b: &Tensor) -> bool {
    x.elem_count() == 0 || b.elem_count() == 0
}

/// Whether there is something to compute in rows that lie in one piece, with so few ranks that these are the way.
fn low_rank_serves(x: &Tensor, b: &Tensor) -> bool {
    const RANKS: usize = 32;
    x.stride()[1] == 1 && !is_empty(x, b) && b.dims()[1] <= RANKS
}

/// What of a forward its backward needs, where that does not recompute it.
#[derive(Default)]
struct Kept {
    /// `s·D(x)·Aᵀ`
    h: Option<Tensor>,
    mask: Option<Mask>,
}

struct Forward<'a> {
    call: &'a LowRank,
    /// `[n, in]`
    x: &'a Tensor,
    /// `[r, in]`
    a: &'a Tensor,
    /// `[out, r]`
    b: &'a Tensor,
    bias: Option<&'a Tensor>,
}

impl Kernel for Forward<'_> {
    /// The result `[n, out]`, and what is kept.
    type Output = (Tensor, Kept);

    fn cpu(&self) -> Result<Self::Output> {
        let Self { call, x, a, b, bias } = *self;
        let mask = call.mask(x);
        let input = mask.as_ref().map(|mask| map_element([x], &Masked(mask))).transpose()?;
        let masked = input.as_ref().unwrap_or(x);
        if let Some((y, h)) = low_rank_pairs::forward(call, [x, masked, a, b], bias)? {
            return Ok((y, Kept { h: Some(h), mask }));
        }
        if call.weight.is_none() && mask.is_none() && bias.is_none() && low_rank_serves(x, b) {
            let delta = |[x, a, b]: [Matrix; 3]| products::low_rank(x, a, b, call.scaling);
            let (y, h) = with_matrices([x, a, b], delta)?;
            return Ok((y, Kept { h: Some(h), mask }));
        }
        let bias = bias.map(to_vec).transpose()?;
        let start = bias.as_deref().map_or(Start::Zero, Start::Row);
        let (weight, dtype, factor) = (call.weight.as_ref(), x.dtype(), call.factor());
        with_matrices([x, masked, a, b, weight.unwrap_or(b)], |[x, masked, a, b, weight_matrix]| {
            let (left, right, dims) = (Left::new(x), weight_matrix.t(), [x.rows, a.rows]);
            let narrow = mask.is_some() || weight.is_some() && left.stays_narrow(&right);
            let h = if narrow && low_rank_serves(self.x, self.b) {
                // Nothing else wants it in f32.
                products::low_rank_inner(masked, a, factor)?
            } else {
                let masked = Left::new(masked);
                let input = if mask.is_some() { masked.wide() } else { left.wide() };
                let product = Product { left: input, right: a.t() };
                let mut h = sum_of_products::<f32>(dims, Start::Zero, &[product]);
                for h in &mut h {
                    *h *= factor;
                }
                h
            };
            let base = weight.map(|_| Product { left: left.beside(&right), right });
            let factor = low_rank_pairs::beside(base.as_ref(), b.t());
            let update = factor.as_ref().map(|factor| Update::of(&h, factor));
            let low = match &update {
                Some(update) => update.product()?,
                None => Product { left: Matrix::of_rows(&h, dims)?, right: b.t() },
            };
            let products: Vec<_> = base.into_iter().chain([low]).collect();
            let y = product(dtype, [dims[0], b.rows], start, &products)?;
            let h = Tensor::from_vec(h, (dims[0], dims[1]), &Device::Cpu)?;
            Ok((y, Kept { h: Some(h), mask }))
        })
    }

    fn gpu(&self) -> Attempt<Self::Output> {
        let Self { call, a, b, bias, .. } = *self;
        let (x, call) = (&gpu::contiguous(self.x)?, &*call.like(self.x)?);
        if low_rank_products::serve(x, a, b) {
            let (y, h) = low_rank_products::forward(call, [x, a, b], bias)?;
            return Ok((y, Kept { h: Some(h), mask: None }));
        }
        let plans = call.plans(x, a, b)?;
        let shape = Shape::from((plans.rows, plans.outputs));
        let mut outputs = match &call.weight {
            Some(weight) => {
                let base = Base { left: x, right: &weight.t()?, bias }.gpu()?;
                gpu::run_in_place(&[x, a, b, &base], &[&shape], gpu::kept(plans, Plans::forward))?
            }
            None => gpu::run(&[x, a, b], &[&shape], gpu::kept(plans, Plans::forward))?,
        };
        Ok((outputs.take()?, Kept::default()))
    }
}

struct LowRankBackward {
    call: LowRank,
    kept: Kept,
}

impl Backward<3> for LowRankBackward {
    fn op(&self) -> &'static str {
        self.call.op
    }

    fn reads(&self, arg: usize) -> Reads {
        if arg == 0 { Reads::Again } else { Reads::Directly }
    }

    fn reads_output(&self) -> bool {
        false
    }

    fn backward(&self, [x, a, b]: [&Tensor; 3], _: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 3]> {
        let call = &self.call;
        let wanted = LoraGradients { x: x.track_op(), a: a.track_op(), b: b.track_op() };
        let (a_matrix, b_matrix) = (call.a_matrix(a)?, call.b_matrix(b)?);
        let (x_rows, grad) = (rows(&graph::value(x)?.detach())?, rows(grad)?);
        let gradients =
            Gradients { saved: self, x: &x_rows, a: &a_matrix, b: &b_matrix, grad: &grad, wanted };
        let [dx, da, db] = backend::run(x.device(), &gradients)?;
        Ok([
            dx.map(|dx| dx.reshape(x.shape())).transpose()?,
            da.map(|da| call.layout.turn(&da)).transpose()?,
            db.map(|db| call.layout.turn(&db)).transpose()?,
        ])
    }
}

/// As [`products::low_rank_backward`], by whole products, for many ranks; without x's.
fn factors_by_products(
    [input, b, h]: [Matrix; 3],
    gradient: &Left,
    scaling: f32,
    wanted: LoraGradients,
) -> Result<LowRankGradients> {
    let [n, r] = [h.rows, h.columns];
    let few = |left: Matrix, right| {
        product(DType::F32, [left.rows, r], Start::Zero, &[Product { left, right }])?.t()
    };
    let b_gradient = wanted.b.then(|| few(gradient.wide().t(), h)).transpose()?;
    let mut e = Vec::new();
    if wanted.x || wanted.a {
        let products = [Product { left: gradient.wide(), right: b }];
        e = sum_of_products::<f32>([n, r], Start::Zero, &products);
        for e in &mut e {
            *e *= scaling;
        }
    }
    // The few columns of e are the packed side.
    let a_gradient = wanted.a.then(|| few(input.t(), Matrix::of_rows(&e, [n, r])?)).transpose()?;
    Ok(LowRankGradients { e, x: None, a: a_gradient, b: b_gradient })
}

/// `base + low`, as far as a mask keeps that.
pub(super) fn with_update(
    dtype: DType,
    dims: [usize; 2],
    base: Option<Product>,
    low: Product,
    mask: Option<&Mask>,
) -> Result<Tensor> {
    let (start, last) = match mask {
        Some(mask) => (Start::Masked(low, mask), None),
        None => (Start::Zero, Some(low)),
    };
    let products: Vec<_> = base.into_iter().chain(last).collect();
    product(dtype, dims, start, &products)
}

struct Gradients<'a> {
    saved: &'a LowRankBackward,
    /// `[n, in]`
    x: &'a Tensor,
    /// `[r, in]`
    a: &'a Tensor,
    /// `[out, r]`
    b: &'a Tensor,
    /// `[n, out]`
    grad: &'a Tensor,
    wanted: LoraGradients,
}

impl Kernel for Gradients<'_> {
    /// Those of `x [n, in]`, `a [r, in]` and `b [out, r]` that are wanted.
    type Output = [Option<Tensor>; 3];

    fn cpu(&self) -> Result<Self::Output> {
        let Self { saved: LowRankBackward { call, kept: Kept { h, mask } }, x, a, b, grad, wanted } = *self;
        let mut gradients = [None, None, None];
        let Some(h) = h else { return Ok(gradients) };
        let mask = mask.as_ref();
        let input = mask.filter(|_| wanted.a).map(|mask| map_element([x], &Masked(mask))).transpose()?;
        let x = input.as_ref().unwrap_or(x);
        if let Some(gradients) = low_rank_pairs::gradients(call, mask, [x, a, b], [h, grad], wanted)? {
            return Ok(gradients);
        }
        let (weight, dtypes) = (call.weight.as_ref(), [x.dtype(), a.dtype(), b.dtype()]);
        let in_blocks = low_rank_serves(x, b) && low_rank_serves(grad, b);
        with_matrices([x, a, b, h, grad, weight.unwrap_or(a)], |[x, a, b, h, grad, weight_matrix]| {
            let left = Left::new(grad);
            let alone = weight.is_none() && mask.is_none() && in_blocks;
            let parts = if in_blocks {
                let wanted = LoraGradients { x: wanted.x && alone, ..wanted };
                products::low_rank_backward([x, a, b, h, grad], call.factor(), wanted)?
            } else {
                factors_by_products([x, b, h], &left, call.factor(), wanted)?
            };
            let stored = |gradient: Tensor, dtype| gradient.contiguous()?.to_dtype(dtype).map(Some);
            if let Some(da) = parts.a {
                gradients[1] = stored(da, dtypes[1])?;
            }
            if let Some(db) = parts.b {
                gradients[2] = stored(db.t()?, dtypes[2])?;
            }
            if alone {
                gradients[0] = parts.x;
                return Ok(gradients);
            }
            if wanted.x {
                let base =
                    weight.map(|_| Product { left: left.beside(&weight_matrix), right: weight_matrix });
                let factor = low_rank_pairs::beside(base.as_ref(), a);
                let update = factor.as_ref().map(|factor| Update::of(&parts.e, factor));
                let low = match &update {
                    Some(update) => update.product()?,
                    None => Product { left: Matrix::of_rows(&parts.e, [h.rows, h.columns])?, right: a },
                };
                let dims = [h.rows, a.columns];
                gradients[0] = Some(with_update(dtypes[0], dims, base, low, mask)?);
            }
            Ok(gradients)
        })
    }

    fn gpu(&self) -> Attempt<Self::Output> {
        let Self { saved: LowRankBackward { call, kept: Kept { h, .. } }, a, b, wanted, .. } = *self;
        let (x, grad) = (&gpu::contiguous(self.x)?, &gpu::contiguous(self.grad)?);
        let call = if wanted.x { call.like(x)? } else { Cow::Borrowed(call) };
        let call = &*call;
        if let Some(h) = h {
            return low_rank_products::gradients(call, [x, a, b], [h, grad], wanted);
        }
        let plans = call.plans(x, a, b)?;
        // A factor's gradient lies as the factor does.
        let lying = |strides: FactorStrides, columns| {
            let along_ranks = strides.rank < strides.column;
            (
                along_ranks,
                Shape::from(if along_ranks { (columns, plans.rank) } else { (plans.rank, columns) }),
            )
        };
        let ((a_turned, a_shape), (b_turned, b_shape)) =
            (lying(plans.a, plans.inputs), lying(plans.b, plans.outputs));
        let shapes = [(wanted.x, x.shape()), (wanted.a, &a_shape), (wanted.b, &b_shape)];
        let shapes: Vec<&Shape> =
            shapes.into_iter().filter(|(wanted, _)| *wanted).map(|(_, shape)| shape).collect();
        let plan = gpu::kept((plans, wanted), |(plans, wanted), tuning| plans.backward(*wanted, tuning));
        let mut outputs = match call.weight.as_ref().filter(|_| wanted.x) {
            Some(weight) => {
                let base = grad.matmul(&operand(weight)?)?;
                gpu::run_in_place(&[x, a, b, grad, &base], &shapes, plan)?
            }
            None => gpu::run(&[x, a, b, grad], &shapes, plan)?,
        };
        let dx = outputs.take_if(wanted.x)?;
        let turn = |gradient: Option<Tensor>, turned: bool| match gradient {
            Some(gradient) if turned => gradient.t().map(Some),
            gradient => Ok(gradient),
        };
        let da = turn(outputs.take_if(wanted.a)?, a_turned)?;
        let db = turn(outputs.take_if(wanted.b)?, !b_turned)?;
        Ok([dx, da, db])
    }
}

/// `x·Wᵀ + bias` in plain Candle operations.
pub(super) fn reference_base(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let weight = weight.detach().to_dtype(x.dtype())?.contiguous()?;
    let y = like_rows(&rows(x)?.matmul(&weight.t()?)?, x)?;
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
