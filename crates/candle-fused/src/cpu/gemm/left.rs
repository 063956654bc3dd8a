//! The left matrix as a product reads it: as it is stored, or widened to f32.

use std::sync::OnceLock;

use super::super::dispatch;
use super::kernel::{Kernel, Pairs};
use super::{Data, Matrix, Product, dot};

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
        let product = Product { left: self.stored, right: *right };
        self.stored.rows > dot::ROWS && takes_pairs(Kernel::of(dispatch::isa()).pairs, &product)
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

/// Whether a product is one of bf16 pairs.
pub(super) fn takes_pairs(pairs: Option<Pairs>, Product { left, right }: &Product) -> bool {
    pairs.is_some()
        && matches!((left.data, right.data), (Data::BF16(_), Data::BF16(_)))
        && left.column_stride == 1
}

/// The left matrices as the kernels read them, widened where they cannot.
pub(super) fn lefts<'a>(kernel: Kernel, products: &[Product<'a>]) -> Vec<Option<Left<'a>>> {
    let left = |product: &Product<'a>| (!takes_pairs(kernel.pairs, product)).then(|| Left::new(product.left));
    products.iter().map(left).collect()
}

/// The products with these left matrices.
pub(super) fn terms<'a>(products: &[Product<'a>], lefts: &'a [Option<Left<'a>>]) -> Vec<Product<'a>> {
    let term = |(product, left): (&Product<'a>, &'a Option<Left<'a>>)| Product {
        left: left.as_ref().map_or(product.left, Left::wide),
        right: product.right,
    };
    products.iter().zip(lefts).map(term).collect()
}
