//! Runs attention on Candle's CPU storage: finds the heads' matrices, spreads them over threads, and makes the results.

use std::mem::MaybeUninit;

use candle_core::{Device, Result, Tensor};

use super::products::{Heads, with_heads};
use crate::cpu::attention::{BackwardKeys, Keys, QUERIES, Scratch, Weighing};
use crate::cpu::gemm::{self, Matrix, PARALLEL};
use crate::cpu::lanes::Element;
use crate::cpu::spread::spread;

/// How the scores of `q [b, t, h, d]` and `k [b, s, g, d]` become weights.
fn weighing(q: &Tensor, k: &Tensor, scale: f32, causal: bool) -> Result<Weighing> {
    let (queries, keys) = (q.dim(1)?, k.dim(1)?);
    Ok(Weighing { queries, keys, scale, causal })
}

/// A tensor of heads whose rows are in one piece each, as it is or copied.
fn in_rows(x: &Tensor) -> Result<Tensor> {
    if x.stride()[3] == 1 { Ok(x.clone()) } else { x.contiguous() }
}

/// Multiplications of all scores.
fn work(q: &Tensor, keys: usize) -> usize {
    q.elem_count().saturating_mul(keys)
}

/// A matrix for each of `batches` and `heads`.
fn each<'a>(tensor: &Heads<'a>, [batches, heads]: [usize; 2]) -> Result<Vec<Matrix<'a>>> {
    (0..batches * heads).map(|i| tensor.at(i / heads, i % heads)).collect()
}

