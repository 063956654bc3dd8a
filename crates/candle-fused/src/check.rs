//! Checks of arguments. Every message names the operation, what was expected and what was got.

use candle_core::{DType, Device, Result, Tensor, bail};

/// `t` is stored as f32, f16 or bf16.
pub(crate) fn float(op: &str, name: &str, t: &Tensor) -> Result<()> {
    match t.dtype() {
        DType::F32 | DType::F16 | DType::BF16 => Ok(()),
        got => bail!("{op}: {name} must be f32, f16 or bf16, got {}", got.as_str()),
    }
}

/// `t` has exactly this shape.
pub(crate) fn shape(op: &str, name: &str, t: &Tensor, expected: &[usize]) -> Result<()> {
    if t.dims() != expected {
        bail!("{op}: {name} must be {expected:?}, got {:?}", t.dims());
    }
    Ok(())
}

/// `t` has this many dimensions.
pub(crate) fn rank(op: &str, name: &str, t: &Tensor, expected: usize) -> Result<()> {
    if t.rank() != expected {
        bail!("{op}: {name} must have {expected} dimensions, got {:?}", t.dims());
    }
    Ok(())
}

/// `t` has this dtype.
pub(crate) fn dtype(op: &str, name: &str, t: &Tensor, expected: DType) -> Result<()> {
    if t.dtype() != expected {
        bail!("{op}: {name} must be {}, got {}", expected.as_str(), t.dtype().as_str());
    }
    Ok(())
}

/// `t` lives on this device.
pub(crate) fn device(op: &str, name: &str, t: &Tensor, expected: &Device) -> Result<()> {
    if !t.device().same_device(expected) {
        bail!("{op}: {name} must be on {:?}, got {:?}", expected.location(), t.device().location());
    }
    Ok(())
}

/// `t` has `x`'s dtype and device, and this shape.
pub(crate) fn like(op: &str, name: &str, t: &Tensor, x: &Tensor, expected: &[usize]) -> Result<()> {
    shape(op, name, t, expected)?;
    dtype(op, name, t, x.dtype())?;
    device(op, name, t, x.device())
}

/// The last dimension of `t`, which must have one.
pub(crate) fn last_dim(op: &str, name: &str, t: &Tensor) -> Result<usize> {
    match t.dims().last() {
        Some(&d) => Ok(d),
        None => bail!("{op}: {name} must have at least 1 dimension, got a scalar"),
    }
}

/// `value` is finite.
pub(crate) fn finite(op: &str, name: &str, value: f32) -> Result<()> {
    if !value.is_finite() {
        bail!("{op}: {name} must be finite, got {value}");
    }
    Ok(())
}

/// `eps` of a normalisation is finite and not negative.
pub(crate) fn epsilon(op: &str, eps: f32) -> Result<()> {
    if !(eps.is_finite() && eps >= 0.0) {
        bail!("{op}: eps must be finite and at least 0, got {eps}");
    }
    Ok(())
}
