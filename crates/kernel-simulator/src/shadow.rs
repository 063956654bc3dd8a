//! Shadow memory: for every two bytes that kernels share, whether they hold a value, and who touched them.
//!
//! Two accesses to the same place, one of them a write, are a race unless something orders them. In the
//! dialect only barriers order, so time is counted in them: a threadgroup's *epoch* for a kind of memory advances
//! at each `threadgroup_barrier` whose flags name that memory. Accesses of two threads of a threadgroup are
//! ordered when their epochs differ; accesses of two threadgroups in one launch never are.
//!
//! The verdict depends on these stamps alone and not on the order in which the simulator happened to run the
//! threads: a race is found even where the outcome was harmless.

/// Bytes to a cell: the smallest storage type is 16 bits wide. Two different bytes of one cell count as one
/// place, which no kernel of the dialect can notice.
const CELL_BYTES: usize = 2;

/// When and by whom: one thread between two barriers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Stamp {
    /// A number that no other threadgroup of the launch has.
    pub(crate) threadgroup: u32,
    /// Linear index of the thread in its threadgroup.
    pub(crate) thread: u32,
    /// Barriers the threadgroup has passed for this kind of memory.
    pub(crate) epoch: u32,
}

impl Stamp {
    /// Whether `self`, which came earlier, is ordered before `now`.
    fn before(self, now: Self) -> bool {
        self.threadgroup == now.threadgroup && (self.thread == now.thread || self.epoch != now.epoch)
    }
}

/// Those who read a place since it was last written, as far as a later write must know: one of them, and how
/// many stand behind it.
#[derive(Clone, Copy, Default)]
enum Readers {
    #[default]
    Nobody,
    Thread(Stamp),
    /// Several threads of a threadgroup, in the same epoch.
    Threadgroup(Stamp),
    /// Threads of several threadgroups.
    Grid(Stamp),
}

impl Readers {
    fn and(self, now: Stamp) -> Self {
        let (Self::Thread(one) | Self::Threadgroup(one)) = self else {
            return if matches!(self, Self::Nobody) { Self::Thread(now) } else { self };
        };
        if one.threadgroup != now.threadgroup {
            Self::Grid(one)
        } else if one.epoch != now.epoch {
            // Readers before the barrier are ordered before every later write of this threadgroup.
            Self::Thread(now)
        } else if one.thread == now.thread {
            self
        } else {
            Self::Threadgroup(one)
        }
    }

    /// A reader that is not ordered before a write `now`.
    fn unordered(self, now: Stamp) -> Option<Stamp> {
        match self {
            Self::Nobody => None,
            Self::Grid(one) => Some(one),
            Self::Thread(one) => (!one.before(now)).then_some(one),
            Self::Threadgroup(one) => {
                let ordered = one.threadgroup == now.threadgroup && one.epoch != now.epoch;
                (!ordered).then_some(one)
            }
        }
    }
}

#[derive(Clone, Copy, Default)]
struct Cell {
    writer: Option<Stamp>,
    readers: Readers,
}

/// What an access collided with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Conflict {
    /// An unordered write by this thread.
    Write(Stamp),
    /// An unordered read by this thread (one of them, when there were several).
    Read(Stamp),
}

impl Conflict {
    pub(crate) fn stamp(self) -> Stamp {
        match self {
            Self::Write(stamp) | Self::Read(stamp) => stamp,
        }
    }
}

/// What is wrong with an access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fault {
    Uninitialised,
    Race(Conflict),
}

/// The shadow of one buffer or threadgroup array.
pub(crate) struct Shadow {
    initialised: Vec<bool>,
    cells: Vec<Cell>,
}

impl Shadow {
    pub(crate) fn new(bytes: usize, initialised: bool) -> Self {
        let cells = bytes.div_ceil(CELL_BYTES);
        Self { initialised: vec![initialised; cells], cells: vec![Cell::default(); cells] }
    }

    /// Forgets who touched what, and keeps what holds a value: the next launch sees everything that this one
    /// wrote.
    pub(crate) fn next_launch(&mut self) {
        self.cells.fill(Cell::default());
    }

