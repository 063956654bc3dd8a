//! Every op of the crate, with sample plans: what the checks on the text run over, and what `wick kernels` prints.

use crate::gated::{Gate, GatedGradients, GatedMul};
use crate::launch::{Element, Launch, Plan, PlanError, Storage, Target};
use crate::params::Tuning;
use crate::{adam, add, attention, cross_entropy, layer_norm, lora, rms_norm, rope, softmax};

/// What an entry point's name alone stands for: the first launch of it among the sample plans of all ops.
///
/// Texts are specialised by `#define`s, so that a name has many; this is the one of an ordinary call (aligned buffers,
/// all gradients). `None` where no op has such an entry point.
#[must_use]
pub fn launch_named(kernel: &str, storage: Storage) -> Option<Launch> {
    let launches = ops().iter().filter_map(|op| op.sample_launches(storage).ok()).flatten();
    launches.into_iter().find(|launch| launch.kernel == kernel)
}

/// An op that has kernels.
#[derive(Clone, Copy, Debug)]
pub struct Op {
    /// Its name in the public API.
    pub name: &'static str,
    samples: fn(Storage, &mut Samples) -> Result<(), PlanError>,
}

/// Collects sample plans.
#[derive(Debug, Default)]
struct Samples(Vec<Plan>);

impl Samples {
    /// A plan for aligned buffers and one for unaligned ones.
    fn add(&mut self, plan: impl Fn(Tuning) -> Result<Plan, PlanError>) -> Result<(), PlanError> {
        self.add_for(true, &plan)?;
        self.add_for(false, &plan)
    }

    /// A plan for buffers that are aligned, or not.
    fn add_for(
        &mut self,
        aligned: bool,
        plan: impl Fn(Tuning) -> Result<Plan, PlanError>,
    ) -> Result<(), PlanError> {
        self.0.push(plan(Tuning { aligned, ..Tuning::default() })?);
        Ok(())
    }
}

/// Every op, in alphabetical order.
#[must_use]
pub const fn ops() -> &'static [Op] {
    &[
        Op { name: "adam", samples: adam_samples },
        Op { name: "add", samples: add_samples },
        Op { name: "attention", samples: attention_samples },
        Op { name: "cross_entropy", samples: cross_entropy_samples },
        Op { name: "gelu_mul", samples: gelu_mul_samples },
        Op { name: "layer_norm", samples: layer_norm_samples },
        Op { name: "lora_delta", samples: lora_delta_samples },
        Op { name: "lora_linear", samples: lora_linear_samples },
        Op { name: "rms_norm", samples: rms_norm_samples },
        Op { name: "rope", samples: rope_samples },
        Op { name: "silu_mul", samples: silu_mul_samples },
        Op { name: "softmax", samples: softmax_samples },
    ]
}

impl Op {
    /// Plans that together use every entry point of the op and every path through its text.
    pub fn sample_plans(&self, storage: Storage) -> Result<Vec<Plan>, PlanError> {
        let mut samples = Samples::default();
        (self.samples)(storage, &mut samples)?;
        Ok(samples.0)
    }

    /// One text of each kernel file that the op uses, as assembled for a target, with the launch it is for.
    pub fn texts(&self, target: Target, storage: Storage) -> Result<Vec<(Launch, String)>, PlanError> {
        let mut texts: Vec<(Launch, String)> = Vec::new();
        for launch in self.sample_launches(storage)? {
            if texts.iter().all(|(seen, _)| seen.file != launch.file) {
                let source = launch.source(target);
                texts.push((launch, source));
            }
        }
        Ok(texts)
    }

    /// The launches of the sample plans whose texts differ, in order.
    pub fn sample_launches(&self, storage: Storage) -> Result<Vec<Launch>, PlanError> {
        let mut launches: Vec<Launch> = Vec::new();
        for launch in self.sample_plans(storage)?.into_iter().flat_map(|plan| plan.launches) {
            let same = |seen: &Launch| {
                (seen.kernel, seen.file, seen.storage, &seen.defines)
                    == (launch.kernel, launch.file, launch.storage, &launch.defines)
            };
            if !launches.iter().any(same) {
                launches.push(launch);
            }
        }
        Ok(launches)
    }
}

/// Rows, columns and alignment that meet every row geometry: a simdgroup a row, a threadgroup a row in one or in
/// several chunks, rows that are walked.
const ROW_SHAPES: [(usize, usize, bool); 4] =
    [(4096, 64, true), (4096, 4096, false), (64, 1024, true), (2, 131_072, true)];

