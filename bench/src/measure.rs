//! One timing of one engine: fresh inputs, the clock, the outputs twice, the verdict.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::case::Case;
use crate::judge::{self, Physics, Seen};
use crate::oracle::{self, Expected};
use crate::protocol::{Reply, Request, Times, Way};
use crate::session::Session;
use crate::statistics::median;
use crate::{Result, ops, tensors};

/// Rows of an output that are checked where there are more than twice as many.
const CHECKED_ROWS: usize = 64;

/// Inputs for one round, and what they should give.
pub struct Round {
    pub path: PathBuf,
    expected: Expected,
    /// The rows that are checked; all where `None`.
    rows: Option<Vec<usize>>,
    outputs: PathBuf,
}

impl Round {
    /// Draws and writes inputs that no engine has seen, and computes what they should give.
    pub fn new(case: &Case, seed: u64, folder: &Path) -> Result<Self> {
        let inputs = tensors::draw(case, seed);
        let path = folder.join(format!("inputs-{seed}.safetensors"));
        tensors::write(&path, &inputs)?;
        let all = oracle::rows(case);
        let rows = (all > 2 * CHECKED_ROWS).then(|| {
            let step = all / CHECKED_ROWS;
            let offset = usize::try_from(seed).unwrap_or(0) % step;
            (0..CHECKED_ROWS).map(|i| i * step + offset).chain([all - 1]).collect::<Vec<_>>()
        });
        let every: Vec<usize> = (0..all).collect();
        let expected = oracle::expected(case, &inputs, rows.as_deref().unwrap_or(&every));
        Ok(Self { path, expected, rows, outputs: folder.join("outputs.safetensors") })
    }

    /// The request for what is checked.
    pub fn request(&self, case: &Case) -> Request {
        Request::Output { path: self.outputs.clone(), rows: self.chosen(case) }
    }

    fn chosen(&self, case: &Case) -> BTreeMap<String, Vec<usize>> {
        let Some(rows) = &self.rows else { return BTreeMap::new() };
        let names = self.expected.keys().filter(|name| oracle::by_rows(case, name));
        names.map(|name| (name.clone(), rows.clone())).collect()
    }
}

impl Drop for Round {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
        let _ = std::fs::remove_file(&self.outputs);
    }
}

/// How often a timing calls.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Plan {
    pub way: Way,
    pub samples: usize,
    pub calls: usize,
}

/// One timing.
#[derive(Debug, Clone)]
pub struct Measured {
    /// Median microseconds of a call.
    pub us: f64,
    pub times: Times,
    /// Why the time does not count.
    pub problem: Option<String>,
}

/// Times an engine that has the round's inputs, and checks what its last call computed. A suspicion that noise could
/// explain is looked into a second time.
pub fn measure(
    session: &mut Session,
    case: &Case,
    physics: &Physics,
    round: &Round,
    plan: Plan,
) -> Result<Measured> {
    let first = checked(session, case, physics, round, plan)?;
    if first.problem.is_none() { Ok(first) } else { checked(session, case, physics, round, plan) }
}

/// Times an engine between two checks. The time has no value of its own: it counts if the check that follows finds nothing.
pub fn pass(session: &mut Session, case: &Case, physics: &Physics, plan: Plan) -> Result<Option<f64>> {
    let (times, wall) = timing(session, plan)?;
    let seen = Seen { wall, first_output: Duration::ZERO, second_output: Duration::ZERO };
    let is_plain = judge::times(case, physics, &times, plan, seen).is_none();
    Ok(is_plain.then(|| per_call(&times, plan)))
}

fn per_call(times: &Times, plan: Plan) -> f64 {
    median(&times.samples_us) / ops::as_f64(plan.calls)
}

fn timing(session: &mut Session, plan: Plan) -> Result<(Times, Duration)> {
    if plan.way == Way::Graph {
        session.tell(&Request::Ready { way: plan.way, calls: plan.calls })?;
    }
    let request = Request::Time { way: plan.way, samples: plan.samples, calls: plan.calls };
    match session.ask(&request)? {
        (Reply::Times(times), wall) => Ok((times, wall)),
        (Reply::Unsupported { reason }, _) => Err(crate::Error::Unsupported(reason)),
        (other, _) => Err(session.unexpected("times", &other)),
    }
}

fn checked(
    session: &mut Session,
    case: &Case,
    physics: &Physics,
    round: &Round,
    plan: Plan,
) -> Result<Measured> {
    let (times, wall) = timing(session, plan)?;
    let output = round.request(case);
    let first_output = session.tell(&output)?;
    let got = tensors::read(&round.outputs)?;
    let second_output = session.tell(&output)?;
    let seen = Seen { wall, first_output, second_output };
    let problem = judge::outputs(case, &round.expected, round.rows.as_deref(), &got)
        .or_else(|| judge::times(case, physics, &times, plan, seen));
    Ok(Measured { us: per_call(&times, plan), times, problem })
}
