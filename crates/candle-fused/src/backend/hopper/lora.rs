//! LoRA's products by the kernels of [`candlewick_kernels::hopper`].

use candle_core::{CudaDevice, DType, Result, Tensor, bail};
use candlewick_kernels::hopper::{GradientPass, LowRankGradient, SumOfProducts};

use super::{Source, fresh, lies, queue, row_stride, warned};
use crate::backend::cuda::{self, Cuda};
use crate::backend::gpu;

/// `left·right + l·r + bias`, where there is a kernel that takes less time than the device's own products.
pub(in crate::backend) fn sum_of_products(
    device: &CudaDevice,
    [left, right]: [&Tensor; 2],
    [l, r]: [&Tensor; 2],
    bias: Option<&Tensor>,
) -> Result<Option<Tensor>> {
    let cuda = Cuda::of(device)?;
    let Some(multiprocessors) = cuda.hopper().multiprocessors(cuda.stream().context()) else {
        return Ok(None);
    };
    let ((rows, inner), (columns, rank), dtype) = (left.dims2()?, (right.dim(1)?, l.dim(1)?), left.dtype());
    let same = [right, l, r].into_iter().chain(bias).all(|tensor| tensor.dtype() == dtype);
    let shapes = [(right, [inner, columns]), (l, [rows, rank]), (r, [rank, columns])];
    let bias_fits = bias.is_none_or(|bias| bias.dims() == [columns]);
    if !same || !bias_fits || shapes.iter().any(|(matrix, dims)| matrix.dims() != dims) {
        bail!("no sum of {:?}·{:?} and {:?}·{:?}", left.shape(), right.shape(), l.shape(), r.shape());
    }
    let (Some(left_stride), Some(l_stride)) = (row_stride(left)?, row_stride(l)?) else {
        return Ok(None);
    };
    let (Some(of_right), Some(of_r)) = (lies(right)?, lies(r)?) else { return Ok(None) };
    // The bias is read in pairs.
    let paired = |bias: &Tensor| bias.is_contiguous() && bias.layout().start_offset().is_multiple_of(2);
    let paired = bias.is_none_or(paired);
    if of_right.in_rows != of_r.in_rows || !paired || !matches!(dtype, DType::F16 | DType::BF16) {
        return Ok(None);
    }
    let (storage, turned) = (gpu::storage(left)?, of_right.in_rows);
    let plan = SumOfProducts { rows, columns, inner, rank, storage, turned, bias: bias.is_some() };
    let Some(launch) = plan.launch(multiprocessors) else { return Ok(None) };
    let Some(function) = warned(launch.kernel, cuda.hopper().function(&cuda, &launch)) else {
        return Ok(None);
    };
    let y = fresh((rows, columns), dtype, left)?;
    let tensors = [left, right, l, r, &y, bias.unwrap_or(l)];
    let queued = cuda::with_addresses(cuda.stream(), tensors, |[left, right, l, r, y, bias]| {
        let matrices = [
            Source::matrix(left, left_stride),
            Source::matrix(right, of_right.stride),
            Source::matrix(l, l_stride),
            Source::matrix(r, of_r.stride),
            Source::matrix(y, columns),
        ];
        // SAFETY: the shapes were checked against the plan, strides and offsets are the tensors' own; `y` is fresh.
        unsafe { queue(cuda.stream(), (&launch, &function), dtype, &matrices, &[bias]) }
    })?;
    Ok(queued.then_some(y))
}

