//! Results and gradients in float64, from the definitions, for chosen rows.
//!
//! Tensors that have a row for each row of `x` are computed for the chosen rows alone; sums over rows (the gradients of
//! weights and adapters, the mean loss) are computed whole.

use std::collections::BTreeMap;

use rayon::prelude::*;

use crate::case::{Case, Dtype, Mode, Op};
use crate::ops::{self, EPS, SCALING, as_f64};
use crate::tensors::{Stored, Tensors};

/// What an engine should hand back, by name.
pub type Expected = BTreeMap<String, Vec<f64>>;

/// Whether an output has a row for each row of `x`.
pub fn by_rows(case: &Case, name: &str) -> bool {
    match name {
        "y" => case.op != Op::CrossEntropy,
        "dx" | "dgate" | "dup" | "dq" => true,
        _ => false,
    }
}

/// How many rows the outputs have.
pub fn rows(case: &Case) -> usize {
    match case.op {
        Op::Attention | Op::Rope => case.size.rows * (case.size.cols / case.size.width.max(1)),
        _ => case.size.rows,
    }
}

/// The greatest error that passes, relative to the greatest value of the exact tensor. It tells a wrong result from one
/// that was rounded in another order, and is wider than the error rule of docs/numerics.md, which judges our own ops:
/// what an engine composes in a 16-bit type rounds several times.
pub fn tolerance(case: &Case) -> f64 {
    match case.dtype {
        Dtype::F32 => 2f64.powi(-13),
        Dtype::F16 => 2f64.powi(-8),
        Dtype::Bf16 => 2f64.powi(-5),
    }
}

/// The outputs of a case for the rows `chosen`.
pub fn expected(case: &Case, inputs: &Tensors, chosen: &[usize]) -> Expected {
    let mut all = match case.op {
        Op::Softmax | Op::Rope | Op::SiluMul | Op::GeluMul => elementwise(case, inputs, chosen),
        Op::RmsNorm | Op::LayerNorm => norm(case, inputs, chosen),
        Op::Attention => attention(case, inputs, chosen),
        Op::CrossEntropy => cross_entropy(case, inputs, chosen),
        Op::FrozenLinear | Op::LoraDelta | Op::LoraLinear => linear(case, inputs, chosen),
    };
    let names = ops::outputs(case);
    all.retain(|name, _| names.contains(name));
    all
}

/// A row of a tensor as a matrix of its last dimension.
fn row(t: &Stored, index: usize) -> Vec<f64> {
    let width = t.shape.last().copied().unwrap_or(1);
    t.range(index * width..(index + 1) * width)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    let (a_parts, a_rest) = a.as_chunks::<8>();
    let (b_parts, b_rest) = b.as_chunks::<8>();
    let mut lanes = [0f64; 8];
    for (a, b) in a_parts.iter().zip(b_parts) {
        for (lane, (a, b)) in lanes.iter_mut().zip(a.iter().zip(b)) {
            *lane += a * b;
        }
    }
    lanes.iter().sum::<f64>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f64>()
}

fn add_scaled(sum: &mut [f64], scale: f64, values: &[f64]) {
    for (sum, value) in sum.iter_mut().zip(values) {
        *sum += scale * value;
    }
}

fn added(mut a: Vec<f64>, b: &[f64]) -> Vec<f64> {
    add_scaled(&mut a, 1.0, b);
    a
}

/// Joins the rows' outputs, each row giving one vector for each name.
fn join<const N: usize>(names: [&str; N], rows: Vec<[Vec<f64>; N]>) -> Expected {
    let mut joined = names.map(|_| Vec::new());
    for row in rows {
        for (joined, part) in joined.iter_mut().zip(row) {
            joined.extend(part);
        }
    }
    names.into_iter().map(str::to_owned).zip(joined).collect()
}

