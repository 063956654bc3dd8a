//! What a loop over rows is, and the passes over a row that loops are made of.

#![expect(clippy::inline_always, reason = "an instruction set reaches only what is inlined")]

use std::any::TypeId;
use std::mem::MaybeUninit;
use std::ops::Deref;

use super::lanes::{Element, LANES, Lanes, Piece, Room, as_room};

/// What is computed of each row of `N` inputs: rows of `M` outputs, parts of `P` sums over the rows, and a statistic.
///
/// # Safety
/// [`Self::row`] must write every element of every output that it gets.
pub(crate) unsafe trait RowLoop<const N: usize, const M: usize, const P: usize>: Sync {
    type Statistic: Clone + Default + Send;

    /// Whether it needs room for a row of f32.
    const SCRATCH: bool = false;
    /// Whether an element costs an exponential, or as much.
    const EXPONENTIALS: bool = false;

    fn row<L: Lanes, T: Element>(&self, row: Row<'_, T, N, M, P>) -> Self::Statistic;
}

/// One row, as a loop sees it.
pub(crate) struct Row<'a, T, const N: usize, const M: usize, const P: usize> {
    /// Among the rows; where rows do not matter, the row-major index of the first element.
    pub(crate) index: usize,
    pub(crate) inputs: [In<'a, T>; N],
    /// Those that are wanted.
    pub(crate) outputs: [Option<Out<'a, T>>; M],
    /// Of f32, to be added to.
    pub(crate) sums: [Option<&'a mut [f32]>; P],
    /// As long as the row, if the loop asks for it.
    pub(crate) scratch: &'a mut [f32],
}

/// A row to be read.
///
/// While a loop computes from the cache or writes, memory has time for what comes next. So the last pass over a row is given this
/// and asks for another row, piece by piece; the passes before it are given a slice.
pub(crate) struct In<'a, T, const SOON: bool = false> {
    row: &'a [T],
    /// So many bytes after a piece lies what is asked for when the piece is read, `SOON` if there is no pass in between.
    ahead: usize,
}

impl<T, const SOON: bool> Clone for In<'_, T, SOON> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<T, const SOON: bool> Copy for In<'_, T, SOON> {}

impl<T> Deref for In<'_, T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        self.row
    }
}

impl<'a, T> In<'a, T> {
    #[inline(always)]
    pub(crate) fn new(row: &'a [T], ahead: usize) -> Self {
        Self { row, ahead }
    }

    /// For a loop of one pass.
    #[inline(always)]
    pub(super) fn soon(self) -> In<'a, T, true> {
        In { row: self.row, ahead: self.ahead }
    }

    /// The first elements, and the others.
    #[inline(always)]
    pub(super) fn split_at(self, mid: usize) -> (Self, Self) {
        let (first, rest) = self.row.split_at(mid);
        (Self { row: first, ..self }, Self { row: rest, ..self })
    }

    /// Parts of so many elements, each of which has all its passes before the next one.
    #[inline(always)]
    pub(super) fn parts(self, len: usize) -> impl Iterator<Item = Self> {
        let ahead = if self.row.len() > len { len * size_of::<T>() } else { self.ahead };
        self.row.chunks(len).map(
            #[inline(always)]
            move |row| Self { row, ahead },
        )
    }
}

/// What a pass reads.
pub(super) trait Source<'a, T>: Copy {
    fn row(self) -> &'a [T];

    /// Asks for what is read later than this piece, if for anything.
    #[inline(always)]
    fn ask<L: Lanes>(self, _: &Piece<T>) {}
}

impl<'a, T> Source<'a, T> for &'a [T] {
    #[inline(always)]
    fn row(self) -> &'a [T] {
        self
    }
}

impl<'a, T, const SOON: bool> Source<'a, T> for In<'a, T, SOON> {
    #[inline(always)]
    fn row(self) -> &'a [T] {
        self.row
    }

    #[inline(always)]
    fn ask<L: Lanes>(self, piece: &Piece<T>) {
        L::ask::<SOON>(piece.as_ptr().cast::<u8>().wrapping_add(self.ahead));
    }
}

