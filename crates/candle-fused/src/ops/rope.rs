//! Rotary position embedding (Su et al., 2021): each pair `(u, v)` of a row is turned by its position's angle,
//! `(u·cos − v·sin, v·cos + u·sin)`.
//!
//! The pairs are `(i, i + rot/2)` ([`RopeLayout::Half`]) or `(2i, 2i + 1)` ([`RopeLayout::Interleaved`]) of the first
//! `rot` columns; the others pass through. Backward: the same rotation by the opposite angle, nothing saved.
//! The tables are constants and get no gradient.

use candle_core::{D, DType, Result, Tensor, bail};

use crate::{backend, check};

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
    backend::dispatch(OP, x, || reference(x, cos, sin, layout), || reference(x, cos, sin, layout))
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
    let (b, heads, t, d) = x.dims4()?;
    let wide = x.to_dtype(DType::F32)?;
    let turned = wide.narrow(D::Minus1, 0, 2 * half)?;
    let (u, v) = match layout {
        RopeLayout::Half => (turned.narrow(D::Minus1, 0, half)?, turned.narrow(D::Minus1, half, half)?),
        RopeLayout::Interleaved => {
            let pairs = turned.reshape((b, heads, t, half, 2))?;
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
            Tensor::stack(&[&first, &second], D::Minus1)?.reshape((b, heads, t, 2 * half))?
        }
    };
    let rest = wide.narrow(D::Minus1, 2 * half, d - 2 * half)?;
    Tensor::cat(&[&turned, &rest], D::Minus1)?.to_dtype(x.dtype())
}
