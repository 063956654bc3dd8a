//! The sum of two tensors of one shape: the residual stream. Backward: `dx = dy = g`.

use candle_core::{Result, Tensor};
use candlewick_kernels::add::Add as Plans;

use crate::backend::cpu::map_element;
use crate::backend::{self, Attempt, Kernel, gpu};
use crate::check;
use crate::cpu::elements as row;
use crate::graph::{self, Backward, Reads};

const OP: &str = "add";

/// `x + y` for tensors of one shape and dtype (f32, f16 or bf16).
///
/// # Errors
/// Another dtype, or a `y` of another shape, dtype or device.
pub fn add(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    check(x, y)?;
    backend::dispatch(OP, x, || fused(x, y), || x + y)
}

fn check(x: &Tensor, y: &Tensor) -> Result<()> {
    check::float(OP, "x", x)?;
    check::like(OP, "y", y, x, x.dims())
}

/// [`add`] in plain Candle operations.
pub fn reference(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    check(x, y)?;
    x + y
}

fn fused(x: &Tensor, y: &Tensor) -> Attempt<Tensor> {
    let sum = sum(&x.detach(), &y.detach())?;
    Ok(graph::record2(x, y, sum, Add)?)
}

/// `x + y` off the graph.
pub(crate) fn sum(x: &Tensor, y: &Tensor) -> Attempt<Tensor> {
    backend::run(x.device(), &Sum { x, y })
}

struct Add;

impl Backward<2> for Add {
    fn op(&self) -> &'static str {
        OP
    }

    fn reads(&self, _: usize) -> Reads {
        Reads::Never
    }

    fn reads_output(&self) -> bool {
        false
    }

    fn backward(&self, args: [&Tensor; 2], _: &Tensor, g: &Tensor) -> Result<[Option<Tensor>; 2]> {
        Ok(args.map(|arg| arg.track_op().then(|| g.clone())))
    }
}

struct Sum<'a> {
    x: &'a Tensor,
    y: &'a Tensor,
}

impl Kernel for Sum<'_> {
    type Output = Tensor;

    fn cpu(&self) -> Result<Tensor> {
        map_element([self.x, self.y], &row::Add)
    }

    fn gpu(&self) -> Attempt<Tensor> {
        let (x, y) = (gpu::contiguous(self.x)?, gpu::contiguous(self.y)?);
        let plans = Plans { elements: x.elem_count(), storage: gpu::storage(&x)? };
        Ok(gpu::run(&[&x, &y], &[x.shape()], gpu::kept(plans, Plans::forward))?.take()?)
    }
}
