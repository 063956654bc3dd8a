//! The harness against engines that lie, and against those that are part of this program.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write, pipe};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::case::{Case, Chosen, DeviceName, Dtype, Mode, Op, Size, read};
use crate::engine::{Library, serve};
use crate::judge::Physics;
use crate::protocol::{Hello, Reply, Request, Times, Way};
use crate::report::CaseReport;
use crate::runner::{Contender, Settings, run};
use crate::session::Session;
use crate::tensors::{self, Stored, Tensors};
use crate::{ops, oracle};

/// What a fake engine does, beside computing softmax correctly.
#[derive(Clone, Copy, PartialEq)]
enum Habit {
    /// Nothing else.
    Honest,
    /// Stops its clock when the work is queued, and does the work when it is asked for the outputs.
    NeverWaits,
    /// As the seed's method did with a lazy library: of many calls only the last is ever computed.
    LastOnly,
    /// Hands out what it computed for the first inputs it ever saw.
    Stale,
    /// Works beside its clock.
    OutsideTheClock,
    /// Claims more time than passed.
    Exaggerates,
}

/// A program that computes in float64 and has a habit.
struct Fake {
    habit: Habit,
    case: Option<Case>,
    inputs: Tensors,
    /// Calls that were timed and not made.
    owed: usize,
    last: oracle::Expected,
}

impl Fake {
    fn call(&mut self) {
        let Some(case) = self.case else { return };
        let rows: Vec<usize> = (0..oracle::rows(&case)).collect();
        self.last = oracle::expected(&case, &self.inputs, &rows);
    }

    fn answer(&mut self, request: Request) -> Reply {
        match request {
            Request::Hello { .. } => Reply::Hello(Hello {
                engine: "fake".to_owned(),
                variants: vec!["fake".to_owned()],
                ..Hello::default()
            }),
            Request::Prepare { case, .. } => {
                self.case = Some(case);
                self.inputs = Tensors::new();
                Reply::Done
            }
            Request::Inputs { path, .. } => {
                if self.habit != Habit::Stale || self.inputs.is_empty() {
                    self.inputs = tensors::read(&path).unwrap();
                }
                Reply::Done
            }
            Request::Time { samples, calls, .. } => {
                Reply::Times(Times { samples_us: self.time(samples, calls), paths: None, note: None })
            }
            Request::Output { path, rows } => {
                for _ in 0..std::mem::take(&mut self.owed) {
                    self.call();
                }
                tensors::write(&path, &self.outputs(&rows)).unwrap();
                Reply::Done
            }
            Request::Ready { .. } => Reply::Done,
            _ => Reply::Unsupported { reason: "a fake".to_owned() },
        }
    }

    fn time(&mut self, samples: usize, calls: usize) -> Vec<f64> {
        let mut samples_us = Vec::new();
        for _ in 0..samples {
            let start = Instant::now();
            match self.habit {
                Habit::NeverWaits => self.owed += calls,
                Habit::LastOnly => self.call(),
                _ => (0..calls).for_each(|_| self.call()),
            }
            let mut us = start.elapsed().as_secs_f64() * 1e6;
            match self.habit {
                Habit::OutsideTheClock => us /= 4.0,
                Habit::Exaggerates => us *= 4.0,
                _ => {}
            }
            samples_us.push(us);
        }
        samples_us
    }

    fn outputs(&self, rows: &BTreeMap<String, Vec<usize>>) -> Tensors {
        let stored = |(name, values): (&String, &Vec<f64>)| {
            let width = values.len() / self.inputs["x"].shape[0];
            let chosen: Vec<f64> = match rows.get(name) {
                Some(rows) => {
                    rows.iter().flat_map(|row| &values[row * width..(row + 1) * width]).copied().collect()
                }
                None => values.clone(),
            };
            let bytes = chosen.iter().flat_map(|value| value.to_le_bytes()).collect();
            (name.clone(), Stored { dtype: safetensors::Dtype::F64, shape: vec![chosen.len()], bytes })
        };
        self.last.iter().map(stored).collect()
    }
}

