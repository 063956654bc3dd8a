//! Runs cases and engines interleaved: every round draws fresh inputs, and every engine has its turn in it.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::case::{Case, Chosen, DeviceName};
use crate::judge::Physics;
use crate::machine::{DISTURBANCE, Work};
use crate::measure::{Measured, Plan, Round, measure, pass};
use crate::protocol::{Hello, Reply, Request, Times, Way};
use crate::report::{CaseReport, Outcome};
use crate::session::{Session, Start};
use crate::{Error, Result, ops};

/// An engine in one of its variants, with a process of its own.
pub struct Contender {
    pub variant: String,
    /// How to start it again; `None` where it was not started by this program.
    start: Option<Start>,
    session: Option<Session>,
    pub hello: Hello,
}

impl Contender {
    /// Starts an engine's process for each of its variants.
    pub fn start_all(start: &Start, device: DeviceName, threads: usize) -> Result<Vec<Self>> {
        let mut first = Some(Session::start(start, device, threads)?);
        let hello = first.as_ref().map(|session| session.hello.clone()).unwrap_or_default();
        let contender = |variant: &String| {
            let session = first.take().map_or_else(|| Session::start(start, device, threads), Ok)?;
            Ok(Self {
                variant: variant.clone(),
                start: Some(start.clone()),
                session: Some(session),
                hello: hello.clone(),
            })
        };
        hello.variants.iter().map(contender).collect()
    }

    /// An engine that already runs.
    #[cfg(test)]
    pub fn adopt(session: Session) -> Self {
        let hello = session.hello.clone();
        Self { variant: hello.variants[0].clone(), start: None, session: Some(session), hello }
    }

    /// Its process, while there is one.
    fn process(&self) -> Option<u32> {
        self.session.as_ref().and_then(Session::process)
    }

    /// `engine`, or `engine variant`.
    pub fn label(&self) -> String {
        if self.variant == self.hello.engine {
            self.variant.clone()
        } else {
            format!("{} {}", self.hello.engine, self.variant)
        }
    }

    /// The process, started again if it ended.
    pub fn running(&mut self, device: DeviceName, threads: usize) -> Result<&mut Session> {
        if let (None, Some(start)) = (&self.session, &self.start) {
            self.session = Some(Session::start(start, device, threads)?);
        }
        self.session.as_mut().ok_or_else(|| Error::Engine("no process".to_owned()))
    }
}

/// How cases are run.
pub struct Settings<'a> {
    pub device: DeviceName,
    pub threads: usize,
    pub physics: Physics,
    /// Where inputs and outputs pass between the programs; a memory file system is best.
    pub scratch: &'a Path,
    /// Rounds at most, for a case.
    pub rounds: usize,
    /// A case's rounds end after this time, but not before there are as many as [`least_rounds`].
    pub budget: Duration,
    /// After this no further case begins.
    pub until: Option<Instant>,
    /// Whether a fused operation may run its reference.
    pub allow_fallback: bool,
    /// Whether compiling engines compile the cases that are worth it.
    pub compile: bool,
    pub seed: u64,
}

/// Microseconds that a sample takes at least, where a call is shorter; and that a timing takes about.
const SAMPLE_US: f64 = 1_500.0;
const TIMING_US: f64 = 12_000.0;
/// Passes of a round on a CPU: the engines' turns follow each other closely, because the machine's pace drifts.
const PASSES: usize = 6;
/// An engine whose call takes longer than this has its turn in two rounds only; and than this, in one.
const SLOW_US: f64 = 100_000.0;
const SLOWEST_US: f64 = 400_000.0;
/// Rounds of a case that are made again because other programs disturbed them.
const DISTURBED_ROUNDS: usize = 4;

/// Runs every chosen case, while there is time, and hands over the report of each. Returns how many were left out.
pub fn run(
    chosen: &[Chosen],
    contenders: &mut [Contender],
    settings: &Settings<'_>,
    mut done: impl FnMut(CaseReport) -> Result<()>,
) -> Result<usize> {
    let mut left = 0;
    for (about, cases) in chosen.iter().flat_map(|file| &file.groups) {
        for case in cases {
            let start = Instant::now();
            if settings.until.is_some_and(|until| start > until) {
                left += 1;
                continue;
            }
            let mut report = one(about, case, contenders, settings)?;
            report.seconds = start.elapsed().as_secs_f64();
            done(report)?;
        }
    }
    Ok(left)
}

