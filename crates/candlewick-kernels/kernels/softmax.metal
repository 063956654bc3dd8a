// Softmax over the last dimension, forward and backward, with a scale and a causal mask.
//
//   y  = exp(s·x − m) / Σ exp(s·x − m)        m = max(s·x)
//   dx = s · y · (g − Σ g·y)
//
// Causal: row i of q sees the columns j ≤ i + (k − q); a hidden one counts as −∞, and is not read.
//
// Memory. Forward reads x once and writes y once; backward reads y and g once and writes dx once; the row stays in
// registers. A row too long for them is read twice: the first pass carries the maximum and the sum along, and
// scales the sum down whenever the maximum grows.
//
// Launch. As for every row kernel: a simdgroup a row, a threadgroup a row, or a threadgroup that walks (rows.rs).
//
// Limits. The maximum starts at the lowest finite float, so that a first pass never subtracts infinities of its
// own. A row whose visible part is all −∞ has the sum 0 and becomes NaN, as does one with a NaN or a +∞ in it.

struct SoftmaxParams {
    uint rows;
    uint columns;
    uint queries;  // q: the row's position is its number modulo this; 0 where nothing is masked
    float scale;
};

#define LOWEST -3.402823466e+38f

// How many columns a row sees.
DEVFN uint visible_columns(uint row, uint columns, uint queries) {
    return CAUSAL ? row % queries + 1u + (columns - queries) : columns;
}

// exp(v) for v ≤ 0. What is stored in 16 bits does not show the last digits of a float.
DEVFN float exponential(float v, float) { return precise::exp(v); }
template <typename U> DEVFN float exponential(float v, U) { return precise::exp2(v * 1.44269504f); }

// s·x of one chunk that is loaded, hidden columns as −∞.
DEVFN void to_scores(uint column, uint visible, float scale, THREAD float* chunk) {
    for (uint i = 0u; i < WIDTH; i++) chunk[i] = !CAUSAL || column + i < visible ? chunk[i] * scale : -INFINITY;
}

KERNEL(softmax, DEVICE const T* x, DEVICE T* y, PARAM(SoftmaxParams, p)) {
    TG_ARRAY(float, scratch, ROW_SCRATCH);
    Team team = {scratch, LANE, SIMD_ID, 0u};
    const uint row = team_index(team, TG_POS.x, N_SIMD);
    if (row >= p.rows) return;
    DEVICE const T* x_row = x + ulong(row) * p.columns;
    DEVICE T* y_row = y + ulong(row) * p.columns;
    const uint visible = visible_columns(row, p.columns, p.queries);

    float scores[HELD];
    load_row(team, x_row, scores, visible);
    float largest = LOWEST;
    float sum = 0.0f;
    for (uint k = 0u; k < row_chunks(p.columns); k++) {
        const uint column = chunk_column(team, k);
        if (column >= (LOOPED ? visible : p.columns)) continue;
        THREAD float* chunk = scores + held_at(k);
        if (LOOPED) load_chunk(x_row + column, chunk);
        to_scores(column, visible, p.scale, chunk);
        const float before = largest;
        for (uint i = 0u; i < WIDTH; i++) largest = fmax(largest, chunk[i]);
        if (LOOPED) {
            sum *= exponential(before - largest, T());
            for (uint i = 0u; i < WIDTH; i++) sum += exponential(chunk[i] - largest, T());
        }
    }
    const float own = largest;
    largest = row_max(team, largest);
    if (LOOPED) {
        sum *= exponential(own - largest, T());
    } else {
        for (uint k = 0u; k < row_chunks(p.columns); k++) {
            if (chunk_column(team, k) >= p.columns) continue;
            THREAD float* chunk = scores + held_at(k);
            for (uint i = 0u; i < WIDTH; i++) {
                chunk[i] = exponential(chunk[i] - largest, T());
                sum += chunk[i];
            }
        }
    }
    const float inverse = 1.0f / row_sum(team, sum);
    for (uint k = 0u; k < row_chunks(p.columns); k++) {
        const uint column = chunk_column(team, k);
        if (column >= p.columns) continue;
        THREAD float* chunk = scores + held_at(k);
        if (LOOPED) {
            if (column < visible) load_chunk(x_row + column, chunk);
            to_scores(column, visible, p.scale, chunk);
            for (uint i = 0u; i < WIDTH; i++) chunk[i] = exponential(chunk[i] - largest, T());
        }
        for (uint i = 0u; i < WIDTH; i++) chunk[i] *= inverse;
        store_chunk(y_row + column, chunk);
    }
}

KERNEL(softmax_backward, DEVICE const T* y, DEVICE const T* grad, DEVICE T* grad_x, PARAM(SoftmaxParams, p)) {
    TG_ARRAY(float, scratch, ROW_SCRATCH);
    Team team = {scratch, LANE, SIMD_ID, 0u};
    const uint row = team_index(team, TG_POS.x, N_SIMD);
    if (row >= p.rows) return;
    const ulong start = ulong(row) * p.columns;

    float probabilities[HELD];
    float grads[HELD];
    float dot = 0.0f;
    // Both rows' loads come before either is unpacked.
    PackedChunk packed_y[PACKED_ITEMS];
    PackedChunk packed_grad[PACKED_ITEMS];
    load_packed_row(team, y + start, packed_y, p.columns);
    load_packed_row(team, grad + start, packed_grad, p.columns);
    unpack_row(team, packed_y, probabilities, p.columns);
    unpack_row(team, packed_grad, grads, p.columns);
    for (uint k = 0u; k < row_chunks(p.columns); k++) {
        const uint column = chunk_column(team, k);
        if (column >= p.columns) continue;
        THREAD float* chunk = probabilities + held_at(k);
        THREAD float* g = grads + held_at(k);
        if (LOOPED) {
            load_chunk(y + start + column, chunk);
            load_chunk(grad + start + column, g);
        }
        for (uint i = 0u; i < WIDTH; i++) dot = fma(chunk[i], g[i], dot);
    }
    dot = row_sum(team, dot);
    for (uint k = 0u; k < row_chunks(p.columns); k++) {
        const uint column = chunk_column(team, k);
        if (column >= p.columns) continue;
        THREAD float* chunk = probabilities + held_at(k);
        THREAD float* g = grads + held_at(k);
        if (LOOPED) {
            load_chunk(y + start + column, chunk);
            load_chunk(grad + start + column, g);
        }
        for (uint i = 0u; i < WIDTH; i++) chunk[i] *= (g[i] - dot) * p.scale;
        store_chunk(grad_x + start + column, chunk);
    }
}
