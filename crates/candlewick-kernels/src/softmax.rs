//! Plans of softmax; the mathematics is at the head of `kernels/softmax.metal`.

use crate::launch::{KernelFile, Launch, Plan, PlanError, Storage};
use crate::params::{Buffers, Params, Tuning, flag, groups, product, shape, size};
use crate::rows::{Held, RowGeometry, SCRATCH_BYTES};

const OP: &str = "softmax";

/// `softmax(scale · x)` over the last of `rows` × `columns`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Softmax {
    /// The product of all dimensions but the last.
    pub rows: usize,
    /// The last dimension.
    pub columns: usize,
    /// x's type, and y's and the gradients'.
    pub storage: Storage,
    /// Multiplies x first.
    pub scale: f32,
    /// For a causal mask, q: x is `[.., q, columns]`, and row i of q sees the columns up to `i + columns - q`.
    pub causal_queries: Option<usize>,
}

impl Softmax {
    /// Input x; output y.
    pub fn forward(&self, tuning: Tuning) -> Result<Plan, PlanError> {
        let elements = self.elements()?;
        let mut buffers = Buffers::default();
        let x = buffers.input("x", self.storage.element(), elements);
        let y = buffers.output("y", self.storage.element(), elements);
        let launch =
            self.launch("softmax", Held::computing(self.storage, self.columns), vec![x, y], tuning)?;
        Ok(buffers.plan(launch.into_iter().collect()))
    }

    /// Inputs y (the forward's result) and grad; output `grad_x`.
    pub fn backward(&self, tuning: Tuning) -> Result<Plan, PlanError> {
        let elements = self.elements()?;
        let mut buffers = Buffers::default();
        let y = buffers.input("y", self.storage.element(), elements);
        let grad = buffers.input("grad", self.storage.element(), elements);
        let grad_x = buffers.output("grad_x", self.storage.element(), elements);
        let launch = self.launch("softmax_backward", Held::READING_TWO, vec![y, grad, grad_x], tuning)?;
        Ok(buffers.plan(launch.into_iter().collect()))
    }

    fn elements(&self) -> Result<usize, PlanError> {
        if let Some(queries) = self.causal_queries {
            if queries > self.columns {
                return Err(shape(
                    OP,
                    "queries of a causal mask",
                    format!("at most {}", self.columns),
                    queries,
                ));
            }
            if self.rows > 0 && (queries == 0 || !self.rows.is_multiple_of(queries)) {
                return Err(shape(OP, "rows", format!("a multiple of the {queries} queries"), self.rows));
            }
        }
        product(OP, "x", &[self.rows, self.columns])
    }

    fn launch(
        &self,
        kernel: &'static str,
        held: Held,
        arguments: Vec<usize>,
        tuning: Tuning,
    ) -> Result<Option<Launch>, PlanError> {
        if self.rows == 0 || self.columns == 0 {
            return Ok(None);
        }
        let geometry = RowGeometry::choose(self.rows, self.columns, self.storage, tuning, held);
        let mut defines = geometry.defines();
        defines.push(flag("CAUSAL", self.causal_queries.is_some()));
        Ok(Some(Launch {
            kernel,
            file: KernelFile::Softmax,
            storage: self.storage,
            defines,
            threadgroups: [groups(OP, self.rows.div_ceil(geometry.teams))?, 1, 1],
            threads: geometry.threads(),
            threadgroup_bytes: SCRATCH_BYTES,
            arguments,
            params: Params::default()
                .u32(size(OP, "rows", self.rows)?)
                .u32(size(OP, "columns", self.columns)?)
                .u32(size(OP, "queries", self.causal_queries.unwrap_or(0))?)
                .f32(self.scale)
                .bytes(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ATTENTION: Softmax =
        Softmax { rows: 24, columns: 8, storage: Storage::F32, scale: 1.0, causal_queries: Some(6) };

    #[test]
    fn a_causal_mask_needs_whole_blocks_of_queries() {
        assert!(ATTENTION.forward(Tuning::default()).is_ok());
        let more_queries = Softmax { causal_queries: Some(12), ..ATTENTION }.forward(Tuning::default());
        assert_eq!(
            more_queries.unwrap_err().to_string(),
            "softmax: queries of a causal mask must be at most 8, got 12"
        );
        assert!(Softmax { rows: 25, ..ATTENTION }.forward(Tuning::default()).is_err());
    }
}