fn elementwise(case: &Case, inputs: &Tensors, chosen: &[usize]) -> Expected {
    let gradient = |i: usize, width: usize| inputs.get("g").map_or_else(|| vec![0.0; width], |g| row(g, i));
    match case.op {
        Op::Softmax => {
            let of_row = |&i: &usize| {
                let x = row(&inputs["x"], i);
                let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let exp: Vec<f64> = x.iter().map(|x| (x - max).exp()).collect();
                let total: f64 = exp.iter().sum();
                let y: Vec<f64> = exp.iter().map(|e| e / total).collect();
                let g = gradient(i, y.len());
                let mean = dot(&g, &y);
                let dx = g.iter().zip(&y).map(|(g, y)| y * (g - mean)).collect();
                [y, dx]
            };
            join(["y", "dx"], chosen.par_iter().map(of_row).collect())
        }
        Op::Rope => {
            let tokens = case.size.rows;
            let of_row = |&i: &usize| {
                let (cos, sin) = (row(&inputs["cos"], i % tokens), row(&inputs["sin"], i % tokens));
                let turn = |x: &[f64], sign: f64| {
                    let (u, v) = x.split_at(cos.len());
                    let first = (0..cos.len()).map(|j| u[j] * cos[j] - sign * v[j] * sin[j]);
                    first.chain((0..cos.len()).map(|j| v[j] * cos[j] + sign * u[j] * sin[j])).collect()
                };
                let x = row(&inputs["x"], i);
                [turn(&x, 1.0), turn(&gradient(i, x.len()), -1.0)]
            };
            join(["y", "dx"], chosen.par_iter().map(of_row).collect())
        }
        _ => {
            let of_row = |&i: &usize| {
                let (gate, up) = (row(&inputs["gate"], i), row(&inputs["up"], i));
                let g = gradient(i, gate.len());
                let (mut y, mut dgate, mut dup) = (Vec::new(), Vec::new(), Vec::new());
                for ((z, up), g) in gate.into_iter().zip(up).zip(g) {
                    let (value, slope) = if case.op == Op::SiluMul { silu(z) } else { gelu(z) };
                    y.push(value * up);
                    dgate.push(g * up * slope);
                    dup.push(g * value);
                }
                [y, dgate, dup]
            };
            join(["y", "dgate", "dup"], chosen.par_iter().map(of_row).collect())
        }
    }
}

/// `z·σ(z)` and its derivative.
fn silu(z: f64) -> (f64, f64) {
    let sigma = 1.0 / (1.0 + (-z).exp());
    (z * sigma, sigma * (1.0 + z * (1.0 - sigma)))
}

/// `z·(1 + tanh t)/2` with `t = √(2/π)·(z + 0.044715·z³)`, and its derivative.
fn gelu(z: f64) -> (f64, f64) {
    let root = (2.0 / std::f64::consts::PI).sqrt();
    let tanh = (root * (z + 0.044_715 * z.powi(3))).tanh();
    let inner = root * (1.0 + 3.0 * 0.044_715 * z * z);
    (0.5 * z * (1.0 + tanh), 0.5 * (1.0 + tanh) + 0.5 * z * (1.0 - tanh * tanh) * inner)
}

/// `x̂ = (x − mean)/√(variance + ε)`, without the mean for the RMS norm.
struct Normalised {
    hat: Vec<f64>,
    reciprocal: f64,
}

fn normalised(case: &Case, x: &[f64]) -> Normalised {
    let n = as_f64(x.len());
    let mean = if case.op == Op::LayerNorm { x.iter().sum::<f64>() / n } else { 0.0 };
    let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
    let reciprocal = (variance + f64::from(EPS)).sqrt().recip();
    Normalised { hat: x.iter().map(|x| (x - mean) * reciprocal).collect(), reciprocal }
}

fn norm(case: &Case, inputs: &Tensors, chosen: &[usize]) -> Expected {
    let w = row(&inputs["w"], 0);
    let bias = inputs.get("b").map_or_else(|| vec![0.0; w.len()], |b| row(b, 0));
    let n = as_f64(w.len());
    let of_row = |&i: &usize| {
        let Normalised { hat, reciprocal } = normalised(case, &row(&inputs["x"], i));
        let y = hat.iter().zip(&w).zip(&bias).map(|((h, w), b)| h * w + b).collect();
        let g = inputs.get("g").map_or_else(|| vec![0.0; w.len()], |g| row(g, i));
        let weighted: Vec<f64> = g.iter().zip(&w).map(|(g, w)| g * w).collect();
        let along = dot(&weighted, &hat) / n;
        let mean = if case.op == Op::LayerNorm { weighted.iter().sum::<f64>() / n } else { 0.0 };
        let dx = weighted.iter().zip(&hat).map(|(g, h)| reciprocal * (g - mean - h * along)).collect();
        [y, dx]
    };
    let mut expected = join(["y", "dx"], chosen.par_iter().map(of_row).collect());
    if let (true, Some(g)) = (case.mode != Mode::Forward, inputs.get("g")) {
        let zeros = || (vec![0.0; w.len()], vec![0.0; w.len()]);
        let add = |(mut dw, mut db): (Vec<f64>, Vec<f64>), i: usize| {
            let hat = normalised(case, &row(&inputs["x"], i)).hat;
            for ((dw, db), (g, hat)) in dw.iter_mut().zip(&mut db).zip(row(g, i).iter().zip(&hat)) {
                *dw += g * hat;
                *db += g;
            }
            (dw, db)
        };
        let (dw, db) = (0..case.size.rows)
            .into_par_iter()
            .fold(zeros, add)
            .reduce(zeros, |(a, b), (c, d)| (added(a, &c), added(b, &d)));
        expected.insert("dw".to_owned(), dw);
        expected.insert("db".to_owned(), db);
    }
    expected
}

