//! Gradients of a loss, without what Candle's backward spends on each edge of the graph.
//!
//! Candle begins the gradient of every tensor with zeros and adds to it out of place: for each use of a tensor one filling
//! and one sum of its size, most of which add to nothing. Where all of a graph are operations of this crate (and views
//! by [`view`](crate::view)), a first gradient is taken as it is. The order of operations is Candle's own.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, TensorId};

use crate::graph::{self, Entry, Node, Undo, View};
use crate::ops::add::sum;
use crate::{backend, check};

/// The gradients of a loss.
pub struct Gradients(Store);

enum Store {
    Own(HashMap<TensorId, Tensor>),
    Candle(GradStore),
}

impl Gradients {
    /// The gradient of a variable; `None` where the loss does not depend on it.
    #[must_use]
    pub fn get(&self, tensor: &Tensor) -> Option<&Tensor> {
        match &self.0 {
            Store::Own(gradients) => gradients.get(&tensor.id()),
            Store::Candle(gradients) => gradients.get(tensor),
        }
    }

    /// The gradient of a variable, taken out.
    pub fn remove(&mut self, tensor: &Tensor) -> Option<Tensor> {
        match &mut self.0 {
            Store::Own(gradients) => gradients.remove(&tensor.id()),
            Store::Candle(gradients) => gradients.remove(tensor),
        }
    }
}

/// The gradients of `weight · loss` for all variables that it depends on: as [`Tensor::backward`], which is called where
/// the graph holds other operations than this crate's.
///
/// # Errors
/// A failed tensor operation.
pub fn backward(loss: &Tensor, weight: f64) -> Result<Gradients> {
    let Some(steps) = steps(loss) else {
        return Ok(Gradients(Store::Candle((loss * weight)?.backward()?)));
    };
    let first =
        Tensor::full(1f32, loss.shape(), loss.device())?.affine(weight, 0.0)?.to_dtype(loss.dtype())?;
    walk(loss, first, steps)
}

/// The gradients of `Σ gradient·y` for all variables that `y` depends on: what comes before `y` gets `gradient` as the
/// gradient of `y`, as from `torch.autograd.grad(y, x, gradient)`.
///
/// # Errors
/// A gradient of another shape or dtype, a failed tensor operation.
pub fn backward_from(y: &Tensor, gradient: &Tensor) -> Result<Gradients> {
    check::like("backward_from", "gradient", gradient, y, y.dims())?;
    match steps(y) {
        Some(steps) => walk(y, gradient.detach(), steps),
        None => Ok(Gradients(Store::Candle((y * gradient.detach())?.sum_all()?.backward()?))),
    }
}

/// The graph behind a tensor, the last operation first; `None` where others than this crate's have a part in it.
fn steps(tensor: &Tensor) -> Option<Vec<(&Tensor, Step)>> {
    tensor.sorted_nodes().into_iter().filter(|tensor| !tensor.is_variable()).map(step).collect()
}

/// Goes back through `steps` with the gradient of the last tensor.
fn walk(last: &Tensor, first: Tensor, steps: Vec<(&Tensor, Step)>) -> Result<Gradients> {
    let mut gradients = HashMap::from([(last.id(), first)]);
    for (tensor, step) in steps {
        let Some(gradient) = gradients.remove(&tensor.id()) else { continue };
        match step {
            Step::View(View { of, undo }) => {
                let gradient = match undo {
                    Undo::Reshape(shape) => backend::contiguous(&gradient)?.reshape(shape)?,
                    Undo::Transpose(first, second) => gradient.transpose(first, second)?,
                };
                accumulate(&mut gradients, of, gradient)?;
            }
            Step::Op(node) => {
                for (arg, gradient) in node.args().iter().zip(node.gradients(tensor, &gradient)?) {
                    if let Some(gradient) = gradient {
                        accumulate(&mut gradients, arg.id(), gradient)?;
                    }
                }
            }
        }
    }
    Ok(Gradients(Store::Own(gradients)))
}

enum Step {
    Op(Arc<dyn Node>),
    View(View),
}

/// A tensor of this crate's, with what makes its gradient those of others.
fn step(tensor: &Tensor) -> Option<(&Tensor, Step)> {
    let step = match graph::entry(tensor.id())? {
        Entry::Op(node) => Step::Op(Weak::upgrade(&node)?),
        Entry::View(view, _) => Step::View(view),
    };
    Some((tensor, step))
}

