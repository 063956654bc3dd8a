//! Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
//! 1, 2, 3" (SC'11): four words of randomness for each counter, in any order, with no state. A dropout mask is
//! therefore a function of the seed and the element's index.

#![expect(clippy::inline_always, reason = "an instruction set reaches only what is inlined")]

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const KEY_STEPS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// The four random words of each of `N` counters under `key`, side by side.
#[expect(clippy::needless_range_loop, reason = "compiled to better instructions than four iterators")]
#[inline(always)]
pub(crate) fn philox4x32<const N: usize>(mut counters: [[u32; N]; 4], mut key: [u32; 2]) -> [[u32; N]; 4] {
    for _ in 0..10 {
        for i in 0..N {
            let [low0, high0] = halves(u64::from(MULTIPLIERS[0]) * u64::from(counters[0][i]));
            let [low1, high1] = halves(u64::from(MULTIPLIERS[1]) * u64::from(counters[2][i]));
            counters[0][i] = high1 ^ counters[1][i] ^ key[0];
            counters[1][i] = low1;
            counters[2][i] = high0 ^ counters[3][i] ^ key[1];
            counters[3][i] = low0;
        }
        key = [key[0].wrapping_add(KEY_STEPS[0]), key[1].wrapping_add(KEY_STEPS[1])];
    }
    counters
}

/// The low and the high 32 bits.
#[expect(clippy::cast_possible_truncation, reason = "taking the halves is the purpose")]
#[inline(always)]
pub(crate) fn halves(word: u64) -> [u32; 2] {
    [word as u32, (word >> 32) as u32]
}

#[cfg(test)]
mod tests {
    use super::philox4x32;

    /// The known answers that the authors distribute with Random123 (`kat_vectors`).
    #[test]
    fn known_answers() {
        let random = |counter: [u32; 4], key| philox4x32(counter.map(|word| [word]), key).map(|[word]| word);
        assert_eq!(random([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(random([!0; 4], [!0; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            random([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }
}