/// A contender's plans for a case, one for each way.
struct Entry<'a> {
    contender: &'a mut Contender,
    plans: Vec<Plan>,
    /// Rounds at most.
    rounds: usize,
    /// Passes of a round.
    passes: usize,
    outcomes: Vec<Outcome>,
}

fn one(
    about: &str,
    case: &Case,
    contenders: &mut [Contender],
    settings: &Settings<'_>,
) -> Result<CaseReport> {
    let copies = copies(case, settings);
    let ways: &[Way] = match settings.device {
        DeviceName::Cpu => &[Way::Synced],
        DeviceName::Cuda => &[Way::Synced, Way::Pipelined, Way::Graph],
    };
    let passes = if settings.device == DeviceName::Cpu { PASSES } else { 1 };
    let trial = Round::new(case, settings.seed, settings.scratch)?;
    let runs =
        |contender: &&mut Contender| contender.variant != "compiled" || (case.compiled && settings.compile);
    let entry = |contender| Entry {
        contender,
        plans: Vec::new(),
        rounds: settings.rounds,
        passes,
        outcomes: Vec::new(),
    };
    let mut entries: Vec<Entry<'_>> = contenders.iter_mut().filter(runs).map(entry).collect();
    each(&mut entries, settings.device, |entry| entry.load(case, &trial, copies, settings));
    for entry in entries.iter_mut().filter(|entry| entry.outcomes.is_empty()) {
        if let Err(error) = entry.prepare(case, &trial, ways, settings) {
            entry.fail(&error);
        }
    }
    drop(trial);
    let start = Instant::now();
    let mut others = 0f64;
    let (mut index, mut patience) = (0, DISTURBED_ROUNDS);
    let least = least_rounds(case, settings.device);
    while index < settings.rounds && (index < least || start.elapsed() < settings.budget) {
        let kept: Vec<_> = entries.iter().map(|entry| entry.outcomes.clone()).collect();
        let seed = settings.seed.wrapping_add((1 + index + 100 * patience) as u64);
        let load = round(case, index, seed, &mut entries, copies, settings)?;
        if load > DISTURBANCE && patience > 0 && settings.device == DeviceName::Cpu {
            patience -= 1;
            for (entry, kept) in entries.iter_mut().zip(kept) {
                entry.outcomes = kept;
            }
            continue;
        }
        others = others.max(load);
        index += 1;
    }
    let outcomes = entries.into_iter().flat_map(|entry| entry.outcomes).collect();
    Ok(CaseReport::new((case, about), settings.device, outcomes, &settings.physics, others))
}

/// Has every engine do what is not measured: side by side beside a GPU, whose machine has processors enough.
fn each(entries: &mut [Entry<'_>], device: DeviceName, what: impl Fn(&mut Entry<'_>) -> Result<()> + Sync) {
    let attempt = |entry: &mut Entry<'_>| {
        if let Err(error) = what(entry) {
            entry.fail(&error);
        }
    };
    match device {
        DeviceName::Cpu => entries.iter_mut().for_each(attempt),
        DeviceName::Cuda => std::thread::scope(|scope| {
            for entry in entries {
                scope.spawn(|| attempt(entry));
            }
        }),
    }
}

