//! Plans of attention; the mathematics is at the heads of `kernels/attention.metal` and `kernels/attention_backward.metal`.

use crate::launch::{
    Element, KernelFile, Launch, MAX_GRID_YZ, Plan, PlanError, SIMDGROUP_SIZE, Storage, TILE,
};
use crate::params::{Buffers, Params, Tuning, define, flag, groups, product, shape, size, small};

const OP: &str = "attention";
/// The widest head whose tiles fit into registers.
const MAX_WIDTH: usize = 128;
/// From here on a threadgroup's simdgroups are twice as many, because fewer threadgroups run at a time.
const WIDE_HEAD: usize = 96;
/// Rows that are staged at a time; twice as many where the queries of narrow heads are walked.
const WALK: usize = 32;
/// Rows of y and its gradient that a threadgroup multiplies, a simdgroup one.
const DOT_ROWS: usize = 8;

/// `softmax(scale · q·kᵀ)·v` of q `[batch, queries, heads, width]` and k, v `[batch, keys, kv_heads, width]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Batch entries.
    pub batch: usize,
    /// Queries of a head.
    pub queries: usize,
    /// Keys of a head: at least one, and with `causal` no fewer than queries.
    pub keys: usize,
    /// Heads of q.
    pub heads: usize,
    /// Heads of k and v, which divide those of q: head i reads head `i / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// The width of a head.
    pub width: usize,
    /// q's strides over batch, tokens and heads, in elements; its last dimension is contiguous.
    pub q: [usize; 3],
    /// k's strides.
    pub k: [usize; 3],
    /// v's strides.
    pub v: [usize; 3],
    /// The type of all tensors.
    pub storage: Storage,
    /// Multiplies the scores; positive.
    pub scale: f32,
    /// Whether query i sees the keys up to `i + keys - queries` alone.
    pub causal: bool,
}

/// Which gradients a backward computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionGradients {
    /// q's.
    pub q: bool,
    /// k's.
    pub k: bool,
    /// v's.
    pub v: bool,
}

impl Attention {
    /// Whether the kernels are for such heads, tokens and scales: 16-bit values, which matrix units multiply exactly, in rows
    /// of whole tiles that fit into registers.
    #[must_use]
    pub fn supports(storage: Storage, width: usize, tokens: usize, scale: f32) -> bool {
        storage != Storage::F32
            && width > 0
            && width <= MAX_WIDTH
            && width.is_multiple_of(TILE)
            && tokens.div_ceil(DOT_ROWS) <= MAX_GRID_YZ as usize
            && scale > 0.0
    }

    /// Strides of a contiguous `[batch, tokens, heads, width]`.
    #[must_use]
    pub const fn contiguous(tokens: usize, heads: usize, width: usize) -> [usize; 3] {
        [tokens * heads * width, heads * width, width]
    }

    /// Inputs q, k, v (through their strides); outputs y, contiguous, and `logarithms` `[batch, heads, queries]`, those of the
    /// sums of exponentials, to the base of two.
    pub fn forward(&self, tuning: Tuning) -> Result<Plan, PlanError> {
        self.check(tuning)?;
        let (mut buffers, element) = (Buffers::default(), self.storage.element());
        let [q, k, v] = self.inputs(&mut buffers)?;
        let y = buffers.output("y", element, self.elements(self.queries, self.heads)?);
        let logarithms = buffers.output("logarithms", Element::F32, self.rows()?);
        let arguments = vec![q, k, v, y, logarithms];
        let launch = self.walk("attention", self.queries, self.heads, WALK, tuning)?;
        let forward = Launch { arguments, params: self.params([0; 3])?, ..launch };
        Ok(buffers.plan(self.launches(vec![forward])))
    }

