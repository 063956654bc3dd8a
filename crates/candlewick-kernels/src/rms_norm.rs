//! Plans of RMS norm; the mathematics is at the head of `kernels/rms_norm.metal`.

use crate::column_sum;
use crate::launch::{Element, KernelFile, Launch, Plan, PlanError, Storage};
use crate::params::{Buffers, Params, Tuning, flag, groups, product, size};
use crate::rows::{Held, RowGeometry, SCRATCH_BYTES, partial_rows};

const OP: &str = "rms_norm";

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
        let elements = product(OP, "x", &[self.rows, self.columns])?;
        let mut buffers = Buffers::default();
        let x = buffers.input("x", self.storage.element(), elements);
        let weight = self.weight_input(&mut buffers).unwrap_or(x);
        let y = buffers.output("y", self.storage.element(), elements);
        if elements == 0 {
            return Ok(buffers.plan(Vec::new()));
        }
        let geometry = RowGeometry::choose(self.rows, self.columns, self.storage, tuning, Held::READING);
        let grads = RmsNormGradients { x: false, weight: false };
        let launch = self.launch("rms_norm", geometry, grads, self.rows, vec![x, weight, y])?;
        Ok(buffers.plan(vec![launch]))
    }

    /// Inputs x, grad, weight (if any); outputs `grad_x` `[rows, columns]` and `grad_weight` `[columns]`, those wanted.
    pub fn backward(&self, wanted: RmsNormGradients, tuning: Tuning) -> Result<Plan, PlanError> {
        let elements = product(OP, "x", &[self.rows, self.columns])?;
        let wanted = RmsNormGradients { weight: wanted.weight && self.weight, ..wanted };
        let element = self.storage.element();
        let mut buffers = Buffers::default();
        let x = buffers.input("x", element, elements);
        let grad = buffers.input("grad", element, elements);
        let weight = self.weight_input(&mut buffers).unwrap_or(x);
        let grad_x = wanted.x.then(|| buffers.output("grad_x", element, elements));
        let grad_weight = wanted.weight.then(|| buffers.output("grad_weight", element, self.columns));
        let held = Held::summing(self.storage);
        let geometry = RowGeometry::choose(self.rows, self.columns, self.storage, tuning, held);
        let teams = if wanted.weight { partial_rows(self.rows, geometry) } else { self.rows };
        let partials = product(OP, "partial sums", &[teams, self.columns])?;
        let partial = wanted.weight.then(|| buffers.scratch("partial", Element::F32, partials));

        let mut launches = Vec::new();
        if elements > 0 && (wanted.x || wanted.weight) {
            // An output that is not wanted is never touched: x stands in its place.
            let arguments = vec![x, weight, grad, grad_x.unwrap_or(x), partial.unwrap_or(x)];
            launches.push(self.launch("rms_norm_backward", geometry, wanted, teams, arguments)?);
        }
        if let (Some(partial), Some(total)) = (partial, grad_weight) {
            launches.extend(column_sum::launch(
                OP,
                self.storage,
                tuning,
                teams,
                self.columns,
                (partial, total),
                None,
            )?);
        }
        Ok(buffers.plan(launches))
    }

    fn weight_input(&self, buffers: &mut Buffers) -> Option<usize> {
        self.weight.then(|| buffers.input("weight", self.storage.element(), self.columns))
    }

    fn launch(
        &self,
        kernel: &'static str,
        geometry: RowGeometry,
        grads: RmsNormGradients,
        teams: usize,
        arguments: Vec<usize>,
    ) -> Result<Launch, PlanError> {
        let mut defines = geometry.defines();
        defines.extend([
            flag("WEIGHT", self.weight),
            flag("WEIGHT_GRAD", grads.weight),
            flag("INPUT_GRAD", grads.x),
        ]);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::Role;

    fn defined(launch: &Launch, name: &str) -> usize {
        launch.defines.iter().find(|define| define.0 == name).unwrap().1.parse().unwrap()
    }

    fn op(rows: usize, columns: usize, storage: Storage) -> RmsNorm {
        RmsNorm { rows, columns, storage, weight: true, eps: 1e-6 }
    }

    #[test]
    fn every_row_has_one_team() {
        for storage in Storage::ALL {
            for (rows, columns) in
                [(1, 1), (1, 4096), (64, 1024), (257, 33), (4096, 64), (4096, 4097), (3, 131_072)]
            {
                let plan = op(rows, columns, storage).forward(Tuning::default()).unwrap();
                plan.check().unwrap();
                let launch = &plan.launches[0];
                let teams = launch.threads as usize / 32 / defined(launch, "ROW_SIMDGROUPS");
                let groups = launch.threadgroups[0] as usize;
                assert!(groups * teams >= rows && (groups - 1) * teams < rows, "{rows} rows: {launch:?}");
            }
        }
    }

    #[test]
    fn sums_over_rows_have_two_stages() {
        let all = RmsNormGradients { x: true, weight: true };
        let plan = op(4096, 1024, Storage::BF16).backward(all, Tuning::default()).unwrap();
        plan.check().unwrap();
        let kernels: Vec<_> = plan.launches.iter().map(|launch| launch.kernel).collect();
        assert_eq!(kernels[0], "rms_norm_backward");
        assert_eq!(kernels[1..], ["column_sum"; 1]);
        assert_eq!(plan.with_role(Role::Output).count(), 2);
        assert!(plan.with_role(Role::Scratch).all(|(_, partial)| partial.len == 1024 * 1024));
    }

    #[test]
    fn what_nobody_wants_is_not_computed() {
        let x_only = RmsNormGradients { x: true, weight: false };
        let plan = op(64, 1024, Storage::F32).backward(x_only, Tuning::default()).unwrap();
        assert_eq!((plan.launches.len(), plan.with_role(Role::Scratch).count()), (1, 0));
        let nothing = RmsNormGradients { x: false, ..x_only };
        assert!(op(64, 1024, Storage::F32).backward(nothing, Tuning::default()).unwrap().launches.is_empty());
        assert!(op(0, 1024, Storage::F32).forward(Tuning::default()).unwrap().launches.is_empty());
    }
}
