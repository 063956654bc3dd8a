//! The training loop on a model that can be checked by hand.

#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_precision_loss, reason = "a test")]

mod training_model;

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Device, Tensor, Var};
use candlewick::data::{Batches, Dataset, Position, Sequence, in_order};
use candlewick::train::{
    Event, Job, Optimizer, OptimizerConfig, OptimizerKind, Parameter, ScheduleKind, Start, Summary,
    TrainConfig, Trainable, accumulate, evaluate, train,
};
use candlewick::{Error, Result};
use training_model::{
    Bigram, Fault, TextFile, VOCABULARY, config, dataset, files, message, random, timeless,
};

/// Runs into `folder`; sets the stop flag once step `stop_at` is done.
fn run(
    model: &Bigram,
    folder: &Path,
    config: &TrainConfig,
    start: Start,
    stop_at: usize,
) -> (Result<Summary>, Vec<Event>) {
    let (training, valid) = (dataset(10, 31), dataset(11, 9));
    let settings = [("rank".to_owned(), "4".to_owned())];
    let artifacts = TextFile(model);
    let job = Job {
        model,
        artifacts: &artifacts,
        train: &training,
        valid: Some(&valid),
        folder,
        settings: &settings,
        start,
    };
    let stop = AtomicBool::new(false);
    let mut events = Vec::new();
    let summary = train(&job, config, &stop, &mut |event| {
        if matches!(event, Event::Step { iter, .. } if iter == stop_at) {
            stop.store(true, Ordering::Relaxed);
        }
        events.push(event);
    });
    (summary, events)
}

