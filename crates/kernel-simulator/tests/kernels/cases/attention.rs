//! `y = softmax(s·q·kᵀ)·v` for each head, keys and values shared by two heads of queries.

use crate::case::{Case, Size, wanted_only};
use crate::data::{Tensor, decode, encode};
use crate::oracle::Arithmetic;
use candlewick_kernels::attention::{Attention, AttentionGradients};
use candlewick_kernels::{Element, Storage};

const SCALE: f32 = 0.3;
const HEADS: usize = 2;

/// None in f32 and where vectors are not aligned, for which there is no kernel.
pub fn cases(size: Size) -> Vec<Case> {
    if size.storage == Storage::F32 || !size.tuning.aligned {
        return Vec::new();
    }
    let all = AttentionGradients { q: true, k: true, v: true };
    let keys_alone = AttentionGradients { q: false, v: false, ..all };
    let values_alone = AttentionGradients { v: true, k: false, ..keys_alone };
    let mut cases = vec![forward(size, true), backward(size, true, all)];
    match size.columns {
        33 => cases.extend([forward(size, false), backward(size, false, all)]),
        31 => cases.push(backward(size, true, keys_alone)),
        32 => cases.push(backward(size, true, values_alone)),
        _ => {}
    }
    cases
}

/// As many queries as rows; under a mask as many keys as columns. Few of both, and of wide heads: a product of tiles is
/// simulated lane by lane.
fn op(size: Size, causal: bool) -> Attention {
    let queries = size.rows.min(70);
    let keys = if causal { queries + size.columns.min(60) } else { size.columns.min(100) };
    let width = match size.columns {
        257 => 128,
        1000 => 48,
        _ => 16,
    };
    // q is a transposed [heads, queries, width], as a rotary embedding leaves it.
    let q = [HEADS * queries * width, width, queries * width];
    let kv = Attention::contiguous(keys, 1, width);
    Attention {
        batch: 1,
        queries,
        keys,
        heads: HEADS,
        kv_heads: 1,
        width,
        q,
        k: kv,
        v: kv,
        storage: size.storage,
        scale: SCALE,
        causal,
    }
}

/// The arguments of one op.
#[derive(Clone)]
struct Arguments {
    op: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
}

impl Arguments {
    fn new(op: Attention) -> Self {
        let Attention { queries, keys, width, storage, .. } = op;
        Self {
            op,
            q: Tensor::random(1, HEADS * queries * width, 2.0, storage),
            k: Tensor::random(2, keys * width, 2.0, storage),
            v: Tensor::random(3, keys * width, 1.0, storage),
            grad: Tensor::random(4, HEADS * queries * width, 1.0, storage),
        }
    }

    /// What a plain implementation leaves in memory, in its storage type.
    fn stored(&self, a: Arithmetic, values: Vec<f64>) -> Vec<f64> {
        let element = self.op.storage.element();
        if a == Arithmetic::Exact { values } else { decode(&encode(values, element), element) }
    }

    fn row(tensor: &Tensor, width: usize, row: usize) -> &[f64] {
        &tensor.values[row * width..][..width]
    }

    fn query(&self, head: usize, query: usize) -> &[f64] {
        Self::row(&self.q, self.op.width, head * self.op.queries + query)
    }

    /// The gradient of y, `[queries, heads, width]`.
    fn grad(&self, head: usize, query: usize) -> &[f64] {
        Self::row(&self.grad, self.op.width, query * HEADS + head)
    }

