// Layer norm over the last dimension, forward and backward.
//
//   y  = x̂ · w + b                 x̂ = (x − mean(x)) · r        r = 1 / √(mean((x − mean(x))²) + eps)
//   dx = r · (g·w − mean(g·w) − x̂ · mean(g·w·x̂))
//   dw = Σ_rows g · x̂        db = Σ_rows g
//
// Memory. As rms_norm: the row stays in registers, mean and r are recomputed by the backward, which loads the next row
// while it works on one; the sums over rows are per team in registers and added by column_sum.
//
// Variance. Mean square minus squared mean takes one reduction instead of two, but cancels where the mean is far from
// zero. A row where it would cost digits has its mean first, and then the mean of squared distances from it.
//
// Range. As rms_norm: a mean square beyond [1e-28, 3e38] is taken again with the distances divided by
// the largest one's power of two.

struct LayerNormParams {
    uint rows;
    uint columns;
    uint teams;  // backward: row, row + teams, row + 2·teams … are one team's
    float eps;
};

DEVFN float mean_of(THREAD Team& team, DEVICE const T* x_row, THREAD float* x, uint columns) {
    // Dividing before adding keeps the sum of a row of large values finite.
    const float share = 1.0f / float(columns);
    float sum = 0.0f;
    for (uint k = 0u; k < row_chunks(columns); k++) {
        const uint column = chunk_column(team, k);
        if (column >= columns) continue;
        if (LOOPED) load_chunk(x_row + column, x);
        for (uint i = 0u; i < WIDTH; i++) sum = fma(x[held_at(k) + i], share, sum);
    }
    return row_sum(team, sum);
}

DEVFN float mean_square(THREAD Team& team, DEVICE const T* x_row, THREAD float* x, uint columns, float mean,
                        float scale) {
    float squares = 0.0f;
    for (uint k = 0u; k < row_chunks(columns); k++) {
        const uint column = chunk_column(team, k);
        if (column >= columns) continue;
        if (LOOPED) load_chunk(x_row + column, x);
        for (uint i = 0u; i < WIDTH; i++) {
            const float v = (x[held_at(k) + i] - mean) * scale;
            squares = fma(v, v, squares);
        }
    }
    return row_sum(team, squares) / float(columns);
}

DEVFN float largest_distance(THREAD Team& team, DEVICE const T* x_row, THREAD float* x, uint columns,
                             float mean) {
    float largest = 0.0f;
    for (uint k = 0u; k < row_chunks(columns); k++) {
        const uint column = chunk_column(team, k);
        if (column >= columns) continue;
        if (LOOPED) load_chunk(x_row + column, x);
        for (uint i = 0u; i < WIDTH; i++) largest = fmax(largest, fabs(x[held_at(k) + i] - mean));
    }
    return row_max(team, largest);
}

// r of a row with this mean; where the row is not LOOPED, x holds it.
DEVFN float inverse_deviation(THREAD Team& team, DEVICE const T* x_row, THREAD float* x, uint columns, float mean,
                              float eps) {
    const float square = mean_square(team, x_row, x, columns, mean, 1.0f);
    if (square + eps >= 1e-28f && square <= 3e38f) return 1.0f / precise::sqrt(square + eps);
    const float largest = largest_distance(team, x_row, x, columns, mean);
    // A row of equal values, and one that holds an infinity, have no better scale.
    if (!(largest > 0.0f && largest < INFINITY)) return 1.0f / precise::sqrt(square + eps);
    const float scale = 1.0f / row_scale(largest);
    const float scaled = mean_square(team, x_row, x, columns, mean, scale);
    return scale / precise::sqrt(scaled + (eps * scale) * scale);
}

// How many variances the squared mean may be for Σ x² to hold the variance: a float has digits to lose where 16 bits are
// stored.
DEVFN float most_variances(float) { return 0.5f; }
template <typename U> DEVFN float most_variances(U) { return 8.0f; }

// Mean and r from Σ x and Σ x² of a row: whether they have digits enough for T. The bound leaves room for the product.
DEVFN bool moments(float sum, float squares, uint columns, float eps, THREAD float& mean, THREAD float& r) {
    mean = sum / float(columns);
    const float square = squares / float(columns) - mean * mean;
    r = 1.0f / precise::sqrt(square + eps);
    return square + eps >= 1e-28f && square <= 1e37f && mean * mean <= most_variances(T()) * square;
}

KERNEL(layer_norm, DEVICE const T* x, DEVICE const T* weight, DEVICE const T* bias, DEVICE T* y,
       PARAM(LayerNormParams, p)) {
    TG_ARRAY(float, scratch, ROW_SCRATCH);
    Team team = {scratch, LANE, SIMD_ID, 0u};
    const uint row = team_index(team, TG_POS.x, N_SIMD);
    if (row >= p.rows) return;
    DEVICE const T* x_row = x + ulong(row) * p.columns;
    DEVICE T* y_row = y + ulong(row) * p.columns;

    float values[HELD];
    load_row(team, x_row, values, p.columns);
    float sums[2] = {0.0f, 0.0f};
    for (uint k = 0u; k < row_chunks(p.columns); k++) {
        const uint column = chunk_column(team, k);
        if (column >= p.columns) continue;
        THREAD float* chunk = values + held_at(k);
        if (LOOPED) load_chunk(x_row + column, chunk);
        for (uint i = 0u; i < WIDTH; i++) {
            sums[0] += chunk[i];
            sums[1] = fma(chunk[i], chunk[i], sums[1]);
        }
    }
    row_sums<2u>(team, sums);
    float mean, r;
    if (!moments(sums[0], sums[1], p.columns, p.eps, mean, r)) {
        mean = mean_of(team, x_row, values, p.columns);
        r = inverse_deviation(team, x_row, values, p.columns, mean, p.eps);
    }
    for (uint k = 0u; k < row_chunks(p.columns); k++) {
        const uint column = chunk_column(team, k);
        if (column >= p.columns) continue;
        THREAD float* chunk = values + held_at(k);
        if (LOOPED) load_chunk(x_row + column, chunk);
        for (uint i = 0u; i < WIDTH; i++) chunk[i] = (chunk[i] - mean) * r;
        if (WEIGHT) {
            float w[WIDTH];
            load_chunk(weight + column, w);
            for (uint i = 0u; i < WIDTH; i++) chunk[i] *= w[i];
        }
        if (BIAS) {
            float b[WIDTH];
            load_chunk(bias + column, b);
            for (uint i = 0u; i < WIDTH; i++) chunk[i] += b[i];
        }
        store_chunk(y_row + column, chunk);
    }
}

