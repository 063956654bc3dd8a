//! One call of an operation on one set of buffers, with the gradients that the mode asks for.

use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Shape, Tensor, Var};

use super::library::Library;
use crate::case::{Case, Mode, Op};
use crate::ops;
use crate::{Error, Result};

/// What a call computed, by name.
pub type Outputs = Vec<(String, Tensor)>;

/// The arguments of an operation, by name.
pub struct Arguments {
    tensors: HashMap<&'static str, Tensor>,
}

impl Arguments {
    /// An argument that the case has.
    pub fn get(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| Error::Engine(format!("no input {name}")))
    }
}

/// A set of buffers.
pub struct Prepared {
    library: Library,
    case: Case,
    is_reference: bool,
    arguments: Arguments,
    tracked: Vec<(String, Var)>,
    /// The result of a forward pass made beforehand, for a backward pass alone.
    result: Option<Tensor>,
}

impl Prepared {
    /// Fresh buffers with the values of `tensors`.
    pub fn new(
        library: Library,
        case: Case,
        variant: &str,
        tensors: &HashMap<String, Tensor>,
    ) -> Result<Self> {
        let mut arguments = HashMap::new();
        let mut tracked = Vec::new();
        for input in ops::inputs(&case) {
            let name = input.name;
            let given = tensors.get(name).ok_or_else(|| Error::Engine(format!("no input {name}")))?;
            let fresh = library.argument(&case, name, &given.copy()?)?;
            if input.tracked && case.mode != Mode::Forward {
                let var = Var::from_tensor(&fresh)?;
                arguments.insert(name, var.as_tensor().clone());
                tracked.push((format!("d{name}"), var));
            } else {
                arguments.insert(name, fresh);
            }
        }
        let is_reference = variant == "reference";
        let mut prepared = Self {
            library,
            case,
            is_reference,
            arguments: Arguments { tensors: arguments },
            tracked,
            result: None,
        };
        if case.mode == Mode::Backward {
            prepared.result = Some(prepared.result()?);
        }
        Ok(prepared)
    }

    /// What is timed.
    pub fn call(&self) -> Result<Outputs> {
        let outputs = if let Some(y) = &self.result {
            self.gradients(y)?
        } else {
            let y = self.result()?;
            let gradients = if self.case.mode == Mode::Both { self.gradients(&y)? } else { Outputs::new() };
            [("y".to_owned(), y)].into_iter().chain(gradients).collect()
        };
        outputs.into_iter().map(|(name, x)| Ok((name, self.library.result(&self.case, x)?))).collect()
    }

    fn result(&self) -> Result<Tensor> {
        self.library.call(&self.case, self.is_reference, &self.arguments)
    }

    /// The gradients from that of the result. Ours as candlewick's training gets them, the others' from Candle.
    fn gradients(&self, y: &Tensor) -> Result<Outputs> {
        let is_loss = self.case.op == Op::CrossEntropy;
        if self.library == Library::Ours && !self.is_reference {
            let gradients = if is_loss {
                candle_fused::backward(y, 1.0)?
            } else {
                candle_fused::backward_from(y, self.arguments.get("g")?)?
            };
            return self.collect(|var| gradients.get(var));
        }
        let gradients: GradStore = if is_loss {
            y.backward()?
        } else {
            y.apply_op1(WithGradient(self.arguments.get("g")?.clone()))?.backward()?
        };
        self.collect(|var| gradients.get(var))
    }

    fn collect<'a>(&self, gradient: impl Fn(&Var) -> Option<&'a Tensor>) -> Result<Outputs> {
        let named = |(name, var): &(String, Var)| match gradient(var) {
            Some(gradient) => Ok((name.clone(), gradient.clone())),
            None => Err(Error::Engine(format!("no gradient {name}"))),
        };
        self.tracked.iter().map(named).collect()
    }
}

/// Ends a graph in a scalar and hands this gradient to what comes before, as `torch.autograd.grad(y, x, g)` does.
/// (`(y·g).sum()` would have the same gradient and cost three passes over `y` that no engine else makes.)
struct WithGradient(Tensor);

impl CustomOp1 for WithGradient {
    fn name(&self) -> &'static str {
        "with_gradient"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        storage: &candle_core::CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(candle_core::CudaStorage, Shape)> {
        use candle_core::backend::{BackendDevice, BackendStorage};
        let shape = Shape::from(());
        Ok((storage.device().zeros_impl(&shape, DType::F32)?, shape))
    }

    fn bwd(&self, y: &Tensor, _: &Tensor, g: &Tensor) -> candle_core::Result<Option<Tensor>> {
        debug_assert!(g.dtype() == DType::F32 && y.dims() == self.0.dims());
        Ok(Some(self.0.clone()))
    }
}
