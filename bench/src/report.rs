//! What a run found: as data, and as a table.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use crate::case::{Case, DeviceName};
use crate::judge::Physics;
use crate::machine::{DISTURBANCE, Facts};
use crate::measure::Measured;
use crate::ops;
use crate::protocol::{Hello, Paths, Way};
use crate::statistics::{least_quarter, median, spread};
use crate::training::Training;

/// What everything is compared with.
pub const BASELINE: &str = "ours fused";

/// The time of some passes that counts. What others do on a processor makes a pass slower, never faster; on a GPU few passes
/// are made, and there is nobody else.
fn typical(device: DeviceName, passes: &[Option<f64>]) -> f64 {
    let passes: Vec<f64> = passes.iter().flatten().copied().collect();
    match device {
        DeviceName::Cpu => least_quarter(&passes),
        DeviceName::Cuda => median(&passes),
    }
}

/// A whole run.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    pub device: DeviceName,
    pub command: String,
    pub commit: String,
    pub machine: Facts,
    pub engines: Vec<Hello>,
    /// Engines that were asked for and did not start.
    pub missing: BTreeMap<String, String>,
    pub limits: BTreeMap<String, f64>,
    pub seconds: f64,
    /// Cases that the time limit left out.
    pub left_out: usize,
    pub cases: Vec<CaseReport>,
    pub trainings: Vec<TrainingReport>,
}

/// A case and how every engine did.
#[derive(Debug, Serialize, Deserialize)]
pub struct CaseReport {
    pub id: String,
    pub case: Case,
    pub about: String,
    pub minimum_bytes: f64,
    pub operations: f64,
    /// Processors that other programs kept busy, in the round where they kept most.
    pub others: f64,
    /// What the case took to measure, with all engines.
    pub seconds: f64,
    pub outcomes: Vec<Outcome>,
}

/// An engine's times for a case in one way.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Outcome {
    pub engine: String,
    pub label: String,
    pub way: Way,
    /// Median microseconds of a call, in each pass of each round.
    pub passes_us: Vec<Option<f64>>,
    /// On a GPU the median of the passes, on a processor the mean of their fastest quarter.
    pub us: Option<f64>,
    /// Our time over this one.
    pub ratio: Option<f64>,
    /// The distance between the extreme ratios of passes, relative to their median.
    pub ratio_spread: Option<f64>,
    /// Of the measured copy bandwidth, by the minimum bytes.
    pub of_bandwidth: Option<f64>,
    /// Of the measured rate of matrix products.
    pub of_products: Option<f64>,
    pub paths: Option<Paths>,
    pub note: Option<String>,
    pub unsupported: Option<String>,
    /// Why the times do not count.
    pub problem: Option<String>,
}

impl Outcome {
    /// Nothing yet.
    pub fn new(engine: &str, label: &str, way: Way) -> Self {
        Self {
            engine: engine.to_owned(),
            label: label.to_owned(),
            way,
            passes_us: Vec::new(),
            us: None,
            ratio: None,
            ratio_spread: None,
            of_bandwidth: None,
            of_products: None,
            paths: None,
            note: None,
            unsupported: None,
            problem: None,
        }
    }

    /// The time of a pass.
    pub fn put(&mut self, slot: usize, us: Option<f64>) {
        self.passes_us.resize(self.passes_us.len().max(slot + 1), None);
        self.passes_us[slot] = us;
    }

    /// A checked pass.
    pub fn add(&mut self, slot: usize, measured: Measured) {
        self.put(slot, Some(measured.us));
        self.paths = measured.times.paths.or(self.paths.take());
        self.note = measured.times.note.or(self.note.take());
        self.problem = self.problem.take().or(measured.problem);
    }
}