#[test]
fn accumulation_equals_one_big_batch() {
    let mut model = Bigram::new();
    model.dropout = 0.0;
    // B away from zero, so that A has a gradient too.
    model.parameters()[1].var.set(&random(9, &[VOCABULARY, 4])).unwrap();
    let data = dataset(3, 12);
    let batches = |size| in_order(&data, size, &Device::Cpu).unwrap().collect::<Result<Vec<_>>>().unwrap();
    let (whole, parts) = (batches(12), batches(5));
    assert_eq!((whole.len(), parts.len()), (1, 3));
    let (loss, gradients) = accumulate(&model, &whole, 1, |_| 0).unwrap();
    let (sum, accumulated) = accumulate(&model, &parts, 1, |_| 0).unwrap();
    assert!((loss - sum).abs() < 1e-6, "{loss} {sum}");
    for (a, b) in gradients.tensors().iter().zip(accumulated.tensors()) {
        let (a, b) = (a.as_ref().unwrap(), b.as_ref().unwrap());
        let distance = (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(distance < 1e-7, "{distance}");
    }
    // The batches have differing numbers of tokens: the mean of their losses is something else.
    let mean = parts
        .iter()
        .map(|part| accumulate(&model, std::slice::from_ref(part), 1, |_| 0).unwrap().0)
        .sum::<f64>();
    assert!((mean / 3.0 - loss).abs() > 1e-3);
}

/// Adam and AdamW from the papers, in f64.
fn expected(
    config: OptimizerConfig,
    start: &[f64],
    gradients: &[Vec<f64>],
    rates: &[f64],
    decay: f64,
) -> Vec<f64> {
    let OptimizerConfig { kind, beta1, beta2, eps, .. } = config;
    let one = |(index, &start): (usize, &f64)| {
        let (mut value, mut first, mut second) = (start, 0.0, 0.0);
        for (step, (gradient, rate)) in (1..).zip(gradients.iter().zip(rates)) {
            let mut g = gradient[index];
            match kind {
                OptimizerKind::Adam => g += decay * value,
                OptimizerKind::AdamW => value -= rate * decay * value,
            }
            first = beta1 * first + (1.0 - beta1) * g;
            second = beta2 * second + (1.0 - beta2) * g * g;
            let (m, v) = (first / (1.0 - beta1.powi(step)), second / (1.0 - beta2.powi(step)));
            value -= rate * m / (v.sqrt() + eps);
        }
        value
    };
    start.iter().enumerate().map(one).collect()
}

#[test]
fn the_optimizers_follow_their_formulas() {
    const STEPS: usize = 60;
    for (kind, weight_decay, dims) in [
        (OptimizerKind::AdamW, 0.1, vec![3, 4]),
        (OptimizerKind::AdamW, 0.1, vec![12]),
        (OptimizerKind::Adam, 0.1, vec![3, 4]),
        (OptimizerKind::Adam, 0.0, vec![12]),
    ] {
        let config = OptimizerConfig { kind, weight_decay, ..OptimizerConfig::default() };
        // w ↦ Σ c·w: its gradient is c.
        let var = Var::from_tensor(&random(20, &dims)).unwrap();
        let parameter = Parameter { name: "w".to_owned(), var, zero_first_gradient: false };
        let start: Vec<f64> = values(&parameter.var).into_iter().map(f64::from).collect();
        let mut optimizer = Optimizer::new(config, std::slice::from_ref(&parameter)).unwrap();
        // Gradients about 1, 1e-4 and 1e-8: for the last, ε is as large as the root.
        let scales: Vec<f32> = (0..12).map(|at| 10_f32.powi(-4 * (at % 3))).collect();
        let scales = Tensor::from_vec(scales, &dims[..], &Device::Cpu).unwrap();
        let mut gradients = Vec::new();
        let mut rates = Vec::new();
        for step in 0..STEPS {
            let c = (random(100 + step as u64, &dims) * &scales).unwrap();
            gradients.push(values(&c).into_iter().map(f64::from).collect());
            rates.push(0.01 / (1.0 + step as f64));
            let model = Linear { parameter: vec![parameter.clone()], c };
            let batch = in_order(&dataset(1, 1), 1, &Device::Cpu).unwrap().next().unwrap().unwrap();
            let (_, got) = accumulate(&model, &[batch], 1, |_| 0).unwrap();
            optimizer.step(&model.parameter, &got, rates[step]).unwrap();
        }
        assert_eq!(optimizer.steps(), STEPS);
        let decay = if dims.len() == 2 { weight_decay } else { 0.0 };
        let expected = expected(config, &start, &gradients, &rates, decay);
        for (got, expected) in values(&parameter.var).into_iter().zip(expected) {
            assert!((f64::from(got) - expected).abs() < 1e-6, "{kind:?} {dims:?}: {got} is not {expected}");
        }
    }
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

struct Linear {
    parameter: Vec<Parameter>,
    c: Tensor,
}

impl Trainable for Linear {
    fn parameters(&self) -> &[Parameter] {
        &self.parameter
    }

    fn loss(&self, _: &candlewick::train::Batch, _: candlewick::train::Pass) -> Result<Tensor> {
        let w = self.parameter[0].var.as_tensor();
        Ok((w.to_dtype(DType::F32)? * &self.c)?.sum_all()?)
    }
}

#[test]
fn sixteen_bit_parameters_add_up_small_updates() {
    let var = Var::from_tensor(&Tensor::ones((1, 2), DType::BF16, &Device::Cpu).unwrap()).unwrap();
    let model = Linear {
        parameter: vec![Parameter { name: "w".to_owned(), var, zero_first_gradient: false }],
        c: Tensor::ones((1, 2), DType::F32, &Device::Cpu).unwrap(),
    };
    let config = OptimizerConfig { weight_decay: 0.0, ..OptimizerConfig::default() };
    let mut optimizer = Optimizer::new(config, &model.parameter).unwrap();
    let batch = in_order(&dataset(1, 1), 1, &Device::Cpu).unwrap().next().unwrap().unwrap();
    // Every step moves w by -1e-4, a fortieth of what bf16 can tell from 1.
    for _ in 0..200 {
        let (_, gradients) = accumulate(&model, std::slice::from_ref(&batch), 1, |_| 0).unwrap();
        optimizer.step(&model.parameter, &gradients, 1e-4).unwrap();
    }
    assert_eq!(values(&model.parameter[0].var), [0.980_468_75; 2]);
}

#[test]
fn the_model_learns_and_events_come_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let model = Bigram::new();
    let (summary, events) = run(&model, folder.path(), &config(60), Start::New, 0);
    let summary = summary.unwrap();
    assert!(!summary.stopped);
    assert_eq!((summary.steps, summary.checkpoint), (60, Some(folder.path().join("checkpoint-60"))));
    let (first, last) = (summary.first_validation.unwrap(), summary.last_validation.unwrap());
    assert!(last < 0.8 * first, "{first} {last}");

    let pick = |pick: fn(&Event) -> Option<usize>| events.iter().filter_map(pick).collect::<Vec<_>>();
    assert!(matches!(events[0], Event::Started { step: 0, iters: 60, trainable: 128 }));
    assert_eq!(
        pick(|e| if let Event::Step { iter, .. } = e { Some(*iter) } else { None }),
        (1..=60).collect::<Vec<_>>()
    );
    let reports = pick(|e| if let Event::Report(report) = e { Some(report.iter) } else { None });
    assert_eq!(reports, (4..=60).step_by(4).collect::<Vec<_>>());
    let validations = pick(|e| if let Event::Validation { iter, .. } = e { Some(*iter) } else { None });
    assert_eq!(validations, (0..=60).step_by(6).collect::<Vec<_>>());
    let saved = pick(|e| if let Event::Saved { iter, .. } = e { Some(*iter) } else { None });
    assert_eq!(saved, (5..=60).step_by(5).collect::<Vec<_>>());
    // The first rate of a warmup is zero: B moves in step 2, and A is seen to learn in step 3.
    let audit = events.iter().position(|e| matches!(e, Event::AuditPassed { parameters: 3 })).unwrap();
    assert!(matches!(events[audit - 1], Event::Step { iter: 3, .. }));
    assert_eq!(files(folder.path()), ["checkpoint-55", "checkpoint-60", "model.txt"]);
    let inside = folder.path().join("checkpoint-60");
    assert_eq!(files(&inside), ["model.txt", "training_state.safetensors"]);
    assert_eq!(
        fs::read(inside.join("model.txt")).unwrap(),
        fs::read(folder.path().join("model.txt")).unwrap()
    );
}

#[test]
fn a_stopped_run_resumes_bit_for_bit() {
    let whole_folder = tempfile::tempdir().unwrap();
    let whole = Bigram::new();
    let (_, whole_events) = run(&whole, whole_folder.path(), &config(20), Start::New, 0);

    // Step 7 is between a report, a validation and a checkpoint; 6 and 12 are validations, 4 is a report.
    for stops in [vec![7], vec![4, 6, 12], vec![1, 2, 3], vec![19]] {
        let folder = tempfile::tempdir().unwrap();
        let mut events = Vec::new();
        let mut start = Start::New;
        for stop_at in stops.into_iter().chain([0]) {
            // Each process begins with the untrained model.
            let model = Bigram::new();
            let (summary, more) = run(&model, folder.path(), &config(20), start, stop_at);
            events.extend(more);
            start = Start::Resume;
            let summary = summary.unwrap();
            assert_eq!(summary.stopped, stop_at > 0);
            if stop_at > 0 {
                assert_eq!(summary.checkpoint, Some(folder.path().join(format!("checkpoint-{stop_at}"))));
            } else {
                assert_eq!(model.bits(), whole.bits());
                assert_ne!(model.bits(), Bigram::new().bits());
            }
        }
        let timeless = |events: &[Event]| events.iter().filter_map(timeless).collect::<Vec<_>>();
        assert_eq!(timeless(&events), timeless(&whole_events));
        let state =
            |folder: &Path| fs::read(folder.join("checkpoint-20/training_state.safetensors")).unwrap();
        assert!(state(folder.path()) == state(whole_folder.path()));
    }
}

#[test]
fn sixteen_bit_runs_resume_bit_for_bit() {
    let bits = |stops: &[usize]| {
        let folder = tempfile::tempdir().unwrap();
        let mut start = Start::New;
        let mut last = Vec::new();
        for &stop_at in stops {
            let model = Bigram::with_dtype(DType::BF16);
            run(&model, folder.path(), &config(12), start, stop_at).0.unwrap();
            start = Start::Resume;
            last = model.bits();
        }
        last
    };
    assert_eq!(bits(&[5, 0]), bits(&[0]));
}

#[test]
fn a_run_with_other_settings_is_not_resumed() {
    let folder = tempfile::tempdir().unwrap();
    let model = Bigram::new();
    run(&model, folder.path(), &config(20), Start::New, 7).0.unwrap();
    let trained = model.bits();
    let refused = |change: fn(&mut TrainConfig)| {
        let mut other = config(20);
        change(&mut other);
        let text = message(run(&model, folder.path(), &other, Start::Resume, 0).0);
        assert!(text.contains("checkpoint-7/training_state.safetensors: "), "{text}");
        text.rsplit("other settings: ").next().unwrap().to_owned()
    };
    assert_eq!(refused(|c| c.batch_size = 4), "batch-size was 3, now 4");
    assert_eq!(refused(|c| c.schedule.learning_rate = 0.06), "learning-rate was 0.05, now 0.06");
    assert_eq!(refused(|c| c.clip_grad_norm = None), "clip-grad-norm was 1, now none");
    assert_eq!(refused(|c| c.optimizer.kind = OptimizerKind::Adam), "optimizer was adamw, now adam");
    assert_eq!(refused(|c| c.schedule.total = 30), "iters was 20, now 30");
    let both = refused(|c| {
        c.seed = 6;
        c.schedule.kind = ScheduleKind::Constant;
    });
    assert_eq!(both, "seed was 5, now 6; schedule was cosine, now constant; iters was 20, now none");
    assert_eq!(model.bits(), trained);
    assert_eq!(files(folder.path()), ["checkpoint-5", "checkpoint-7", "model.txt"]);
    // How often it reports is nobody's business.
    let more = TrainConfig { steps_per_report: 1, save_every: 2, ..config(20) };
    assert_eq!(run(&model, folder.path(), &more, Start::Resume, 0).0.unwrap().steps, 20);
}

#[test]
fn a_constant_rate_can_go_on_longer() {
    let constant = |iters| {
        let mut config = config(iters);
        config.schedule.kind = ScheduleKind::Constant;
        config
    };
    let (long, short) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (whole, resumed) = (Bigram::new(), Bigram::new());
    run(&whole, long.path(), &constant(20), Start::New, 0).0.unwrap();
    run(&resumed, short.path(), &constant(11), Start::New, 0).0.unwrap();
    run(&resumed, short.path(), &constant(20), Start::Resume, 0).0.unwrap();
    assert_eq!(whole.bits(), resumed.bits());
}

#[test]
fn an_unfinished_run_is_not_overwritten_by_accident() {
    let folder = tempfile::tempdir().unwrap();
    run(&Bigram::new(), folder.path(), &config(20), Start::New, 12).0.unwrap();
    let before = files(folder.path());
    let text = message(run(&Bigram::new(), folder.path(), &config(20), Start::New, 0).0);
    assert!(text.contains("checkpoint-12: an earlier run stopped at step 12 of 20"), "{text}");
    assert_eq!(files(folder.path()), before);
    // On request it is; and only when the new run has a checkpoint to show.
    let failing = Bigram::with_fault(Fault::DetachB);
    assert!(run(&failing, folder.path(), &config(20), Start::Replace, 0).0.is_err());
    assert_eq!(files(folder.path()), before);
    run(&Bigram::new(), folder.path(), &config(20), Start::Replace, 6).0.unwrap();
    assert_eq!(files(folder.path()), ["checkpoint-5", "checkpoint-6", "model.txt"]);
    // A finished run is replaced as files are.
    run(&Bigram::new(), folder.path(), &config(20), Start::Resume, 0).0.unwrap();
    run(&Bigram::new(), folder.path(), &config(8), Start::New, 0).0.unwrap();
    assert_eq!(files(folder.path()), ["checkpoint-5", "checkpoint-8", "model.txt"]);
    // Also where the new checkpoints have the names of the old.
    run(&Bigram::new(), folder.path(), &config(8), Start::New, 5).0.unwrap();
    assert_eq!(files(folder.path()), ["checkpoint-5", "model.txt"]);
}

#[test]
fn nothing_to_resume_and_damaged_checkpoints_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let text = message(run(&Bigram::new(), folder.path(), &config(20), Start::Resume, 0).0);
    assert!(text.ends_with("there is no checkpoint to resume from"), "{text}");

    run(&Bigram::new(), folder.path(), &config(20), Start::New, 7).0.unwrap();
    let path = folder.path().join("checkpoint-7/training_state.safetensors");
    let whole = fs::read(&path).unwrap();
    let model = Bigram::new();
    let untrained = model.bits();
    for length in [0, 7, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..length]).unwrap();
        for start in [Start::Resume, Start::New] {
            let text = message(run(&model, folder.path(), &config(20), start, 0).0);
            assert!(text.contains("checkpoint-7/training_state.safetensors: is damaged"), "{length}: {text}");
        }
    }
    // A header that lies about a shape.
    let lying = String::from_utf8_lossy(&whole[8..]).find("[4,12]").unwrap() + 8;
    let mut wrong = whole.clone();
    wrong[lying..lying + 6].copy_from_slice(b"[6,8] ");
    fs::write(&path, wrong).unwrap();
    let text = message(run(&model, folder.path(), &config(20), Start::Resume, 0).0);
    assert!(text.contains("head.lora_A` must be ([4, 12], F32), got ([6, 8], F32)"), "{text}");
    assert_eq!(model.bits(), untrained);
}

