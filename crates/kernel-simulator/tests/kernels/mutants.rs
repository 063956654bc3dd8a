//! Planted bugs: the real kernels with one small change each, of the kind that people make. The simulator must
//! see every one of them. A change that no longer applies fails the test: the kernels and this list move together.

use crate::case::{Case, Size};
use crate::cases::{adam, add, attention, cross_entropy, gated, layer_norm, lora, rms_norm, rope, softmax};
use crate::mutant_list::MUTANTS;
use candlewick_kernels::attention::AttentionGradients;
use candlewick_kernels::gated::Gate;
use candlewick_kernels::{Element, KernelFile, Launch, Plan, Storage, Target, Tuning};
use kernel_simulator::{Kind, Simulator, Site};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// One planted bug.
pub struct Mutant {
    /// What was done.
    pub name: &'static str,
    /// The plan and inputs that show it.
    pub shown_by: Shown,
    pub change: Change,
    /// What must be reported; one of these, where the order of threads decides.
    pub kinds: &'static [Kind],
}

/// The change that makes a kernel wrong.
pub enum Change {
    /// The first text, which the assembled text holds exactly once, becomes the second.
    Text(&'static str, &'static str),
    Plan(fn(&mut Plan)),
}

/// The cases that mutants are shown by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shown {
    /// A threadgroup a row, the row in registers, in vectors.
    RmsNorm,
    RmsNormBackward,
    /// A simdgroup a row.
    RmsNormManyRows,
    /// Rows too long for registers, more of them than teams; and many partial sums.
    RmsNormWalkedBackward,
    Softmax,
    SoftmaxBackward,
    LayerNorm,
    LayerNormBackward,
    Rope,
    RopeInterleaved,
    SiluMul,
    SiluMulBackward,
    GeluMulBackward,
    CrossEntropy,
    CrossEntropyBackward,
    Lora,
    LoraBackward,
    /// With rows enough for several parts of the factors' gradients.
    LoraBackwardManyRows,
    LoraMask,
    /// Three blocks of keys, which the first queries do not see, and fewer queries than the threadgroups have rows.
    Attention,
    AttentionBackward,
    Add,
    Adam,
}

impl Shown {
    const ALL: [Self; 23] = [
        Self::RmsNorm,
        Self::RmsNormBackward,
        Self::RmsNormManyRows,
        Self::RmsNormWalkedBackward,
        Self::Softmax,
        Self::SoftmaxBackward,
        Self::LayerNorm,
        Self::LayerNormBackward,
        Self::Rope,
        Self::RopeInterleaved,
        Self::SiluMul,
        Self::SiluMulBackward,
        Self::GeluMulBackward,
        Self::CrossEntropy,
        Self::CrossEntropyBackward,
        Self::Lora,
        Self::LoraBackward,
        Self::LoraBackwardManyRows,
        Self::LoraMask,
        Self::Attention,
        Self::AttentionBackward,
        Self::Add,
        Self::Adam,
    ];

    fn case(self) -> Case {
        let size = |rows, columns| Size::new(Storage::F32, rows, columns);
        let heads = Size::new(Storage::BF16, 70, 4);
        let all = AttentionGradients { q: true, k: true, v: true };
        let walked = Size { tuning: Tuning { max_threads: 64, ..Tuning::default() }, ..size(100, 4096) };
        match self {
            Self::RmsNorm => rms_norm::forward(size(3, 1000)),
            Self::RmsNormBackward => rms_norm::backward(size(3, 1000)),
            Self::RmsNormManyRows => rms_norm::forward(size(260, 33)),
            Self::RmsNormWalkedBackward => rms_norm::backward(walked),
            Self::Softmax => softmax::forward(size(3, 1000), false),
            Self::SoftmaxBackward => softmax::backward(size(3, 1000)),
            Self::LayerNorm => layer_norm::forward(size(3, 1000)),
            Self::LayerNormBackward => layer_norm::backward(size(3, 1000)),
            Self::Rope => rope::case(size(3, 64), false, false),
            Self::RopeInterleaved => rope::case(size(3, 64), true, false),
            Self::SiluMul => gated::forward(Gate::Silu, size(3, 257)),
            Self::SiluMulBackward => gated::backward(Gate::Silu, size(3, 257)),
            Self::GeluMulBackward => gated::backward(Gate::Gelu, size(3, 257)),
            Self::CrossEntropy => cross_entropy::forward(size(260, 300), Element::I64, false),
            Self::CrossEntropyBackward => cross_entropy::backward(size(3, 300), Element::I64),
            Self::Lora => lora::forward(size(70, 256), lora::peft(size(70, 256), 320)),
            Self::LoraBackward => lora::backward(size(3, 100), lora::peft(size(3, 100), 60)),
            Self::LoraBackwardManyRows => lora::backward(size(70, 100), lora::peft(size(70, 100), 60)),
            Self::LoraMask => lora::mask(size(3, 100), lora::with_dropout(lora::peft(size(3, 100), 60))),
            Self::Adam => adam::step(size(3, 257)),
            Self::Add => add::forward(size(3, 257)),
            Self::Attention => attention::forward(heads, true),
            Self::AttentionBackward => attention::backward(heads, true, all),
        }
    }
}

