//! A small generator of random numbers, for the order in which threads run.

/// `SplitMix64` (Steele, Lea and Flood, 2014).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Takes one of the items, each with the same chance.
    pub(crate) fn take<T>(&mut self, items: &mut Vec<T>) -> Option<T> {
        let chosen = (!items.is_empty()).then(|| self.below(items.len()));
        chosen.map(|chosen| items.swap_remove(chosen))
    }

    /// A number below `bound`, which is not zero. The bias for bounds far below 2⁶⁴ is of no account here.
    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).unwrap_or(0)
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}
