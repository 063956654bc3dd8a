// The gradients of attention (attention.metal), whose scores are never in memory here either.
//
// With P the weights, made again from the scores and the logarithms of their sums, g the gradient of y and d = Σ g∘y of a
// row: dS = P∘(g·vᵀ − d), dq = s·dS·k, dk = s·dSᵀ·q, dv = Pᵀ·g (Dao, 2023). The gradient of queries walks the keys as the
// forward does. Those of keys and values walk the queries of all heads that share them, in order: the weights are made
// twice, and no two threadgroups write to one place, so that the bits are the same each time.
//
// Arithmetic: 14·t·s·DIM operations a head, half of them under a causal mask.
// Launch: as the forward; TG_POS.y is the block of ROWS queries, from the last on, or of ROWS keys, from the first on.

// Σ g∘y of each row: a simdgroup a row.
KERNEL(attention_dots, DEVICE const T* y, DEVICE const T* grad, DEVICE float* dots, PARAM(AttentionParams, p)) {
    const uint query = TG_POS.y * N_SIMD + SIMD_ID;
    const uint head = TG_POS.x % p.heads;
    const uint batch = TG_POS.x / p.heads;
    if (query >= p.queries) return;
    DEVICE const T* y_row = y + ((ulong(batch) * p.queries + query) * p.heads + head) * DIM;
    DEVICE const T* grad_row = grad + head_start(p.grad, batch, head) + ulong(query) * p.grad.token;
    float dot = 0.0f;
    for (uint i = LANE; i < DIM / 2u; i += SIMDGROUP_SIZE) {
        const float2 a = unpack2(((DEVICE const uint*)y_row)[i], T());
        const float2 b = unpack2(((DEVICE const uint*)grad_row)[i], T());
        dot = fma(a.x, b.x, fma(a.y, b.y, dot));
    }
    dot = simd_sum(dot);
    if (LANE == 0u) dots[(ulong(batch) * p.heads + head) * p.queries + query] = dot;
}

KERNEL(attention_backward_queries, DEVICE const T* q, DEVICE const T* k, DEVICE const T* v, DEVICE const T* grad,
       DEVICE const float* logarithms, DEVICE const float* dots, DEVICE T* grad_q, PARAM(AttentionParams, p)) {
    TG_ARRAY(uint4, staged_keys, WALK * STAGED_VECTORS);
    TG_ARRAY(uint4, staged_values, WALK * STAGED_VECTORS);
    THREADGROUP const T* keys = (THREADGROUP const T*)staged_keys;
    THREADGROUP const T* values = (THREADGROUP const T*)staged_values;
    const uint block = ((p.queries + ROWS - 1u) / ROWS - 1u - TG_POS.y) * ROWS;
    const uint own = block + SIMD_ID * TILE;
    const uint head = TG_POS.x % p.heads;
    const uint batch = TG_POS.x / p.heads;
    DEVICE const T* k_head = k + head_start(p.k, batch, head / p.shared);
    DEVICE const T* v_head = v + head_start(p.v, batch, head / p.shared);

    TileLeft<T> queries[WIDE];
    TileLeft<T> grads[WIDE];
    load_own(q + head_start(p.q, batch, head), p.q.token, own, p.queries, queries, LANE);
    load_own(grad + head_start(p.grad, batch, head), p.grad.token, own, p.queries, grads, LANE);
    float logarithm[2];
    float dot[2];
    for (uint side = 0u; side < 2u; side++) {
        const uint row = own + tile_row(LANE) + 8u * side;
        const ulong at = (ulong(batch) * p.heads + head) * p.queries + row;
        logarithm[side] = row < p.queries ? logarithms[at] : INFINITY;
        dot[side] = row < p.queries ? dots[at] : 0.0f;
    }
    TileSum sums[WIDE];
    clear_sums(sums);
    uint4 next_keys[SHARE];
    uint4 next_values[SHARE];
    fetch(k_head, p.k.token, 0u, p.keys, next_keys, TID.x);
    fetch(v_head, p.v.token, 0u, p.keys, next_values, TID.x);
    const float scale = p.scale * LOG2_E;
    const uint visible = visible_keys(p, block + ROWS);
    for (uint start = 0u; start < visible; start += WALK) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        stage(next_keys, staged_keys, TID.x);
        stage(next_values, staged_values, TID.x);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (start + WALK < visible) {
            fetch(k_head, p.k.token, start + WALK, p.keys, next_keys, TID.x);
            fetch(v_head, p.v.token, start + WALK, p.keys, next_values, TID.x);
        }
        if (start >= visible_keys(p, own + TILE)) continue;
        const bool all = all_visible(p, own, TILE, start, WALK);
        UNROLL
        for (uint j = 0u; j < WALK / TILE; j++) {
            const uint key = start + j * TILE;
            TileSum scores;
            TileSum of_weights;
            dot_rows(queries, keys + j * TILE * STAGED_ROW, scores, LANE);
            dot_rows(grads, values + j * TILE * STAGED_ROW, of_weights, LANE);
            for (uint e = 0u; e < 8u; e++) {
                const float weight = precise::exp2(fma(scores.values[e], scale, -logarithm[e / 4u]));
                scores.values[e] = weight * (of_weights.values[e] - dot[e / 4u]);
            }
            if (!all) {
                for (uint e = 0u; e < 8u; e++) {
                    const uint row = own + tile_row(LANE) + e / 4u * 8u;
                    const uint column = key + tile_column(LANE) + e / 2u % 2u * 8u + e % 2u;
                    if (!is_visible(p, row, column)) scores.values[e] = 0.0f;
                }
            }
            add_rows(scores, keys + j * TILE * STAGED_ROW, sums, LANE);
        }
    }
    const float scales[2] = {p.scale, p.scale};
    const ulong stride = ulong(p.heads) * DIM;
    store_sums(sums, scales, grad_q + ulong(batch) * p.queries * stride + head * DIM, stride, own, p.queries, LANE);
}

