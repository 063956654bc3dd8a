//! Whether two runs of one build agree.

use std::path::Path;
use std::process::ExitCode;

use crate::protocol::Way;
use crate::report::Report;
use crate::statistics::median;
use crate::{Error, Result};

/// Ratios that are further apart than this do not agree.
const AGREEMENT: f64 = 0.10;

/// Prints how far the ratios of two reports are apart; fails where the median distance is more than a tenth.
pub fn run(first: &Path, second: &Path) -> Result<ExitCode> {
    let (first, second) = (read(first)?, read(second)?);
    let mut distances = Vec::new();
    for (case, outcome) in first.cases.iter().flat_map(|case| case.outcomes.iter().map(move |o| (case, o))) {
        let again = second.cases.iter().find(|other| other.id == case.id);
        let again = again.and_then(|other| other.outcome(&outcome.label, outcome.way));
        if let (Some(a), Some(b)) = (outcome.ratio, again.and_then(|o| o.ratio))
            && outcome.label != crate::report::BASELINE
        {
            let way =
                if outcome.way == Way::Synced { String::new() } else { format!(" {}", outcome.way.name()) };
            distances.push((
                (a / b).ln().abs().exp() - 1.0,
                format!("{} / {}{way}: {a:.3} and {b:.3}", case.id, outcome.label),
            ));
        }
    }
    if distances.is_empty() {
        return Err(Error::Engine("the reports have no ratio in common".to_owned()));
    }
    distances.sort_by(|a, b| b.0.total_cmp(&a.0));
    let far = distances.iter().filter(|(distance, _)| *distance > AGREEMENT).count();
    let typical = median(&distances.iter().map(|(distance, _)| *distance).collect::<Vec<_>>());
    for (distance, what) in distances.iter().take(20) {
        println!("{:5.1}%  {what}", 100.0 * distance);
    }
    println!(
        "{} ratios, {far} of them more than 10% apart; the median distance is {:.1}%",
        distances.len(),
        100.0 * typical
    );
    Ok(if typical <= AGREEMENT { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A report from its file.
pub fn read(path: &Path) -> Result<Report> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::at(path, e))?;
    serde_json::from_str(&text).map_err(|e| Error::at(path, e))
}