fn rms_norm_samples(storage: Storage, samples: &mut Samples) -> Result<(), PlanError> {
    let both = rms_norm::RmsNormGradients { x: true, weight: true };
    for (rows, columns, aligned) in ROW_SHAPES {
        let op = rms_norm::RmsNorm { rows, columns, storage, weight: true, eps: 1e-6 };
        samples.add_for(aligned, |tuning| op.forward(tuning))?;
        samples.add_for(aligned, |tuning| op.backward(both, tuning))?;
    }
    let op = rms_norm::RmsNorm { rows: 64, columns: 1024, storage, weight: true, eps: 1e-6 };
    samples.add(|tuning| op.backward(rms_norm::RmsNormGradients { x: false, ..both }, tuning))?;
    samples.add(|tuning| op.backward(rms_norm::RmsNormGradients { weight: false, ..both }, tuning))?;
    let plain = rms_norm::RmsNorm { weight: false, ..op };
    samples.add(|tuning| plain.forward(tuning))?;
    samples.add(|tuning| plain.backward(both, tuning))
}

fn layer_norm_samples(storage: Storage, samples: &mut Samples) -> Result<(), PlanError> {
    let all = layer_norm::LayerNormGradients { x: true, weight: true, bias: true };
    for (rows, columns, aligned) in ROW_SHAPES {
        let op = layer_norm::LayerNorm { rows, columns, storage, weight: true, bias: true, eps: 1e-5 };
        samples.add_for(aligned, |tuning| op.forward(tuning))?;
        samples.add_for(aligned, |tuning| op.backward(all, tuning))?;
    }
    for (weight, bias) in [(true, false), (false, false)] {
        let op = layer_norm::LayerNorm { rows: 64, columns: 1024, storage, weight, bias, eps: 1e-5 };
        samples.add(|tuning| op.forward(tuning))?;
        samples.add(|tuning| op.backward(all, tuning))?;
        samples.add(|tuning| op.backward(layer_norm::LayerNormGradients { x: false, ..all }, tuning))?;
    }
    Ok(())
}

fn softmax_samples(storage: Storage, samples: &mut Samples) -> Result<(), PlanError> {
    for (rows, columns, aligned) in ROW_SHAPES {
        for causal_queries in [None, Some(2)] {
            let op = softmax::Softmax { rows, columns, storage, scale: 0.125, causal_queries };
            samples.add_for(aligned, |tuning| op.forward(tuning))?;
        }
        let op = softmax::Softmax { rows, columns, storage, scale: 0.125, causal_queries: None };
        samples.add_for(aligned, |tuning| op.backward(tuning))?;
    }
    Ok(())
}

/// In f32 alone, as optimizers compute.
fn adam_samples(storage: Storage, samples: &mut Samples) -> Result<(), PlanError> {
    if storage != Storage::F32 {
        return Ok(());
    }
    let op = adam::Adam {
        elements: 4099,
        new1: 0.1,
        old2: 0.999,
        new2: 0.001,
        eps: 1e-8,
        rate: 1e-3,
        part: 1.0,
        shrink: 1.0,
        l2: 0.0,
    };
    samples.add(|tuning| op.step(tuning))
}

fn add_samples(storage: Storage, samples: &mut Samples) -> Result<(), PlanError> {
    samples.add(|tuning| add::Add { elements: 4099, storage }.forward(tuning))
}

/// None in f32, which the matrix units of CUDA do not multiply exactly.
fn attention_samples(storage: Storage, samples: &mut Samples) -> Result<(), PlanError> {
    use attention::{Attention, AttentionGradients};
    if storage == Storage::F32 {
        return Ok(());
    }
    for (width, causal) in [(16, false), (64, true), (64, false), (96, true), (128, true)] {
        let strides = |heads| Attention::contiguous(100, heads, width);
        let (q, k, v) = (strides(4), strides(2), strides(2));
        let op = Attention {
            batch: 2,
            queries: 100,
            keys: 100,
            heads: 4,
            kv_heads: 2,
            width,
            q,
            k,
            v,
            storage,
            scale: 0.125,
            causal,
        };
        samples.add_for(true, |tuning| op.forward(tuning))?;
        for (k, v) in [(true, true), (true, false), (false, true)] {
            let wanted = AttentionGradients { q: true, k, v };
            samples.add_for(true, |tuning| op.backward(q, wanted, tuning))?;
        }
    }
    Ok(())
}

fn rope_samples(storage: Storage, samples: &mut Samples) -> Result<(), PlanError> {
    for interleaved in [true, false] {
        for table in [Storage::F32, storage] {
            let op = rope::Rope {
                batch: 2,
                heads: 4,
                positions: 16,
                columns: 64,
                rotary: 32,
                strides: rope::Rope::contiguous(4, 16, 64),
                batched_table: false,
                interleaved,
                storage,
                table,
            };
            samples.add(|tuning| op.forward(tuning))?;
            samples.add(|tuning| op.backward(tuning))?;
        }
    }
    Ok(())
}

fn silu_mul_samples(storage: Storage, samples: &mut Samples) -> Result<(), PlanError> {
    gated_samples(Gate::Silu, storage, samples)
}

fn gelu_mul_samples(storage: Storage, samples: &mut Samples) -> Result<(), PlanError> {
    gated_samples(Gate::Gelu, storage, samples)
}

