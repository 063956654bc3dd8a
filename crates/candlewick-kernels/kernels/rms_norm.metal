// RMS norm over the last dimension, forward and backward.
//
//   y  = x · r · w                 r = 1 / √(mean(x²) + eps)
//   dx = r · (g·w − x̂ · mean(g·w·x̂))        x̂ = x · r
//   dw = Σ_rows g · x̂
//
// Memory. Forward reads x once and writes y once: the row stays in registers between the sum and the scaling.
// Backward reads x and g once, writes dx once, and recomputes r instead of having it saved: x is needed anyway, and
// Σ x² and Σ g·w·x share a barrier. The next row is loaded while one is worked on: a device that waited for each
// would read half of the time.
// The weight's gradient is a sum over rows. Each team walks many rows, keeps its columns' sums in registers and
// writes one partial row; column_sum adds those. No atomics, so the same input gives the same bits.
//
// Launch. Short rows, many of them: one simdgroup a row, no barrier. Otherwise a threadgroup a row; its size
// follows the row's length. Rows beyond the registers are walked in passes.
//
// Range. x² leaves f32 from 1.8e19 up and 1e-19 down, and a sum of squares earlier. When the mean square comes out
// beyond [1e-28, 3e38] it is taken again with the row divided by the power of two of its largest magnitude. The test
// is the same in the whole team, costs nothing, and the second pass runs for such rows only.

struct RmsNormParams {
    uint rows;
    uint columns;
    uint teams;  // backward: row, row + teams, row + 2·teams … are one team's
    float eps;
};

DEVFN float largest_magnitude(THREAD Team& team, DEVICE const T* x_row, THREAD float* x, uint columns) {
    float largest = 0.0f;
    for (uint k = 0u; k < row_chunks(columns); k++) {
        const uint column = chunk_column(team, k);
        if (column >= columns) continue;
        if (LOOPED) load_chunk(x_row + column, x);
        for (uint i = 0u; i < WIDTH; i++) largest = fmax(largest, fabs(x[held_at(k) + i]));
    }
    return row_max(team, largest);
}

DEVFN float mean_square(THREAD Team& team, DEVICE const T* x_row, THREAD float* x, uint columns, float scale) {
    float squares = 0.0f;
    for (uint k = 0u; k < row_chunks(columns); k++) {
        const uint column = chunk_column(team, k);
        if (column >= columns) continue;
        if (LOOPED) load_chunk(x_row + column, x);
        for (uint i = 0u; i < WIDTH; i++) {
            const float v = x[held_at(k) + i] * scale;
            squares = fma(v, v, squares);
        }
    }
    return row_sum(team, squares) / float(columns);
}

// r of a row; where the row is not LOOPED, x holds it.
DEVFN float inverse_rms(THREAD Team& team, DEVICE const T* x_row, THREAD float* x, uint columns, float eps) {
    const float square = mean_square(team, x_row, x, columns, 1.0f);
    if (square + eps >= 1e-28f && square <= 3e38f) return 1.0f / precise::sqrt(square + eps);
    const float largest = largest_magnitude(team, x_row, x, columns);
    // A row of zeros, and one that holds an infinity, have no better scale.
    if (!(largest > 0.0f && largest < INFINITY)) return 1.0f / precise::sqrt(square + eps);
    const float scale = 1.0f / row_scale(largest);
    const float scaled = mean_square(team, x_row, x, columns, scale);
    return scale / precise::sqrt(scaled + (eps * scale) * scale);
}

KERNEL(rms_norm, DEVICE const T* x, DEVICE const T* weight, DEVICE T* y, PARAM(RmsNormParams, p)) {
    TG_ARRAY(float, scratch, ROW_SCRATCH);
    Team team = {scratch, LANE, SIMD_ID, 0u};
    const uint row = team_index(team, TG_POS.x, N_SIMD);
    if (row >= p.rows) return;
    DEVICE const T* x_row = x + ulong(row) * p.columns;
    DEVICE T* y_row = y + ulong(row) * p.columns;

    float values[HELD];
    load_row(team, x_row, values, p.columns);
    const float r = inverse_rms(team, x_row, values, p.columns, p.eps);
    for (uint k = 0u; k < row_chunks(p.columns); k++) {
        const uint column = chunk_column(team, k);
        if (column >= p.columns) continue;
        THREAD float* chunk = values + held_at(k);
        if (LOOPED) load_chunk(x_row + column, chunk);
        float w[WIDTH];
        if (WEIGHT) load_chunk(weight + column, w);
        for (uint i = 0u; i < WIDTH; i++) chunk[i] = WEIGHT ? chunk[i] * r * w[i] : chunk[i] * r;
        store_chunk(y_row + column, chunk);
    }
}

