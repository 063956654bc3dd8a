//! What a run leaves behind when its process is killed or its disk is full.
//!
//! The tests start this very program again, with an environment variable that makes its ignored test do the work.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::cast_precision_loss, reason = "a test")]

mod training_model;

use std::collections::BTreeMap;
use std::env;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use candlewick::train::checkpoint::Checkpoints;
use candlewick::train::{Artifacts, Event, Job, Start, TrainConfig, train};
use training_model::{Bigram, TextFile, config, dataset, files, leftovers};

const FOLDER: &str = "CANDLEWICK_TEST_FOLDER";
const ITERS: usize = 400;

/// A file that makes a save long enough to be hit.
struct Slow<'a>(TextFile<'a>);

impl Artifacts for Slow<'_> {
    fn save(&self, folder: &Path) -> candlewick::Result<()> {
        candlewick::files::write_atomically(&folder.join("ballast"), &vec![0x5a; 1 << 19])?;
        self.0.save(folder)
    }
}

/// Trains in `$CANDLEWICK_TEST_FOLDER`, from the newest checkpoint when there is one, and notes every step's loss.
#[test]
#[ignore = "started by the other tests"]
fn child() {
    let Some(folder) = env::var_os(FOLDER) else { return };
    let folder = Path::new(&folder);
    let resume = !Checkpoints::new(folder).steps().unwrap().is_empty();
    let model = Bigram::new();
    let data = dataset(10, 31);
    let job = Job {
        model: &model,
        artifacts: &Slow(TextFile(&model)),
        train: &data,
        valid: None,
        folder,
        settings: &[],
        start: if resume { Start::Resume } else { Start::New },
    };
    let config = TrainConfig { save_every: 1, ..config(ITERS) };
    let mut log = OpenOptions::new().create(true).append(true).open(folder.join("losses")).unwrap();
    let result = train(&job, &config, &AtomicBool::new(false), &mut |event| {
        if let Event::Step { iter, loss } = event {
            // One write: a kill leaves the line whole or absent.
            log.write_all(format!("{iter} {:016x}\n", loss.to_bits()).as_bytes()).unwrap();
        }
    });
    if let Err(error) = result {
        println!("error: {error}");
        std::process::exit(3);
    }
}

fn command(folder: &Path) -> Command {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "child", "--ignored", "--nocapture"]).env(FOLDER, folder);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Loss bits by step. Steps that were done twice must have come out the same.
fn losses(folder: &Path) -> BTreeMap<usize, String> {
    let mut losses = BTreeMap::new();
    for line in fs::read_to_string(folder.join("losses")).unwrap().lines() {
        let (step, bits) = line.split_once(' ').unwrap();
        let earlier = losses.insert(step.parse().unwrap(), bits.to_owned());
        assert!(earlier.is_none_or(|earlier| earlier == bits), "step {step} came out differently");
    }
    losses
}

#[test]
fn killed_anywhere_a_run_goes_on_bit_for_bit() {
    let (undisturbed, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    assert!(command(undisturbed.path()).status().unwrap().success());
    let expected = losses(undisturbed.path());
    assert_eq!(expected.len(), ITERS);

    let mut hits = 0;
    let mut half_written = 0;
    let start = Instant::now();
    for attempt in 0_u64.. {
        let mut child = command(killed.path()).spawn().unwrap();
        // Long enough to start and do some steps; the odd part moves the kill through all phases of a step.
        std::thread::sleep(Duration::from_micros(15_000 + attempt * 7_919 % 23_000));
        if child.try_wait().unwrap().is_some() {
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        hits += 1;
        half_written += usize::from(leftovers(killed.path()) > 0);
        // Every checkpoint that can be seen is whole.
        Checkpoints::new(killed.path()).unfinished().unwrap();
        if hits >= 25 || start.elapsed() > Duration::from_secs(20) {
            break;
        }
    }
    assert!(command(killed.path()).status().unwrap().success());
    assert!(hits >= 5, "only {hits} kills");
    assert!(half_written >= 1, "of {hits} kills none was during a save");
    assert_eq!(losses(killed.path()), expected);
    for name in [format!("checkpoint-{ITERS}/training_state.safetensors"), "model.txt".to_owned()] {
        assert!(
            fs::read(killed.path().join(&name)).unwrap() == fs::read(undisturbed.path().join(&name)).unwrap()
        );
    }
    assert_eq!(leftovers(killed.path()), 0);
}

#[test]
fn a_full_disk_is_an_error_and_leaves_what_was_there() {
    let folder = tempfile::tempdir().unwrap();
    let program = env::current_exe().unwrap();
    // The limit on a file's size stands in for the disk's: 100 KiB, less than the ballast.
    let limited = |folder: &Path| {
        let script = "trap '' XFSZ; ulimit -f 100; exec \"$0\" --exact child --ignored --nocapture";
        Command::new("bash").args(["-c", script]).arg(&program).env(FOLDER, folder).output().unwrap()
    };
    let check = |output: std::process::Output| {
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(output.status.code(), Some(3), "{text}");
        let line = text.lines().find(|line| line.starts_with("error: ")).unwrap().to_owned();
        assert!(line.contains("ballast") && line.contains("File too large"), "{line}");
    };
    check(limited(folder.path()));
    assert_eq!(files(folder.path()), ["losses"]);

    // With a checkpoint already there.
    let mut child = command(folder.path()).spawn().unwrap();
    let checkpoints = Checkpoints::new(folder.path());
    while checkpoints.steps().unwrap().is_empty() {
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let newest = *checkpoints.steps().unwrap().last().unwrap();
    let state = || fs::read(checkpoints.path(newest).join("training_state.safetensors")).unwrap();
    let before = state();
    check(limited(folder.path()));
    assert_eq!(checkpoints.steps().unwrap().last(), Some(&newest));
    assert!(state() == before);
    assert_eq!(leftovers(folder.path()), 0);
    assert!(command(folder.path()).status().unwrap().success());
}
