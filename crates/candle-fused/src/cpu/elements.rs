//! Loops without rows: a sum, and a step of Adam.

#![expect(clippy::inline_always, reason = "an instruction set reaches only what is inlined")]

use candlewick_kernels::adam::Adam as Constants;

use super::lanes::{Element, Lanes};
use super::rows::{In, Row, RowLoop, map, pass};

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
