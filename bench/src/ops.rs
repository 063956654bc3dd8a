//! What each operation reads, writes and computes: the tensors of a case, its minimum bytes and its operations.

use crate::case::{Case, Mode, Op};

/// The epsilon of the norms.
pub const EPS: f32 = 1e-5;
/// The scaling of a LoRA product.
pub const SCALING: f32 = 2.0;

/// How an input's values are drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Values {
    /// About normal, with this mean and deviation.
    Normal { mean: f64, deviation: f64 },
    /// cos of the angle of a position and a pair.
    Cos,
    /// sin of it.
    Sin,
    /// Columns, i64.
    Targets,
}

/// A tensor by name and shape.
#[derive(Debug, Clone, PartialEq)]
pub struct Input {
    pub name: &'static str,
    pub shape: Vec<usize>,
    pub values: Values,
    /// Whether it gets a gradient where the mode has gradients.
    pub tracked: bool,
}

/// The inputs of a case. `g`, the gradient of the result, is there where the mode has gradients and the result is not
/// the loss itself.
pub fn inputs(case: &Case) -> Vec<Input> {
    let size = case.size;
    let (rows, cols, rank) = (size.rows, size.cols, size.rank);
    let out = out(case);
    let normal = |mean, deviation| Values::Normal { mean, deviation };
    let unit = normal(0.0, 1.0);
    let narrow = |n: usize| normal(0.0, (1.0 / as_f64(n.max(1))).sqrt());
    let input =
        |name, shape: &[usize], values, tracked| Input { name, shape: shape.to_vec(), values, tracked };
    let x = |values| input("x", &[rows, cols], values, true);
    let mut inputs = match case.op {
        Op::Attention => {
            let keys = heads_shape(case, out);
            vec![
                input("q", &heads_shape(case, cols), unit, true),
                input("k", &keys, unit, true),
                input("v", &keys, unit, true),
            ]
        }
        Op::Softmax => vec![x(normal(0.0, 2.0))],
        Op::RmsNorm => vec![x(unit), input("w", &[cols], normal(1.0, 0.1), true)],
        Op::LayerNorm => {
            vec![
                x(unit),
                input("w", &[cols], normal(1.0, 0.1), true),
                input("b", &[cols], normal(0.0, 0.1), true),
            ]
        }
        Op::Rope => {
            let half = size.width / 2;
            vec![
                input("x", &heads_shape(case, cols), unit, true),
                input("cos", &[rows, half], Values::Cos, false),
                input("sin", &[rows, half], Values::Sin, false),
            ]
        }
        Op::SiluMul | Op::GeluMul => {
            vec![input("gate", &[rows, cols], unit, true), input("up", &[rows, cols], unit, true)]
        }
        Op::CrossEntropy => vec![x(normal(0.0, 2.0)), input("targets", &[rows], Values::Targets, false)],
        Op::FrozenLinear => vec![x(unit), input("w", &[out, cols], narrow(cols), false)],
        Op::LoraDelta => {
            vec![
                x(unit),
                input("a", &[rank, cols], narrow(cols), true),
                input("b", &[out, rank], narrow(rank), true),
            ]
        }
        Op::LoraLinear => vec![
            x(unit),
            input("w", &[out, cols], narrow(cols), false),
            input("a", &[rank, cols], narrow(cols), true),
            input("b", &[out, rank], narrow(rank), true),
        ],
    };
    if case.mode != Mode::Forward && case.op != Op::CrossEntropy {
        let shape = match case.op {
            Op::Attention | Op::Rope => heads_shape(case, cols),
            _ => vec![rows, out],
        };
        inputs.push(input("g", &shape, unit, false));
    }
    inputs
}

/// The names of the tensors that an engine hands back: the result `y`, and `d` with the name of each tracked input.
pub fn outputs(case: &Case) -> Vec<String> {
    let mut names = Vec::new();
    if case.mode != Mode::Backward {
        names.push("y".to_owned());
    }
    if case.mode != Mode::Forward {
        names.extend(inputs(case).iter().filter(|i| i.tracked).map(|i| format!("d{}", i.name)));
    }
    names
}

/// Columns of the result.
pub fn out(case: &Case) -> usize {
    match case.size.out {
        0 => case.size.cols,
        out => out,
    }
}