/// A row to be written.
pub(crate) struct Out<'a, T> {
    row: &'a mut [MaybeUninit<T>],
    /// Past the cache. Then its address is a multiple of 16.
    stream: bool,
}

impl<'a, T: Element> Out<'a, T> {
    /// `stream` asks for stores past the cache, which the row's address must allow.
    #[inline(always)]
    pub(crate) fn new(row: &'a mut [MaybeUninit<T>], stream: bool) -> Self {
        let stream = stream && row.as_ptr().addr().is_multiple_of(16);
        Self { row, stream }
    }

    /// Over what is there.
    #[inline(always)]
    pub(crate) fn over(row: &'a mut [T]) -> Self {
        let (pointer, len) = (row.as_mut_ptr().cast(), row.len());
        // SAFETY: the same elements in the same places, and nothing here writes the lack of a value.
        let row = unsafe { std::slice::from_raw_parts_mut(pointer, len) };
        Self { row, stream: false }
    }

    /// The first elements, and the others.
    #[inline(always)]
    pub(crate) fn split_at(self, mid: usize) -> (Self, Self) {
        let (first, rest) = self.row.split_at_mut(mid);
        (Self { row: first, stream: self.stream }, Self::new(rest, self.stream))
    }

    #[inline(always)]
    pub(crate) fn fill(self, value: T) {
        for room in self.row {
            room.write(value);
        }
    }

    #[inline(always)]
    pub(crate) fn set(&mut self, index: usize, value: T) {
        self.row[index].write(value);
    }

    /// For more than one pass.
    #[inline(always)]
    pub(crate) fn reborrow(&mut self) -> Out<'_, T> {
        Out { row: self.row, stream: self.stream }
    }
}

/// The pieces of a row, all the same number, and what is left.
#[inline(always)]
fn pieces<T>(row: &[T], len: usize) -> (&[Piece<T>], &[T]) {
    let (whole, rest) = row.as_chunks::<LANES>();
    (&whole[..len / LANES], &rest[..len % LANES])
}

#[inline(always)]
fn pieces_mut<T>(row: &mut [T], len: usize) -> (&mut [Piece<T>], &mut [T]) {
    let (whole, rest) = row.as_chunks_mut::<LANES>();
    (&mut whole[..len / LANES], &mut rest[..len % LANES])
}

/// Less than a piece; the other lanes are 0.
#[inline(always)]
pub(super) fn load_part<L: Lanes, T: Element>(from: &[T]) -> L {
    T::load(&L::part(from, T::zero()))
}

#[inline(always)]
pub(super) fn store_part<L: Lanes, T: Element>(lanes: L, to: &mut [MaybeUninit<T>]) {
    let mut piece = [T::zero(); LANES];
    T::store(lanes, as_room(&mut piece));
    L::put_part(&piece, to);
}

/// The inputs of a pass that has none.
pub(super) const NONE: [&[f32]; 0] = [];

/// `M` values and `P` new values of `sums`, for each element of rows of one length: `f(inputs, wide, sums)`, where `wide`
/// are f32 whatever the inputs are. What is not wanted is not written. Without `wide` and `sums`, `f` must be the same in
/// every lane: elements may come in another order.
#[inline(always)]
pub(super) fn pass<
    'a,
    L: Lanes,
    T: Element + 'a,
    U: Element,
    const N: usize,
    const K: usize,
    const M: usize,
    const P: usize,
