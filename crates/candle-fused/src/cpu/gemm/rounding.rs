//! Rounding of sums to what a result is stored as.

#![expect(clippy::inline_always, reason = "an instruction set reaches only what is inlined")]

use std::mem::MaybeUninit;
use std::slice;

use super::super::dispatch::{self, Isa, Vectorised};
use super::super::lanes::{Element, LANES, Lanes};
use super::super::rows::{load_part, store_part};

/// Rounds `from` into `to`, which is as long.
pub(crate) fn round<T: Element>(from: &[f32], to: &mut [MaybeUninit<T>]) {
    round_with(dispatch::isa(), from, to);
}

pub(super) fn round_with<T: Element>(isa: Isa, from: &[f32], to: &mut [MaybeUninit<T>]) {
    assert!(from.len() <= to.len(), "rounding needs room");
    // SAFETY: one row, for which there is room.
    unsafe { round_rows(isa, from, from.len(), to.as_mut_ptr(), 0) };
}

/// Rounds rows of so many columns, into rows that are `stride` apart.
///
/// # Safety
/// Each row has this room at `to`, which nobody else uses.
pub(super) unsafe fn round_rows<T: Element>(
    isa: Isa,
    from: &[f32],
    columns: usize,
    to: *mut MaybeUninit<T>,
    stride: usize,
) {
    dispatch::vectorise(isa, Rounding { from, columns, to, stride });
}

/// Elements that are rounded at once.
const PAIR: usize = 2 * LANES;

/// Rows that are asked for ahead, where they lie apart: most were last written elsewhere, and stores wait in turn.
const AHEAD: usize = 3;

/// What [`round_rows`] is given.
struct Rounding<'a, T> {
    from: &'a [f32],
    columns: usize,
    to: *mut MaybeUninit<T>,
    stride: usize,
}

impl<T: Element> Vectorised for Rounding<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        for (i, row) in self.from.chunks_exact(self.columns.max(1)).enumerate() {
            // SAFETY: the room that was promised.
            let to = unsafe { slice::from_raw_parts_mut(self.to.add(i * self.stride), row.len()) };
            let ((pairs, rest), (rooms, rest_to)) = (row.as_chunks::<PAIR>(), to.as_chunks_mut::<PAIR>());
            let next = self.to.wrapping_add((i + AHEAD) * self.stride);
            for (j, (pair, room)) in pairs.iter().zip(rooms).enumerate() {
                L::ask_to_write(next.wrapping_add(j * PAIR).cast());
                let (pieces, _) = pair.as_chunks();
                L::store_both(L::load(&pieces[0]), L::load(&pieces[1]), room);
            }
            for (part, room) in rest.chunks(LANES).zip(rest_to.chunks_mut(LANES)) {
                store_part(load_part::<L, f32>(part), room);
            }
        }
    }
}

/// The f32 `from` as it is stored, in the place of what was there.
pub(crate) fn store<T: Element>(from: &[f32], to: &mut Vec<T>) {
    to.clear();
    to.reserve(from.len());
    round(from, &mut to.spare_capacity_mut()[..from.len()]);
    // SAFETY: within the capacity, and `round` has written all elements.
    unsafe { to.set_len(from.len()) };
}