fn accumulate(gradients: &mut HashMap<TensorId, Tensor>, id: TensorId, gradient: Tensor) -> Result<()> {
    let gradient = match gradients.remove(&id) {
        Some(before) => sum(&before, &gradient)?,
        None => gradient,
    };
    gradients.insert(id, gradient.detach());
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::{Dropout, LoraLinearOptions, Mask, RopeLayout, SoftmaxOptions, view};

    pub(crate) fn tensor(dims: &[usize]) -> Tensor {
        Tensor::randn(0f32, 1.0, dims, &Device::Cpu).unwrap()
    }

    pub(crate) fn var(dims: &[usize]) -> Var {
        Var::from_tensor(&tensor(dims)).unwrap()
    }

    #[test]
    fn a_dimension_for_itself_is_no_other_view() {
        let x = var(&[3, 4]);
        let y = crate::add(&x, &x).unwrap();
        let y = view::transpose(&y, 1, 1).unwrap();
        let gradients = backward_from(&y, &tensor(&[3, 4]).ones_like().unwrap()).unwrap();
        let gradient: Vec<f32> = gradients.get(&x).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(gradient, [2.0; 12]);
    }

    /// A block of a transformer, with every kind of edge: shared tensors, views, constants.
    fn loss(vars: &[Var], constants: &[Tensor]) -> Result<Tensor> {
        let [x, norm, a, b, up] = vars else { unreachable!() };
        let [weight, table, head, targets] = constants else { unreachable!() };
        let options = LoraLinearOptions { scaling: 2.0, dropout: Some(Dropout { p: 0.2, seed: 3 }) };
        let normed = crate::rms_norm(x, Some(norm), 1e-6)?;
        let q = crate::lora_linear(&normed, weight, None, a, b, options)?;
        let q = view::transpose(&view::reshape(&q, (2, 6, 4, 4))?, 1, 2)?;
        let q = view::transpose(&crate::rope(&q, table, table, RopeLayout::Half)?, 1, 2)?;
        let kv = view::reshape(&normed, (2, 6, 4, 4))?;
        let y = crate::attention(&q, &kv, &kv, SoftmaxOptions { scale: 0.5, mask: Mask::Causal })?;
        let x = crate::add(x, &view::reshape(&y, (2, 6, 16))?)?;
        let x = crate::add(&x, &crate::silu_mul(&x, up)?)?;
        crate::linear_cross_entropy(&x, head, targets, Some(-100))
    }

    /// Without the sign of zero, which Candle's zeros take away.
    fn bits(tensor: &Tensor) -> Vec<u32> {
        let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        values.into_iter().map(|x| (x + 0.0).to_bits()).collect()
    }

    #[test]
    fn gradients_are_those_of_candle() {
        let vars = [&[2, 6, 16][..], &[16], &[3, 16], &[16, 3], &[2, 6, 16]].map(var);
        let targets = Tensor::new(&[1i64, 2, 3, 4, 5, -100, 6, 7, 8, -100, 0, 1], &Device::Cpu).unwrap();
        let constants = [tensor(&[16, 16]), tensor(&[6, 2]), tensor(&[9, 16]), targets];
        let loss = loss(&vars, &constants).unwrap();
        for weight in [1.0, 0.25] {
            let expected = (&loss * weight).unwrap().backward().unwrap();
            let mut own = backward(&loss, weight).unwrap();
            assert!(matches!(own.0, Store::Own(_)), "every operation is this crate's");
            for var in &vars {
                assert_eq!(bits(own.get(var).unwrap()), bits(expected.get(var).unwrap()));
                assert!(own.remove(var).is_some() && own.get(var).is_none());
            }
        }
    }

    #[test]
    fn a_gradient_to_begin_with_is_that_of_a_weighted_sum() {
        let (x, norm, g) = (var(&[3, 8]), var(&[8]), tensor(&[3, 8]));
        let fused = crate::rms_norm(&x, Some(&norm), 1e-6).unwrap();
        for (y, is_own) in [(fused.clone(), true), (fused.affine(1.0, 0.5).unwrap(), false)] {
            let expected = (&y * &g).unwrap().sum_all().unwrap().backward().unwrap();
            let got = backward_from(&y, &g).unwrap();
            assert_eq!(matches!(got.0, Store::Own(_)), is_own);
            for var in [&x, &norm] {
                assert_eq!(bits(got.get(var).unwrap()), bits(expected.get(var).unwrap()));
            }
        }
        let error = backward_from(&fused, &tensor(&[8, 3])).err().unwrap().to_string();
        assert!(error.contains("gradient must be [3, 8], got [8, 3]"), "{error}");
    }

    #[test]
    fn other_operations_are_left_to_candle() {
        let x = var(&[3, 4]);
        let loss = crate::rms_norm(&x, None, 1e-6).unwrap().sqr().unwrap().sum_all().unwrap();
        let (own, expected) = (backward(&loss, 0.5).unwrap(), (&loss * 0.5).unwrap().backward().unwrap());
        assert!(matches!(own.0, Store::Candle(_)));
        assert_eq!(bits(own.get(&x).unwrap()), bits(expected.get(&x).unwrap()));
    }

    #[test]
    fn what_is_dropped_is_forgotten() {
        let x = var(&[2, 6]);
        let (id, view_id) = {
            let y = crate::rms_norm(&x, None, 1e-6).unwrap();
            let view = view::reshape(&y, 12).unwrap();
            assert!(graph::entry(y.id()).is_some() && graph::entry(view.id()).is_some());
            (y.id(), view.id())
        };
        assert!(graph::entry(id).is_none() && graph::entry(view_id).is_none());
        let constant = x.as_detached_tensor();
        assert!(graph::entry(view::reshape(&constant, 12).unwrap().id()).is_none());
        assert_eq!(constant.dtype(), DType::F32);
    }
}