/// `[1, heads, tokens, width]`, with so many columns in all heads.
fn heads_shape(case: &Case, cols: usize) -> Vec<usize> {
    let width = case.size.width.max(1);
    vec![1, cols / width, case.size.rows, width]
}

/// What attention's scores are multiplied by.
#[expect(clippy::cast_possible_truncation, reason = "a factor near 0.1, in f32 as the ops take it")]
pub fn attention_scale(case: &Case) -> f32 {
    as_f64(case.size.width).sqrt().recip() as f32
}

/// What a case costs at least.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// Bytes that must be read and written when every tensor is touched once in the forward and once in the backward
    /// pass.
    pub bytes: f64,
    /// Multiplications and additions of matrix products.
    pub product_operations: f64,
    /// All operations, an exponential or a root counting as one.
    pub operations: f64,
}

/// The minimum cost of a case.
pub fn cost(case: &Case) -> Cost {
    let size = case.size;
    let f = as_f64;
    let n = f(size.rows) * f(size.cols);
    let (rows, cols, out, rank) = (f(size.rows), f(size.cols), f(out(case)), f(size.rank));
    let adapter = rank * (cols + out);
    // Elements touched forward and backward, operations of products, other operations.
    let (forward, backward) = match case.op {
        // Half of the scores are masked; their gradient takes five products, of which one makes them again.
        Op::Attention => {
            let scores = rows * (rows + 1.0) / 2.0 * cols / f(size.width.max(1));
            let product = 2.0 * scores * f(size.width);
            let elements = 2.0 * n + 2.0 * rows * out;
            ((elements, 2.0 * product, 4.0 * scores), (2.0 * elements, 5.0 * product, 5.0 * scores))
        }
        Op::Softmax => ((2.0 * n, 0.0, 5.0 * n), (3.0 * n, 0.0, 4.0 * n)),
        Op::RmsNorm => ((2.0 * n + cols, 0.0, 4.0 * n), (3.0 * n + 2.0 * cols, 0.0, 9.0 * n)),
        Op::LayerNorm => ((2.0 * n + 2.0 * cols, 0.0, 7.0 * n), (3.0 * n + 3.0 * cols, 0.0, 12.0 * n)),
        Op::Rope => {
            let table = rows * f(size.width);
            ((2.0 * n + table, 0.0, 3.0 * n), (2.0 * n + table, 0.0, 3.0 * n))
        }
        Op::SiluMul => ((3.0 * n, 0.0, 5.0 * n), (5.0 * n, 0.0, 11.0 * n)),
        Op::GeluMul => ((3.0 * n, 0.0, 9.0 * n), (5.0 * n, 0.0, 19.0 * n)),
        Op::CrossEntropy => ((n, 0.0, 3.0 * n), (2.0 * n, 0.0, 3.0 * n)),
        Op::FrozenLinear => {
            let product = 2.0 * n * out;
            let elements = n + cols * out + rows * out;
            ((elements, product, 0.0), (elements, product, 0.0))
        }
        Op::LoraDelta => {
            let product = 2.0 * rows * adapter;
            let elements = n + rows * out + adapter;
            ((elements, product, rows * out), (elements + n + adapter, 2.0 * product, rows * rank))
        }
        Op::LoraLinear => {
            let (base, low) = (2.0 * n * out, 2.0 * rows * adapter);
            let elements = n + rows * out + cols * out + adapter;
            (
                (elements, base + low, 2.0 * rows * out),
                (elements + n + adapter, base + 2.0 * low, n + rows * rank),
            )
        }
    };
    let parts: &[(f64, f64, f64)] = match case.mode {
        Mode::Forward => &[forward],
        Mode::Backward => &[backward],
        Mode::Both => &[forward, backward],
    };
    let sum = |part: fn(&(f64, f64, f64)) -> f64| parts.iter().map(part).sum::<f64>();
    Cost {
        bytes: sum(|p| p.0) * f(case.dtype.bytes()),
        product_operations: sum(|p| p.1),
        operations: sum(|p| p.1 + p.2),
    }
}

/// Bytes of all inputs of a case.
pub fn input_bytes(case: &Case) -> usize {
    inputs(case).iter().map(|i| i.shape.iter().product::<usize>() * case.dtype.bytes()).sum()
}

#[expect(clippy::cast_precision_loss, reason = "sizes are far below 2^53")]
pub fn as_f64(n: usize) -> f64 {
    n as f64
}
