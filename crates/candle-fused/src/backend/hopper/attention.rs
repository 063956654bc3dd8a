//! Attention by the kernels of [`candlewick_kernels::hopper::attention`].

use candle_core::{CudaDevice, DType, Result, Tensor, bail};
use candlewick_kernels::attention::Attention;
use candlewick_kernels::hopper::{ROW_ALIGNMENT, attention};

use super::{Source, fresh, queue, warned};
use crate::backend::cuda::{self, Cuda};
use crate::backend::gpu;

/// Bytes between tokens, heads or batch entries that a tensor map can tell.
const FARTHEST: usize = 1 << 40;

/// `[batch, tokens, heads, width]` at an address, if tiles can have it: rows of whole 16 bytes, and no stride of 0.
fn source(tensor: &Tensor, address: u64) -> Option<Source> {
    let (&[batch, tokens, heads, width], &[of_batch, of_token, of_head, 1]) =
        (tensor.dims(), tensor.stride())
    else {
        return None;
    };
    // How far apart what is there once is, nobody asks.
    let stride = |count, stride| if count == 1 { width } else { stride };
    let strides = [stride(tokens, of_token), stride(heads, of_head), stride(batch, of_batch)];
    let bytes = strides.map(|stride| stride * tensor.dtype().size_in_bytes());
    let serves = |bytes: &usize| bytes.is_multiple_of(ROW_ALIGNMENT) && (1..FARTHEST).contains(bytes);
    (address.is_multiple_of(ROW_ALIGNMENT as u64) && bytes.iter().all(serves))
        .then_some(Source { address, strides })
}

fn sources<const N: usize>(tensors: [&Tensor; N], addresses: [u64; N]) -> Option<[Source; N]> {
    let found: Vec<_> =
        tensors.into_iter().zip(addresses).map(|(tensor, address)| source(tensor, address)).collect();
    found.into_iter().collect::<Option<Vec<_>>>()?.try_into().ok()
}

/// An error where the tensors are not those that the plan is of.
fn check(plan: &Attention, [q, k, v]: [&Tensor; 3], like_q: &[&Tensor]) -> Result<()> {
    let of_queries = [plan.batch, plan.queries, plan.heads, plan.width];
    let of_keys = [plan.batch, plan.keys, plan.kv_heads, plan.width];
    let fits = |tensor: &Tensor, dims| tensor.dims() == dims && tensor.dtype() == q.dtype();
    let is_stored = gpu::storage(q)? == plan.storage;
    if !is_stored
        || !fits(k, of_keys)
        || !fits(v, of_keys)
        || !like_q.iter().chain([&q]).all(|x| fits(x, of_queries))
    {
        bail!("no attention of {:?}, {:?} and {:?}", q.shape(), k.shape(), v.shape());
    }
    Ok(())
}

/// y and the logarithms of the sums of exponentials, to the base of two, where there is a kernel for such heads.
pub(in crate::backend) fn forward(
    device: &CudaDevice,
    [q, k, v]: [&Tensor; 3],
    plan: &Attention,
) -> Result<Option<[Tensor; 2]>> {
    let cuda = Cuda::of(device)?;
    if cuda.hopper().multiprocessors(cuda.stream().context()).is_none() {
        return Ok(None);
    }
    let Some(launch) = attention::forward(plan) else { return Ok(None) };
    let Some(function) = warned(launch.kernel, cuda.hopper().function(&cuda, &launch)) else {
        return Ok(None);
    };
    check(plan, [q, k, v], &[])?;
    let y = fresh(q.shape(), q.dtype(), q)?;
    let logarithms = fresh((plan.batch, plan.heads, plan.queries), DType::F32, q)?;
    let queued = cuda::with_addresses(
        cuda.stream(),
        [q, k, v, &y, &logarithms],
        |[of_q, of_k, of_v, of_y, logarithms]| {
            let Some(tiled) = sources([q, k, v, &y], [of_q, of_k, of_v, of_y]) else { return Ok(false) };
            // SAFETY: the tensors have the plan's shapes and one dtype; the last two are fresh, and as large as it says.
            unsafe { queue(cuda.stream(), (&launch, &function), q.dtype(), &tiled, &[logarithms]) }
        },
    )?;
    Ok(queued.then_some([y, logarithms]))
}

