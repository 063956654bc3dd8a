//! The products of a layer with its adapter by `adapted_product.cu`.

use candle_core::{CudaDevice, DType, Result, Tensor, bail};
use candlewick_kernels::hopper::{AdaptedPass, AdaptedProduct, Way};

use super::{Source, fresh, lies, queue, row_stride, warned};
use crate::backend::cuda::{self, Cuda};
use crate::backend::gpu;

/// `left·right + l·r` with `l = scale·left·projection`.
pub(in crate::backend) struct Product<'a> {
    pub(in crate::backend) left: &'a Tensor,
    pub(in crate::backend) right: &'a Tensor,
    pub(in crate::backend) projection: &'a Tensor,
    pub(in crate::backend) r: &'a Tensor,
    pub(in crate::backend) scale: f32,
}

impl Product<'_> {
    /// What a kernel would do, and from one row or column of each factor to the next; `None` where tiles cannot have them.
    fn plan(&self, way: Way) -> Result<Option<(AdaptedProduct, [usize; 4])>> {
        let Self { left, right, projection, r, scale } = *self;
        let ((rows, inner), (columns, rank), dtype) =
            (left.dims2()?, (right.dim(1)?, r.dim(0)?), left.dtype());
        let shapes = [(right, [inner, columns]), (projection, [inner, rank]), (r, [rank, columns])];
        if shapes.iter().any(|(matrix, dims)| matrix.dims() != dims || matrix.dtype() != dtype) {
            bail!(
                "no product of {:?}·{:?} with {:?}·{:?}",
                left.shape(),
                right.shape(),
                projection.shape(),
                r.shape()
            );
        }
        if !matches!(dtype, DType::F16 | DType::BF16) {
            return Ok(None);
        }
        let Some(stride) = row_stride(left)? else { return Ok(None) };
        let mut strides = [stride; 4];
        let turned = matches!(way, Way::Backward { .. });
        for (stride, factor) in strides[1..].iter_mut().zip([right, projection, r]) {
            match lies(factor)? {
                Some(lies) if lies.in_rows == turned => *stride = lies.stride,
                _ => return Ok(None),
            }
        }
        let storage = gpu::storage(left)?;
        Ok(Some((AdaptedProduct { rows, columns, inner, rank, storage, scale, way }, strides)))
    }

    /// As tiles see the factors, `l` and the result.
    fn sources(
        &self,
        [left, right, projection, r, l, y]: [u64; 6],
        strides: [usize; 4],
    ) -> Result<[Source; 6]> {
        let [of_left, of_right, of_projection, of_r] = strides;
        Ok([
            Source::matrix(left, of_left),
            Source::matrix(right, of_right),
            Source::matrix(projection, of_projection),
            Source::matrix(l, self.r.dim(0)?),
            Source::matrix(r, of_r),
            Source::matrix(y, self.right.dim(1)?),
        ])
    }
}

/// `left·right + l·r + bias`, and `l`, of a product whose factors lie column after column, where there is a kernel for it.
pub(in crate::backend) fn forward(
    device: &CudaDevice,
    product: &Product,
    bias: Option<&Tensor>,
) -> Result<Option<[Tensor; 2]>> {
    let cuda = Cuda::of(device)?;
    let Some(multiprocessors) = cuda.hopper().multiprocessors(cuda.stream().context()) else {
        return Ok(None);
    };
    // The bias is read in pairs.
    let paired = |bias: &Tensor| bias.is_contiguous() && bias.layout().start_offset().is_multiple_of(2);
    if !bias.is_none_or(paired) {
        return Ok(None);
    }
    let Product { left, right, projection, r, .. } = *product;
    let dtype = left.dtype();
    let Some((plan, strides)) = product.plan(Way::Forward { bias: bias.is_some() })? else { return Ok(None) };
    if bias.is_some_and(|bias| bias.dims() != [plan.columns] || bias.dtype() != dtype) {
        bail!("no bias of {} columns: {:?}", plan.columns, bias.map(Tensor::layout));
    }
    let Some(AdaptedPass { counters, parts: [l_parts, ..], product: launch, .. }) =
        plan.launches(multiprocessors)
    else {
        return Ok(None);
    };
    let Some(counters) = cuda.hopper().counters(counters, left)? else { return Ok(None) };
    let Some(function) = warned(launch.kernel, cuda.hopper().function(&cuda, &launch)) else {
        return Ok(None);
    };
    let (y, l) =
        (fresh((plan.rows, plan.columns), dtype, left)?, fresh((plan.rows, plan.rank), dtype, left)?);
    let parts = fresh(l_parts, DType::F32, left)?;
    let tensors = [left, right, projection, r, &l, &y, &parts, counters, bias.unwrap_or(left)];
    let queued = cuda::with_addresses(
        cuda.stream(),
        tensors,
        |[left, right, projection, r, l, y, parts, counters, bias]| {
            let matrices = product.sources([left, right, projection, r, l, y], strides)?;
            // SAFETY: the shapes were checked against the plan, strides and offsets are the tensors' own; `l`, `y` and the
            // scratch are fresh and as large as the plan says. The counters are zero whenever no such launch is under way,
            // and launches of one stream follow each other.
            unsafe {
                queue(cuda.stream(), (&launch, &function), dtype, &matrices, &[l, parts, counters, bias])
            }
        },
    )?;
    Ok(queued.then_some([y, l]))
}

