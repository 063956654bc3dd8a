//! The gradient audit: does every parameter learn?
//!
//! A gradient can be lost without any error, for one when an operation is recorded without its backward; training
//! then goes on, and only a part of the model learns. So the first step's gradients are looked at one by one:
//!
//! 1. every parameter has a gradient, and it is finite;
//! 2. it is not zero, unless it must be: LoRA's A begins with a zero gradient because B is zero;
//! 3. those excused in (2) have one that is not zero as soon as an update has moved the others.

use super::Parameter;
use crate::{Error, Result};

/// How far the audit of a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Audit {
    /// Nothing has been looked at.
    First,
    /// Only the parameters whose first gradient is zero are left.
    Excused,
    /// Everything has passed.
    Passed,
}

impl Audit {
    /// Looks at one step's gradient norms. `moved`: an update with a learning rate above zero went before.
    ///
    /// Fails with the names of all parameters that do not learn.
    pub(super) fn check(self, parameters: &[Parameter], norms: &[Option<f64>], moved: bool) -> Result<Self> {
        let excuse = match self {
            Self::Passed => return Ok(self),
            Self::Excused if !moved => return Ok(self),
            Self::First => !moved,
            Self::Excused => false,
        };
        let problems: Vec<String> = parameters
            .iter()
            .zip(norms)
            .filter(|(parameter, _)| self == Self::First || parameter.zero_first_gradient)
            .filter_map(|(parameter, norm)| {
                let problem = match norm {
                    None => "has no gradient",
                    Some(norm) if !norm.is_finite() => "has a gradient that is not finite",
                    Some(0.0) if !(excuse && parameter.zero_first_gradient) => "has a zero gradient",
                    Some(_) => return None,
                };
                Some(format!("`{}` {problem}", parameter.name))
            })
            .collect();
        if !problems.is_empty() {
            return Err(Error::Audit(problems));
        }
        let excused = excuse && parameters.iter().any(|parameter| parameter.zero_first_gradient);
        Ok(if excused { Self::Excused } else { Self::Passed })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;

    fn parameters() -> Vec<Parameter> {
        [("a", true), ("b", false)]
            .map(|(name, zero_first_gradient)| Parameter {
                name: name.to_owned(),
                var: Var::zeros(1, DType::F32, &Device::Cpu).unwrap(),
                zero_first_gradient,
            })
            .to_vec()
    }

    fn problems(audit: Audit, norms: [Option<f64>; 2], moved: bool) -> Vec<String> {
        match audit.check(&parameters(), &norms, moved) {
            Err(Error::Audit(problems)) => problems,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_missing_zero_or_broken_gradient_is_named() {
        let first = Audit::First;
        assert_eq!(problems(first, [Some(0.0), None], false), ["`b` has no gradient"]);
        assert_eq!(problems(first, [None, Some(1.0)], false), ["`a` has no gradient"]);
        assert_eq!(problems(first, [Some(0.0), Some(0.0)], false), ["`b` has a zero gradient"]);
        let both = ["`a`", "`b`"].map(|name| format!("{name} has a gradient that is not finite"));
        assert_eq!(problems(first, [Some(f64::NAN), Some(f64::INFINITY)], false), both);
        assert_eq!(problems(first, [Some(0.0), Some(1.0)], true), ["`a` has a zero gradient"]);
    }

    #[test]
    fn an_excused_parameter_must_learn_once_the_others_moved() {
        let parameters = parameters();
        let audit = Audit::First.check(&parameters, &[Some(0.0), Some(1.0)], false).unwrap();
        assert_eq!(audit, Audit::Excused);
        assert_eq!(audit.check(&parameters, &[Some(0.0), Some(1.0)], false).unwrap(), Audit::Excused);
        assert_eq!(problems(audit, [Some(0.0), Some(1.0)], true), ["`a` has a zero gradient"]);
        assert_eq!(audit.check(&parameters, &[Some(1e-20), Some(0.0)], true).unwrap(), Audit::Passed);
        assert_eq!(Audit::First.check(&parameters, &[Some(1.0), Some(1.0)], true).unwrap(), Audit::Passed);
    }
}