#[test]
fn the_audit_names_what_does_not_learn() {
    let lost = |fault| {
        let folder = tempfile::tempdir().unwrap();
        let model = Bigram::with_fault(fault);
        let (result, _) = run(&model, folder.path(), &config(20), Start::New, 0);
        assert!(files(folder.path()).is_empty());
        let Err(Error::Audit(problems)) = result else { panic!("{result:?}") };
        problems
    };
    assert_eq!(lost(Fault::DetachB), ["`head.lora_B` has no gradient"]);
    assert_eq!(lost(Fault::DetachA), ["`head.lora_A` has no gradient"]);
    assert_eq!(lost(Fault::ZeroBias), ["`head.bias` has a zero gradient"]);
}

#[test]
fn numbers_that_are_not_finite_stop_the_run() {
    // Two passes per step: pass 14 is in step 7.
    for (fault, what) in
        [(Fault::NanLoss(14), "the loss"), (Fault::NanGradient(14), "the gradient of `head.bias`")]
    {
        let folder = tempfile::tempdir().unwrap();
        let model = Bigram::with_fault(fault);
        let (result, events) = run(&model, folder.path(), &config(20), Start::New, 0);
        let text = message(result);
        assert!(text.starts_with(&format!("step 7: {what} is not finite")), "{text}");
        assert!(matches!(events.last(), Some(Event::Validation { iter: 6, .. })));
        // What was saved is whole, and the parameters are those of step 6.
        assert_eq!(files(folder.path()), ["checkpoint-5"]);
        let healthy = Bigram::new();
        run(&healthy, tempfile::tempdir().unwrap().path(), &config(20), Start::New, 6).0.unwrap();
        assert_eq!(model.bits(), healthy.bits());
    }
    let model = Bigram::new();
    let broken = Tensor::new(&[f32::NAN; VOCABULARY], &Device::Cpu).unwrap();
    model.parameters()[2].var.set(&broken).unwrap();
    let config = TrainConfig { steps_per_eval: 5, ..config(20) };
    let text = message(run(&model, tempfile::tempdir().unwrap().path(), &config, Start::New, 0).0);
    assert!(text.starts_with("step 0: the validation loss is not finite"), "{text}");
    let batch = Batches::new(&dataset(1, 4), 4, 0, Position::default()).unwrap().next(&Device::Cpu).unwrap();
    let text = message(accumulate(&model, &[batch], 3, |_| 0));
    assert!(text.starts_with("step 3: parameter `head.bias`, and with it the loss, is not finite"), "{text}");
}