    /// Inputs q, k, v, y and logarithms (the forward's results) and grad, with its own strides; outputs `grad_q`, `grad_k`,
    /// `grad_v`, those wanted, contiguous.
    pub fn backward(
        &self,
        grad: [usize; 3],
        wanted: AttentionGradients,
        tuning: Tuning,
    ) -> Result<Plan, PlanError> {
        self.check(tuning)?;
        let (mut buffers, element) = (Buffers::default(), self.storage.element());
        let [q, k, v] = self.inputs(&mut buffers)?;
        let queries = self.elements(self.queries, self.heads)?;
        let keys = self.elements(self.keys, self.kv_heads)?;
        let y = buffers.input("y", element, queries);
        let logarithms = buffers.input("logarithms", Element::F32, self.rows()?);
        let grads = buffers.input("grad", element, self.reach(self.queries, self.heads, grad)?);
        // An output that is not wanted is never touched: q stands in its place.
        let mut output = |name, wanted, len| if wanted { buffers.output(name, element, len) } else { q };
        let grad_q = output("grad_q", wanted.q, queries);
        let grad_k = output("grad_k", wanted.k, keys);
        let grad_v = output("grad_v", wanted.v, keys);
        let needs_dots = wanted.q || wanted.k;
        let dots = if needs_dots { buffers.scratch("dots", Element::F32, self.rows()?) } else { logarithms };
        let params = self.params(grad)?;
        let mut launches = Vec::new();
        let walk = |kernel, rows, heads, walk, arguments| -> Result<Launch, PlanError> {
            let mut launch = self.walk(kernel, rows, heads, walk, tuning)?;
            launch.file = KernelFile::AttentionBackward;
            launch.defines.extend([flag("KEY_GRAD", wanted.k), flag("VALUE_GRAD", wanted.v)]);
            Ok(Launch { arguments, params: params.clone(), ..launch })
        };
        if needs_dots {
            let rows = DOT_ROWS.min(tuning.max_simdgroups());
            let launch = walk("attention_dots", self.queries, self.heads, WALK, vec![y, grads, dots])?;
            launches.push(Launch {
                threadgroups: [launch.threadgroups[0], groups(OP, self.queries.div_ceil(rows))?, 1],
                threads: small(rows) * SIMDGROUP_SIZE,
                threadgroup_bytes: 0,
                ..launch
            });
        }
        if wanted.q {
            let arguments = vec![q, k, v, grads, logarithms, dots, grad_q];
            launches.push(walk("attention_backward_queries", self.queries, self.heads, WALK, arguments)?);
        }
        if wanted.k || wanted.v {
            let arguments = vec![q, k, v, grads, logarithms, dots, grad_k, grad_v];
            let rows = if self.is_wide() { WALK } else { 2 * WALK };
            launches.push(walk("attention_backward_keys", self.keys, self.kv_heads, rows, arguments)?);
        }
        Ok(buffers.plan(self.launches(launches)))
    }

    /// None where there is nothing to compute.
    fn launches(&self, launches: Vec<Launch>) -> Vec<Launch> {
        if self.batch * self.queries * self.heads == 0 { Vec::new() } else { launches }
    }

    fn is_wide(&self) -> bool {
        self.width >= WIDE_HEAD
    }

