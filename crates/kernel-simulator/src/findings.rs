//! Bugs as they are found: each place and kind once, with a count, to be given names when the run is over.

use crate::report::{Kind, Thread};
use std::collections::HashMap;
use std::collections::hash_map::Entry;

/// Different findings that are kept; a broken kernel shows itself long before.
const MOST: usize = 50;

/// A [`Report`](crate::Report) whose place is still a list of addresses.
pub(crate) struct Finding {
    pub(crate) kind: Kind,
    /// Where in the kernel's code: the address the check was called from, then its callers', outwards.
    pub(crate) stack: Vec<usize>,
    pub(crate) buffer: Option<String>,
    pub(crate) offset: Option<i64>,
    pub(crate) thread: Option<Thread>,
    pub(crate) detail: String,
    pub(crate) count: u64,
}

impl Finding {
    pub(crate) fn new(kind: Kind, detail: impl Into<String>) -> Self {
        Self {
            kind,
            stack: Vec::new(),
            buffer: None,
            offset: None,
            thread: None,
            detail: detail.into(),
            count: 1,
        }
    }

    pub(crate) fn at(mut self, stack: Vec<usize>, thread: Thread) -> Self {
        self.stack = stack;
        self.thread = Some(thread);
        self
    }

    pub(crate) fn in_buffer(mut self, name: &str, offset: i64) -> Self {
        self.buffer = Some(name.to_owned());
        self.offset = Some(offset);
        self
    }
}

/// What was found in one launch.
#[derive(Default)]
pub(crate) struct Findings {
    list: Vec<Finding>,
    known: HashMap<(Kind, Vec<usize>, Option<String>), usize>,
}

impl Findings {
    /// Adds a finding, or counts it when the same code did the same to the same buffer before.
    pub(crate) fn add(&mut self, finding: Finding) {
        let key = (finding.kind, finding.stack.clone(), finding.buffer.clone());
        match self.known.entry(key) {
            Entry::Occupied(known) => self.list[*known.get()].count += 1,
            Entry::Vacant(place) if self.list.len() < MOST => {
                place.insert(self.list.len());
                self.list.push(finding);
            }
            Entry::Vacant(_) => {}
        }
    }

    pub(crate) fn take(&mut self) -> Vec<Finding> {
        self.known.clear();
        std::mem::take(&mut self.list)
    }
}