fn cross_entropy(case: &Case, inputs: &Tensors, chosen: &[usize]) -> Expected {
    let target = |i: usize| inputs["targets"].at(i);
    let log_sum_exp = |x: &[f64]| {
        let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        max + x.iter().map(|x| (x - max).exp()).sum::<f64>().ln()
    };
    let rows = as_f64(case.size.rows);
    let columns = |x: Vec<f64>| x.into_iter().enumerate().map(|(j, x)| (as_f64(j), x));
    let is_target = |i: usize, j: f64| (j - target(i)).abs() < 0.5;
    let loss = |i: usize| {
        let x = row(&inputs["x"], i);
        let lse = log_sum_exp(&x);
        columns(x).filter(|&(j, _)| is_target(i, j)).map(|(_, x)| lse - x).sum::<f64>()
    };
    let total: f64 = (0..case.size.rows).into_par_iter().map(loss).sum();
    let of_row = |&i: &usize| {
        let x = row(&inputs["x"], i);
        let lse = log_sum_exp(&x);
        let gradient = |(j, x): (f64, f64)| ((x - lse).exp() - f64::from(u8::from(is_target(i, j)))) / rows;
        [columns(x).map(gradient).collect()]
    };
    let mut expected = join(["dx"], chosen.par_iter().map(of_row).collect());
    expected.insert("y".to_owned(), vec![total / rows]);
    expected
}

/// Causal attention; rows are the queries of one head after the other.
fn attention(case: &Case, inputs: &Tensors, chosen: &[usize]) -> Expected {
    let (tokens, width) = (case.size.rows, case.size.width.max(1));
    let (heads, kv_heads) = (case.size.cols / width, ops::out(case) / width);
    let scale = f64::from(ops::attention_scale(case));
    let rows = |name: &str, head: usize| {
        let rows = head * tokens..(head + 1) * tokens;
        rows.map(|i| row(&inputs[name], i)).collect::<Vec<_>>()
    };
    let has_gradient = inputs.contains_key("g");
    let gradient = |i: usize| if has_gradient { row(&inputs["g"], i) } else { vec![0.0; width] };
    // The weights of a query, y, and the gradient of the scores.
    let attend = |q: &[f64], g: &[f64], k: &[Vec<f64>], v: &[Vec<f64>]| {
        let scores: Vec<f64> = k.iter().map(|k| scale * dot(q, k)).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let exp: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
        let total: f64 = exp.iter().sum();
        let weights: Vec<f64> = exp.iter().map(|e| e / total).collect();
        let mut y = vec![0.0; width];
        weights.iter().zip(v).for_each(|(weight, v)| add_scaled(&mut y, *weight, v));
        let along = dot(&y, g);
        let change = |(weight, v): (&f64, &Vec<f64>)| scale * weight * (dot(g, v) - along);
        let changes: Vec<f64> = weights.iter().zip(v).map(change).collect();
        (weights, y, changes)
    };
    let of_row = |&i: &usize| {
        let (head, token) = (i / tokens, i % tokens);
        let kv_head = head * kv_heads / heads;
        let seen = |name| (0..=token).map(|j| row(&inputs[name], kv_head * tokens + j)).collect::<Vec<_>>();
        let k = seen("k");
        let (_, y, changes) = attend(&row(&inputs["q"], i), &gradient(i), &k, &seen("v"));
        let mut dq = vec![0.0; width];
        changes.iter().zip(&k).for_each(|(change, k)| add_scaled(&mut dq, *change, k));
        [y, dq]
    };
    let mut expected = join(["y", "dq"], chosen.par_iter().map(of_row).collect());
    if case.mode != Mode::Forward {
        let of_kv_head = |kv_head: usize| {
            let (k, v) = (rows("k", kv_head), rows("v", kv_head));
            let zeros = || [vec![0.0; tokens * width], vec![0.0; tokens * width]];
            let shared = heads / kv_heads;
            let add = |mut sums: [Vec<f64>; 2], i: usize| {
                let (q, g) = (row(&inputs["q"], i), gradient(i));
                let visible = i % tokens + 1;
                let (weights, _, changes) = attend(&q, &g, &k[..visible], &v[..visible]);
                let [dk, dv] = &mut sums;
                for (j, (weight, change)) in weights.iter().zip(&changes).enumerate() {
                    add_scaled(&mut dk[j * width..(j + 1) * width], *change, &q);
                    add_scaled(&mut dv[j * width..(j + 1) * width], *weight, &g);
                }
                sums
            };
            let queries = kv_head * shared * tokens..(kv_head + 1) * shared * tokens;
            let both = |[a, b]: [Vec<f64>; 2], [c, d]: [Vec<f64>; 2]| [added(a, &c), added(b, &d)];
            queries.into_par_iter().fold(zeros, add).reduce(zeros, both)
        };
        expected.extend(join(["dk", "dv"], (0..kv_heads).map(of_kv_head).collect()));
    }
    expected
}