/// Something that serves requests on a thread of its own.
fn session(serve: impl FnOnce(Box<dyn BufRead>, Box<dyn Write>) + Send + 'static) -> Session {
    let (requests, writer) = pipe().unwrap();
    let (reader, answers) = pipe().unwrap();
    std::thread::spawn(move || serve(Box::new(BufReader::new(requests)), Box::new(answers)));
    Session::talk(Box::new(writer), Box::new(BufReader::new(reader)), None, DeviceName::Cpu, 1).unwrap()
}

fn fake(habit: Habit) -> Contender {
    Contender::adopt(session(move |requests, mut answers| {
        let mut fake =
            Fake { habit, case: None, inputs: Tensors::new(), owed: 0, last: oracle::Expected::new() };
        for line in requests.lines() {
            let Ok(line) = line else { return };
            let reply = fake.answer(serde_json::from_str(&line).unwrap());
            writeln!(answers, "{}", serde_json::to_string(&reply).unwrap()).unwrap();
        }
    }))
}

fn own(library: Library) -> Contender {
    Contender::adopt(session(move |requests, answers| serve(library, requests, answers).unwrap()))
}

/// Runs cases and asserts nothing of the speed of the machine that runs the tests: its limits are out of reach, or where
/// `copy` is given, that.
fn measured(cases: Vec<Case>, contender: Contender, copy: f64) -> Vec<CaseReport> {
    // One at a time: the other tests would be noise.
    static QUIET: Mutex<()> = Mutex::new(());
    let _quiet = QUIET.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    let far = 1e18;
    let settings = Settings {
        device: DeviceName::Cpu,
        threads: 1,
        physics: Physics {
            copy,
            cached_copy: copy,
            cache_bytes: 1e6,
            f32_products: far,
            short_products: far,
        },
        scratch: folder.path(),
        rounds: 3,
        budget: Duration::from_secs(1),
        until: None,
        allow_fallback: false,
        compile: true,
        seed: 7,
    };
    let chosen = Chosen { op: cases[0].op, about: String::new(), groups: vec![(String::new(), cases)] };
    let mut reports = Vec::new();
    let done = |report| {
        reports.push(report);
        Ok(())
    };
    assert_eq!(run(&[chosen], &mut [contender], &settings, done).unwrap(), 0);
    reports
}

fn softmax() -> Case {
    let size = Size { rows: 150, cols: 16, out: 0, rank: 0, width: 0 };
    Case { op: Op::Softmax, size, dtype: Dtype::F32, mode: Mode::Both, rotate: false, compiled: false }
}

/// The problem that the harness has with an engine, whose time then must not appear.
fn problem(habit: Habit) -> Option<String> {
    let reports = measured(vec![softmax()], fake(habit), 5e9);
    let outcome = &reports[0].outcomes[0];
    assert_eq!(outcome.us.is_none(), outcome.problem.is_some(), "{outcome:?}");
    assert_eq!(outcome.passes_us.is_empty(), outcome.problem.is_some(), "{outcome:?}");
    outcome.problem.clone()
}

#[test]
fn an_honest_engine_is_timed() {
    assert_eq!(problem(Habit::Honest), None);
}

#[test]
fn an_engine_that_does_not_wait_is_reported_and_not_timed() {
    let problem = problem(Habit::NeverWaits).unwrap();
    assert!(problem.contains("then worked"), "{problem}");
}

#[test]
fn an_engine_that_computes_one_call_of_many_is_reported_and_not_timed() {
    let problem = problem(Habit::LastOnly).unwrap();
    assert!(problem.contains("below the device's limit"), "{problem}");
}

#[test]
fn an_engine_with_stale_outputs_is_reported_and_not_timed() {
    let problem = problem(Habit::Stale).unwrap();
    assert!(problem.contains("is wrong"), "{problem}");
}

#[test]
fn an_engine_whose_clock_is_not_the_runners_is_reported_and_not_timed() {
    let outside = problem(Habit::OutsideTheClock).unwrap();
    assert!(outside.contains("work outside its clock"), "{outside}");
    let exaggerated = problem(Habit::Exaggerates).unwrap();
    assert!(exaggerated.contains("passed"), "{exaggerated}");
}

