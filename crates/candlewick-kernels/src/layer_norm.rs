//! Plans of layer norm; the mathematics is at the head of `kernels/layer_norm.metal`.

use crate::column_sum;
use crate::launch::{Element, KernelFile, Launch, Plan, PlanError, Storage};
use crate::params::{Buffers, Params, Tuning, flag, groups, product, size};
use crate::rows::{Held, RowGeometry, SCRATCH_BYTES, partial_rows};

const OP: &str = "layer_norm";

/// A layer norm over the last of `rows` × `columns`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerNorm {
    /// The product of all dimensions but the last.
    pub rows: usize,
    /// The last dimension.
    pub columns: usize,
    /// x's type, and the weight's, the bias' and the gradients'.
    pub storage: Storage,
    /// Whether there is a weight `[columns]`.
    pub weight: bool,
    /// Whether there is a bias `[columns]`.
    pub bias: bool,
    /// Added to the variance.
    pub eps: f32,
}

/// Which gradients a backward computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerNormGradients {
    /// x's.
    pub x: bool,
    /// The weight's; without a weight it is left out.
    pub weight: bool,
    /// The bias'; without a bias it is left out.
    pub bias: bool,
}

impl LayerNorm {
    /// Inputs x, weight (if any), bias (if any); output y.
    pub fn forward(&self, tuning: Tuning) -> Result<Plan, PlanError> {
        let elements = product(OP, "x", &[self.rows, self.columns])?;
        let element = self.storage.element();
        let mut buffers = Buffers::default();
        let x = buffers.input("x", element, elements);
        let weight = if self.weight { buffers.input("weight", element, self.columns) } else { x };
        let bias = if self.bias { buffers.input("bias", element, self.columns) } else { x };
        let y = buffers.output("y", element, elements);
        if elements == 0 {
            return Ok(buffers.plan(Vec::new()));
        }
        let held = Held::computing(self.storage, self.columns);
        let geometry = RowGeometry::choose(self.rows, self.columns, self.storage, tuning, held);
        let grads = LayerNormGradients { x: false, weight: false, bias: false };
        let launch = self.launch("layer_norm", geometry, grads, self.rows, vec![x, weight, bias, y])?;
        Ok(buffers.plan(vec![launch]))
    }

    /// Inputs x, grad, weight (if any); outputs `grad_x`, `grad_weight`, `grad_bias`, those wanted.
    pub fn backward(&self, wanted: LayerNormGradients, tuning: Tuning) -> Result<Plan, PlanError> {
        let elements = product(OP, "x", &[self.rows, self.columns])?;
        let wanted = LayerNormGradients {
            weight: wanted.weight && self.weight,
            bias: wanted.bias && self.bias,
            ..wanted
        };
        let sums = wanted.weight || wanted.bias;
        let element = self.storage.element();
        let mut buffers = Buffers::default();
        let x = buffers.input("x", element, elements);
        let grad = buffers.input("grad", element, elements);
        let weight = if self.weight { buffers.input("weight", element, self.columns) } else { x };
        let grad_x = wanted.x.then(|| buffers.output("grad_x", element, elements));
        let grad_weight = wanted.weight.then(|| buffers.output("grad_weight", element, self.columns));
        let grad_bias = wanted.bias.then(|| buffers.output("grad_bias", element, self.columns));
        let held = Held::summing(self.storage);
        let geometry = RowGeometry::choose(self.rows, self.columns, self.storage, tuning, held);
        let teams = if sums { partial_rows(self.rows, geometry) } else { self.rows };
        let partials = product(OP, "partial sums", &[teams, self.columns])?;
        let weight_partial = wanted.weight.then(|| buffers.scratch("weight_partial", Element::F32, partials));
        let bias_partial = wanted.bias.then(|| buffers.scratch("bias_partial", Element::F32, partials));

        let mut launches = Vec::new();
        if elements > 0 && (wanted.x || sums) {
            // An output that is not wanted is never touched: x stands in its place.
            let partials = [weight_partial.unwrap_or(x), bias_partial.unwrap_or(x)];
            let arguments = vec![x, weight, grad, grad_x.unwrap_or(x), partials[0], partials[1]];
            launches.push(self.launch("layer_norm_backward", geometry, wanted, teams, arguments)?);
        }
        let mut ends = [weight_partial.zip(grad_weight), bias_partial.zip(grad_bias)].into_iter().flatten();
        if let Some(first) = ends.next() {
            let sum = column_sum::launch(OP, self.storage, tuning, teams, self.columns, first, ends.next())?;
            launches.extend(sum);
        }
        Ok(buffers.plan(launches))
    }

    fn launch(
        &self,
        kernel: &'static str,
        geometry: RowGeometry,
        grads: LayerNormGradients,
        teams: usize,
        arguments: Vec<usize>,
    ) -> Result<Launch, PlanError> {
        let mut defines = geometry.defines();
        defines.extend([
            flag("WEIGHT", self.weight),
            flag("BIAS", self.bias),
            flag("WEIGHT_GRAD", grads.weight),
            flag("BIAS_GRAD", grads.bias),
            flag("INPUT_GRAD", grads.x),
        ]);
        Ok(Launch {
            kernel,
            file: KernelFile::LayerNorm,
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

    fn op(rows: usize, columns: usize, storage: Storage) -> LayerNorm {
        LayerNorm { rows, columns, storage, weight: true, bias: true, eps: 1e-6 }
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
        let all = LayerNormGradients { x: true, weight: true, bias: true };
        let plan = op(4096, 1024, Storage::BF16).backward(all, Tuning::default()).unwrap();
        plan.check().unwrap();
        let kernels: Vec<_> = plan.launches.iter().map(|launch| launch.kernel).collect();
        assert_eq!(kernels[0], "layer_norm_backward");
        assert_eq!(kernels[1..], ["column_sum"; 1]);
        assert_eq!(plan.with_role(Role::Output).count(), 3);
        assert!(plan.with_role(Role::Scratch).all(|(_, partial)| partial.len == 1024 * 1024));
    }

    #[test]
    fn what_nobody_wants_is_not_computed() {
        let x_only = LayerNormGradients { x: true, weight: false, bias: false };
        let plan = op(64, 1024, Storage::F32).backward(x_only, Tuning::default()).unwrap();
        assert_eq!((plan.launches.len(), plan.with_role(Role::Scratch).count()), (1, 0));
        let nothing = LayerNormGradients { x: false, ..x_only };
        assert!(op(64, 1024, Storage::F32).backward(nothing, Tuning::default()).unwrap().launches.is_empty());
        assert!(op(0, 1024, Storage::F32).forward(Tuning::default()).unwrap().launches.is_empty());
    }
}