fn gated_samples(f: Gate, storage: Storage, samples: &mut Samples) -> Result<(), PlanError> {
    let op = GatedMul { f, elements: 4099, storage };
    samples.add(|tuning| op.forward(tuning))?;
    samples.add(|tuning| op.backward(GatedGradients { gate: true, up: true }, tuning))
}

fn cross_entropy_samples(storage: Storage, samples: &mut Samples) -> Result<(), PlanError> {
    for (targets, shapes) in [(Element::I64, &ROW_SHAPES[..]), (Element::U32, &ROW_SHAPES[..1])] {
        for &(rows, columns, aligned) in shapes {
            let op =
                cross_entropy::CrossEntropy { rows, columns, storage, targets, ignore_index: Some(-100) };
            samples.add_for(aligned, |tuning| op.forward(tuning))?;
            samples.add_for(aligned, |tuning| op.backward(tuning))?;
        }
    }
    Ok(())
}

/// Both layouts of the factors, and factors wider than x.
fn lora_sample(rows: usize, rank: usize, storage: Storage, adapter: Storage, peft: bool) -> lora::Lora {
    let (inputs, outputs) = (512, 1024);
    let by_rank = lora::FactorStrides::rank_major;
    let by_column = lora::FactorStrides::column_major(rank);
    lora::Lora {
        rows,
        inputs,
        outputs,
        rank,
        storage,
        adapter,
        a: if peft { by_rank(inputs) } else { by_column },
        b: if peft { by_column } else { by_rank(outputs) },
        scaling: 2.0,
        dropout: None,
        base: false,
    }
}

fn lora_delta_samples(storage: Storage, samples: &mut Samples) -> Result<(), PlanError> {
    let wanted = lora::LoraGradients { x: true, a: true, b: true };
    for peft in [true, false] {
        for (rows, rank, adapter) in [(1, 8, storage), (64, 3, storage), (2048, 16, Storage::F32)] {
            let op = lora_sample(rows, rank, storage, adapter, peft);
            samples.add_for(true, |tuning| op.forward(tuning))?;
            samples.add_for(true, |tuning| op.backward(wanted, tuning))?;
        }
        let op = lora_sample(300, 8, storage, storage, peft);
        samples.add_for(false, |tuning| op.backward(wanted, tuning))?;
    }
    Ok(())
}

fn lora_linear_samples(storage: Storage, samples: &mut Samples) -> Result<(), PlanError> {
    let dropout = lora::Dropout { p: 0.1, seed: 42 };
    for dropout in [None, Some(dropout)] {
        for rows in [1, 2048] {
            let plain = lora_sample(rows, 8, storage, storage, true);
            let op = lora::Lora { base: true, dropout, ..plain };
            let wanted = lora::LoraGradients { x: true, a: true, b: true };
            samples.add_for(rows == 1, |tuning| op.forward(tuning))?;
            samples.add_for(rows == 1, |tuning| op.backward(wanted, tuning))?;
        }
    }
    let dropout = Some(lora::Dropout { p: 0.1, seed: 42 });
    samples.add(|tuning| lora::Lora { dropout, ..lora_sample(1, 8, storage, storage, true) }.mask(tuning))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::{KernelFile, Role};

    #[test]
    fn sample_plans_are_within_limits_and_write_every_output() {
        for op in ops() {
            for storage in Storage::ALL {
                for plan in op.sample_plans(storage).unwrap() {
                    plan.check().unwrap();
                    for (index, buffer) in plan.buffers.iter().enumerate() {
                        let used = plan.launches.iter().any(|launch| launch.arguments.contains(&index));
                        assert!(
                            used || buffer.role == Role::Input,
                            "{}: nobody writes {}",
                            op.name,
                            buffer.name
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn every_entry_point_has_a_launch_by_its_name() {
        let mut names = 0;
        for file in KernelFile::ALL {
            for line in file.source().text.lines() {
                let Some(rest) = line.strip_prefix("KERNEL(") else { continue };
                let name = rest.split(',').next().unwrap();
                // Some ops are for some storage types only.
                let is_missing = |storage| match file {
                    KernelFile::Adam => storage != Storage::F32,
                    file => file.needs_matrix_units() && storage == Storage::F32,
                };
                for storage in Storage::ALL {
                    if is_missing(storage) {
                        assert_eq!(launch_named(name, storage), None);
                        continue;
                    }
                    let launch = launch_named(name, storage).unwrap_or_else(|| panic!("no launch of {name}"));
                    assert_eq!((launch.kernel, launch.file, launch.storage), (name, file, storage));
                }
                names += 1;
            }
        }
        assert!(names > KernelFile::ALL.len(), "{names}");
        assert_eq!(launch_named("no_such_kernel", Storage::F32), None);
    }

    #[test]
    fn ops_are_in_order() {
        assert!(ops().is_sorted_by_key(|op| op.name));
    }
}
