//! The rotation of a row's pairs.

/// Pairs `(i, i + h)`, for `h` angles; columns from `2h` on are copied.
pub(crate) fn half(x: &[f32], cos: &[f32], sin: &[f32], y: &mut [f32]) {
    let (x, y) = split(x, y, 2 * cos.len());
    let (u, v) = x.split_at(cos.len());
    let (first, second) = y.split_at_mut(cos.len());
    for (i, (&c, &s)) in cos.iter().zip(sin).enumerate() {
        first[i] = u[i] * c - v[i] * s;
        second[i] = v[i] * c + u[i] * s;
    }
}

/// Pairs `(2i, 2i + 1)`, for `h` angles; columns from `2h` on are copied.
pub(crate) fn interleaved(x: &[f32], cos: &[f32], sin: &[f32], y: &mut [f32]) {
    let (x, y) = split(x, y, 2 * cos.len());
    let pairs = x.as_chunks::<2>().0.iter().zip(y.as_chunks_mut::<2>().0);
    for (([u, v], y), (&c, &s)) in pairs.zip(cos.iter().zip(sin)) {
        *y = [u * c - v * s, v * c + u * s];
    }
}

/// The columns to rotate; the others are copied.
fn split<'a>(x: &'a [f32], y: &'a mut [f32], rotated: usize) -> (&'a [f32], &'a mut [f32]) {
    let (x, x_rest) = x.split_at(rotated);
    let (y, y_rest) = y.split_at_mut(rotated);
    y_rest.copy_from_slice(x_rest);
    (x, y)
}