    /// The weights of a query, the logarithm of the sum of their exponentials, and y.
    fn attend(&self, a: Arithmetic, head: usize, query: usize) -> (Vec<f64>, f64, Vec<f64>) {
        let Attention { queries, keys, width, causal, .. } = self.op;
        let visible = if causal { query + 1 + keys - queries } else { keys };
        let dots = (0..visible).map(|key| a.dot(self.query(head, query), Self::row(&self.k, width, key)));
        let dots = self.stored(a, dots.collect());
        let scores: Vec<_> = dots.iter().map(|dot| a.round(dot * f64::from(SCALE))).collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let powers: Vec<_> = scores.iter().map(|score| a.exp(score - largest)).collect();
        let sum = a.sum(powers.iter().copied());
        let weights = self.stored(a, powers.iter().map(|power| a.round(power / sum)).collect());
        let mut y = vec![0.0; width];
        for (key, weight) in weights.iter().enumerate() {
            a.add_row(&mut y, Self::row(&self.v, width, key).iter().map(|v| a.round(weight * v)));
        }
        (weights, a.round((largest + sum.ln()) / std::f64::consts::LN_2), y)
    }
}

pub fn forward(size: Size, causal: bool) -> Case {
    let args = Arguments::new(op(size, causal));
    let op = args.op;
    let plan = op.forward(size.tuning).unwrap();
    let inputs = [&args.q.clone(), &args.k.clone(), &args.v.clone()];
    Case::new("attention forward", size, plan, &inputs, move |a| {
        let (mut y, mut logarithms) = (Vec::new(), Vec::new());
        for query in 0..op.queries {
            y.extend((0..HEADS).flat_map(|head| args.attend(a, head, query).2));
        }
        for head in 0..HEADS {
            logarithms.extend((0..op.queries).map(|query| args.attend(a, head, query).1));
        }
        vec![y, logarithms]
    })
}

pub fn backward(size: Size, causal: bool, wanted: AttentionGradients) -> Case {
    let args = Arguments::new(op(size, causal));
    let op = args.op;
    let grad_strides = Attention::contiguous(op.queries, HEADS, op.width);
    let plan = op.backward(grad_strides, wanted, size.tuning).unwrap();
    let rows = move |head: usize| (0..op.queries).map(move |query| (head, query));
    let attend = |(head, query)| args.attend(Arithmetic::Exact, head, query);
    let by_query = (0..op.queries).flat_map(|query| (0..HEADS).map(move |head| (head, query)));
    let y = Tensor::new(by_query.flat_map(|row| attend(row).2), op.storage.element());
    let logarithms = Tensor::new((0..HEADS).flat_map(rows).map(|row| attend(row).1), Element::F32);
    let inputs =
        [&args.q.clone(), &args.k.clone(), &args.v.clone(), &y.clone(), &logarithms, &args.grad.clone()];
    Case::new("attention backward", size, plan, &inputs, move |a| {
        let Attention { queries, keys, width, .. } = op;
        let [mut grad_q, mut grad_k, mut grad_v] =
            [queries * HEADS, keys, keys].map(|rows| vec![0.0; rows * width]);
        for (head, query) in (0..HEADS).flat_map(rows) {
            let (weights, ..) = args.attend(a, head, query);
            let grad = args.grad(head, query);
            let of_weights = (0..weights.len()).map(|key| a.dot(grad, Arguments::row(&args.v, width, key)));
            let of_weights = args.stored(a, of_weights.collect());
            let dot = a.dot(&weights, &of_weights);
            let change = |(p, g): (&f64, &f64)| a.round(a.round(p * a.round(g - dot)) * f64::from(SCALE));
            let changes = args.stored(a, weights.iter().zip(&of_weights).map(change).collect());
            for (key, (weight, change)) in weights.iter().zip(&changes).enumerate() {
                let at = |row: usize| row * width..(row + 1) * width;
                let k = Arguments::row(&args.k, width, key).iter().map(|k| a.round(change * k));
                a.add_row(&mut grad_q[at(query * HEADS + head)], k);
                let q = args.query(head, query).iter().map(|q| a.round(change * q));
                a.add_row(&mut grad_k[at(key)], q);
                a.add_row(&mut grad_v[at(key)], grad.iter().map(|g| a.round(weight * g)));
            }
        }
        wanted_only([(wanted.q, grad_q), (wanted.k, grad_k), (wanted.v, grad_v)])
    })
}