    fn check(&self, tuning: Tuning) -> Result<(), PlanError> {
        let tokens = self.queries.max(self.keys);
        if !Self::supports(self.storage, self.width, tokens, self.scale) {
            let got = format!("{} of width {} scaled by {}", self.storage.word(), self.width, self.scale);
            let expected =
                format!("16-bit heads of a multiple of {TILE} up to {MAX_WIDTH}, a positive scale");
            return Err(shape(OP, "q", expected, got));
        }
        if self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            return Err(shape(OP, "heads of k", format!("a divisor of {}", self.heads), self.kv_heads));
        }
        let least = if self.causal { self.queries.max(1) } else { 1 };
        if self.keys < least {
            return Err(shape(OP, "keys", format!("at least {least}"), self.keys));
        }
        let strides = [self.q, self.k, self.v].concat();
        if !tuning.aligned || strides.iter().any(|stride| !stride.is_multiple_of(self.storage.vector())) {
            return Err(shape(OP, "rows", "at multiples of 16 bytes", format!("strides {strides:?}")));
        }
        Ok(())
    }

    /// `batch · heads · queries`.
    fn rows(&self) -> Result<usize, PlanError> {
        product(OP, "queries", &[self.batch, self.heads, self.queries])
    }

    fn elements(&self, tokens: usize, heads: usize) -> Result<usize, PlanError> {
        product(OP, "q", &[self.batch, tokens, heads, self.width])
    }

    /// From the first element to the last of a tensor with these strides, inclusive.
    fn reach(&self, tokens: usize, heads: usize, strides: [usize; 3]) -> Result<usize, PlanError> {
        if self.elements(tokens, heads)? == 0 {
            return Ok(0);
        }
        let mut reach = self.width;
        for (dim, stride) in [self.batch, tokens, heads].into_iter().zip(strides) {
            reach = reach.saturating_add(product(OP, "q", &[dim - 1, stride])?);
        }
        Ok(reach)
    }

    fn inputs(&self, buffers: &mut Buffers) -> Result<[usize; 3], PlanError> {
        let element = self.storage.element();
        let q = buffers.input("q", element, self.reach(self.queries, self.heads, self.q)?);
        let k = buffers.input("k", element, self.reach(self.keys, self.kv_heads, self.k)?);
        let v = buffers.input("v", element, self.reach(self.keys, self.kv_heads, self.v)?);
        Ok([q, k, v])
    }

    /// A launch whose simdgroups own `rows` of `heads` and walk the others, `walk` at a time.
    fn walk(
        &self,
        kernel: &'static str,
        rows: usize,
        heads: usize,
        walk: usize,
        tuning: Tuning,
    ) -> Result<Launch, PlanError> {
        let simdgroups = if self.is_wide() { 8 } else { 4 }.min(tuning.max_simdgroups());
        // Two blocks, and two numbers a row.
        let staged = 2 * walk * ((self.width / self.storage.vector() + 1) * 16 + 4);
        Ok(Launch {
            kernel,
            file: KernelFile::Attention,
            storage: self.storage,
            defines: vec![
                define("DIM", format!("{}u", self.width)),
                define("SIMDGROUPS", format!("{simdgroups}u")),
                define("WALK", format!("{walk}u")),
                flag("CAUSAL", self.causal),
            ],
            threadgroups: [
                groups(OP, product(OP, "heads", &[self.batch, heads])?)?,
                groups(OP, rows.div_ceil(simdgroups * TILE))?,
                1,
            ],
            threads: small(simdgroups) * SIMDGROUP_SIZE,
            threadgroup_bytes: small(staged),
            arguments: Vec::new(),
            params: Vec::new(),
        })
    }

    fn params(&self, grad: [usize; 3]) -> Result<Vec<u8>, PlanError> {
        let mut params = Params::default()
            .u32(size(OP, "queries", self.queries)?)
            .u32(size(OP, "keys", self.keys)?)
            .u32(size(OP, "heads", self.heads)?)
            .u32(size(OP, "heads", self.heads / self.kv_heads)?)
            .f32(self.scale);
        for stride in [self.q, self.k, self.v, grad].as_flattened() {
            params = params.u32(size(OP, "stride", *stride)?);
        }
        Ok(params.bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::Role;

    const ATTENTION: Attention = Attention {
        batch: 2,
        queries: 70,
        keys: 100,
        heads: 4,
        kv_heads: 2,
        width: 64,
        q: Attention::contiguous(70, 4, 64),
        k: Attention::contiguous(100, 2, 64),
        v: Attention::contiguous(100, 2, 64),
        storage: Storage::BF16,
        scale: 0.125,
        causal: true,
    };

    #[test]
    fn blocks_cover_all_rows() {
        let plan = ATTENTION.forward(Tuning::default()).unwrap();
        plan.check().unwrap();
        assert_eq!(plan.launches[0].threadgroups, [8, 2, 1]);
        let few = Tuning { max_threads: 64, ..Tuning::default() };
        assert_eq!(ATTENTION.forward(few).unwrap().launches[0].threadgroups, [8, 3, 1]);
        let wide = Attention { width: 128, q: Attention::contiguous(70, 4, 128), ..ATTENTION };
        assert_eq!(wide.forward(Tuning::default()).unwrap().launches[0].threads, 256);
    }

    #[test]
    fn outputs_are_those_wanted() {
        for bits in 0..8 {
            let wanted = AttentionGradients { q: bits & 1 > 0, k: bits & 2 > 0, v: bits & 4 > 0 };
            let plan = ATTENTION.backward(ATTENTION.q, wanted, Tuning::default()).unwrap();
            plan.check().unwrap();
            let outputs = [wanted.q, wanted.k, wanted.v].map(usize::from).iter().sum();
            assert_eq!(plan.with_role(Role::Output).count(), outputs);
            let dots = usize::from(wanted.q || wanted.k);
            let keys = usize::from(wanted.k || wanted.v);
            assert_eq!(plan.launches.len(), dots + usize::from(wanted.q) + keys);
        }
    }

    #[test]
    fn shapes_are_checked() {
        let refused = |attention: Attention| attention.forward(Tuning::default()).unwrap_err().to_string();
        let message = refused(Attention { storage: Storage::F32, ..ATTENTION });
        assert!(message.starts_with("attention: q must be 16-bit heads"), "{message}");
        assert!(refused(Attention { width: 72, ..ATTENTION }).contains("of width 72"));
        assert!(refused(Attention { scale: -1.0, ..ATTENTION }).contains("scaled by -1"));
        assert!(refused(Attention { kv_heads: 3, ..ATTENTION }).contains("a divisor of 4, got 3"));
        assert!(refused(Attention { keys: 69, ..ATTENTION }).contains("at least 70, got 69"));
        assert!(refused(Attention { q: [17920, 260, 64], ..ATTENTION }).contains("multiples of 16 bytes"));
        let unaligned = Tuning { aligned: false, ..Tuning::default() };
        assert!(ATTENTION.forward(unaligned).is_err());
    }
}