>(
    sources: [impl Source<'a, T>; N],
    wide: [&[f32]; K],
    outputs: [Option<Out<'_, U>>; M],
    sums: [Option<&mut [f32]>; P],
    f: impl Fn([L; N], [L; K], [L; P]) -> ([L; M], [L; P]),
) {
    // What is the same in every lane, and meets nothing that lies in another order.
    if K == 0 && P == 0 && TypeId::of::<T>() == TypeId::of::<U>() {
        pass_in::<true, L, T, U, N, K, M, P>(sources, wide, outputs, sums, f);
    } else {
        pass_in::<false, L, T, U, N, K, M, P>(sources, wide, outputs, sums, f);
    }
}

#[inline(always)]
fn pass_in<
    'a,
    const ANY_ORDER: bool,
    L: Lanes,
    T: Element + 'a,
    U: Element,
    const N: usize,
    const K: usize,
    const M: usize,
    const P: usize,
>(
    sources: [impl Source<'a, T>; N],
    wide: [&[f32]; K],
    outputs: [Option<Out<'_, U>>; M],
    sums: [Option<&mut [f32]>; P],
    f: impl Fn([L; N], [L; K], [L; P]) -> ([L; M], [L; P]),
) {
    let lens = (sources.first().map(|source| source.row().len()), wide.first().map(|row| row.len()));
    let len = lens.0.or(lens.1).or(sums.iter().flatten().next().map(|sum| sum.len())).unwrap_or_default();
    let zero = L::splat(0.0);
    let inputs = sources.map(
        #[inline(always)]
        |source| pieces(source.row(), len),
    );
    let wide = wide.map(
        #[inline(always)]
        |row| pieces(row, len),
    );
    let streams = outputs.each_ref().map(|out| out.as_ref().is_some_and(|out| out.stream));
    let mut outputs = outputs.map(
        #[inline(always)]
        |out| out.map(|out| pieces_mut(out.row, len)),
    );
    let mut sums = sums.map(
        #[inline(always)]
        |sum| sum.map(|sum| pieces_mut(sum, len)),
    );

    for i in 0..len / LANES {
        // Not by `array::from_fn`, which is a function of its own, compiled for other instructions.
        let (mut x, mut w, mut s) = ([zero; N], [zero; K], [zero; P]);
        for k in 0..N {
            let from = &inputs[k].0[i];
            sources[k].ask::<L>(from);
            x[k] = if ANY_ORDER { T::load_any(from) } else { T::load(from) };
        }
        for k in 0..K {
            w[k] = L::load(&wide[k].0[i]);
        }
        for k in 0..P {
            if let Some(sum) = &sums[k] {
                s[k] = L::load(&sum.0[i]);
            }
        }
        let (y, s) = f(x, w, s);
        for k in 0..M {
            if let Some((out, _)) = &mut outputs[k] {
                let to = &mut out[i];
                match (streams[k], ANY_ORDER) {
                    // SAFETY: a row that is streamed begins at a multiple of 16, and a piece has 32 or 64 bytes.
                    (true, true) => unsafe { U::stream_again(y[k], to) },
                    // SAFETY: likewise.
                    (true, false) => unsafe { U::stream(y[k], to) },
                    (false, true) => U::store_again(y[k], to),
                    (false, false) => U::store(y[k], to),
                }
            }
        }
        for k in 0..P {
            if let Some((sum, _)) = &mut sums[k] {
                s[k].store(as_room(&mut sum[i]));
            }
        }
    }
    if !len.is_multiple_of(LANES) {
        let (mut x, mut w, mut s) = ([zero; N], [zero; K], [zero; P]);
        for k in 0..N {
            x[k] = load_part(inputs[k].1);
        }
        for k in 0..K {
            w[k] = load_part(wide[k].1);
        }
        for k in 0..P {
            if let Some(sum) = &sums[k] {
                s[k] = load_part(sum.1);
            }
        }
        let (y, s) = f(x, w, s);
        for k in 0..M {
            if let Some((_, out)) = &mut outputs[k] {
                store_part(y[k], out);
            }
        }
        for k in 0..P {
            if let Some((_, sum)) = &mut sums[k] {
                let lanes = s[k].to_array();
                sum.copy_from_slice(&lanes[..sum.len()]);
            }
        }
    }
}

/// `y = f(x, w)` for each element, as [`pass`] does it.
#[inline(always)]
pub(super) fn map<'a, L: Lanes, T: Element + 'a, U: Element, const N: usize, const K: usize>(
    inputs: [impl Source<'a, T>; N],
    wide: [&[f32]; K],
    output: Out<'_, U>,
    f: impl Fn([L; N], [L; K]) -> L,
) {
    pass(
        inputs,
        wide,
        [Some(output)],
        [],
        #[inline(always)]
        |x, w, []| ([f(x, w)], []),
    );
}

/// `S` sums over the elements of rows of one length, to which `f(totals, inputs, wide)` adds an element's terms. Each is made of
/// `A` interleaved parts of sixteen lanes, more of which hide an addition's latency where `f` is short.
#[inline(always)]
pub(super) fn sums<
    'a,
    const A: usize,
    L: Lanes,
    T: Element + 'a,
    const N: usize,
    const K: usize,
    const S: usize,
>(
    sources: [impl Source<'a, T>; N],
    wide: [&[f32]; K],
    f: impl Fn([L; S], [L; N], [L; K]) -> [L; S],
) -> [f32; S] {
    let len = sources[0].row().len();
    let inputs = sources.map(
        #[inline(always)]
        |source| pieces(source.row(), len),
    );
    let wide = wide.map(
        #[inline(always)]
        |row| pieces(row, len),
    );
    let zero = L::splat(0.0);
    let mut totals = [[zero; S]; A];
    let groups = inputs.map(
        #[inline(always)]
        |row| row.0.as_chunks::<A>(),
    );
    let wide_groups = wide.map(
        #[inline(always)]
        |row| row.0.as_chunks::<A>(),
    );
    let count = len / LANES / A;
    let inputs_whole = groups.map(
        #[inline(always)]
        |row| &row.0[..count],
    );
    let wide_whole = wide_groups.map(
        #[inline(always)]
        |row| &row.0[..count],
    );
    for i in 0..count {
        for (a, total) in totals.iter_mut().enumerate() {
            let (mut x, mut w) = ([zero; N], [zero; K]);
            for k in 0..N {
                let from = &inputs_whole[k][i][a];
                sources[k].ask::<L>(from);
                x[k] = T::load(from);
            }
            for k in 0..K {
                w[k] = L::load(&wide_whole[k][i][a]);
            }
            *total = f(*total, x, w);
        }
    }
    for i in 0..len / LANES % A {
        let (mut x, mut w) = ([zero; N], [zero; K]);
        for k in 0..N {
            x[k] = T::load(&groups[k].1[i]);
        }
        for k in 0..K {
            w[k] = L::load(&wide_groups[k].1[i]);
        }
        totals[0] = f(totals[0], x, w);
    }
    if !len.is_multiple_of(LANES) {
        let (mut x, mut w) = ([zero; N], [zero; K]);
        for k in 0..N {
            x[k] = load_part(inputs[k].1);
        }
        for k in 0..K {
            w[k] = load_part(wide[k].1);
        }
        let added = f(totals[0], x, w);
        for (total, added) in totals[0].iter_mut().zip(added) {
            *total = added.first(len % LANES, *total);
        }
    }
    let mut total = [zero; S];
    for part in totals {
        for (total, part) in total.iter_mut().zip(part) {
            *total = *total + part;
        }
    }
    let mut joined = [0.0; S];
    for (joined, total) in joined.iter_mut().zip(total) {
        *joined = total.sum();
    }
    joined
}

/// Writes `f(x)` for each element of a row, in the order of [`Element::load_any`], and returns their sum.
#[inline(always)]
pub(super) fn map_total<'a, L: Lanes, T: Element + 'a>(
    source: impl Source<'a, T>,
    out: &mut [f32],
    f: impl Fn(L) -> L,
) -> f32 {
    let len = source.row().len();
    let (whole, rest) = pieces(source.row(), len);
    let (out, out_rest) = pieces_mut(out, len);
    let mut total = L::splat(0.0);
    for (from, to) in whole.iter().zip(out) {
        source.ask::<L>(from);
        let y = f(T::load_any(from));
        total = total + y;
        y.store(as_room(to));
    }
    if !rest.is_empty() {
        let y = f(load_part(rest)).to_array();
        out_rest.copy_from_slice(&y[..rest.len()]);
        total = total + load_part(out_rest);
    }
    total.sum()
}

/// `y = f(x)` for each element of what [`map_total`] has written of a row of `y`'s type.
#[inline(always)]
pub(super) fn map_again<L: Lanes, U: Element>(x: &[f32], y: Out<'_, U>, f: impl Fn(L) -> L) {
    pass_in::<true, L, f32, U, 1, 0, 1, 0>(
        [x],
        [],
        [Some(y)],
        [],
        #[inline(always)]
        |[x], [], []| ([f(x)], []),
    );
}

/// The least and the greatest element; NaN is passed over, and an empty row has `inf` and `-inf`.
#[inline(always)]
pub(super) fn extremes<L: Lanes, T: Element>(row: &[T]) -> [f32; 2] {
    if let Some((bits, wide)) = T::as_bits(row) {
        // As integers floats of one sign are in order: of positive ones the greatest is the greatest with a sign, of negative ones the
        // least the greatest without.
        let (mut greatest, mut least) = (i16::MIN, 0);
        for &bits in bits {
            greatest = greatest.max(bits.cast_signed());
            least = least.max(bits);
        }
        let (least, greatest) = (wide(least), wide(greatest.cast_unsigned()));
        // There are both, and no NaN, which as an integer is beyond all else.
        if greatest >= 0.0 && least <= 0.0 && !bits.is_empty() {
            return [least, greatest];
        }
    }
    // As many chains as there are registers for.
    if L::REGISTERS > 8 { extremes_by::<4, L, T>(row) } else { extremes_by::<2, L, T>(row) }
}

#[inline(always)]
fn extremes_by<const A: usize, L: Lanes, T: Element>(row: &[T]) -> [f32; 2] {
    let (whole, rest) = row.as_chunks::<LANES>();
    let (groups, singles) = whole.as_chunks::<A>();
    let mut least = [L::splat(f32::INFINITY); A];
    let mut greatest = [L::splat(f32::NEG_INFINITY); A];
    for group in groups {
        for (k, piece) in group.iter().enumerate() {
            let x = T::load_any::<L>(piece);
            (least[k], greatest[k]) = (least[k].min(x), greatest[k].max(x));
        }
    }
    for piece in singles {
        let x = T::load_any::<L>(piece);
        (least[0], greatest[0]) = (least[0].min(x), greatest[0].max(x));
    }
    if !rest.is_empty() {
        let x = load_part::<L, T>(rest);
        least[1] = least[1].min(x.first(rest.len(), L::splat(f32::INFINITY)));
        greatest[1] = greatest[1].max(x.first(rest.len(), L::splat(f32::NEG_INFINITY)));
    }
    let (mut low, mut high) = (least[0], greatest[0]);
    for k in 1..A {
        (low, high) = (low.min(least[k]), high.max(greatest[k]));
    }
    [-(-low).greatest(), high.greatest()]
}

/// `f(x)` of one element, as the lanes compute it.
#[inline(always)]
pub(super) fn one<L: Lanes>(x: f32, f: impl Fn(L) -> L) -> f32 {
    f(L::splat(x)).to_array()[0]
}

/// The sum of a row in f64, for what overflows or vanishes in f32.
pub(super) fn wide_sum<T: Element>(row: &[T], f: impl Fn(f64) -> f64) -> f64 {
    row.iter().map(|x| f(x.to_f64())).sum()
}

/// Rounds one number as `T` stores it.
#[inline(always)]
pub(super) fn round<L: Lanes, T: Element>(x: f32) -> T {
    let mut piece: Piece<T> = [T::zero(); LANES];
    let room: &mut Room<T> = as_room(&mut piece);
    T::store(L::splat(x), room);
    piece[0]
}

/// Widens one number.
#[inline(always)]
pub(super) fn wide<L: Lanes, T: Element>(x: T) -> f32 {
    T::load::<L>(&[x; LANES]).to_array()[0]
}