#[test]
fn an_engine_that_fell_back_is_reported_and_not_timed() {
    use crate::protocol::Paths;
    use crate::runner::check_path;
    let timed = |fused, fallback| crate::measure::Measured {
        us: 1.0,
        times: Times {
            samples_us: vec![1.0],
            paths: Some(Paths { fused, fallback, reasons: Vec::new() }),
            note: None,
        },
        problem: None,
    };
    for (fused, fallback, is_good) in [(5, 0, true), (0, 5, false), (4, 1, false), (0, 0, false)] {
        let mut strict = timed(fused, fallback);
        check_path(&mut strict, false);
        assert_eq!(strict.problem.is_none(), is_good);
        let mut allowed = timed(fused, fallback);
        check_path(&mut allowed, true);
        assert!(allowed.problem.is_none() && allowed.times.note.is_none() == is_good);
    }
}

#[test]
fn every_operation_runs_and_agrees_with_float64() {
    for library in [Library::Ours, Library::Candle] {
        let cases =
            read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("cases"), DeviceName::Cpu, false).unwrap();
        let mut small = Vec::new();
        for chosen in &cases {
            let size = match chosen.op {
                Op::Attention => Size { rows: 150, cols: 48, out: 16, rank: 0, width: 16 },
                Op::Rope => Size { rows: 150, cols: 48, out: 0, rank: 0, width: 16 },
                Op::FrozenLinear => Size { rows: 150, cols: 33, out: 31, rank: 0, width: 0 },
                Op::LoraDelta | Op::LoraLinear => Size { rows: 150, cols: 33, out: 31, rank: 5, width: 0 },
                _ => Size { rows: 150, cols: 33, out: 0, rank: 0, width: 0 },
            };
            for mode in [Mode::Forward, Mode::Backward, Mode::Both] {
                let case =
                    Case { op: chosen.op, size, dtype: Dtype::F32, mode, rotate: true, compiled: false };
                small.push(case);
            }
        }
        assert!(small.len() >= 30, "an operation has no case file");
        for report in measured(small, own(library), 1e18) {
            let outcome = &report.outcomes[0];
            assert!(outcome.us.is_some(), "{}: {outcome:?}", report.id);
            if library == Library::Ours {
                let paths = outcome.paths.clone().unwrap();
                assert!(paths.fused > 0 && paths.fallback == 0, "{}: {paths:?}", report.id);
            }
        }
    }
}

#[test]
fn case_files_have_what_their_operation_needs() {
    for device in [DeviceName::Cpu, DeviceName::Cuda] {
        for small in [true, false] {
            for chosen in read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("cases"), device, small).unwrap() {
                assert!(chosen.about.len() > 20 && (small || !chosen.groups.is_empty()), "{:?}", chosen.op);
                for (about, case) in chosen
                    .groups
                    .iter()
                    .flat_map(|(about, cases)| cases.iter().map(move |case| (about, case)))
                {
                    assert!(about.len() > 10, "{}", case.id());
                    let empty = ops::inputs(case).iter().any(|input| input.shape.contains(&0));
                    assert!(!empty, "{}", case.id());
                    let cost = ops::cost(case);
                    assert!(cost.bytes > 0.0 && cost.operations > 0.0, "{}", case.id());
                    assert!(!case.id().is_empty() && Way::Synced.name() == "synced");
                }
            }
        }
    }
}

#[test]
fn inputs_are_a_function_of_their_seed() {
    let case = softmax();
    assert_eq!(tensors::draw(&case, 1), tensors::draw(&case, 1));
    assert_ne!(tensors::draw(&case, 1), tensors::draw(&case, 2));
    let x = &tensors::draw(&case, 1)["x"];
    let values = x.range(0..x.len());
    let n = ops::as_f64(values.len());
    let mean = values.iter().sum::<f64>() / n;
    let deviation = (values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n).sqrt();
    assert!(mean.abs() < 0.15 && (deviation - 2.0).abs() < 0.1, "{mean} {deviation}");
}
