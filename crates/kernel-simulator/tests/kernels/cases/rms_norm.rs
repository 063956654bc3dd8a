//! `y = x · r · w`, `r = 1 / √(mean(x²) + eps)`.

use crate::case::Case;
use crate::data::Tensor;
use crate::oracle::Arithmetic;
use candlewick_kernels::rms_norm::{RmsNorm, RmsNormGradients};
use candlewick_kernels::{Storage, Tuning};

pub fn cases(storage: Storage, columns: usize) -> Vec<Case> {
    let rows = 3;
    let op = RmsNorm { rows, columns, storage, weight: true, eps: 1e-5 };
    let x = Tensor::random(1, rows * columns, 2.0, storage);
    let weight = Tensor::random(2, columns, 1.5, storage);
    let grad = Tensor::random(3, rows * columns, 1.0, storage);
    let wanted = RmsNormGradients { x: true, weight: true };
    let data = Data { x: x.values.clone(), weight: weight.values.clone(), grad: grad.values.clone(), eps: op.eps.into() };
    let backward_data = data.clone();
    vec![
        Case::new(
            format!("rms_norm forward {storage:?} {columns}"),
            op.forward(Tuning::default()).unwrap(),
            &[&x, &weight],
            move |a| vec![data.forward(a)],
        ),
        Case::new(
            format!("rms_norm backward {storage:?} {columns}"),
            op.backward(wanted, Tuning::default()).unwrap(),
            &[&x, &grad, &weight],
            move |a| backward_data.backward(a),
        ),
    ]
}

#[derive(Clone)]
struct Data {
    x: Vec<f64>,
    weight: Vec<f64>,
    grad: Vec<f64>,
    eps: f64,
}

impl Data {
    fn inverse_rms(&self, x: &[f64], a: Arithmetic) -> f64 {
        let mean = a.round(a.dot(x, x) / x.len() as f64);
        a.round(1.0 / a.round(a.round(mean + self.eps).sqrt()))
    }

    fn forward(&self, a: Arithmetic) -> Vec<f64> {
        let rows = self.x.chunks(self.weight.len());
        let row = |x: &[f64]| {
            let r = self.inverse_rms(x, a);
            x.iter().zip(&self.weight).map(|(x, w)| a.round(a.round(x * r) * w)).collect::<Vec<_>>()
        };
        rows.flat_map(row).collect()
    }

    fn backward(&self, a: Arithmetic) -> Vec<Vec<f64>> {
        let columns = self.weight.len();
        let mut grad_x = Vec::new();
        let mut grad_weight = vec![0.0; columns];
        for (x, g) in self.x.chunks(columns).zip(self.grad.chunks(columns)) {
            let r = self.inverse_rms(x, a);
            let normal: Vec<_> = x.iter().map(|x| a.round(x * r)).collect();
            let weighted: Vec<_> = g.iter().zip(&self.weight).map(|(g, w)| a.round(g * w)).collect();
            let mean = a.round(a.dot(&normal, &weighted) / columns as f64);
            for column in 0..columns {
                let through_mean = a.round(normal[column] * mean);
                grad_x.push(a.round(r * a.round(weighted[column] - through_mean)));
                let term = a.round(g[column] * normal[column]);
                grad_weight[column] = a.round(grad_weight[column] + term);
            }
        }
        vec![grad_x, grad_weight]
    }
}
