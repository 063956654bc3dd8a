//! Plans of RMS norm; the mathematics is at the head of `kernels/rms_norm.metal`.

use crate::column_sum;
use crate::launch::{Buffer, Element, KernelFile, Launch, Plan, PlanError, Role, Storage};
use crate::params::{Params, Tuning, flag, groups, product, size};
use crate::rows::{RowGeometry, SCRATCH_BYTES, partial_rows};

const OP: &str = "rms_norm";
/// Registers for a row: forward holds x, backward holds x, the gradient and the weight's sums.
const HELD_FORWARD: usize = 32;
const HELD_BACKWARD: usize = 16;

/// An RMS norm over the last of `rows` × `columns`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RmsNorm {
    /// The product of all dimensions but the last.
    pub rows: usize,
    /// The last dimension.
    pub columns: usize,
    /// x's type, and the weight's and the gradients'.
    pub storage: Storage,
    /// Whether there is a weight `[columns]`.
    pub weight: bool,
    /// Added to the mean square.
    pub eps: f32,
}

/// Which gradients a backward computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RmsNormGradients {
    /// x's.
    pub x: bool,
    /// The weight's; without a weight it is left out.
    pub weight: bool,
}

impl RmsNorm {
    /// Inputs x, weight (if any); output y `[rows, columns]`.
    pub fn forward(&self, tuning: Tuning) -> Result<Plan, PlanError> {
        let (mut buffers, elements) = self.inputs(&["x"])?;
        let y = buffers.len();
        buffers.push(Buffer {
            name: "y",
            element: self.storage.element(),
            len: elements,
            role: Role::Output,
        });
        if elements == 0 {
            return Ok(Plan { buffers, launches: Vec::new() });
        }
        let geometry = RowGeometry::choose(self.rows, self.columns, self.storage, tuning, HELD_FORWARD);
        let mut defines = geometry.defines();
        defines.extend([flag("WEIGHT", self.weight), flag("WEIGHT_GRAD", false), flag("INPUT_GRAD", false)]);
        let launch =
            self.launch("rms_norm", geometry, defines, self.rows, vec![0, self.weight_index(1), y])?;
        Ok(Plan { buffers, launches: vec![launch] })
    }

    /// Inputs x, grad, weight (if any); outputs `grad_x` `[rows, columns]` and `grad_weight` `[columns]`, those wanted.
    pub fn backward(&self, wanted: RmsNormGradients, tuning: Tuning) -> Result<Plan, PlanError> {
        let (mut buffers, elements) = self.inputs(&["x", "grad"])?;
        let weight_grad = wanted.weight && self.weight;
        let mut push = |name, element, len, role| {
            buffers.push(Buffer { name, element, len, role });
            buffers.len() - 1
        };
        let grad_x = wanted.x.then(|| push("grad_x", self.storage.element(), elements, Role::Output));
        let grad_weight =
            weight_grad.then(|| push("grad_weight", self.storage.element(), self.columns, Role::Output));
        let parts = if weight_grad { partial_rows(self.rows) } else { self.rows };
        let partial = weight_grad
            .then(|| product(OP, "partial sums", &[parts, self.columns]))
            .transpose()?
            .map(|len| push("partial", Element::F32, len, Role::Scratch));
        if self.columns == 0 || (elements == 0 && !weight_grad) || !(wanted.x || weight_grad) {
            return Ok(Plan { buffers, launches: Vec::new() });
        }

        let geometry = RowGeometry::choose(self.rows, self.columns, self.storage, tuning, HELD_BACKWARD);
        let mut defines = geometry.defines();
        defines.extend([
            flag("WEIGHT", self.weight),
            flag("WEIGHT_GRAD", weight_grad),
            flag("INPUT_GRAD", wanted.x),
        ]);
        // An output that is not wanted is never touched: x stands in its place.
        let arguments = vec![0, self.weight_index(2), 1, grad_x.unwrap_or(0), partial.unwrap_or(0)];
        let mut launches = Vec::new();
        if elements > 0 {
            launches.push(self.launch("rms_norm_backward", geometry, defines, parts, arguments)?);
        }
        if let (Some(partial), Some(total)) = (partial, grad_weight) {
            let ends = (partial, total);
            launches.push(column_sum::launch(OP, self.storage, tuning, parts, self.columns, ends)?);
        }
        Ok(Plan { buffers, launches })
    }

    fn weight_index(&self, index: usize) -> usize {
        if self.weight { index } else { 0 }
    }

    fn inputs(&self, rows: &[&'static str]) -> Result<(Vec<Buffer>, usize), PlanError> {
        let elements = product(OP, "x", &[self.rows, self.columns])?;
        let element = self.storage.element();
        let mut buffers: Vec<_> =
            rows.iter().map(|&name| Buffer { name, element, len: elements, role: Role::Input }).collect();
        if self.weight {
            buffers.push(Buffer { name: "weight", element, len: self.columns, role: Role::Input });
        }
        Ok((buffers, elements))
    }

    fn launch(
        &self,
        kernel: &'static str,
        geometry: RowGeometry,
        defines: Vec<(&'static str, String)>,
        teams: usize,
        arguments: Vec<usize>,
    ) -> Result<Launch, PlanError> {
        Ok(Launch {
            kernel,
            file: KernelFile::RmsNorm,
            storage: self.storage,
            defines,
            threadgroups: [groups(OP, teams.div_ceil(geometry.teams))?, 1, 1],
            threads: geometry.threads(),
            threadgroup_bytes: SCRATCH_BYTES,
            arguments,
            params: Params::default()
                .u32(size(OP, "rows", self.rows)?)
                .u32(size(OP, "columns", self.columns)?)
                .u32(size(OP, "teams", teams)?)
                .f32(self.eps)
                .bytes(),
        })
    }
}