/// One round: fresh inputs, and every engine's turn. Returns how many processors other programs kept busy meanwhile.
fn round(
    case: &Case,
    index: usize,
    seed: u64,
    entries: &mut [Entry<'_>],
    copies: usize,
    settings: &Settings<'_>,
) -> Result<f64> {
    let processes: Vec<u32> =
        entries.iter().filter_map(|entry| entry.contender.process()).chain([std::process::id()]).collect();
    let (start, before) = (Instant::now(), Work::now(&processes));
    let round = Round::new(case, seed, settings.scratch)?;
    let count = entries.len();
    let is_due = |entry: &Entry<'_>| !entry.plans.is_empty() && index < entry.rounds;
    each(
        entries,
        settings.device,
        |entry| {
            if is_due(entry) { entry.take(&round, copies, settings) } else { Ok(()) }
        },
    );
    let most = entries.iter().map(|entry| entry.passes).max().unwrap_or(0);
    for number in 0..most {
        // Nobody always follows the same neighbour.
        for turn in 0..count {
            let turn = if number.is_multiple_of(2) { turn } else { count - 1 - turn };
            let entry = &mut entries[(turn + index) % count];
            if number < entry.passes
                && is_due(entry)
                && let Err(error) = entry.turn(case, &round, index, number, settings)
            {
                entry.fail(&error);
            }
        }
    }
    let (wall, after) = (start.elapsed().as_secs_f64(), Work::now(&processes));
    Ok(before.zip(after).map_or(0.0, |(before, after)| before.others(after, wall)))
}

/// Rounds that are always made. A GPU has nobody else to serve, and passing large tensors to every engine takes far longer
/// than timing them.
fn least_rounds(case: &Case, device: DeviceName) -> usize {
    match device {
        DeviceName::Cpu => 3,
        DeviceName::Cuda if ops::input_bytes(case) > 64 << 20 => 1,
        DeviceName::Cuda => 2,
    }
}

/// How many copies of the inputs a case goes round in.
fn copies(case: &Case, settings: &Settings<'_>) -> usize {
    let bytes = ops::as_f64(ops::input_bytes(case).max(1));
    let wanted = (2.0 * settings.physics.cache_bytes / bytes).ceil().clamp(2.0, 64.0);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 2 and 64")]
    if case.rotate { wanted as usize } else { 1 }
}

impl Entry<'_> {
    /// Gets the engine ready: beside a GPU with first calls, in which compilers compile.
    fn load(&mut self, case: &Case, trial: &Round, copies: usize, settings: &Settings<'_>) -> Result<()> {
        let (variant, warm) = (self.contender.variant.clone(), settings.device == DeviceName::Cuda);
        let session = self.contender.running(settings.device, settings.threads)?;
        let request = Request::Prepare { case: *case, variant, eps: ops::EPS, scaling: ops::SCALING };
        session.tell(&request)?;
        session.tell(&Request::Inputs { path: trial.path.clone(), copies, warm }).map(|_| ())
    }

    /// Finds out how often each timing should call.
    fn prepare(&mut self, case: &Case, trial: &Round, ways: &[Way], settings: &Settings<'_>) -> Result<()> {
        let label = self.contender.label();
        let engine = self.contender.hello.engine.clone();
        let session = self.contender.running(settings.device, settings.threads)?;
        let mut outcomes = Vec::new();
        for &way in ways {
            let mut outcome = Outcome::new(&engine, &label, way);
            match plan(session, way) {
                Ok((plan, us)) => {
                    // The first request for outputs may load what writes them.
                    session.tell(&trial.request(case))?;
                    (self.rounds, self.passes) = match us {
                        us if us > SLOWEST_US => (1, 1),
                        us if us > SLOW_US => (self.rounds.min(2), 1),
                        us if us > 4.0 * TIMING_US => (self.rounds, 2),
                        _ => (self.rounds, self.passes),
                    };
                    self.plans.push(plan);
                }
                Err(Error::Unsupported(reason)) => outcome.unsupported = Some(reason),
                Err(error) => return Err(error),
            }
            outcomes.push(outcome);
        }
        self.outcomes = outcomes;
        Ok(())
    }

    /// New inputs.
    fn take(&mut self, round: &Round, copies: usize, settings: &Settings<'_>) -> Result<()> {
        let warm = self.rounds > 2;
        let session = self.contender.running(settings.device, settings.threads)?;
        session.tell(&Request::Inputs { path: round.path.clone(), copies, warm }).map(|_| ())
    }

    /// One pass of a round; the last one's outputs are checked.
    fn turn(
        &mut self,
        case: &Case,
        round: &Round,
        index: usize,
        number: usize,
        settings: &Settings<'_>,
    ) -> Result<()> {
        let slot = index * PASSES + number;
        let session = self.contender.running(settings.device, settings.threads)?;
        for plan in &self.plans {
            let Some(outcome) = self.outcomes.iter_mut().find(|outcome| outcome.way == plan.way) else {
                continue;
            };
            if outcome.problem.is_some() {
                // What was caught twice is not believed a third time.
            } else if number + 1 < self.passes {
                outcome.put(slot, pass(session, case, &settings.physics, *plan)?);
            } else {
                let mut measured = measure(session, case, &settings.physics, round, *plan)?;
                check_path(&mut measured, settings.allow_fallback);
                outcome.add(slot, measured);
            }
        }
        Ok(())
    }

    /// The engine cannot, or does not any more; then its process is not to be trusted with the next case.
    fn fail(&mut self, error: &Error) {
        self.plans.clear();
        let is_unsupported = matches!(error, Error::Unsupported(_));
        // Candle's errors go on with a backtrace.
        let reason = error.to_string().lines().next().unwrap_or_default().to_owned();
        if self.outcomes.is_empty() {
            let (engine, label) = (&self.contender.hello.engine, self.contender.label());
            self.outcomes.push(Outcome::new(engine, &label, Way::Synced));
        }
        for outcome in self.outcomes.iter_mut().filter(|outcome| outcome.unsupported.is_none()) {
            if is_unsupported {
                outcome.unsupported = Some(reason.clone());
            } else {
                outcome.problem = Some(reason.clone());
            }
        }
        if !is_unsupported {
            self.contender.session = None;
        }
    }
}

