//! Attention whose teams walk tiles: what [`crate::attention`] plans for every device, for heads of 64 or 128 columns.

use super::{BOX, Launch, ROOM_BESIDE, Text, Tiled};
use crate::attention::Attention;
use crate::params::{Params, small};
use crate::source::{SourceFile, source_file};

const ATTENTION: SourceFile = source_file!("kernels/hopper/attention.cu");
const QUERIES: SourceFile = source_file!("kernels/hopper/attention_backward_queries.cu");
const KEYS: SourceFile = source_file!("kernels/hopper/attention_backward_keys.cu");

/// Threads of a team.
const TEAM_THREADS: u32 = 128;

/// A kernel of attention, by what its threadgroups own and walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Walk {
    /// The forward: queries walk keys.
    Forward,
    /// The gradient of queries, which walk keys.
    BackwardQueries,
    /// The gradients of keys and values, which walk queries.
    BackwardKeys,
}

/// How large a threadgroup of a [`Walk`] is.
#[derive(Clone, Copy)]
pub(super) struct Form {
    /// Teams, each with 64 rows of its own.
    teams: u32,
    /// Rows of a block that is walked.
    walk: u32,
    /// Places for such blocks.
    stages: u32,
}

impl Form {
    pub(super) fn defines(self) -> Vec<(&'static str, String)> {
        let Self { teams, walk, stages } = self;
        [("TEAMS", teams), ("WALK", walk), ("STAGES", stages)].map(|(name, n)| (name, format!("{n}u"))).into()
    }

    const fn rows(self) -> u32 {
        self.teams * BOX
    }

    /// Threadgroups that a multiprocessor has room for: `AT_ONCE` of `heads.h`.
    const fn at_once(self) -> usize {
        if self.teams == 1 { 2 } else { 1 }
    }
}

impl Walk {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Forward, Self::BackwardQueries, Self::BackwardKeys];

    /// What took the least time on an H100 of the forms that have registers and shared memory enough.
    pub(super) const fn form(self, width: u32) -> Form {
        let (teams, walk, stages) = match (self, width) {
            (Self::Forward | Self::BackwardQueries, 64) => (1, 128, 2),
            (Self::Forward, _) => (3, 64, 2),
            (Self::BackwardQueries, _) => (2, 64, 3),
            (Self::BackwardKeys, 64) => (1, 64, 3),
            (Self::BackwardKeys, _) => (1, 64, 2),
        };
        Form { teams, walk, stages }
    }

    pub(super) const fn file(self) -> SourceFile {
        match self {
            Self::Forward => ATTENTION,
            Self::BackwardQueries => QUERIES,
            Self::BackwardKeys => KEYS,
        }
    }

    const fn kernel(self) -> &'static str {
        match self {
            Self::Forward => "attention",
            Self::BackwardQueries => "attention_backward_queries",
            Self::BackwardKeys => "attention_backward_keys",
        }
    }

    /// Tiles of a threadgroup's own rows, and floats beside each row that is walked.
    const fn own(self) -> (u32, u32) {
        match self {
            Self::Forward => (1, 0),
            Self::BackwardQueries => (3, 0),
            Self::BackwardKeys => (2, 2),
        }
    }
}

/// The forward: tiles of q, k, v and y; the address of the logarithms. `None` where it does not serve: another width or type.
#[must_use]
pub fn forward(attention: &Attention) -> Option<Launch> {
    let width = width(attention)?;
    let form = Walk::Forward.form(width);
    let tiles = vec![
        queries(attention, form.rows()),
        keys(attention, form.walk),
        keys(attention, form.walk),
        queries(attention, BOX),
    ];
    Some(launch(Walk::Forward, attention, width, tiles, 0))
}

/// The backward, of all three gradients: tiles of q, k, v, y, its gradient and q's; tiles of q, k, v, y's gradient, k's and
/// v's. Both take the addresses of the forward's logarithms and of as many dots, which the first writes. `None` as for
/// [`forward`].
#[must_use]
pub fn backward(attention: &Attention, multiprocessors: usize) -> Option<[Launch; 2]> {
    let width = width(attention)?;
    let form = Walk::BackwardQueries.form(width);
    let own = queries(attention, form.rows());
    let walked = keys(attention, form.walk);
    let tiles = vec![own, walked, walked, own, own, queries(attention, BOX)];
    let of_queries = launch(Walk::BackwardQueries, attention, width, tiles, 0);
    let form = Walk::BackwardKeys.form(width);
    let (walked, own) = (queries(attention, form.walk), keys(attention, form.rows()));
    let result = keys(attention, BOX);
    let tiles = vec![walked, own, own, walked, result, result];
    let at_once = form.at_once() * multiprocessors;
    Some([of_queries, launch(Walk::BackwardKeys, attention, width, tiles, at_once)])
}

/// A head's width, if the kernels are for such attention.
fn width(attention: &Attention) -> Option<u32> {
    let Attention { batch, queries, keys, heads, kv_heads, width, storage, scale, causal, .. } = *attention;
    let fits = |count: usize| i32::try_from(count).is_ok();
    let rows = batch.checked_mul(heads).and_then(|heads| heads.checked_mul(queries.max(keys)));
    let serves = Attention::supports(storage, width, queries.max(keys), scale)
        && matches!(width, 64 | 128)
        && [batch, queries, keys, heads, kv_heads].into_iter().all(|count| count > 0)
        && heads.is_multiple_of(kv_heads)
        && (!causal || keys >= queries)
        && rows.is_some_and(fits);
    serves.then_some(small(width))
}

