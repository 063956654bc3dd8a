//! The arithmetic of an oracle: each op is written once and evaluated twice, exactly and as a plain
//! implementation in f32 would.

/// How the results of elementary operations are rounded.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Arithmetic {
    /// Not at all, beyond f64 itself.
    Exact,
    /// To f32 after every operation, and sums one term after the other.
    Single,
}

impl Arithmetic {
    /// The result of one operation.
    pub fn round(self, value: f64) -> f64 {
        match self {
            Self::Exact => value,
            Self::Single => f64::from(value as f32),
        }
    }

    pub fn sum(self, terms: impl IntoIterator<Item = f64>) -> f64 {
        terms.into_iter().fold(0.0, |sum, term| self.round(sum + self.round(term)))
    }

    pub fn dot(self, a: &[f64], b: &[f64]) -> f64 {
        self.sum(a.iter().zip(b).map(|(a, b)| a * b))
    }
}