#[test]
fn validation_weighs_tokens_not_batches() {
    let model = Bigram::new();
    let data = dataset(4, 10);
    let go = AtomicBool::new(false);
    let loss = |size, limit| {
        let evaluation = evaluate(&model, &data, size, limit, &Device::Cpu, &go).unwrap().unwrap();
        (evaluation.loss, evaluation.tokens)
    };
    let (whole, tokens) = loss(10, None);
    for size in [1, 3, 7] {
        let (parts, counted) = loss(size, None);
        assert!((parts - whole).abs() < 1e-6);
        assert_eq!(counted, tokens);
    }
    assert!(loss(3, Some(2)).1 < tokens);
    let stopped = evaluate(&model, &data, 3, None, &Device::Cpu, &AtomicBool::new(true));
    assert_eq!(stopped.unwrap(), None);
}

#[test]
fn impossible_settings_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |change: fn(&mut TrainConfig)| {
        let mut config = config(20);
        change(&mut config);
        message(run(&Bigram::new(), folder.path(), &config, Start::New, 0).0)
    };
    assert_eq!(refused(|c| c.batch_size = 0), "batch-size must be at least 1, got 0");
    assert_eq!(refused(|c| c.val_batches = Some(0)), "val-batches must be at least 1, or -1 for all, got 0");
    assert_eq!(refused(|c| c.clip_grad_norm = Some(-1.0)), "clip-grad-norm must be above 0, got -1");
    assert_eq!(refused(|c| c.optimizer.beta1 = 1.0), "beta1 must be in 0..1, got 1");
    assert_eq!(refused(|c| c.schedule.learning_rate = f64::NAN), "learning-rate must be 0 or above, got NaN");
    assert!(files(folder.path()).is_empty());
    assert!(Dataset::from_sequences(vec![]).is_err());
    assert!(Dataset::from_sequences(vec![Sequence { tokens: vec![1], prompt: 0 }]).is_err());
}

#[test]
fn a_stop_before_the_first_step_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let model = Bigram::new();
    let (training, artifacts) = (dataset(10, 31), TextFile(&model));
    let job = Job {
        model: &model,
        artifacts: &artifacts,
        train: &training,
        valid: Some(&training),
        folder: folder.path(),
        settings: &[],
        start: Start::New,
    };
    let summary = train(&job, &config(20), &AtomicBool::new(true), &mut |_| ()).unwrap();
    assert!(summary.stopped);
    assert_eq!((summary.steps, summary.checkpoint, summary.first_validation), (0, None, None));
    assert!(files(folder.path()).is_empty());
}
