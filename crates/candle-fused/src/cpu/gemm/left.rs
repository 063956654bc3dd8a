//! The left matrix as a product reads it: as it is stored, widened to f32, or turned.

use std::slice;
use std::sync::OnceLock;

use half::bf16;

use super::super::dispatch;
use super::kernel::{Kernel, Pairs};
use super::parts::{PARTS, Parts};
use super::{Data, Matrix, Product, dot, pack};

/// A left matrix for several products, widened once, when the first of them needs it.
pub(crate) struct Left<'a> {
    stored: Matrix<'a>,
    wide: OnceLock<Vec<f32>>,
}

impl<'a> Left<'a> {
    pub(crate) fn new(stored: Matrix<'a>) -> Self {
        Self { stored, wide: OnceLock::new() }
    }

    /// In f32.
    pub(crate) fn wide(&self) -> Matrix<'_> {
        let readable = self.stored.row_stride == 1 || self.stored.column_stride == 1;
        if readable && matches!(self.stored.data, Data::F32(_)) {
            return self.stored;
        }
        let (stored, turned) = along(self.stored);
        let wide = self.wide.get_or_init(|| stored.to_f32());
        match Matrix::of_rows(wide, [stored.rows, stored.columns]) {
            Ok(wide) if turned => wide.t(),
            Ok(wide) => wide,
            Err(_) => self.stored,
        }
    }

    /// Whether the product with this right matrix reads it as it is, in 16 bits.
    pub(crate) fn stays_narrow(&self, right: &Matrix) -> bool {
        self.stored.rows > dot::ROWS && takes_pairs(Kernel::of(dispatch::isa()).pairs, &self.stored, right)
    }

    /// As the product with this right matrix reads it best.
    pub(crate) fn beside(&self, right: &Matrix) -> Matrix<'_> {
        if self.stays_narrow(right) { self.stored } else { self.wide() }
    }
}

/// The matrix, or its transpose where that lies in rows; whether it is that.
fn along(matrix: Matrix) -> (Matrix, bool) {
    let turned = matrix.row_stride == 1 && matrix.column_stride != 1;
    (if turned { matrix.t() } else { matrix }, turned)
}

/// Whether this processor multiplies bf16 in pairs.
pub(crate) fn multiplies_pairs() -> bool {
    Kernel::of(dispatch::isa()).pairs.is_some()
}

/// Whether products with these rows are best of bf16 pairs, also where the other matrix is f32 and has to be split.
pub(crate) fn multiplies_parts(rows: &Matrix) -> bool {
    let fast = Kernel::of(dispatch::isa()).pairs.is_some_and(|pairs| pairs.fast);
    fast && rows.rows > dot::ROWS && reads_pairs(rows)
}

/// Whether pairs are read of a left matrix as it lies.
pub(super) fn reads_pairs(left: &Matrix) -> bool {
    matches!(left.data, Data::BF16(_)) && left.in_rows().is_some()
}

/// Whether a product is one of bf16 pairs.
pub(super) fn takes_pairs(pairs: Option<Pairs>, left: &Matrix, right: &Matrix) -> bool {
    pairs.is_some() && reads_pairs(left) && matches!(right.data, Data::BF16(_))
}

/// A matrix whose columns are the rows of a left one.
pub(crate) enum Columns<'a> {
    Wide(Left<'a>),
    /// bf16, the columns in one piece.
    Pairs {
        /// Two steps a word.
        words: Vec<f32>,
        /// Columns and their steps, each a multiple of what is turned at once.
        dims: [usize; 2],
        columns: usize,
    },
}

impl<'a> Columns<'a> {
    /// In pairs, if that is said; then the matrix is bf16, and the processor multiplies pairs.
    pub(crate) fn of(matrix: Matrix<'a>, in_pairs: bool) -> Self {
        if in_pairs {
            let (words, dims) = pack::turn_pairs(dispatch::isa(), &matrix);
            Self::Pairs { words, dims, columns: matrix.columns }
        } else {
            Self::Wide(Left::new(matrix))
        }
    }

    /// `[columns, count]`: those of `count` of the rows, from `first` on, which is even.
    pub(crate) fn some(&self, first: usize, count: usize) -> Option<Matrix<'_>> {
        match self {
            Self::Wide(left) => Some(left.wide().some_rows(first, count).t()),
            Self::Pairs { words, dims: [_, steps], columns } => {
                // SAFETY: the same memory; any bits are bf16, which needs no more alignment.
                let data = unsafe { slice::from_raw_parts(words.as_ptr().cast::<bf16>(), 2 * words.len()) };
                Matrix::new(Data::BF16(data), first, [*columns, count], [*steps, 1])
            }
        }
    }
}

/// A left matrix as the kernels read it.
pub(super) enum Read<'a> {
    Stored(Matrix<'a>),
    Wide(Left<'a>),
    Parts(Parts),
}

/// The left matrices as the kernels read them: as they are, in parts, or widened.
pub(super) fn lefts<'a>(kernel: Kernel, products: &[Product<'a>]) -> Vec<Read<'a>> {
    let read = |Product { left, right }: &Product<'a>| {
        if takes_pairs(kernel.pairs, left, right) {
            return Read::Stored(*left);
        }
        parts_for(kernel.pairs, left, right).map_or_else(|| Read::Wide(Left::new(*left)), Read::Parts)
    };
    products.iter().map(read).collect()
}

/// The parts of an f32 left matrix, where the product of these with the right one is the fastest.
fn parts_for(pairs: Option<Pairs>, left: &Matrix, right: &Matrix) -> Option<Parts> {
    if serve_parts(pairs, left, right) { Parts::of(left) } else { None }
}

fn serve_parts(pairs: Option<Pairs>, left: &Matrix, right: &Matrix) -> bool {
    /// The fewest rows, steps and columns for which the splitting pays, of the left matrix and of both.
    const LEFT: [usize; 3] = [dot::ROWS + 1, 1, 192];
    const BOTH: [usize; 3] = [48, 192, 256];
    let [rows, steps, columns] = if is_split(right) { BOTH } else { LEFT };
    pairs.is_some_and(|pairs| pairs.fast)
        && matches!(left.data, Data::F32(_))
        && left.in_rows().is_some()
        && left.rows >= rows
        && right.columns >= columns
        && right.rows >= steps
}

/// Whether a right matrix beside parts is in parts, too.
fn is_split(right: &Matrix) -> bool {
    !matches!(right.data, Data::BF16(_))
}

/// Whether this product of f32 is one of pairs, in parts.
pub(crate) fn takes_parts(Product { left, right }: &Product) -> bool {
    serve_parts(Kernel::of(dispatch::isa()).pairs, left, right)
}

/// A product as the kernels compute it: each part of the left matrix, as many columns of it after the others, with the same
/// right one, or that one's parts.
pub(super) struct Term<'a> {
    pub(super) left: Matrix<'a>,
    pub(super) parts: usize,
    pub(super) right: Matrix<'a>,
    pub(super) split: bool,
}

/// The products with these left matrices.
pub(super) fn terms<'a>(products: &[Product<'a>], lefts: &'a [Read<'a>]) -> Vec<Term<'a>> {
    let term = |(Product { left, right }, read): (&Product<'a>, &'a Read<'a>)| {
        let (left, parts) = match read {
            Read::Stored(left) => (*left, 1),
            Read::Wide(left) => (left.wide(), 1),
            Read::Parts(parts) => parts.matrix().map_or((*left, 1), |matrix| (matrix, PARTS)),
        };
        Term { left, parts, right: *right, split: parts > 1 && is_split(right) }
    };
    products.iter().zip(lefts).map(term).collect()
}
