//! `metrics.jsonl`: one JSON object per report and validation.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use candlewick::files::write_atomically;
use candlewick::train::Event;
use candlewick::{Error, Result};
use serde::{Deserialize, Serialize};

/// One line of the file.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Record {
    Train {
        iter: usize,
        train_loss: f64,
        learning_rate: f64,
        iterations_per_second: f64,
        tokens_per_second: f64,
        trained_tokens: u64,
        peak_memory_bytes: Option<u64>,
    },
    Validation {
        iter: usize,
        val_loss: f64,
        val_perplexity: f64,
        val_tokens: usize,
        val_seconds: f64,
    },
}

impl Record {
    fn of(event: &Event) -> Option<Self> {
        match event {
            Event::Report(report) => Some(Self::Train {
                iter: report.iter,
                train_loss: report.loss,
                learning_rate: report.learning_rate,
                iterations_per_second: report.iterations_per_second,
                tokens_per_second: report.tokens_per_second,
                trained_tokens: report.trained_tokens,
                peak_memory_bytes: report.peak_memory,
            }),
            Event::Validation { iter, evaluation } => Some(Self::Validation {
                iter: *iter,
                val_loss: evaluation.loss,
                val_perplexity: evaluation.perplexity(),
                val_tokens: evaluation.tokens,
                val_seconds: evaluation.seconds,
            }),
            _ => None,
        }
    }

    pub const fn step(&self) -> usize {
        match self {
            Self::Train { iter, .. } | Self::Validation { iter, .. } => *iter,
        }
    }
}

/// The file, and what it holds.
///
/// A new run replaces an earlier run's file with its own first step, not before: a run that cannot begin overwrites
/// nothing. A resumed run keeps the lines up to its checkpoint.
pub struct Metrics {
    path: PathBuf,
    records: Vec<Record>,
    file: Option<File>,
}

impl Metrics {
    pub fn new(folder: &Path) -> Self {
        Self { path: folder.join("metrics.jsonl"), records: Vec::new(), file: None }
    }

    /// Everything so far, in order.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// Writes down what there is to write.
    pub fn event(&mut self, event: &Event) -> Result<()> {
        match event {
            Event::Started { step, .. } if *step > 0 => self.records = before(&self.path, *step)?,
            Event::Step { .. } if self.file.is_none() => self.begin()?,
            _ => {}
        }
        let Some(record) = Record::of(event) else { return Ok(()) };
        self.records.push(record);
        match &mut self.file {
            Some(file) => file.write_all(&line(&record)).map_err(Error::io(&self.path)),
            None => Ok(()),
        }
    }

    fn begin(&mut self) -> Result<()> {
        if let Some(folder) = self.path.parent() {
            fs::create_dir_all(folder).map_err(Error::io(folder))?;
        }
        let lines: Vec<u8> = self.records.iter().flat_map(line).collect();
        write_atomically(&self.path, &lines)?;
        self.file = Some(OpenOptions::new().append(true).open(&self.path).map_err(Error::io(&self.path))?);
        Ok(())
    }
}

/// The records of an earlier run up to a step. A line that a kill left half-written is beyond any checkpoint.
fn before(path: &Path, step: usize) -> Result<Vec<Record>> {
    if !path.try_exists().map_err(Error::io(path))? {
        return Ok(Vec::new());
    }
    let bytes = fs::read(path).map_err(Error::io(path))?;
    let records = bytes.split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok());
    Ok(records.filter(|record: &Record| record.step() <= step).collect())
}

fn line(record: &Record) -> Vec<u8> {
    // Plain numbers: there is nothing in a record that JSON cannot hold (a number that is not finite becomes null).
    let mut line = serde_json::to_vec(record).unwrap_or_default();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use candlewick::train::Evaluation;

    use super::*;

    fn validation(iter: usize) -> Event {
        Event::Validation { iter, evaluation: Evaluation { loss: 2.0, tokens: 7, seconds: 0.5 } }
    }

    fn started(step: usize) -> Event {
        Event::Started { step, iters: 9, trainable: 1 }
    }

    fn step(iter: usize) -> Event {
        Event::Step { iter, loss: 1.0 }
    }

    fn iters(folder: &Path) -> Vec<usize> {
        before(&folder.join("metrics.jsonl"), usize::MAX).unwrap().iter().map(Record::step).collect()
    }

    #[test]
    fn a_run_replaces_the_file_with_its_first_step_and_a_resumed_one_cuts_it() {
        let folder = tempfile::tempdir().unwrap();
        let run = |events: &[Event]| {
            let mut metrics = Metrics::new(folder.path());
            for event in events {
                metrics.event(event).unwrap();
            }
        };
        run(&[started(0), validation(0), step(1), validation(1), step(2), validation(2)]);
        assert_eq!(iters(folder.path()), [0, 1, 2]);
        run(&[started(0), validation(0)]);
        assert_eq!(iters(folder.path()), [0, 1, 2]);
        // Killed in the middle of a line, resumed from step 1.
        let path = folder.path().join("metrics.jsonl");
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"iter\":1,\"val").unwrap();
        run(&[started(1), step(2), validation(2), step(3), validation(3)]);
        assert_eq!(iters(folder.path()), [0, 1, 2, 3]);
        run(&[started(0), validation(0), step(1)]);
        assert_eq!(iters(folder.path()), [0]);
    }

    #[test]
    fn a_line_is_read_back_to_the_last_bit() {
        // Numbers that a parser which rounds twice misses.
        for loss in [3.821_276_664_733_886_7, 2.798_285_007_476_806_6, 0.007_008_477_123_264_848] {
            let evaluation = Evaluation { loss, tokens: 7, seconds: 0.5 };
            let record = Record::of(&Event::Validation { iter: 1, evaluation }).unwrap();
            assert_eq!(serde_json::from_slice::<Record>(&line(&record)).unwrap(), record);
        }
    }

    #[test]
    fn lines_have_named_numbers() {
        let record = Record::of(&validation(3)).unwrap();
        let text = String::from_utf8(line(&record)).unwrap();
        assert!(text.starts_with("{\"iter\":3,\"val_loss\":2.0,\"val_perplexity\":7.38"), "{text}");
        assert!(text.ends_with("\"val_tokens\":7,\"val_seconds\":0.5}\n"), "{text}");
    }
}