impl CaseReport {
    /// Works out times and ratios. A time with a problem does not count, and is not even kept.
    pub fn new(
        (case, about): (&Case, &str),
        device: DeviceName,
        mut outcomes: Vec<Outcome>,
        physics: &Physics,
        others: f64,
    ) -> Self {
        let cost = ops::cost(case);
        for outcome in outcomes.iter_mut().filter(|outcome| outcome.problem.is_some()) {
            outcome.passes_us.clear();
        }
        let ours: BTreeMap<Way, Vec<Option<f64>>> = outcomes
            .iter()
            .filter(|outcome| outcome.label == BASELINE)
            .map(|outcome| (outcome.way, outcome.passes_us.clone()))
            .collect();
        for outcome in outcomes.iter_mut().filter(|outcome| !outcome.passes_us.is_empty()) {
            let us = typical(device, &outcome.passes_us);
            outcome.us = Some(us);
            outcome.of_bandwidth = Some(cost.bytes / (us * 1e-6) / physics.copy);
            outcome.of_products = (cost.product_operations > 0.0)
                .then(|| cost.product_operations / (us * 1e-6) / physics.products(case));
            let ours = ours.get(&outcome.way).map_or(&[][..], Vec::as_slice);
            let pairs = ours.iter().zip(&outcome.passes_us);
            let ratios: Vec<f64> = pairs.filter_map(|(ours, us)| Some((*ours)? / (*us)?)).collect();
            if !ratios.is_empty() {
                outcome.ratio = Some(match device {
                    DeviceName::Cpu => typical(device, ours) / us,
                    DeviceName::Cuda => median(&ratios),
                });
                outcome.ratio_spread = Some(spread(&ratios));
            }
        }
        Self {
            id: case.id(),
            case: *case,
            about: about.to_owned(),
            minimum_bytes: cost.bytes,
            operations: cost.operations,
            others,
            seconds: 0.0,
            outcomes,
        }
    }

    /// An engine's outcome in a way.
    pub fn outcome(&self, label: &str, way: Way) -> Option<&Outcome> {
        self.outcomes.iter().find(|outcome| outcome.label == label && outcome.way == way)
    }

    /// One line for whoever watches.
    pub fn line(&self) -> String {
        let mut line = format!("{:44} {:5.1} s", self.id, self.seconds);
        for outcome in
            self.outcomes.iter().filter(|outcome| outcome.us.is_some() || outcome.problem.is_some())
        {
            let way = if outcome.way == Way::Synced { "" } else { outcome.way.name() };
            let value = match (outcome.us, outcome.ratio) {
                (Some(us), _) if outcome.label == BASELINE => format!("{us:.1} µs"),
                (_, Some(ratio)) => format!("{ratio:.2}"),
                (Some(us), None) => format!("{us:.1} µs"),
                (None, None) => "!".to_owned(),
            };
            let _ = write!(line, "  {} {way}{}{value}", outcome.label, if way.is_empty() { "" } else { " " });
        }
        line
    }
}

/// A training step and how every engine did.
#[derive(Debug, Serialize, Deserialize)]
pub struct TrainingReport {
    pub id: String,
    pub training: Training,
    pub outcomes: Vec<TrainingOutcome>,
}

/// An engine's training steps.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TrainingOutcome {
    pub label: String,
    /// Median of the processes' medians.
    pub tokens_per_second: Option<f64>,
    /// In each process.
    pub rounds: Vec<f64>,
    /// Our rate over this one's, the median of the pairs.
    pub ratio: Option<f64>,
    /// Bytes, of a fresh process or of the device.
    pub peak_bytes: Option<f64>,
    /// Bytes of the device in use by its driver's count.
    pub driver_bytes: Option<f64>,
    /// The first and the last loss.
    pub losses: Option<(f64, f64)>,
    /// Processors that other programs kept busy meanwhile, at most.
    pub others: Option<f64>,
    pub problem: Option<String>,
}

impl Report {
    /// Both, with the machine's facts of the first.
    pub fn join(mut self, other: Self) -> Self {
        self.command = format!("{}`, `{}", self.command, other.command);
        self.seconds += other.seconds;
        self.left_out += other.left_out;
        self.meet(other.engines);
        self.missing.extend(other.missing);
        self.cases.extend(other.cases);
        self.trainings.extend(other.trainings);
        self
    }

    /// Remembers engines that are new.
    pub fn meet(&mut self, engines: Vec<Hello>) {
        for hello in engines {
            if !self.engines.iter().any(|own| own.engine == hello.engine) {
                self.engines.push(hello);
            }
        }
    }

    /// The labels of all engines, ours first, in the order they ran.
    pub fn labels(&self) -> Vec<String> {
        let mut labels: Vec<String> = Vec::new();
        for outcome in self.cases.iter().flat_map(|case| &case.outcomes) {
            if !labels.contains(&outcome.label) {
                labels.push(outcome.label.clone());
            }
        }
        labels
    }