/// A case that was to run fused and did not is a problem, or at least a note.
pub fn check_path(measured: &mut Measured, allow_fallback: bool) {
    let Some(paths) = &measured.times.paths else { return };
    if paths.fallback > 0 || paths.fused == 0 {
        let what = format!("fell back ({})", paths.reasons.join("; "));
        if allow_fallback {
            measured.times.note = Some(what);
        } else {
            measured.problem.get_or_insert(what);
        }
    }
}

fn plan(session: &mut Session, way: Way) -> Result<(Plan, f64)> {
    let mut us = f64::INFINITY;
    // The shortest of several: one that was interrupted would make the plan too small to catch a lie.
    for calls in [1, 1, 16, 16, 16] {
        if us.is_finite() && (us > SLOW_US || us > SAMPLE_US && calls > 1) {
            break;
        }
        if way == Way::Graph {
            session.tell(&Request::Ready { way, calls })?;
        }
        let (reply, _) = session.ask(&Request::Time { way, samples: 1, calls })?;
        let Reply::Times(Times { samples_us, .. }) = reply else {
            return Err(match reply {
                Reply::Unsupported { reason } => Error::Unsupported(reason),
                other => session.unexpected("times", &other),
            });
        };
        us = us.min(samples_us.first().copied().unwrap_or(f64::INFINITY) / ops::as_f64(calls));
    }
    if !(us.is_finite() && us > 0.0) {
        us = SAMPLE_US;
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped")]
    let whole = |value: f64, low: f64, high: f64| value.clamp(low, high) as usize;
    let calls = whole((SAMPLE_US / us).ceil(), 1.0, 1000.0);
    let samples = whole(TIMING_US / (us * ops::as_f64(calls)), 1.0, 30.0);
    Ok((Plan { way, samples, calls }, us))
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use crate::case::{Dtype, Mode, Op, Size};

    /// An engine that ends in the middle of a case is there again for the next one.
    #[test]
    fn an_engine_that_ended_is_started_again() {
        let folder = tempfile::tempdir().unwrap();
        let starts = folder.path().join("starts");
        let hello = r#"{"is":"hello","engine":"frail","variants":["frail"],"versions":{},"threads":1,"allocator":""}"#;
        let script = format!(
            "while read line; do case $line in *hello*) echo >> {}; echo '{hello}';; *) exit 3;; esac; done",
            starts.display()
        );
        let start = Start {
            name: "frail".into(),
            program: "/bin/sh".into(),
            arguments: vec!["-c".into(), script],
            environment: Vec::new(),
        };
        for device in [DeviceName::Cpu, DeviceName::Cuda] {
            let _ = std::fs::remove_file(&starts);
            let mut contenders = Contender::start_all(&start, device, 1).unwrap();
            let size = Size { rows: 4, cols: 8, out: 0, rank: 0, width: 0 };
            let case = |mode| Case {
                op: Op::Softmax,
                size,
                dtype: Dtype::F32,
                mode,
                rotate: false,
                compiled: false,
            };
            let groups = vec![("twice".to_owned(), vec![case(Mode::Forward), case(Mode::Both)])];
            let chosen = [Chosen { op: Op::Softmax, about: String::new(), groups }];
            let physics = Physics {
                copy: 1e18,
                cached_copy: 1e18,
                cache_bytes: 1e3,
                f32_products: 1e18,
                short_products: 1e18,
            };
            let settings = Settings {
                device,
                threads: 1,
                physics,
                scratch: folder.path(),
                rounds: 2,
                budget: Duration::from_millis(1),
                until: None,
                allow_fallback: false,
                compile: false,
                seed: 7,
            };
            let mut problems = Vec::new();
            run(&chosen, &mut contenders, &settings, |report| {
                problems.extend(report.outcomes.iter().filter_map(|outcome| outcome.problem.clone()));
                Ok(())
            })
            .unwrap();
            assert_eq!(problems.len(), 2, "{problems:?}");
            assert_eq!(std::fs::read_to_string(&starts).unwrap().lines().count(), 2);
        }
    }
}