/// A matrix by rows.
fn matrix(inputs: &Tensors, name: &str) -> Option<Vec<Vec<f64>>> {
    let t = inputs.get(name)?;
    Some((0..t.shape[0]).into_par_iter().map(|i| row(t, i)).collect())
}

fn linear(case: &Case, inputs: &Tensors, chosen: &[usize]) -> Expected {
    let (cols, out) = (case.size.cols, ops::out(case));
    let adapter = matrix(inputs, "a").zip(matrix(inputs, "b"));
    let weight = if case.op == Op::LoraDelta { None } else { matrix(inputs, "w") };
    let scaling = f64::from(SCALING);
    let gradient = |i: usize| inputs.get("g").map_or_else(|| vec![0.0; out], |g| row(g, i));
    // h = s·x·Aᵀ and e = s·g·B of a row.
    let inner = |a: &[Vec<f64>], x: &[f64]| a.iter().map(|a| scaling * dot(a, x)).collect::<Vec<_>>();
    let outer = |b: &[Vec<f64>], g: &[f64]| {
        let mut e = vec![0.0; case.size.rank];
        b.iter().zip(g).for_each(|(b, g)| add_scaled(&mut e, scaling * g, b));
        e
    };
    let of_row = |&i: &usize| {
        let (x, g) = (row(&inputs["x"], i), gradient(i));
        let (mut y, mut dx) = (vec![0.0; out], vec![0.0; cols]);
        if let Some(w) = &weight {
            for ((w, y), g) in w.iter().zip(&mut y).zip(&g) {
                *y = dot(w, &x);
                add_scaled(&mut dx, *g, w);
            }
        }
        if let Some((a, b)) = &adapter {
            let h = inner(a, &x);
            b.iter().zip(&mut y).for_each(|(b, y)| *y += dot(b, &h));
            a.iter().zip(outer(b, &g)).for_each(|(a, e)| add_scaled(&mut dx, e, a));
        }
        [y, dx]
    };
    let mut expected = join(["y", "dx"], chosen.par_iter().map(of_row).collect());
    if let (true, Some((a, b))) = (case.mode != Mode::Forward, &adapter) {
        let rank = case.size.rank;
        let zeros = || (vec![0.0; rank * cols], vec![0.0; out * rank]);
        let add = |(mut da, mut db): (Vec<f64>, Vec<f64>), i: usize| {
            let (x, g) = (row(&inputs["x"], i), gradient(i));
            for (e, da) in outer(b, &g).into_iter().zip(da.chunks_mut(cols)) {
                add_scaled(da, e, &x);
            }
            let h = inner(a, &x);
            for (g, db) in g.iter().zip(db.chunks_mut(rank.max(1))) {
                add_scaled(db, *g, &h);
            }
            (da, db)
        };
        let (da, db) = (0..case.size.rows)
            .into_par_iter()
            .fold(zeros, add)
            .reduce(zeros, |(a, b), (c, d)| (added(a, &c), added(b, &d)));
        expected.insert("da".to_owned(), da);
        expected.insert("db".to_owned(), db);
    }
    expected
}