/// `make` of each pair of keys and values, over threads.
fn packed<'a, K: Send>(
    keys: &[Matrix<'a>],
    values: &[Matrix<'a>],
    worth: bool,
    make: impl Fn(Matrix<'a>, Matrix<'a>) -> K + Sync,
) -> Vec<K> {
    let mut packed: Vec<Option<K>> = keys.iter().map(|_| None).collect();
    let tasks = packed.iter_mut().zip(keys.iter().zip(values)).collect();
    spread(tasks, worth, |(): &mut (), (to, (k, v)): (&mut Option<K>, _)| *to = Some(make(*k, *v)));
    packed.into_iter().flatten().collect()
}

/// `softmax(scale·q·kᵀ)·v` for `q [b, t, h, d]`, `k` and `v [b, s, g, d]`, none of which is empty, in `q`'s shape and dtype,
/// which is `T`.
pub(crate) fn forward<T: Element>([q, k, v]: [&Tensor; 3], scale: f32, causal: bool) -> Result<Tensor> {
    /// Some queries of a head, and where their results go.
    struct Block<'a, 'b, T> {
        q: Matrix<'a>,
        keys: usize,
        first: usize,
        rows: Vec<&'b mut [MaybeUninit<T>]>,
    }

    let ((batches, tokens, heads, width), kv_heads) = (q.dims4()?, k.dim(2)?);
    let (group, weighing) = (heads / kv_heads, weighing(q, k, scale, causal)?);
    let worth = work(q, weighing.keys) >= PARALLEL;
    let (q_rows, k, v) = (in_rows(q)?, in_rows(k)?, in_rows(v)?);
    let mut y: Vec<T> = Vec::with_capacity(q.elem_count());
    with_heads([&q_rows, &k, &v], |[q_rows, k, v]| {
        let (k, v) = (each(&k, [batches, kv_heads])?, each(&v, [batches, kv_heads])?);
        let keys = packed(&k, &v, worth, |k, v| Keys::new::<T>(k, v, tokens));
        let mut free = &mut y.spare_capacity_mut()[..batches * tokens * heads * width];
        let mut tasks = Vec::with_capacity(batches * tokens.div_ceil(QUERIES) * heads);
        for b in 0..batches {
            for first in (0..tokens).step_by(QUERIES) {
                let count = QUERIES.min(tokens - first);
                let block = free.split_off_mut(..count * heads * width).unwrap_or_default();
                let mut rows: Vec<Vec<_>> = (0..heads).map(|_| Vec::with_capacity(count)).collect();
                for (i, row) in block.chunks_exact_mut(width).enumerate() {
                    rows[i % heads].push(row);
                }
                for (h, rows) in rows.into_iter().enumerate() {
                    let q = q_rows.at(b, h)?.some_rows(first, count);
                    tasks.push(Block { q, keys: b * kv_heads + h / group, first, rows });
                }
            }
        }
        // Those that see most keys first, so that the threads end together.
        tasks.reverse();
        spread(tasks, worth, |scratch: &mut Scratch, Block { q, keys: of, first, rows }| {
            let y = keys[of].attend::<T>(weighing, &q, first, scratch);
            for (y, row) in y.chunks_exact(width).zip(rows) {
                gemm::round(y, row);
            }
        });
        Ok(())
    })?;
    // SAFETY: within the capacity; the blocks' rows partition the result, and each task writes all of its own.
    unsafe { y.set_len(batches * tokens * heads * width) };
    Tensor::from_vec(y, q.shape(), &Device::Cpu)
}

/// The gradients of q, k and v of [`forward`] from that of the result, each `[b, heads, rows, d]`.
pub(crate) fn backward<T: Element>(
    [q, k, v]: [&Tensor; 3],
    grad: &Tensor,
    scale: f32,
    causal: bool,
) -> Result<[Tensor; 3]> {
    /// A head: its queries, the gradient of their results, whose keys they see, and where the gradients go.
    type Task<'a, 'b, T> = ([Matrix<'a>; 2], usize, &'b mut [MaybeUninit<T>], [&'b mut [f32]; 2]);

    let ((batches, tokens, heads, width), (_, key_count, kv_heads, _)) = (q.dims4()?, k.dims4()?);
    let (group, weighing) = (heads / kv_heads, weighing(q, k, scale, causal)?);
    let worth = work(q, weighing.keys) >= PARALLEL;
    let grad = in_rows(&grad.to_dtype(q.dtype())?)?;
    let (q, k, v) = (in_rows(q)?, in_rows(k)?, in_rows(v)?);
    let (q_size, kv_size, share) = (tokens * width, key_count * width, gemm::whole(key_count) * width);
    let mut dq: Vec<T> = Vec::with_capacity(batches * heads * q_size);
    // Of every head's own, transposed.
    let mut shares = [(); 2].map(|()| vec![0f32; batches * heads * share]);
    with_heads([&q, &k, &v, &grad], |[q, k, v, grad]| {
        let (k, v) = (each(&k, [batches, kv_heads])?, each(&v, [batches, kv_heads])?);
        let keys = packed(&k, &v, worth, BackwardKeys::new::<T>);
        let mut free = &mut dq.spare_capacity_mut()[..batches * heads * q_size];
        let mut tasks: Vec<Task<T>> = Vec::with_capacity(batches * heads);
        let [k_shares, v_shares] = &mut shares;
        let mut free_shares = [k_shares.as_mut_slice(), v_shares.as_mut_slice()];
        for (i, (q, grad)) in
            each(&q, [batches, heads])?.into_iter().zip(each(&grad, [batches, heads])?).enumerate()
        {
            let dq = free.split_off_mut(..q_size).unwrap_or_default();
            let shares = free_shares.each_mut().map(|free| free.split_off_mut(..share).unwrap_or_default());
            tasks.push(([q, grad], i / group, dq, shares));
        }
        spread(tasks, worth, |scratch: &mut Scratch, (matrices, of, dq, shares)| {
            keys[of].gradients::<T>(weighing, matrices, scratch, dq, shares);
        });
        Ok(())
    })?;
    // SAFETY: within the capacity; the tasks partition it, and each writes all of its own.
    unsafe { dq.set_len(batches * heads * q_size) };
    let [dk, dv] = shares.map(|shares| {
        let mut sum: Vec<T> = Vec::with_capacity(batches * kv_heads * kv_size);
        let rooms = sum.spare_capacity_mut()[..batches * kv_heads * kv_size].chunks_mut(kv_size);
        let mut shares = shares;
        let tasks = rooms.zip(shares.chunks_mut(group * share)).collect();
        let add = |turned: &mut Vec<f32>, (to, shares): (&mut [MaybeUninit<T>], &mut [f32])| {
            let (total, others) = shares.split_at_mut(share);
            for share in others.chunks_exact(share) {
                total.iter_mut().zip(share).for_each(|(total, x)| *total += x);
            }
            turned.resize(kv_size, 0.0);
            gemm::transpose(total, share / width, [width, key_count], turned);
            gemm::round(turned, to);
        };
        spread(tasks, worth, add);
        // SAFETY: within the capacity; the tasks partition it, and each writes all of its own.
        unsafe { sum.set_len(batches * kv_heads * kv_size) };
        Tensor::from_vec(sum, (batches, kv_heads, key_count, width), &Device::Cpu)
    });
    Ok([Tensor::from_vec(dq, (batches, heads, tokens, width), &Device::Cpu)?, dk?, dv?])
}