/// `scale·g·b` in the dtype of `g` and `gᵀ·h` in `factor`, for `g [n, out]`, `b [out, r]` and `h [n, r]`, by one pass over `g`,
/// where there is a kernel for it.
pub(in crate::backend) fn low_rank_gradient(
    device: &CudaDevice,
    [g, b, h]: [&Tensor; 3],
    scale: f32,
    factor: DType,
) -> Result<Option<[Tensor; 2]>> {
    let cuda = Cuda::of(device)?;
    let Some(multiprocessors) = cuda.hopper().multiprocessors(cuda.stream().context()) else {
        return Ok(None);
    };
    let ((rows, columns), rank, dtype) = (g.dims2()?, h.dim(1)?, g.dtype());
    let shapes = [(b, [columns, rank]), (h, [rows, rank])];
    if shapes.iter().any(|(matrix, dims)| matrix.dims() != dims || matrix.dtype() != dtype) {
        bail!("no gradient of {:?} for {:?} and {:?}", g.shape(), b.shape(), h.shape());
    }
    let strides = (row_stride(g)?, row_stride(b)?, row_stride(h)?);
    let (Some(g_stride), Some(b_stride), Some(h_stride)) = strides else { return Ok(None) };
    let (storage, factor_storage) = match (dtype, factor) {
        (DType::F16 | DType::BF16, DType::F32) => (gpu::storage(g)?, candlewick_kernels::Storage::F32),
        (DType::F16 | DType::BF16, same) if same == dtype => (gpu::storage(g)?, gpu::storage(g)?),
        _ => return Ok(None),
    };
    let plan = LowRankGradient { rows, columns, rank, storage, factor: factor_storage, scale };
    let Some(GradientPass { parts, pass, sum }) = plan.launches(multiprocessors) else { return Ok(None) };
    let functions = cuda.hopper().function(&cuda, &pass).and_then(|of_pass| {
        let of_sum = cuda.hopper().function(&cuda, &sum)?;
        Ok((of_pass, of_sum))
    });
    let Some((of_pass, of_sum)) = warned(pass.kernel, functions) else { return Ok(None) };
    let [e_parts, d_parts] = parts;
    let scratch = fresh((1, e_parts + d_parts), DType::F32, g)?;
    let (e, d) = (fresh((rows, rank), dtype, g)?, fresh((columns, rank), factor, g)?);
    let tensors = [g, b, h, &scratch, &e, &d];
    let queued = cuda::with_addresses(cuda.stream(), tensors, |[g, b, h, scratch, e, d]| {
        let matrices = [(g, g_stride), (b, b_stride), (h, h_stride)];
        let matrices = matrices.map(|(address, stride)| Source::matrix(address, stride));
        let scratches = [scratch, scratch + (e_parts * size_of::<f32>()) as u64];
        // SAFETY: as above; the scratch is as large as the plan says, fresh like both results, and the second launch runs
        // after the first.
        unsafe {
            let queued = queue(cuda.stream(), (&pass, &of_pass), dtype, &matrices, &scratches)?;
            Ok(queued
                && queue(cuda.stream(), (&sum, &of_sum), dtype, &[], &[scratches[0], scratches[1], e, d])?)
        }
    })?;
    Ok(queued.then_some([e, d]))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::tests::{across, assert_near, hopper, matrix, products, values};
    use super::*;

    #[test]
    fn a_sum_of_products_is_rounded_once() {
        let Some(device) = hopper() else { return };
        let shapes = [
            [1, 8, 8, 8],
            [33, 264, 72, 16],
            [128, 256, 64, 64],
            [257, 248, 520, 72],
            [1000, 520, 328, 24],
            [2062, 384, 512, 40],
            // More parts than clusters.
            [5000, 1032, 136, 8],
        ];
        for [rows, columns, inner, rank] in shapes {
            for dtype in [DType::F16, DType::BF16] {
                for (turned, biased, before) in
                    [(false, false, 0), (true, false, 0), (false, true, 8), (true, true, 24)]
                {
                    let right = if turned { matrix } else { across };
                    let (left, r) = (
                        matrix(&device, [rows, inner], before, dtype, 1),
                        right(&device, [inner, columns], before, dtype, 2),
                    );
                    let (low_left, low_right) = (
                        matrix(&device, [rows, rank], before, dtype, 3),
                        right(&device, [rank, columns], before, dtype, 4),
                    );
                    let bias = matrix(&device, [1, columns], 0, dtype, 5).flatten_all().unwrap();
                    let bias = biased.then_some(&bias);
                    let what =
                        format!("{rows}x{columns}x{inner} r {rank} {dtype:?} {turned} {biased} {before}");
                    let sum = || {
                        let sum = sum_of_products(&device, [&left, &r], [&low_left, &low_right], bias);
                        sum.unwrap().unwrap_or_else(|| panic!("{what}: declined"))
                    };
                    let one = Tensor::ones((rows, 1), DType::F64, &Device::Cpu).unwrap();
                    let row = bias.map(|bias| bias.reshape((1, columns)).unwrap());
                    let pairs = [[&left, &r], [&low_left, &low_right]].into_iter();
                    let pairs: Vec<_> = pairs.chain(row.as_ref().map(|row| [&one, row])).collect();
                    let got = sum();
                    assert_near(&got, &products(&pairs, 1.0), &what);
                    assert_eq!(values(&got), values(&sum()), "{what}: two runs differ");
                }
            }
        }
    }

    #[test]
    fn one_pass_gives_both_gradients() {
        let Some(device) = hopper() else { return };
        let shapes =
            [[1, 8, 8], [64, 256, 16], [65, 264, 24], [1000, 520, 32], [2062, 384, 16], [8192, 4096, 8]];
        for [rows, columns, rank] in shapes {
            for dtype in [DType::F16, DType::BF16] {
                for (factor, before) in [(DType::F32, 0), (dtype, 8)] {
                    let g = matrix(&device, [rows, columns], before, dtype, 1);
                    let b = matrix(&device, [columns, rank], before, dtype, 2);
                    let h = matrix(&device, [rows, rank], before, dtype, 3);
                    let what = format!("{rows}x{columns} r {rank} {dtype:?} {factor:?} {before}");
                    let pass = || {
                        let pass = low_rank_gradient(&device, [&g, &b, &h], 0.75, factor).unwrap();
                        pass.unwrap_or_else(|| panic!("{what}: declined"))
                    };
                    let [e, d] = pass();
                    assert_near(&e, &products(&[[&g, &b]], 0.75), &format!("{what}: e"));
                    assert_near(&d, &products(&[[&g.t().unwrap(), &h]], 1.0), &format!("{what}: d"));
                    assert_eq!((e.dtype(), d.dtype()), (dtype, factor));
                    let again = pass();
                    assert_eq!([values(&e), values(&d)], again.map(|gradient| values(&gradient)), "{what}");
                }
            }
        }
    }

    #[test]
    fn what_tiles_cannot_hold_is_left_to_the_device() {
        let Some(device) = hopper() else { return };
        let dims = [[1000, 520], [520, 328], [1000, 16], [16, 328]];
        let made = |dims: [usize; 2], seed| matrix(&device, dims, 0, DType::BF16, seed);
        let [left, right, l, r] = [0, 1, 2, 3].map(|i| made(dims[i], i));
        let sum = |left: &Tensor, right: &Tensor, l: &Tensor, r: &Tensor| {
            sum_of_products(&device, [left, right], [l, r], None).unwrap().is_some()
        };
        assert!(sum(&left, &right, &l, &r));
        let shifted = matrix(&device, dims[0], 4, DType::BF16, 9);
        assert!(!sum(&shifted, &right, &l, &r), "rows that begin at 8 bytes");
        let column = across(&device, dims[3], 0, DType::BF16, 9);
        assert!(!sum(&left, &right, &l, &column), "factors that lie differently");
        let [odd_l, odd_r] = [made([1000, 12], 1), made([12, 328], 2)];
        assert!(!sum(&left, &right, &odd_l, &odd_r), "a rank of 12");
        assert!(sum_of_products(&device, [&left, &right], [&r, &l], None).is_err());
    }
}