/// `left·right + l·r` of a product whose factors lie row after row, `lᵀ·input` and `leftᵀ·kept`, the latter two in `factor`,
/// where there are kernels for it.
pub(in crate::backend) fn backward(
    device: &CudaDevice,
    product: &Product,
    [input, kept]: [&Tensor; 2],
    factor: DType,
) -> Result<Option<[Tensor; 3]>> {
    let cuda = Cuda::of(device)?;
    let Some(multiprocessors) = cuda.hopper().multiprocessors(cuda.stream().context()) else {
        return Ok(None);
    };
    let Product { left, right, projection, r, .. } = *product;
    let dtype = left.dtype();
    let of_factor = match factor {
        DType::F32 => candlewick_kernels::Storage::F32,
        same if same == dtype => gpu::storage(left)?,
        _ => return Ok(None),
    };
    let Some((plan, strides)) = product.plan(Way::Backward { factor: of_factor })? else { return Ok(None) };
    let shapes = [(input, [plan.rows, plan.columns]), (kept, [plan.rows, plan.rank])];
    if shapes.iter().any(|(matrix, dims)| matrix.dims() != dims || matrix.dtype() != dtype) {
        bail!("no gradients for {:?} and {:?}", input.shape(), kept.shape());
    }
    let (Some(of_input), Some(of_kept)) = (row_stride(input)?, row_stride(kept)?) else { return Ok(None) };
    let pass = plan.launches(multiprocessors);
    let Some(AdaptedPass { counters, parts: [l_parts, d_parts, c_parts], product: launch, sum: Some(sum) }) =
        pass
    else {
        return Ok(None);
    };
    let Some(counters) = cuda.hopper().counters(counters, left)? else { return Ok(None) };
    let functions = cuda.hopper().function(&cuda, &launch).and_then(|of_product| {
        let of_sum = cuda.hopper().function(&cuda, &sum)?;
        Ok((of_product, of_sum))
    });
    let Some((of_product, of_sum)) = warned(launch.kernel, functions) else { return Ok(None) };
    let (y, l) =
        (fresh((plan.rows, plan.columns), dtype, left)?, fresh((plan.rows, plan.rank), dtype, left)?);
    let (c, d) =
        (fresh((plan.rank, plan.columns), factor, left)?, fresh((plan.inner, plan.rank), factor, left)?);
    let parts = fresh(l_parts + d_parts + c_parts, DType::F32, left)?;
    let tensors = [left, right, projection, r, &l, &y, input, kept, &parts, counters, &c, &d];
    let queued = cuda::with_addresses(
        cuda.stream(),
        tensors,
        |[left, right, projection, r, l, y, input, kept, parts, counters, c, d]| {
            let [a, b, e, f, g, h] = product.sources([left, right, projection, r, l, y], strides)?;
            let matrices = [a, b, e, f, g, h, Source::matrix(kept, of_kept), Source::matrix(input, of_input)];
            let behind = |floats: usize| parts + (floats * size_of::<f32>()) as u64;
            let (of_d, of_c) = (behind(l_parts), behind(l_parts + d_parts));
            // SAFETY: as in the forward; the second launch, which reads the parts, runs after the first, which writes them.
            unsafe {
                let addresses = [l, parts, counters, of_d, of_c];
                let queued = queue(cuda.stream(), (&launch, &of_product), dtype, &matrices, &addresses)?;
                Ok(queued && queue(cuda.stream(), (&sum, &of_sum), dtype, &[], &[of_d, of_c, d, c])?)
            }
        },
    )?;
    Ok(queued.then_some([y, c, d]))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::tests::{across, assert_near, exact, hopper, matrix, products, values};
    use super::*;

    /// Exact with the sums of the matrices below.
    const SCALE: f32 = 0.046_875;
    /// More parts than clusters, leads that are not all columns, rows and columns that fill no part, two bands of rows.
    const SHAPES: [[usize; 4]; 6] = [
        [256, 512, 512, 16],
        [1000, 520, 584, 8],
        [300, 4096, 512, 16],
        [2062, 968, 712, 16],
        [5000, 1032, 520, 8],
        [4200, 2056, 1032, 16],
    ];

    #[test]
    fn an_adapted_product_is_rounded_once() {
        let Some(device) = hopper() else { return };
        for [rows, columns, inner, rank] in SHAPES {
            for dtype in [DType::F16, DType::BF16] {
                for (biased, before) in [(false, 0), (true, 8)] {
                    let what = format!("{rows}x{columns}x{inner} r {rank} {dtype:?} {biased} {before}");
                    let left = matrix(&device, [rows, inner], before, dtype, 1);
                    let right = across(&device, [inner, columns], before, dtype, 2);
                    let projection = across(&device, [inner, rank], before, dtype, 3);
                    let r = across(&device, [rank, columns], before, dtype, 4);
                    let bias = matrix(&device, [1, columns], 0, dtype, 5).flatten_all().unwrap();
                    let bias = biased.then_some(&bias);
                    let product =
                        Product { left: &left, right: &right, projection: &projection, r: &r, scale: SCALE };
                    let run = || {
                        let run = forward(&device, &product, bias).unwrap();
                        run.unwrap_or_else(|| panic!("{what}: declined"))
                    };
                    let [y, l] = run();
                    assert_near(
                        &l,
                        &products(&[[&left, &projection]], f64::from(SCALE)),
                        &format!("{what}: l"),
                    );
                    let one = Tensor::ones((rows, 1), DType::F64, &Device::Cpu).unwrap();
                    let row = bias.map(|bias| bias.reshape((1, columns)).unwrap());
                    let pairs = [[&left, &right], [&l, &r]].into_iter();
                    let pairs: Vec<_> = pairs.chain(row.as_ref().map(|row| [&one, row])).collect();
                    assert_near(&y, &products(&pairs, 1.0), &what);
                    for _ in 0..3 {
                        let again = run();
                        assert_eq!(
                            [&y, &l].map(values),
                            again.each_ref().map(values),
                            "{what}: two runs differ"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn an_adapted_gradient_comes_with_its_factors() {
        let Some(device) = hopper() else { return };
        for [rows, columns, inner, rank] in SHAPES {
            for dtype in [DType::F16, DType::BF16] {
                for (factor, before) in [(DType::F32, 0), (dtype, 8)] {
                    let what = format!("{rows}x{columns}x{inner} r {rank} {dtype:?} {factor:?} {before}");
                    let of = |dims, seed| matrix(&device, dims, before, dtype, seed);
                    let (left, right) = (of([rows, inner], 1), of([inner, columns], 2));
                    let (projection, r) = (of([inner, rank], 3), of([rank, columns], 4));
                    let (input, kept) = (of([rows, columns], 5), of([rows, rank], 6));
                    let product =
                        Product { left: &left, right: &right, projection: &projection, r: &r, scale: SCALE };
                    let run = || {
                        let run = backward(&device, &product, [&input, &kept], factor).unwrap();
                        run.unwrap_or_else(|| panic!("{what}: declined"))
                    };
                    let [y, c, d] = run();
                    // What the kernel rounded l to; the forward test holds l itself to the product.
                    let l = (exact(&left).matmul(&exact(&projection)).unwrap() * f64::from(SCALE)).unwrap();
                    let l = l.to_dtype(DType::F32).unwrap().to_dtype(dtype).unwrap();
                    assert_near(&y, &products(&[[&left, &right], [&l, &r]], 1.0), &what);
                    assert_near(&c, &products(&[[&l.t().unwrap(), &input]], 1.0), &format!("{what}: c"));
                    assert_near(&d, &products(&[[&left.t().unwrap(), &kept]], 1.0), &format!("{what}: d"));
                    assert_eq!((c.dtype(), d.dtype()), (factor, factor));
                    for _ in 0..3 {
                        let again = run();
                        assert_eq!(
                            [&y, &c, &d].map(values),
                            again.each_ref().map(values),
                            "{what}: two runs differ"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn what_the_kernel_cannot_have_is_left_to_others() {
        let Some(device) = hopper() else { return };
        let dtype = DType::BF16;
        let left = matrix(&device, [1000, 520], 0, dtype, 1);
        let columns = |dims, seed| across(&device, dims, 0, dtype, seed);
        let (right, projection, r) = (columns([520, 640], 2), columns([520, 16], 3), columns([16, 640], 4));
        let serves = |left: &Tensor, right: &Tensor, projection: &Tensor, r: &Tensor| {
            forward(&device, &Product { left, right, projection, r, scale: 1.0 }, None).unwrap().is_some()
        };
        assert!(serves(&left, &right, &projection, &r));
        let shifted = matrix(&device, [1000, 520], 4, dtype, 1);
        assert!(!serves(&shifted, &right, &projection, &r), "rows that begin at 8 bytes");
        let in_rows = matrix(&device, [520, 16], 0, dtype, 3);
        assert!(!serves(&left, &right, &in_rows, &r), "factors that lie differently");
        assert!(!serves(&left, &right, &columns([520, 24], 3), &columns([24, 640], 4)), "a rank of 24");
        let wrong = Product { left: &left, right: &right, projection: &r, r: &projection, scale: 1.0 };
        assert!(forward(&device, &wrong, None).is_err());
    }
}
