//! Rotary position embedding (Su et al., 2021): each pair `(u, v)` of a row is turned by its position's angle,
//! `(u·cos − v·sin, v·cos + u·sin)`.
//!
//! The pairs are `(i, i + rot/2)` ([`RopeLayout::Half`]) or `(2i, 2i + 1)` ([`RopeLayout::Interleaved`]) of the first
//! `rot` columns; the others pass through. Backward: the same rotation by the opposite angle, nothing saved.
//! The tables are constants and get no gradient.

use candle_core::{D, DType, Result, Tensor, bail};
use candlewick_kernels::rope::Rope as Plans;

use crate::backend::cpu::{map_row, with_f32};
use crate::backend::{self, Attempt, Kernel, gpu};
use crate::check;
use crate::cpu::rope as row;
use crate::graph::{self, Backward, Reads, tracked};

const OP: &str = "rope";

/// Which columns of a row form a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeLayout {
    /// `(i, i + rot/2)`: Hugging Face's `rotate_half`.
    Half,
    /// `(2i, 2i + 1)`: the layout of the paper and of GPT-J.
    Interleaved,
}

/// Rotates the first `rot = 2·h` columns of `x [b, heads, t, d]` (f32, f16 or bf16) by the tables `cos` and `sin`,
/// each `[t, h]` or `[b, t, h]`, in f32 or `x`'s dtype. `x` may be a transposed `[b, t, heads, d]`: its rows are read
/// where they lie.
///
/// # Errors
/// Another rank or dtype, tables of other shapes or devices, more columns to rotate than `x` has.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, layout: RopeLayout) -> Result<Tensor> {
    check(x, cos, sin)?;
    backend::dispatch(OP, x, || fused(x, cos, sin, layout), || reference(x, cos, sin, layout))
}

fn check(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<()> {
    check::float(OP, "x", x)?;
    check::rank(OP, "x", x, 4)?;
    let (b, _, t, d) = x.dims4()?;
    let half = check::last_dim(OP, "cos", cos)?;
    if 2 * half > d {
        bail!("{OP}: x has {d} columns, got tables that rotate {}", 2 * half);
    }
    for (name, table) in [("cos", cos), ("sin", sin)] {
        match table.dims() {
            [_, _] => check::shape(OP, name, table, &[t, half])?,
            _ => check::shape(OP, name, table, &[b, t, half])?,
        }
        if table.dtype() != DType::F32 {
            check::dtype(OP, name, table, x.dtype())?;
        }
        check::device(OP, name, table, x.device())?;
    }
    check::shape(OP, "sin", sin, cos.dims())
}

/// [`rope`] in plain Candle operations.
pub fn reference(x: &Tensor, cos: &Tensor, sin: &Tensor, layout: RopeLayout) -> Result<Tensor> {
    check(x, cos, sin)?;
    let half = cos.dim(D::Minus1)?;
    if x.elem_count() == 0 || half == 0 {
        return x.copy();
    }
    let table = |table: &Tensor| {
        let table = table.detach().to_dtype(DType::F32)?;
        // [b, t, h] is broadcast over the heads.
        if table.rank() == 3 { table.unsqueeze(1) } else { Ok(table) }
    };
    let (cos, sin) = (table(cos)?, table(sin)?);
    let (batch, heads, length, width) = x.dims4()?;
    let wide = x.to_dtype(DType::F32)?;
    let turned = wide.narrow(D::Minus1, 0, 2 * half)?;
    let (u, v) = match layout {
        RopeLayout::Half => (turned.narrow(D::Minus1, 0, half)?, turned.narrow(D::Minus1, half, half)?),
        RopeLayout::Interleaved => {
            let pairs = turned.reshape((batch, heads, length, half, 2))?;
            (
                pairs.narrow(D::Minus1, 0, 1)?.squeeze(D::Minus1)?,
                pairs.narrow(D::Minus1, 1, 1)?.squeeze(D::Minus1)?,
            )
        }
    };
    let first = (u.broadcast_mul(&cos)? - v.broadcast_mul(&sin)?)?;
    let second = (v.broadcast_mul(&cos)? + u.broadcast_mul(&sin)?)?;
    let turned = match layout {
        RopeLayout::Half => Tensor::cat(&[&first, &second], D::Minus1)?,
        RopeLayout::Interleaved => {
            Tensor::stack(&[&first, &second], D::Minus1)?.reshape((batch, heads, length, 2 * half))?
        }
    };
    let rest = wide.narrow(D::Minus1, 2 * half, width - 2 * half)?;
    Tensor::cat(&[&turned, &rest], D::Minus1)?.to_dtype(x.dtype())
}

fn fused(x: &Tensor, cos: &Tensor, sin: &Tensor, layout: RopeLayout) -> Attempt<Tensor> {
    let y = backend::run(x.device(), &Rotation { x, cos, sin, layout, back: false })?;
    Ok(graph::record1(x, y, Rope { cos: cos.detach(), sin: sin.detach(), layout })?)
}

struct Rope {
    cos: Tensor,
    sin: Tensor,
    layout: RopeLayout,
}

impl Backward<1> for Rope {
    fn op(&self) -> &'static str {
        OP
    }

    fn reads(&self, _: usize) -> Reads {
        Reads::Never
    }

    fn reads_output(&self) -> bool {
        false
    }

    fn backward(&self, [x]: [&Tensor; 1], _: &Tensor, g: &Tensor) -> Result<[Option<Tensor>; 1]> {
        let rotation = Rotation { x: g, cos: &self.cos, sin: &self.sin, layout: self.layout, back: true };
        Ok([tracked(x, || Ok(backend::run(x.device(), &rotation)?))?])
    }
}

