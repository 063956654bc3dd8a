//! The arithmetic of an oracle: each op is written once and evaluated twice, exactly, and as a plain
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

    pub fn mean(self, terms: &[f64]) -> f64 {
        self.round(self.sum(terms.iter().copied()) / terms.len() as f64)
    }

    pub fn dot(self, a: &[f64], b: &[f64]) -> f64 {
        self.sum(a.iter().zip(b).map(|(a, b)| a * b))
    }

    pub fn multiply(self, a: &[f64], b: &[f64]) -> Vec<f64> {
        a.iter().zip(b).map(|(a, b)| self.round(a * b)).collect()
    }

    pub fn exp(self, value: f64) -> f64 {
        self.round(self.round(value).exp())
    }

    /// `1 / √(value + eps)`.
    pub fn inverse_root(self, value: f64, eps: f64) -> f64 {
        self.round(1.0 / self.round(self.round(value + eps).sqrt()))
    }

    /// Adds one row to a running sum of rows.
    pub fn add_row(self, total: &mut [f64], row: impl IntoIterator<Item = f64>) {
        for (total, value) in total.iter_mut().zip(row) {
            *total = self.round(*total + value);
        }
    }
}
