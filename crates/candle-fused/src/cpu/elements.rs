//! Loops without rows: a sum, a step of Adam, and the mask of dropout.

#![expect(clippy::inline_always, reason = "an instruction set reaches only what is inlined")]

use candlewick_kernels::adam::Adam as Constants;

use super::lanes::{Element, Lanes};
use super::rows::{In, Row, RowLoop, map, pass};
use crate::ops::lora_linear::Dropout;

/// `x + y`.
pub(crate) struct Add;

// SAFETY: `map` writes the whole row.
unsafe impl RowLoop<2, 1, 0> for Add {
    type Statistic = ();

    #[inline(always)]
    fn row<L: Lanes, T: Element>(&self, row: Row<'_, T, 2, 1, 0>) {
        let [Some(sum)] = row.outputs else { return };
        map(
            row.inputs.map(In::soon),
            [],
            sum,
            #[inline(always)]
            |[x, y]: [L; 2], []| x + y,
        );
    }
}

/// Value, moments and gradient to the next value and moments: see [`AdamStep`](crate::ops::adam::AdamStep).
pub(crate) struct Adam(pub(crate) Constants);

// SAFETY: `pass` writes the whole rows.
unsafe impl RowLoop<4, 3, 0> for Adam {
    type Statistic = ();

    #[inline(always)]
    fn row<L: Lanes, T: Element>(&self, row: Row<'_, T, 4, 3, 0>) {
        let Constants { new1, old2, new2, eps, rate, part, shrink, l2: decay, .. } = self.0;
        let [new1, old2, new2] = [new1, old2, new2].map(L::splat);
        let [eps, rate, part, shrink, l2] = [eps, rate, part, shrink, decay].map(L::splat);
        pass(
            row.inputs.map(In::soon),
            [],
            row.outputs,
            [],
            #[inline(always)]
            |[x, m, v, g]: [L; 4], [], []| {
                let g = if decay == 0.0 { g } else { g + x * l2 };
                let m = m + (g - m) * new1;
                let v = v * old2 + g * g * new2;
                ([x * shrink - m / (v.sqrt() * part + eps) * rate, m, v], [])
            },
        );
    }
}

/// Multiplies by the mask.
pub(crate) struct Drop(pub(crate) Dropout);

// SAFETY: `map` writes the whole row.
unsafe impl RowLoop<1, 1, 0> for Drop {
    type Statistic = ();

    const SCRATCH: bool = true;
    const EXPONENTIALS: bool = true;

    #[inline(always)]
    fn row<L: Lanes, T: Element>(&self, row: Row<'_, T, 1, 1, 0>) {
        let ([x], [Some(y)]) = (row.inputs, row.outputs) else { return };
        let factors = &mut row.scratch[..x.len()];
        mask(self.0, row.index, factors);
        map(
            [x.soon()],
            [&*factors],
            y,
            #[inline(always)]
            |[x]: [L; 1], [factor]| x * factor,
        );
    }
}

/// The factors of consecutive elements, the first of which has this index.
fn mask(dropout: Dropout, first: usize, factors: &mut [f32]) {
    let mut index = first;
    let mut rest = factors;
    while !rest.is_empty() {
        let lane = index % 4;
        let block = dropout.factors(index as u64 / 4);
        let here = rest.split_off_mut(..rest.len().min(4 - lane)).unwrap_or_default();
        index += here.len();
        here.copy_from_slice(&block[lane..lane + here.len()]);
    }
}