impl Mutant {
    /// Runs the mutant. What went wrong with the search for its bug.
    fn hunt(&self, simulator: &Simulator) -> Result<(), String> {
        let case = self.shown_by.case();
        let mut plan = case.plan.clone();
        let applied = AtomicUsize::new(0);
        let text = |launch: &Launch| {
            let text = launch.source(Target::Simulator);
            match self.change {
                Change::Text(from, to) => {
                    applied.fetch_max(text.matches(from).count(), Ordering::Relaxed);
                    text.replace(from, to)
                }
                Change::Plan(_) => text,
            }
        };
        if let Change::Plan(change) = self.change {
            change(&mut plan);
        }
        let run = simulator.run_text(&plan, &case.inputs(), &text).map_err(|error| error.to_string())?;
        let applied = applied.into_inner();
        if matches!(self.change, Change::Text(..)) && applied != 1 {
            return Err(format!("its text is found {applied} times"));
        }
        if run.reports.iter().any(|report| self.kinds.contains(&report.kind)) {
            Ok(())
        } else {
            Err(format!("{:?} is not reported, but: {run}", self.kinds))
        }
    }
}

#[test]
fn every_planted_bug_is_caught() {
    // A mutant's loop may well be endless.
    let simulator = Simulator::new().unwrap().with_step_limit(20_000_000);
    let next = AtomicUsize::new(0);
    let work = || {
        let mut escaped = Vec::new();
        while let Some(mutant) = MUTANTS.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(why) = mutant.hunt(&simulator) {
                escaped.push(format!("{:?}, {}: {why}", mutant.shown_by, mutant.name));
            }
        }
        escaped
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let escaped: Vec<_> = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
    });
    println!("{} of {} planted bugs caught", MUTANTS.len() - escaped.len(), MUTANTS.len());
    assert!(escaped.is_empty(), "{} escaped:\n{}", escaped.len(), escaped.join("\n"));
}

#[test]
fn without_a_bug_the_same_cases_are_clean() {
    let simulator = Simulator::new().unwrap();
    for shown in Shown::ALL {
        if let Err(why) = shown.case().check(&simulator) {
            panic!("{shown:?}: {why}");
        }
    }
}

/// A report says where: the line of the text, the buffer, the byte, the thread.
#[test]
fn a_report_names_the_place() {
    let simulator = Simulator::new().unwrap();
    let case = Shown::SiluMulBackward.case();
    let (from, to) = ("store_chunk(grad_up + at, g)", "store_chunk((DEVICE T*)up + at, g)");
    let text = |launch: &Launch| launch.source(Target::Simulator).replace(from, to);
    let run = simulator.run_text(&case.plan, &case.inputs(), &text).unwrap();
    let [report] = &run.reports[..] else { panic!("{run}") };
    let file = KernelFile::SiluMul.source();
    let line = file.text.lines().position(|line| line.contains(from)).unwrap() + 1;

    assert_eq!((report.kind, report.kernel.as_str()), (Kind::WriteToInput, "silu_mul_backward"));
    // store_chunk is where it happens, and the kernel is where it is called from.
    assert_eq!(report.site.as_ref().map(|site| site.file.as_str()), Some("chunk.h"));
    let caller = Site { file: "silu_mul.metal".into(), line: line.try_into().unwrap() };
    assert_eq!(report.callers.first(), Some(&caller));
    let thread = report.thread.unwrap();
    let index = i64::from(thread.threadgroup[0] * case.plan.launches[0].threads + thread.thread);
    assert_eq!(report.buffer.as_deref(), Some("up"));
    assert_eq!(report.offset, Some(16 * index), "a chunk is 16 bytes");
}
