//! Shared by the tests on the text: every distinct text of the crate, and two threads to check them with.

#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use candlewick_kernels::{Launch, Storage, Target, ops};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// One distinct text, and the launch it was first seen for.
pub struct Text {
    pub op: &'static str,
    pub launch: Launch,
    pub source: String,
    /// Of the texts with its entry point and storage.
    pub first_of_its_kind: bool,
}

impl Text {
    pub fn name(&self) -> String {
        let defines: Vec<_> =
            self.launch.defines.iter().map(|(name, value)| format!("{name}={value}")).collect();
        format!("{} {:?} [{}]", self.launch.kernel, self.launch.storage, defines.join(" "))
    }
}

/// Every text of every op and storage for a target, each once.
pub fn texts(target: Target) -> Vec<Text> {
    let mut texts = BTreeMap::new();
    let mut kinds = BTreeSet::new();
    for op in ops() {
        for storage in Storage::ALL {
            for launch in op.sample_launches(storage).unwrap() {
                let source = launch.source(target);
                let first_of_its_kind = kinds.insert((launch.kernel, launch.storage.word()));
                texts.entry(source.clone()).or_insert(Text {
                    op: op.name,
                    launch,
                    source,
                    first_of_its_kind,
                });
            }
        }
    }
    texts.into_values().collect()
}

/// Runs `check` over all texts with as many threads as the machine has, and returns the messages of those that fail.
pub fn failures(texts: &[Text], check: impl Fn(usize, &Text) -> Result<(), String> + Sync) -> Vec<String> {
    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((index, text)) = {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    texts.get(index).map(|text| (index, text))
                } {
                    if let Err(message) = check(index, text) {
                        failures.lock().unwrap().push(format!("{}\n{message}", text.name()));
                    }
                }
            });
        }
    });
    failures.into_inner().unwrap()
}