    /// What did not count, and why.
    pub fn problems(&self) -> Vec<(String, String)> {
        let cases = self.cases.iter().flat_map(|case| {
            case.outcomes.iter().filter_map(|outcome| {
                let what = format!("{}: {} {}", case.id, outcome.label, outcome.way.name());
                Some((what, outcome.problem.clone()?))
            })
        });
        let trainings = self.trainings.iter().flat_map(|training| {
            training.outcomes.iter().filter_map(|outcome| {
                Some((format!("{}: {}", training.id, outcome.label), outcome.problem.clone()?))
            })
        });
        cases.chain(trainings).collect()
    }

    /// Everything, as Markdown.
    pub fn table(&self) -> String {
        let mut text = String::new();
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "# {} benchmark\n", self.device.name())?;
        writeln!(text, "`{}`, commit {}, {:.0} s.\n", self.command, self.commit, self.seconds)?;
        for (name, value) in &self.machine {
            writeln!(text, "- {name}: {value}")?;
        }
        for hello in &self.engines {
            let versions: Vec<_> =
                hello.versions.iter().map(|(name, version)| format!("{name} {version}")).collect();
            write!(
                text,
                "- engine {}: {}; {} threads; allocator: {}",
                hello.engine,
                versions.join(", "),
                hello.threads,
                hello.allocator
            )?;
            for note in &hello.notes {
                write!(text, "; {note}")?;
            }
            writeln!(text)?;
        }
        for (engine, reason) in &self.missing {
            writeln!(text, "- engine {engine} did not start: {reason}")?;
        }
        for (name, value) in &self.limits {
            writeln!(text, "- {name}: {:.1}", value / 1e9)?;
        }
        writeln!(text)?;
        match self.device {
            DeviceName::Cpu => self.write_ratios(text)?,
            DeviceName::Cuda => self.write_ways(text)?,
        }
        self.write_trainings(text)?;
        if self.left_out > 0 {
            writeln!(text, "\nThe time limit left out {} cases.", self.left_out)?;
        }
        let is_disturbed = |case: &&CaseReport| self.device == DeviceName::Cpu && case.others > DISTURBANCE;
        let disturbed: Vec<_> = self.cases.iter().filter(is_disturbed).collect();
        if !disturbed.is_empty() {
            writeln!(text, "\n## Disturbed\n\nOther programs kept this many processors busy meanwhile.\n")?;
            for case in disturbed {
                writeln!(text, "- {}: {:.2}", case.id, case.others)?;
            }
        }
        let problems = self.problems();
        if !problems.is_empty() {
            writeln!(text, "\n## Not counted\n")?;
            for (what, problem) in problems {
                writeln!(text, "- {what}: {problem}")?;
            }
        }
        Ok(())
    }

    /// One table for each operation, as the case files' order has them.
    fn by_op(&self) -> Vec<(&'static str, Vec<&CaseReport>)> {
        let mut tables: Vec<(&'static str, Vec<&CaseReport>)> = Vec::new();
        for case in &self.cases {
            let name = case.case.op.name();
            match tables.iter_mut().find(|(op, _)| *op == name) {
                Some((_, cases)) => cases.push(case),
                None => tables.push((name, vec![case])),
            }
        }
        tables
    }

    /// Ratios: our time over theirs.
    fn write_ratios(&self, text: &mut String) -> std::fmt::Result {
        let labels = self.labels();
        let others: Vec<_> = labels.iter().filter(|label| *label != BASELINE).collect();
        for (op, cases) in self.by_op() {
            writeln!(text, "## {op}\n\nOur time over theirs; below 1 we are faster.\n")?;
            write!(text, "| case | MB | Mop | ours µs | of copy | of products | path |")?;
            others.iter().try_for_each(|label| write!(text, " / {label} |"))?;
            writeln!(text, "\n|---|---|---|---|---|---|---|{}", "---|".repeat(others.len()))?;
            for case in cases {
                let ours = case.outcome(BASELINE, Way::Synced);
                write!(
                    text,
                    "| {} | {:.2} | {:.1} | {} | {} | {} | {} |",
                    case.id.strip_prefix(op).unwrap_or(&case.id).trim(),
                    case.minimum_bytes / 1e6,
                    case.operations / 1e6,
                    number(ours.and_then(|o| o.us), 1),
                    percent(ours.and_then(|o| o.of_bandwidth)),
                    percent(ours.and_then(|o| o.of_products)),
                    path(ours),
                )?;
                for label in &others {
                    let outcome = case.outcome(label, Way::Synced);
                    write!(text, " {} |", cell(outcome, |o| number(o.ratio, 3)))?;
                }
                writeln!(text)?;
            }
            writeln!(text)?;
        }
        Ok(())
    }

    /// Microseconds, synced / pipelined / graph.
    fn write_ways(&self, text: &mut String) -> std::fmt::Result {
        let labels = self.labels();
        for (op, cases) in self.by_op() {
            writeln!(text, "## {op}\n\nMicroseconds: synced / pipelined / graph (GPU time).\n")?;
            write!(text, "| case | MB | Mop | of copy | of products | path |")?;
            labels.iter().try_for_each(|label| write!(text, " {label} |"))?;
            writeln!(text, "\n|---|---|---|---|---|---|{}", "---|".repeat(labels.len()))?;
            for case in cases {
                let ours = case.outcome(BASELINE, Way::Graph);
                write!(
                    text,
                    "| {} | {:.2} | {:.1} | {} | {} | {} |",
                    case.id.strip_prefix(op).unwrap_or(&case.id).trim(),
                    case.minimum_bytes / 1e6,
                    case.operations / 1e6,
                    percent(ours.and_then(|o| o.of_bandwidth)),
                    percent(ours.and_then(|o| o.of_products)),
                    path(case.outcome(BASELINE, Way::Synced)),
                )?;
                for label in &labels {
                    let ways = [Way::Synced, Way::Pipelined, Way::Graph]
                        .map(|way| cell(case.outcome(label, way), |o| number(o.us, 2)));
                    write!(text, " {} |", ways.join(" / "))?;
                }
                writeln!(text)?;
            }
            writeln!(text)?;
        }
        let notes: std::collections::BTreeSet<_> = self
            .cases
            .iter()
            .flat_map(|case| &case.outcomes)
            .filter_map(|o| Some(format!("- {} {}: {}", o.label, o.way.name(), o.note.as_ref()?)))
            .collect();
        notes.iter().try_for_each(|note| writeln!(text, "{note}"))
    }

    fn write_trainings(&self, text: &mut String) -> std::fmt::Result {
        if self.trainings.is_empty() {
            return Ok(());
        }
        writeln!(text, "## LoRA training steps\n\nForward, backward, clip and AdamW on random weights.\n")?;
        writeln!(
            text,
            "| step | engine | tokens/s | ours over theirs | peak GiB | loss | others' load |\n|---|---|---|---|---|---|---|"
        )?;
        for training in &self.trainings {
            for outcome in &training.outcomes {
                let gib = |bytes: Option<f64>| number(bytes.map(|bytes| bytes / 1_073_741_824.0), 2);
                let memory = match outcome.driver_bytes {
                    Some(driver) => format!("{} (driver: {})", gib(outcome.peak_bytes), gib(Some(driver))),
                    None => gib(outcome.peak_bytes),
                };
                let losses = outcome.losses.map_or_else(String::new, |(a, b)| format!("{a:.3} → {b:.3}"));
                let rate = if outcome.problem.is_some() {
                    "not counted".to_owned()
                } else {
                    number(outcome.tokens_per_second, 1)
                };
                let ratio = number(outcome.ratio, 2);
                let others = number(outcome.others, 2);
                writeln!(
                    text,
                    "| {} | {} | {rate} | {ratio} | {memory} | {losses} | {others} |",
                    training.id, outcome.label
                )?;
            }
        }
        Ok(())
    }
}

fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{value:.digits$}"))
}

fn percent(value: Option<f64>) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{:.0}%", 100.0 * value))
}

fn path(ours: Option<&Outcome>) -> String {
    match ours.and_then(|outcome| outcome.paths.as_ref()) {
        Some(paths) if paths.fallback == 0 && paths.fused > 0 => "fused".to_owned(),
        Some(_) => "FELL BACK".to_owned(),
        None => "–".to_owned(),
    }
}

fn cell(outcome: Option<&Outcome>, value: impl Fn(&Outcome) -> String) -> String {
    match outcome {
        Some(outcome) if outcome.problem.is_some() => "not counted".to_owned(),
        Some(outcome) => value(outcome),
        None => "–".to_owned(),
    }
}