    /// Notes a read of `bytes` at `offset`; the first fault found with its offset.
    pub(crate) fn read(&mut self, offset: usize, bytes: usize, now: Stamp) -> Result<(), (usize, Fault)> {
        let mut fault = Ok(());
        for index in offset / CELL_BYTES..(offset + bytes).div_ceil(CELL_BYTES) {
            let found = if self.initialised[index] {
                let cell = &mut self.cells[index];
                cell.readers = cell.readers.and(now);
                cell.writer
                    .filter(|writer| !writer.before(now))
                    .map(|writer| Fault::Race(Conflict::Write(writer)))
            } else {
                Some(Fault::Uninitialised)
            };
            if let (Ok(()), Some(found)) = (&fault, found) {
                fault = Err((index * CELL_BYTES, found));
            }
        }
        fault
    }

    /// Notes a write of `bytes` at `offset`; the first fault found with its offset.
    pub(crate) fn write(&mut self, offset: usize, bytes: usize, now: Stamp) -> Result<(), (usize, Fault)> {
        let mut fault = Ok(());
        for index in offset / CELL_BYTES..(offset + bytes).div_ceil(CELL_BYTES) {
            let cell = &mut self.cells[index];
            let written = cell.writer.filter(|writer| !writer.before(now)).map(Conflict::Write);
            let found = written.or_else(|| cell.readers.unordered(now).map(Conflict::Read));
            // Later accesses that are ordered after this write are ordered after all before it.
            *cell = Cell { writer: Some(now), readers: Readers::Nobody };
            self.initialised[index] = true;
            if let (Ok(()), Some(found)) = (&fault, found) {
                fault = Err((index * CELL_BYTES, Fault::Race(found)));
            }
        }
        fault
    }

    /// Offset of the first bytes that hold no value, and how many such bytes there are.
    pub(crate) fn unwritten(&self) -> Option<(usize, usize)> {
        let first = self.initialised.iter().position(|held| !held)?;
        let count = self.initialised.iter().filter(|held| !**held).count();
        Some((first * CELL_BYTES, count * CELL_BYTES))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(thread: u32, epoch: u32) -> Stamp {
        Stamp { threadgroup: 0, thread, epoch }
    }

    fn other_group(thread: u32) -> Stamp {
        Stamp { threadgroup: 1, ..at(thread, 0) }
    }

    fn full() -> Shadow {
        Shadow::new(4, true)
    }

    fn race(result: Result<(), (usize, Fault)>) -> Option<Conflict> {
        match result {
            Err((_, Fault::Race(conflict))) => Some(conflict),
            _ => None,
        }
    }

    #[test]
    fn a_read_before_any_write_is_uninitialised() {
        let mut shadow = Shadow::new(8, false);
        assert_eq!(shadow.write(0, 4, at(0, 0)), Ok(()));
        assert_eq!(shadow.read(2, 4, at(0, 0)), Err((4, Fault::Uninitialised)));
        assert_eq!(shadow.unwritten(), Some((4, 4)));
    }

    #[test]
    fn a_write_races_with_a_read_of_another_thread_until_a_barrier() {
        let (writer, same, later) = (at(0, 3), at(40, 3), at(40, 4));
        let mut shadow = full();
        assert_eq!(shadow.write(0, 4, writer), Ok(()));
        assert_eq!(race(shadow.read(0, 4, same)), Some(Conflict::Write(writer)));
        assert_eq!(shadow.read(0, 4, later), Ok(()));
    }

    #[test]
    fn a_read_is_remembered_though_the_writer_read_last() {
        let mut shadow = full();
        assert_eq!(shadow.read(0, 4, at(5, 0)), Ok(()));
        assert_eq!(shadow.read(0, 4, at(6, 0)), Ok(()));
        assert!(race(shadow.write(0, 4, at(6, 0))).is_some());
    }

    #[test]
    fn threadgroups_are_never_ordered() {
        let mut shadow = full();
        assert_eq!(shadow.read(0, 2, at(0, 0)), Ok(()));
        assert_eq!(shadow.read(0, 2, other_group(0)), Ok(()));
        assert!(race(shadow.write(0, 2, other_group(0))).is_some());
        let mut shadow = full();
        assert_eq!(shadow.write(0, 2, at(0, 0)), Ok(()));
        assert!(race(shadow.read(0, 2, other_group(7))).is_some());
        shadow.next_launch();
        assert_eq!(shadow.read(0, 2, other_group(7)), Ok(()));
    }

    #[test]
    fn a_thread_never_races_with_itself() {
        let mut shadow = full();
        for _ in 0..2 {
            assert_eq!(shadow.read(0, 4, at(9, 0)), Ok(()));
            assert_eq!(shadow.write(0, 4, at(9, 0)), Ok(()));
        }
    }
}
