//! One plan with its inputs and what must come out, and the rule that judges it.

use crate::data::{Tensor, decode, encode, roundoff};
use crate::oracle::Arithmetic;
use candlewick_kernels::{Element, Plan, Role, Storage, Tuning};
use kernel_simulator::Simulator;

/// What a case is made for.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    pub storage: Storage,
    pub rows: usize,
    pub columns: usize,
    pub tuning: Tuning,
}

impl Size {
    pub fn new(storage: Storage, rows: usize, columns: usize) -> Self {
        Self { storage, rows, columns, tuning: Tuning::default() }
    }

    pub fn elements(&self) -> usize {
        self.rows * self.columns
    }

    /// A matrix of this size.
    pub fn matrix(&self, seed: u64, magnitude: f64) -> Tensor {
        Tensor::random(seed, self.elements(), magnitude, self.storage)
    }

    /// One value for each column.
    pub fn vector(&self, seed: u64, magnitude: f64) -> Tensor {
        Tensor::random(seed, self.columns, magnitude, self.storage)
    }
}

/// What each output must hold, in the plan's order.
type Outputs = Box<dyn Fn(Arithmetic) -> Vec<Vec<f64>> + Send + Sync>;

/// An op's forward or backward at one size.
pub struct Case {
    pub name: String,
    pub plan: Plan,
    /// The bytes of the inputs, in the plan's order.
    inputs: Vec<Vec<u8>>,
    outputs: Outputs,
}

impl Case {
    pub fn new(
        name: &str,
        size: Size,
        plan: Plan,
        inputs: &[&Tensor],
        outputs: impl Fn(Arithmetic) -> Vec<Vec<f64>> + Send + Sync + 'static,
    ) -> Self {
        let name = format!("{name} {size:?}");
        let inputs = inputs.iter().map(|tensor| tensor.bytes.clone()).collect();
        Self { name, plan, inputs, outputs: Box::new(outputs) }
    }

    pub fn inputs(&self) -> Vec<&[u8]> {
        self.inputs.iter().map(Vec::as_slice).collect()
    }

    /// Runs the case. Its multiplications, or everything that is wrong.
    pub fn check(&self, simulator: &Simulator) -> Result<u64, String> {
        let run =
            simulator.run(&self.plan, &self.inputs()).map_err(|error| format!("{}: {error}", self.name))?;
        if !run.reports.is_empty() {
            return Err(format!("{}:\n{run}", self.name));
        }
        let (exact, reference) = ((self.outputs)(Arithmetic::Exact), (self.outputs)(Arithmetic::Single));
        let buffers: Vec<_> = self.plan.with_role(Role::Output).map(|(_, buffer)| buffer).collect();
        assert_eq!(exact.len(), buffers.len(), "{}: the oracle has another number of outputs", self.name);
        for (index, buffer) in buffers.into_iter().enumerate() {
            let (exact, reference) = (&exact[index], &reference[index]);
            assert_eq!(
                exact.len(),
                buffer.len,
                "{}: the oracle's {} has another length",
                self.name,
                buffer.name
            );
            let got = decode(&run.outputs[index], buffer.element);
            // A plain implementation stores its result in the same type.
            let reference = decode(&encode(reference.iter().copied(), buffer.element), buffer.element);
            judge(&got, exact, &reference, buffer.element)
                .map_err(|fault| format!("{}: {}: {fault}", self.name, buffer.name))?;
        }
        Ok(run.multiplications)
    }
}

/// The outputs of a backward that computes only some gradients.
pub fn wanted_only<const N: usize>(gradients: [(bool, Vec<f64>); N]) -> Vec<Vec<f64>> {
    gradients.into_iter().filter_map(|(wanted, gradient)| wanted.then_some(gradient)).collect()
}

/// The rule: no further from the exact result than twice a plain implementation in f32, plus two roundings of the
/// largest value. Where the plain implementation overflows, eight roundings are all there is.
fn judge(got: &[f64], exact: &[f64], reference: &[f64], element: Element) -> Result<(), String> {
    let largest = exact.iter().fold(0.0, |largest: f64, value| largest.max(value.abs()));
    let (at, error) = worst(got, exact);
    let (_, reference_error) = worst(reference, exact);
    let rounding = roundoff(element) * largest;
    let allowed =
        if reference_error.is_finite() { 2.0 * reference_error + 2.0 * rounding } else { 8.0 * rounding };
    if error <= allowed {
        return Ok(());
    }
    let (got, exact) = (got[at], exact[at]);
    Err(format!(
        "element {at} must be {exact}, got {got}: the error {error:.2e} exceeds {allowed:.2e} (reference {reference_error:.2e})"
    ))
}

/// The largest error and its place. A NaN is the largest of all, but right where it belongs.
fn worst(got: &[f64], exact: &[f64]) -> (usize, f64) {
    let error =
        |(got, exact): (&f64, &f64)| if got.is_nan() && exact.is_nan() { 0.0 } else { (got - exact).abs() };
    let errors = got.iter().zip(exact).map(error).enumerate();
    errors.fold((0, 0.0), |worst, error| if error.1 > worst.1 || error.1.is_nan() { error } else { worst })
}
