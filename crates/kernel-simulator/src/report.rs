//! What the simulator says about a kernel.

use std::fmt;

/// The kinds of bug the simulator sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// An access outside every buffer, outside a threadgroup array, or outside a private array. It ends the run.
    OutOfBounds,
    /// A read of memory that nothing has written.
    Uninitialised,
    /// A write to a buffer that the plan calls an input.
    WriteToInput,
    /// Two threads of a threadgroup touch a place, one writing, with no barrier between them that orders this
    /// kind of memory.
    Race,
    /// Two threadgroups of a launch touch a place, one writing.
    GridRace,
    /// A threadgroup barrier, or a threadgroup array, that not every thread reaches in the same way. It ends the run.
    DivergentBarrier,
    /// A simd operation that not every lane reaches in the same way, or whose lane argument differs between lanes.
    DivergentSimd,
    /// A vector access to an address that is not a multiple of its size.
    Misaligned,
    /// A launch outside what every device allows: its grid, its threads, its threadgroup memory, its arguments.
    Limit,
    /// An element of an output that no launch has written.
    Unwritten,
    /// Arithmetic without a defined result: a division by zero, an overlong shift, signed overflow.
    Undefined,
    /// A launch that makes more memory accesses than any sensible one: a loop that does not end. It ends the run.
    Endless,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OutOfBounds => "out of bounds",
            Self::Uninitialised => "uninitialised read",
            Self::WriteToInput => "write to an input",
            Self::Race => "race within a threadgroup",
            Self::GridRace => "race between threadgroups",
            Self::DivergentBarrier => "divergent barrier",
            Self::DivergentSimd => "divergent simd operation",
            Self::Misaligned => "misaligned vector access",
            Self::Limit => "limit broken",
            Self::Unwritten => "output never written",
            Self::Undefined => "undefined arithmetic",
            Self::Endless => "endless loop",
        })
    }
}

/// A place in a kernel's text.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Site {
    /// The file, as its `#line` names it: `rms_norm.metal`.
    pub file: String,
    /// The line in that file.
    pub line: u32,
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// One simulated thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Thread {
    /// Its threadgroup's position in the grid.
    pub threadgroup: [u32; 3],
    /// Its position in the threadgroup.
    pub thread: u32,
}

impl fmt::Display for Thread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "thread {} of {:?}", self.thread, self.threadgroup)
    }
}

/// One bug, seen one or more times at one place of the text and in one buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// What is wrong.
    pub kind: Kind,
    /// The entry point that ran; empty for what belongs to the plan as a whole.
    pub kernel: String,
    /// Where in the text, when that is known.
    pub site: Option<Site>,
    /// The lines that called there, from the innermost outwards.
    pub callers: Vec<Site>,
    /// The buffer or threadgroup array, when memory is at fault.
    pub buffer: Option<String>,
    /// The byte in it. Out of bounds, the distance from its start.
    pub offset: Option<i64>,
    /// The first thread that was seen doing it.
    pub thread: Option<Thread>,
    /// What else is known: sizes, the other thread of a race, where each lane of a divergence stands.
    pub detail: String,
    /// How often it was seen.
    pub count: u64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.kind)?;
        if !self.kernel.is_empty() {
            write!(f, " in {}", self.kernel)?;
        }
        if let Some(site) = &self.site {
            write!(f, " at {site}")?;
        }
        for caller in &self.callers {
            write!(f, " from {caller}")?;
        }
        if let Some(buffer) = &self.buffer {
            write!(f, ", `{buffer}`")?;
        }
        if let Some(offset) = self.offset {
            write!(f, " byte {offset}")?;
        }
        if let Some(thread) = &self.thread {
            write!(f, ", {thread}")?;
        }
        if !self.detail.is_empty() {
            write!(f, ": {}", self.detail)?;
        }
        if self.count > 1 {
            write!(f, " ({} times)", self.count)?;
        }
        Ok(())
    }
}