// Adds Σ x² and Σ g·w·x·scale of a row; where the row is not LOOPED, x and g hold it and the gradient.
DEVFN void add_sums(THREAD const Team& team, DEVICE const T* x_row, DEVICE const T* grad_row, DEVICE const T* weight,
                    THREAD const PackedChunk* packed_weight, THREAD float* x, THREAD float* g, uint columns,
                    float scale, THREAD float* sums) {
    for (uint k = 0u; k < row_chunks(columns); k++) {
        const uint column = chunk_column(team, k);
        if (column >= columns) continue;
        if (LOOPED) {
            load_chunk(x_row + column, x);
            load_chunk(grad_row + column, g);
        }
        float w[WIDTH];
        if (WEIGHT) load_weight(weight + column, packed_weight, k, w);
        for (uint i = 0u; i < WIDTH; i++) {
            const float v = x[held_at(k) + i], weighted = WEIGHT ? g[held_at(k) + i] * w[i] : g[held_at(k) + i];
            sums[0] = fma(v, v, sums[0]);
            sums[1] = fma(weighted, v * scale, sums[1]);
        }
    }
}

KERNEL(rms_norm_backward, DEVICE const T* x, DEVICE const T* weight, DEVICE const T* grad, DEVICE T* grad_x,
       DEVICE float* partial, PARAM(RmsNormParams, p)) {
    TG_ARRAY(float, scratch, ROW_SCRATCH);
    Team team = {scratch, LANE, SIMD_ID, 0u};
    const uint first = team_index(team, TG_POS.x, N_SIMD);
    if (first >= p.teams) return;
    DEVICE float* partial_row = partial + ulong(first) * p.columns;

    float weight_sums[HELD];
    for (uint i = 0u; i < HELD; i++) weight_sums[i] = 0.0f;
    // The next row is on its way while one is worked on.
    PackedChunk next_x[PACKED_ITEMS];
    PackedChunk next_grad[PACKED_ITEMS];
    load_packed_row(team, x + ulong(first) * p.columns, next_x, p.columns);
    load_packed_row(team, grad + ulong(first) * p.columns, next_grad, p.columns);
    PackedChunk packed_weight[PACKED_ITEMS];
    if (WEIGHT && HOLDS_WEIGHT) load_packed_row(team, weight, packed_weight, p.columns);
    for (uint row = first; row < p.rows; row += p.teams) {
        DEVICE const T* x_row = x + ulong(row) * p.columns;
        DEVICE const T* grad_row = grad + ulong(row) * p.columns;
        float values[HELD];
        float grads[HELD];
        unpack_row(team, next_x, values, p.columns);
        unpack_row(team, next_grad, grads, p.columns);
        if (p.rows - row > p.teams) {
            load_packed_row(team, x_row + ulong(p.teams) * p.columns, next_x, p.columns);
            load_packed_row(team, grad_row + ulong(p.teams) * p.columns, next_grad, p.columns);
        }

        // Both sums at once, as if r were 1; again with r in its place where that leaves f32.
        float sums[2] = {0.0f, 0.0f};
        add_sums(team, x_row, grad_row, weight, packed_weight, values, grads, p.columns, 1.0f, sums);
        row_sums<2u>(team, sums);
        const float square = sums[0] / float(p.columns);
        float r = 1.0f / precise::sqrt(square + p.eps);
        float dot = sums[1] * r;
        if (!(square + p.eps >= 1e-28f && square <= 3e38f && fabs(dot) <= 3e38f)) {
            r = inverse_rms(team, x_row, values, p.columns, p.eps);
            sums[1] = 0.0f;
            add_sums(team, x_row, grad_row, weight, packed_weight, values, grads, p.columns, r, sums);
            dot = row_sum(team, sums[1]);
        }
        const float mean = dot / float(p.columns);

        for (uint k = 0u; k < row_chunks(p.columns); k++) {
            const uint column = chunk_column(team, k);
            if (column >= p.columns) continue;
            THREAD float* normal = values + held_at(k);
            THREAD float* g = grads + held_at(k);
            THREAD float* kept = weight_sums + held_at(k);
            if (LOOPED) {
                load_chunk(x_row + column, normal);
                load_chunk(grad_row + column, g);
            }
            float w[WIDTH];
            if (WEIGHT) load_weight(weight + column, packed_weight, k, w);
            for (uint i = 0u; i < WIDTH; i++) {
                normal[i] *= r;
                kept[i] = LOOPED ? g[i] * normal[i] : fma(g[i], normal[i], kept[i]);
                const float weighted = WEIGHT ? g[i] * w[i] : g[i];
                g[i] = r * fma(-normal[i], mean, weighted);
            }
            if (INPUT_GRAD) store_chunk(grad_x + ulong(row) * p.columns + column, g);
            if (WEIGHT_GRAD && LOOPED) {
                // Too long for registers: this thread's columns of the partial row are the accumulator.
                for (uint i = 0u; i < WIDTH; i++)
                    partial_row[column + i] = row == first ? kept[i] : partial_row[column + i] + kept[i];
            }
        }
    }
    if (WEIGHT_GRAD && !LOOPED) {
        for (uint k = 0u; k < row_chunks(p.columns); k++) {
            const uint column = chunk_column(team, k);
            if (column < p.columns) store_chunk(partial_row + column, weight_sums + held_at(k));
        }
    }
}