/// The gradients of q, k and v, from those, y, its gradient, and the forward's logarithms, where there are kernels.
pub(in crate::backend) fn backward(
    device: &CudaDevice,
    [q, k, v]: [&Tensor; 3],
    [y, grad, logarithms]: [&Tensor; 3],
    plan: &Attention,
) -> Result<Option<[Tensor; 3]>> {
    let cuda = Cuda::of(device)?;
    let Some(multiprocessors) = cuda.hopper().multiprocessors(cuda.stream().context()) else {
        return Ok(None);
    };
    let Some([queries, keys]) = attention::backward(plan, multiprocessors) else { return Ok(None) };
    let functions = cuda.hopper().function(&cuda, &queries).and_then(|of_queries| {
        let of_keys = cuda.hopper().function(&cuda, &keys)?;
        Ok((of_queries, of_keys))
    });
    let Some((of_queries, of_keys)) = warned(queries.kernel, functions) else { return Ok(None) };
    check(plan, [q, k, v], &[y, grad])?;
    let rows = [plan.batch, plan.heads, plan.queries];
    if logarithms.dims() != rows || logarithms.dtype() != DType::F32 || !logarithms.is_contiguous() {
        bail!("no logarithms of {rows:?} rows: {:?}", logarithms.layout());
    }
    let dtype = q.dtype();
    let dots = fresh(logarithms.shape(), DType::F32, q)?;
    let (grad_q, grad_k, grad_v) =
        (fresh(q.shape(), dtype, q)?, fresh(k.shape(), dtype, q)?, fresh(v.shape(), dtype, q)?);
    let tensors = [q, k, v, y, grad, &grad_q, &grad_k, &grad_v];
    let [a, b, c, d, e, f, g, h] = tensors;
    let queued = cuda::with_addresses(
        cuda.stream(),
        [a, b, c, d, e, f, g, h, logarithms, &dots],
        |[a, b, c, d, e, f, g, h, logarithms, dots]| {
            let Some([q, k, v, y, grad, grad_q, grad_k, grad_v]) = sources(tensors, [a, b, c, d, e, f, g, h])
            else {
                return Ok(false);
            };
            let rows = [logarithms, dots];
            // SAFETY: as in the forward; the dots are as many as the logarithms, and the second launch, which reads them,
            // runs after the first, which writes them.
            unsafe {
                let tiled = [q, k, v, y, grad, grad_q];
                let queued = queue(cuda.stream(), (&queries, &of_queries), dtype, &tiled, &rows)?;
                let tiled = [q, k, v, grad, grad_k, grad_v];
                Ok(queued && queue(cuda.stream(), (&keys, &of_keys), dtype, &tiled, &rows)?)
            }
        },
    )?;
    Ok(queued.then_some([grad_q, grad_k, grad_v]))
}

#[cfg(test)]
mod tests {
    use candle_core::{D, Device};

    use super::super::tests::hopper;
    use super::*;

    /// `[batch, tokens, heads, width]` between -1 and 1, exact in f16 and bf16, as it is or as a view of heads first.
    fn heads(device: &CudaDevice, dims: [usize; 4], dtype: DType, turned: bool, seed: usize) -> Tensor {
        let [batch, tokens, heads, width] = dims;
        let step = |i: usize| u8::try_from((i * 7919 + seed * 104_729) % 1009 % 33).unwrap();
        let values: Vec<f32> = (0..dims.iter().product()).map(|i| f32::from(step(i)) / 16.0 - 1.0).collect();
        let lying = if turned { (batch, heads, tokens, width) } else { (batch, tokens, heads, width) };
        let x = Tensor::from_vec(values, lying, &Device::Cuda(device.clone())).unwrap();
        let x = x.to_dtype(dtype).unwrap();
        if turned { x.transpose(1, 2).unwrap() } else { x }
    }