KERNEL(attention_backward_keys, DEVICE const T* q, DEVICE const T* k, DEVICE const T* v, DEVICE const T* grad,
       DEVICE const float* logarithms, DEVICE const float* dots, DEVICE T* grad_k, DEVICE T* grad_v,
       PARAM(AttentionParams, p)) {
    TG_ARRAY(uint4, staged_queries, WALK * STAGED_VECTORS);
    TG_ARRAY(uint4, staged_grads, WALK * STAGED_VECTORS);
    TG_ARRAY(float, row_logarithms, WALK);
    TG_ARRAY(float, row_dots, WALK);
    THREADGROUP const T* queries = (THREADGROUP const T*)staged_queries;
    THREADGROUP const T* grads = (THREADGROUP const T*)staged_grads;
    const uint block = TG_POS.y * ROWS;
    const uint own = block + SIMD_ID * TILE;
    const uint kv_head = TG_POS.x % (p.heads / p.shared);
    const uint batch = TG_POS.x / (p.heads / p.shared);

    TileLeft<T> keys[WIDE];
    TileLeft<T> values[WIDE];
    load_own(k + head_start(p.k, batch, kv_head), p.k.token, own, p.keys, keys, LANE);
    load_own(v + head_start(p.v, batch, kv_head), p.v.token, own, p.keys, values, LANE);
    TileSum of_keys[WIDE];
    TileSum of_values[WIDE];
    clear_sums(of_keys);
    clear_sums(of_values);
    // The first queries that see a key of the block.
    const uint hidden = p.keys - p.queries;
    const uint first = CAUSAL && block > hidden ? (block - hidden) / WALK * WALK : 0u;
    const uint last_head = (kv_head + 1u) * p.shared;
    const float scale = p.scale * LOG2_E;
    uint4 next_queries[SHARE];
    uint4 next_grads[SHARE];
    uint head = kv_head * p.shared;
    uint start = first;
    fetch(q + head_start(p.q, batch, head), p.q.token, start, p.queries, next_queries, TID.x);
    fetch(grad + head_start(p.grad, batch, head), p.grad.token, start, p.queries, next_grads, TID.x);
    while (start < p.queries && head < last_head) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        stage(next_queries, staged_queries, TID.x);
        stage(next_grads, staged_grads, TID.x);
        for (uint i = TID.x; i < WALK; i += THREADS) {
            const ulong row = (ulong(batch) * p.heads + head) * p.queries + start + i;
            const bool exists = start + i < p.queries;
            row_logarithms[i] = exists ? logarithms[row] : INFINITY;
            if (KEY_GRAD) row_dots[i] = exists ? dots[row] : 0.0f;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        const uint query_block = start;
        start += WALK;
        if (start >= p.queries) {
            start = first;
            head++;
        }
        if (head < last_head) {
            fetch(q + head_start(p.q, batch, head), p.q.token, start, p.queries, next_queries, TID.x);
            fetch(grad + head_start(p.grad, batch, head), p.grad.token, start, p.queries, next_grads, TID.x);
        }
        if (own >= visible_keys(p, query_block + WALK)) continue;
        const bool all = all_visible(p, query_block, WALK, own, TILE);
        UNROLL
        for (uint j = 0u; j < WALK / TILE; j++) {
            const uint query = query_block + j * TILE;
            TileSum weights;
            TileSum of_weights;
            dot_rows(keys, queries + j * TILE * STAGED_ROW, weights, LANE);
            if (KEY_GRAD) dot_rows(values, grads + j * TILE * STAGED_ROW, of_weights, LANE);
            for (uint e = 0u; e < 8u; e++) {
                const uint column = j * TILE + tile_column(LANE) + e / 2u % 2u * 8u + e % 2u;
                weights.values[e] = precise::exp2(fma(weights.values[e], scale, -row_logarithms[column]));
                if (KEY_GRAD) of_weights.values[e] -= row_dots[column];
            }
            if (!all) {
                for (uint e = 0u; e < 8u; e++) {
                    const uint row = own + tile_row(LANE) + e / 4u * 8u;
                    const uint column = query + tile_column(LANE) + e / 2u % 2u * 8u + e % 2u;
                    if (!is_visible(p, column, row)) weights.values[e] = 0.0f;
                }
            }
            if (VALUE_GRAD) add_rows(weights, grads + j * TILE * STAGED_ROW, of_values, LANE);
            if (KEY_GRAD) {
                for (uint e = 0u; e < 8u; e++) of_weights.values[e] *= weights.values[e];
                add_rows(of_weights, queries + j * TILE * STAGED_ROW, of_keys, LANE);
            }
        }
    }
    const float scales[2] = {p.scale, p.scale};
    const float ones[2] = {1.0f, 1.0f};
    const ulong stride = ulong(p.heads / p.shared) * DIM;
    const ulong to = ulong(batch) * p.keys * stride + kv_head * DIM;
    if (KEY_GRAD) store_sums(of_keys, scales, grad_k + to, stride, own, p.keys, LANE);
    if (VALUE_GRAD) store_sums(of_values, ones, grad_v + to, stride, own, p.keys, LANE);
}
