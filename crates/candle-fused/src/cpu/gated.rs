//! `f(gate)·up`, and its gradients.

#![expect(clippy::inline_always, reason = "an instruction set reaches only what is inlined")]

use candlewick_kernels::gated::Gate;

use super::lanes::{Element, Lanes};
use super::rows::{In, Row, RowLoop, map, pass};

/// `z·σ(z)` and its slope `σ·(1 + z·(1 − σ))`.
#[inline(always)]
fn silu<L: Lanes, T: Element>(z: L) -> [L; 2] {
    let one = L::splat(1.0);
    let s = one / (one + T::exp(-z));
    [z * s, s * (one + z * (one - s))]
}

/// `z·σ(2t)` and its slope `σ + z·σ·(1 − σ)·2t′`, with `t = √(2/π)·(z + 0.044715·z³)`.
#[inline(always)]
fn gelu<L: Lanes, T: Element>(z: L) -> [L; 2] {
    const TWO_ROOT_TWO_OVER_PI: f32 = 1.595_769;
    const CUBIC: f32 = 0.044_715;
    /// Beyond, σ is 0 or 1 to the last bit, and a cube would overflow.
    const LIMIT: f32 = 16.0;
    let one = L::splat(1.0);
    let c = z.min(L::splat(LIMIT)).max(L::splat(-LIMIT));
    let twice_t = L::splat(TWO_ROOT_TWO_OVER_PI) * (c + L::splat(CUBIC) * c * c * c);
    let slope = L::splat(TWO_ROOT_TWO_OVER_PI) * (one + L::splat(3.0 * CUBIC) * c * c);
    // σ·(1 − σ) from the smaller of the two: the greater has lost digits of 1 − σ.
    let e = T::exp(-twice_t.abs());
    let greater = one / (one + e);
    let smaller = e * greater;
    let s = twice_t.if_less(L::splat(0.0), smaller, greater);
    [z * s, s + c * (smaller * greater) * slope]
}

/// `y = f(gate)·up`.
pub(crate) struct Forward(pub(crate) Gate);

// SAFETY: `map` writes the whole row.
unsafe impl RowLoop<2, 1, 0> for Forward {
    type Statistic = ();

    const EXPONENTIALS: bool = true;

    #[inline(always)]
    fn row<L: Lanes, T: Element>(&self, row: Row<'_, T, 2, 1, 0>) {
        let [Some(y)] = row.outputs else { return };
        match self.0 {
            Gate::Silu => map(
                row.inputs.map(In::soon),
                [],
                y,
                #[inline(always)]
                |[z, up]: [L; 2], []| silu::<L, T>(z)[0] * up,
            ),
            Gate::Gelu => map(
                row.inputs.map(In::soon),
                [],
                y,
                #[inline(always)]
                |[z, up]: [L; 2], []| gelu::<L, T>(z)[0] * up,
            ),
        }
    }
}

/// `d_gate = g·up·f′(gate)` and `d_up = g·f(gate)`, from `gate`, `up` and `g`.
pub(crate) struct Backward(pub(crate) Gate);

// SAFETY: `pass` writes the whole rows.
unsafe impl RowLoop<3, 2, 0> for Backward {
    type Statistic = ();

    const EXPONENTIALS: bool = true;

    #[inline(always)]
    fn row<L: Lanes, T: Element>(&self, row: Row<'_, T, 3, 2, 0>) {
        match self.0 {
            Gate::Silu => gradients(
                row,
                #[inline(always)]
                |z| silu::<L, T>(z),
            ),
            Gate::Gelu => gradients(
                row,
                #[inline(always)]
                |z| gelu::<L, T>(z),
            ),
        }
    }
}

#[inline(always)]
fn gradients<L: Lanes, T: Element>(row: Row<'_, T, 3, 2, 0>, f: impl Fn(L) -> [L; 2]) {
    pass(
        row.inputs.map(In::soon),
        [],
        row.outputs,
        [],
        #[inline(always)]
        |[z, up, g]: [L; 3], [], []| {
            let [value, slope] = f(z);
            ([g * up * slope, g * value], [])
        },
    );
}