    fn plan(q: &Tensor, k: &Tensor, causal: bool) -> Attention {
        let ((batch, queries, heads, width), (_, keys, kv_heads, _)) =
            (q.dims4().unwrap(), k.dims4().unwrap());
        Attention {
            batch,
            queries,
            keys,
            heads,
            kv_heads,
            width,
            q: [0; 3],
            k: [0; 3],
            v: [0; 3],
            storage: gpu::storage(q).unwrap(),
            scale: 0.25,
            causal,
        }
    }

    /// y and the gradients of q, k and v for the gradient `g` of y, in f64; and the same sums of magnitudes, where what is
    /// rounded on the way is a part of which.
    fn expected([q, k, v, g]: [&Tensor; 4], plan: &Attention) -> Result<[[Tensor; 4]; 2]> {
        let cpu = |x: &Tensor| x.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.transpose(1, 2)?.contiguous();
        let group = plan.heads / plan.kv_heads;
        let shared = |x: &Tensor| {
            let x = cpu(x)?.unsqueeze(2)?;
            x.broadcast_as((plan.batch, plan.kv_heads, group, plan.keys, plan.width))?
                .contiguous()?
                .flatten(1, 2)
        };
        let summed = |x: Tensor| {
            x.reshape((plan.batch, plan.kv_heads, group, plan.keys, plan.width))?.sum(2)?.transpose(1, 2)
        };
        let (q, k, v, g, scale) = (cpu(q)?, shared(k)?, shared(v)?, cpu(g)?, f64::from(plan.scale));
        let hides = |i: usize| {
            let (query, key) = (i / plan.keys, i % plan.keys);
            if plan.causal && key > query + plan.keys - plan.queries { f64::NEG_INFINITY } else { 0.0 }
        };
        let mask: Vec<f64> = (0..plan.queries * plan.keys).map(hides).collect();
        let mask = Tensor::from_vec(mask, (plan.queries, plan.keys), &Device::Cpu)?;
        let scores = (q.matmul(&k.t()?)? * scale)?.broadcast_add(&mask)?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        let y = weights.matmul(&v)?;
        let along = |g: &Tensor, y: &Tensor| (g * y)?.sum_keepdim(D::Minus1);
        let of_weights = g.matmul(&v.t()?)?.broadcast_sub(&along(&g, &y)?)?;
        let [abs_q, abs_k, abs_v, abs_g, abs_y] = [&q, &k, &v, &g, &y].map(Tensor::abs);
        let (abs_q, abs_k, abs_v, abs_g, abs_y) = (abs_q?, abs_k?, abs_v?, abs_g?, abs_y?);
        let parts = abs_g.matmul(&abs_v.t()?)?.broadcast_add(&along(&abs_g, &abs_y)?)?;
        let products = |of_weights: &Tensor, q: &Tensor, k: &Tensor, v: &Tensor, g: &Tensor| -> Result<_> {
            let of_scores = ((&weights * of_weights)? * scale)?;
            Ok([
                weights.matmul(v)?.transpose(1, 2)?,
                of_scores.matmul(k)?.transpose(1, 2)?,
                summed(of_scores.t()?.matmul(q)?)?,
                summed(weights.t()?.matmul(g)?)?,
            ])
        };
        Ok([products(&of_weights, &q, &k, &v, &g)?, products(&parts, &abs_q, &abs_k, &abs_v, &abs_g)?])
    }

    fn all(device: &CudaDevice, [q, k, v, g]: [&Tensor; 4], plan: &Attention) -> Option<[Tensor; 4]> {
        let [y, logarithms] = forward(device, [q, k, v], plan).unwrap()?;
        let [of_q, of_k, of_v] = backward(device, [q, k, v], [&y, g, &logarithms], plan).unwrap()?;
        Some([y, of_q, of_k, of_v])
    }