// Adds Σ (x − from), Σ (x − from)², Σ g·w·(x − from)·scale and Σ g·w of a row; where the row is not LOOPED, x and g hold
// it and the gradient, and packed_weight the weight.
DEVFN void add_sums(THREAD const Team& team, DEVICE const T* x_row, DEVICE const T* grad_row, DEVICE const T* weight,
                    THREAD const PackedChunk* packed_weight, THREAD float* x, THREAD float* g, uint columns, float from,
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
            const float distance = x[held_at(k) + i] - from;
            const float weighted = WEIGHT ? g[held_at(k) + i] * w[i] : g[held_at(k) + i];
            sums[0] += distance;
            sums[1] = fma(distance, distance, sums[1]);
            sums[2] = fma(weighted, distance * scale, sums[2]);
            sums[3] += weighted;
        }
    }
}

KERNEL(layer_norm_backward, DEVICE const T* x, DEVICE const T* weight, DEVICE const T* grad, DEVICE T* grad_x,
       DEVICE float* weight_partial, DEVICE float* bias_partial, PARAM(LayerNormParams, p)) {
    TG_ARRAY(float, scratch, ROW_SCRATCH);
    Team team = {scratch, LANE, SIMD_ID, 0u};
    const uint first = team_index(team, TG_POS.x, N_SIMD);
    if (first >= p.teams) return;
    DEVICE float* weight_row = weight_partial + ulong(first) * p.columns;
    DEVICE float* bias_row = bias_partial + ulong(first) * p.columns;

    float weight_sums[HELD];
    float bias_sums[HELD];
    for (uint i = 0u; i < HELD; i++) {
        weight_sums[i] = 0.0f;
        bias_sums[i] = 0.0f;
    }
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

        // All sums at once, around zero and as if r were 1; again around the mean, with r in its place, where that loses
        // digits or leaves f32.
        float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        add_sums(team, x_row, grad_row, weight, packed_weight, values, grads, p.columns, 0.0f, 1.0f, sums);
        row_sums<4u>(team, sums);
        float mean, r;
        const bool are_good = moments(sums[0], sums[1], p.columns, p.eps, mean, r);
        float dot = (sums[2] - mean * sums[3]) * r;
        if (!(are_good && fabs(dot) <= 3e38f)) {
            mean = mean_of(team, x_row, values, p.columns);
            r = inverse_deviation(team, x_row, values, p.columns, mean, p.eps);
            float again[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            add_sums(team, x_row, grad_row, weight, packed_weight, values, grads, p.columns, mean, r, again);
            dot = row_sum(team, again[2]);
        }
        const float mean_dot = dot / float(p.columns), mean_grad = sums[3] / float(p.columns);

        for (uint k = 0u; k < row_chunks(p.columns); k++) {
            const uint column = chunk_column(team, k);
            if (column >= p.columns) continue;
            THREAD float* normal = values + held_at(k);
            THREAD float* g = grads + held_at(k);
            if (LOOPED) {
                load_chunk(x_row + column, normal);
                load_chunk(grad_row + column, g);
            }
            float w[WIDTH];
            if (WEIGHT) load_weight(weight + column, packed_weight, k, w);
            for (uint i = 0u; i < WIDTH; i++) {
                normal[i] = (normal[i] - mean) * r;
                const float taken = g[i] * normal[i];
                if (!LOOPED) {
                    weight_sums[held_at(k) + i] += taken;
                    bias_sums[held_at(k) + i] += g[i];
                }
                // Too long for registers: this thread's columns of the partial rows are the accumulators.
                if (WEIGHT_GRAD && LOOPED)
                    weight_row[column + i] = row == first ? taken : weight_row[column + i] + taken;
                if (BIAS_GRAD && LOOPED) bias_row[column + i] = row == first ? g[i] : bias_row[column + i] + g[i];
                const float weighted = WEIGHT ? g[i] * w[i] : g[i];
                g[i] = r * fma(-normal[i], mean_dot, weighted - mean_grad);
            }
            if (INPUT_GRAD) store_chunk(grad_x + ulong(row) * p.columns + column, g);
        }
    }
    if (!LOOPED) {
        for (uint k = 0u; k < row_chunks(p.columns); k++) {
            const uint column = chunk_column(team, k);
            if (column >= p.columns) continue;
            if (WEIGHT_GRAD) store_chunk(weight_row + column, weight_sums + held_at(k));
            if (BIAS_GRAD) store_chunk(bias_row + column, bias_sums + held_at(k));
        }
    }
}