struct Rotation<'a> {
    x: &'a Tensor,
    cos: &'a Tensor,
    sin: &'a Tensor,
    layout: RopeLayout,
    /// By the opposite angle.
    back: bool,
}

impl Kernel for Rotation<'_> {
    type Output = Tensor;

    fn cpu(&self) -> Result<Tensor> {
        let (_, heads, positions, _) = self.x.dims4()?;
        let interleaved = self.layout == RopeLayout::Interleaved;
        let (cos, sin) = if interleaved {
            // An angle for each column.
            let both = |first: &Tensor, second: &Tensor| {
                Tensor::stack(&[first, second], D::Minus1)?.flatten_from(D::Minus2)
            };
            (both(self.cos, self.cos)?, both(&self.sin.neg()?, self.sin)?)
        } else {
            (self.cos.clone(), self.sin.clone())
        };
        with_f32([&cos, &sin], |[cos_values, sin_values]| {
            let (width, per_batch, back) = (cos.dim(D::Minus1)?, self.cos.rank() == 3, self.back);
            let (cos, sin) = (cos_values, sin_values);
            let row = row::Rotation { cos, sin, width, interleaved, per_batch, heads, positions, back };
            map_row([self.x], &row)
        })
    }

    fn gpu(&self) -> Attempt<Tensor> {
        // The kernel reads rows where they lie, if they are contiguous themselves.
        let x = match *self.x.stride() {
            [.., 1] => self.x.clone(),
            _ => gpu::contiguous(self.x)?,
        };
        let cos = gpu::contiguous(self.cos)?;
        let sin = gpu::contiguous(&self.sin.to_dtype(cos.dtype())?)?;
        let (batch, heads, positions, columns) = x.dims4()?;
        let plans = Plans {
            batch,
            heads,
            positions,
            columns,
            rotary: 2 * cos.dim(D::Minus1)?,
            strides: [x.stride()[0], x.stride()[1], x.stride()[2]],
            batched_table: cos.rank() == 3,
            interleaved: self.layout == RopeLayout::Interleaved,
            storage: gpu::storage(&x)?,
            table: gpu::storage(&cos)?,
        };
        let recipe =
            gpu::kept(
                (plans, self.back),
                |&(plans, back), tuning| {
                    if back { plans.backward(tuning) } else { plans.forward(tuning) }
                },
            );
        Ok(gpu::run(&[&x, &cos, &sin], &[x.shape()], recipe)?.take()?)
    }
}