fn queries(attention: &Attention, tokens: u32) -> Tiled {
    let Attention { batch, queries, heads, width, .. } = *attention;
    Tiled::Heads { sizes: [batch, queries, heads, width], tokens }
}

fn keys(attention: &Attention, tokens: u32) -> Tiled {
    let Attention { batch, keys, kv_heads, width, .. } = *attention;
    Tiled::Heads { sizes: [batch, keys, kv_heads, width], tokens }
}

/// `at_once` threadgroups of one team are at work at a time.
fn launch(walk: Walk, attention: &Attention, width: u32, tiles: Vec<Tiled>, at_once: usize) -> Launch {
    let Attention { batch, queries, keys, heads, kv_heads, storage, scale, causal, .. } = *attention;
    let form = walk.form(width);
    let (own_tiles, floats) = walk.own();
    let (rows, own_heads) = if walk == Walk::BackwardKeys { (keys, kv_heads) } else { (queries, heads) };
    let blocks = rows.div_ceil(form.rows() as usize);
    // A causal mask leaves less to do the later a block of keys is.
    let middle = if causal && batch * own_heads * blocks <= at_once { blocks.div_ceil(2) } else { blocks };
    let row_bytes = 2 * width;
    Launch {
        kernel: walk.kernel(),
        text: Text::Attention { walk, storage, width, causal },
        tiles,
        threadgroups: [small(batch * own_heads), small(blocks)],
        threads: (1 + form.teams) * TEAM_THREADS,
        at_once: false,
        shared_bytes: own_tiles * form.rows() * row_bytes
            + form.stages * form.walk * (2 * row_bytes + 4 * floats)
            + ROOM_BESIDE,
        params: Params::default()
            .u32(small(queries))
            .u32(small(keys))
            .u32(small(heads))
            .u32(small(heads / kv_heads))
            .f32(scale)
            .u32(small(middle))
            .bytes(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::MOST_SHARED_BYTES;
    use super::*;
    use crate::launch::Storage;

    fn attention(queries: usize, keys: usize, width: usize) -> Attention {
        Attention {
            batch: 1,
            queries,
            keys,
            heads: 32,
            kv_heads: 8,
            width,
            q: Attention::contiguous(queries, 32, width),
            k: Attention::contiguous(keys, 8, width),
            v: Attention::contiguous(keys, 8, width),
            storage: Storage::BF16,
            scale: 0.125,
            causal: true,
        }
    }

    #[test]
    fn threadgroups_fit_a_multiprocessor() {
        for width in [64, 128] {
            let attention = attention(1000, 1000, width);
            let [of_queries, of_keys] = backward(&attention, 132).unwrap();
            for launch in [forward(&attention).unwrap(), of_queries, of_keys] {
                assert!(
                    launch.shared_bytes <= MOST_SHARED_BYTES,
                    "{}: {}",
                    launch.kernel,
                    launch.shared_bytes
                );
                // A threadgroup takes 1 KiB for itself.
                let two = 2 * (launch.shared_bytes + 1024) <= 228 * 1024;
                assert!(two || launch.threads > 256, "{}: {}", launch.kernel, launch.shared_bytes);
            }
        }
    }

    #[test]
    fn blocks_cover_all_rows() {
        let grid = |queries, keys, width| {
            let attention = attention(queries, keys, width);
            let [of_queries, of_keys] = backward(&attention, 132).unwrap();
            [forward(&attention).unwrap(), of_queries, of_keys].map(|launch| launch.threadgroups)
        };
        assert_eq!(grid(193, 321, 128), [[32, 2], [32, 2], [8, 6]]);
        assert_eq!(grid(192, 320, 128), [[32, 1], [32, 2], [8, 5]]);
        assert_eq!(grid(1, 65, 64), [[32, 1], [32, 1], [8, 2]]);
    }

    /// The last parameter says from which row of the grid on the keys' blocks come in reverse.
    #[test]
    fn blocks_that_are_at_work_together_are_paired() {
        let middle = |attention: &Attention| {
            let [_, of_keys] = backward(attention, 132).unwrap();
            let last = of_keys.params.last_chunk::<4>().copied().unwrap();
            (u32::from_le_bytes(last), of_keys.threadgroups[1])
        };
        assert_eq!(middle(&attention(2048, 2048, 64)), (16, 32));
        assert_eq!(middle(&attention(2176, 2176, 64)), (34, 34));
        assert_eq!(middle(&Attention { causal: false, ..attention(2048, 2048, 64) }), (32, 32));
    }

    #[test]
    fn what_tiles_cannot_hold_is_declined() {
        for declined in [
            attention(100, 100, 96),
            attention(0, 100, 64),
            attention(100, 0, 64),
            Attention { batch: 0, ..attention(100, 100, 64) },
            Attention { heads: 0, ..attention(100, 100, 64) },
            Attention { kv_heads: 3, ..attention(100, 100, 64) },
            attention(101, 100, 64),
            Attention { storage: Storage::F32, ..attention(100, 100, 64) },
            Attention { scale: -1.0, ..attention(100, 100, 64) },
            attention(100, 1 << 28, 64),
        ] {
            assert_eq!(forward(&declined), None, "{declined:?}");
            assert_eq!(backward(&declined, 132), None, "{declined:?}");
        }
    }
}