    fn values(x: &Tensor) -> Vec<f64> {
        let x = x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn attention_and_its_gradients_are_those_of_f64() {
        let Some(device) = hopper() else { return };
        let shapes = [
            [1, 1, 2, 1, 1],
            [2, 33, 65, 4, 2],
            [1, 64, 64, 2, 2],
            [2, 193, 193, 6, 2],
            [1, 129, 400, 4, 1],
            // More blocks of keys than are at work at a time.
            [4, 300, 1300, 8, 4],
        ];
        for [batch, queries, keys, of_q, of_k] in shapes {
            for (dtype, width, causal, turned) in [
                (DType::BF16, 64, true, false),
                (DType::F16, 64, false, true),
                (DType::BF16, 128, false, false),
                (DType::F16, 128, true, true),
            ] {
                let q = heads(&device, [batch, queries, of_q, width], dtype, turned, 1);
                let k = heads(&device, [batch, keys, of_k, width], dtype, !turned, 2);
                let v = heads(&device, [batch, keys, of_k, width], dtype, turned, 3);
                let g = heads(&device, [batch, queries, of_q, width], dtype, !turned, 4);
                let plan = plan(&q, &k, causal);
                let what = format!("{batch} {queries} {keys} {of_q} {of_k} {width} {dtype:?} {causal}");
                let got = all(&device, [&q, &k, &v, &g], &plan).unwrap_or_else(|| panic!("{what}: declined"));
                let [expected, magnitudes] = expected([&q, &k, &v, &g], &plan).unwrap();
                // f16 has subnormal numbers where weights are small.
                let (rounding, least) = match dtype {
                    DType::F16 => (2f64.powi(-11), 2f64.powi(-25)),
                    _ => (2f64.powi(-8), 0.0),
                };
                let terms = f64::from(u32::try_from(keys.max(queries * of_q)).unwrap());
                let names = ["y", "dq", "dk", "dv"].into_iter();
                for (name, ((got, expected), magnitudes)) in
                    names.zip(got.iter().zip(&expected).zip(&magnitudes))
                {
                    let magnitudes = values(magnitudes);
                    for (i, (got, expected)) in values(got).iter().zip(values(expected)).enumerate() {
                        // A weight, or a score's gradient and what it is a difference of; and the result.
                        let bound = 2.0 * rounding * magnitudes[i] + terms * least;
                        assert!(
                            (got - expected).abs() <= bound,
                            "{what}: {name} {got} for {expected} at {i}"
                        );
                    }
                }
                let again = all(&device, [&q, &k, &v, &g], &plan).unwrap();
                assert_eq!(got.map(|x| values(&x)), again.map(|x| values(&x)), "{what}: two runs differ");
            }
        }
    }

    /// A row of y that sees a NaN is all NaN, and no other one.
    #[test]
    fn what_is_not_a_number_stays_in_its_rows() {
        let Some(device) = hopper() else { return };
        let of = |seed| heads(&device, [1, 100, 2, 64], DType::BF16, false, seed);
        let (q, v) = (of(1), of(3));
        let wrong = (Tensor::ones((1, 1, 2, 64), DType::BF16, q.device()).unwrap() * f64::NAN).unwrap();
        let k = of(2).slice_assign(&[0..1, 70..71, 0..2, 0..64], &wrong).unwrap();
        let [y, _] = forward(&device, [&q, &k, &v], &plan(&q, &k, true)).unwrap().unwrap();
        for (i, value) in values(&y).into_iter().enumerate() {
            assert_eq!(value.is_nan(), i / 128 >= 70, "{value} at {i}");
        }
    }

    #[test]
    fn what_tiles_cannot_hold_is_left_to_the_dialect() {
        let Some(device) = hopper() else { return };
        let of = |dims, seed| heads(&device, dims, DType::BF16, false, seed);
        let (q, k) = (of([1, 40, 4, 64], 1), of([1, 40, 2, 64], 2));
        let serves = |k: &Tensor| forward(&device, [&q, k, k], &plan(&q, k, true)).unwrap().is_some();
        assert!(serves(&k));
        assert!(!serves(&of([1, 1, 2, 64], 3).broadcast_as((1, 40, 2, 64)).unwrap()), "tokens in one place");
        assert!(!serves(&of([1, 40, 2, 68], 3).narrow(3, 0, 64).unwrap()), "rows that begin at 8 bytes");
        let wide = of([1, 40, 2, 96], 3);
        assert!(forward(&device, [&wide; 3], &plan(&wide, &wide, true)).unwrap().is_none());
        assert!(forward(&device, [&q, &k, &q], &plan(&q, &k, true)).is_err());
    }
}
