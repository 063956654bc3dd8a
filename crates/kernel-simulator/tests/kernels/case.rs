//! One plan with its inputs and what must come out, and the rule that judges it.

use crate::data::{Tensor, decode, encode, roundoff};
use crate::oracle::Arithmetic;
use candlewick_kernels::{Element, Plan, Role};
use kernel_simulator::Simulator;

/// An op's forward or backward at one size.
pub struct Case {
    pub name: String,
    pub plan: Plan,
    /// The bytes of the inputs, in the plan's order.
    pub inputs: Vec<Vec<u8>>,
    /// What each output must hold, in the plan's order.
    pub outputs: Box<dyn Fn(Arithmetic) -> Vec<Vec<f64>> + Send + Sync>,
}

impl Case {
    pub fn new(
        name: String,
        plan: Plan,
        inputs: &[&Tensor],
        outputs: impl Fn(Arithmetic) -> Vec<Vec<f64>> + Send + Sync + 'static,
    ) -> Self {
        let inputs = inputs.iter().map(|tensor| tensor.bytes.clone()).collect();
        Self { name, plan, inputs, outputs: Box::new(outputs) }
    }

    pub fn inputs(&self) -> Vec<&[u8]> {
        self.inputs.iter().map(Vec::as_slice).collect()
    }

    /// Runs the case. Its multiplications, or everything that is wrong.
    pub fn check(&self, simulator: &Simulator) -> Result<u64, String> {
        let run = simulator.run(&self.plan, &self.inputs()).map_err(|error| format!("{}: {error}", self.name))?;
        if !run.reports.is_empty() {
            return Err(format!("{}:\n{run}", self.name));
        }
        let (exact, reference) = ((self.outputs)(Arithmetic::Exact), (self.outputs)(Arithmetic::Single));
        let outputs: Vec<_> = self.plan.with_role(Role::Output).map(|(_, buffer)| buffer).collect();
        assert_eq!(exact.len(), outputs.len(), "{}: the oracle has another number of outputs", self.name);
        for (((buffer, got), exact), reference) in outputs.iter().zip(&run.outputs).zip(&exact).zip(&reference) {
            assert_eq!(exact.len(), buffer.len, "{}: the oracle's {} is too short", self.name, buffer.name);
            let got = decode(got, buffer.element);
            // A plain implementation stores its result like ours.
            let reference = decode(&encode(reference.iter().copied(), buffer.element), buffer.element);
            judge(&got, exact, &reference, buffer.element)
                .map_err(|fault| format!("{}: {}: {fault}", self.name, buffer.name))?;
        }
        Ok(run.multiplications)
    }
}

/// The rule: no further from the exact result than twice a plain implementation in f32, plus two roundings of the
/// largest value.
fn judge(got: &[f64], exact: &[f64], reference: &[f64], element: Element) -> Result<(), String> {
    let largest = exact.iter().fold(0.0, |largest: f64, value| largest.max(value.abs()));
    let error = |values: &[f64]| {
        let errors = values.iter().zip(exact).map(|(value, exact)| if value == exact { 0.0 } else { (value - exact).abs() });
        errors.enumerate().fold((0, 0.0), |worst: (usize, f64), (index, error)| {
            // A NaN is the worst of all, and stays so.
            if error > worst.1 || error.is_nan() && !worst.1.is_nan() { (index, error) } else { worst }
        })
    };
    let (at, got_error) = error(got);
    let (_, reference_error) = error(reference);
    let allowed = 2.0 * reference_error + 2.0 * roundoff(element) * largest;
    if got_error <= allowed {
        Ok(())
    } else {
        Err(format!(
            "element {at} is {}, must be {}: the error {got_error:.3e} exceeds {allowed:.3e} \
             (reference {reference_error:.3e})",
            got[at], exact[at]
        ))
    }
}
