// Attention, y = softmax(s·q·kᵀ)·v for each head, without the scores ever being in memory.
//
// FlashAttention-2 (Dao, 2023) in the form that tiles take: a simdgroup owns 16 queries and walks the keys in blocks that its
// threadgroup stages. Scores are the sums of one product and become the left side of the next in registers. A running
// maximum m and sum l of exp(s·q·kᵀ − m) belong to each query; when m grows, l and what is summed of y are scaled. What is
// left beside y is m + log l, from which the backward has the weights of any block at once. Exponentials are powers of
// two, of scores that log₂ e has been multiplied into.
//
// Memory traffic: q and y once; k and v once for every ROWS queries, from cache for all but the first. Arithmetic: 4·t·s·DIM
// operations a head, half of them under a causal mask, which skips blocks that no query of a simdgroup sees.
//
// Launch: TG_POS.x is the head of a batch, y the block of ROWS queries, from the last on: under a causal mask these have most
// to do. T has 16 bits; the scale is positive.
// At the limits: a row that sees only −∞ gives NaN, and so does a NaN or +∞ among its scores, as softmax does.

KERNEL(attention, DEVICE const T* q, DEVICE const T* k, DEVICE const T* v, DEVICE T* y, DEVICE float* logarithms,
       PARAM(AttentionParams, p)) {
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
    load_own(q + head_start(p.q, batch, head), p.q.token, own, p.queries, queries, LANE);
    TileSum sums[WIDE];
    clear_sums(sums);
    float largest[2];
    float total[2];
    for (uint side = 0u; side < 2u; side++) {
        largest[side] = LOWEST;
        total[side] = 0.0f;
    }
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
        TileSum scores[WALK / TILE];
        float larger[2];
        for (uint side = 0u; side < 2u; side++) larger[side] = LOWEST;
        UNROLL
        for (uint j = 0u; j < WALK / TILE; j++) {
            const uint key = start + j * TILE;
            dot_rows(queries, keys + j * TILE * STAGED_ROW, scores[j], LANE);
            if (!all) {
                for (uint e = 0u; e < 8u; e++) {
                    const uint row = own + tile_row(LANE) + e / 4u * 8u;
                    const uint column = key + tile_column(LANE) + e / 2u % 2u * 8u + e % 2u;
                    if (!is_visible(p, row, column)) scores[j].values[e] = -INFINITY;
                }
            }
            for (uint e = 0u; e < 8u; e++) larger[e / 4u] = fmax(larger[e / 4u], scores[j].values[e]);
        }
        for (uint side = 0u; side < 2u; side++) {
            larger[side] = fmax(tile_row_max(larger[side]) * scale, largest[side]);
            const float shrink = precise::exp2(largest[side] - larger[side]);
            largest[side] = larger[side];
            total[side] *= shrink;
            UNROLL
            for (uint i = 0u; i < WIDE; i++) {
                for (uint e = 0u; e < 4u; e++) sums[i].values[4u * side + e] *= shrink;
            }
        }
        UNROLL
        for (uint j = 0u; j < WALK / TILE; j++) {
            for (uint e = 0u; e < 8u; e++) {
                scores[j].values[e] = precise::exp2(fma(scores[j].values[e], scale, -largest[e / 4u]));
                total[e / 4u] += scores[j].values[e];
            }
            add_rows(scores[j], values + j * TILE * STAGED_ROW, sums, LANE);
        }
    }
    float inverse[2];
    for (uint side = 0u; side < 2u; side++) {
        total[side] = tile_row_sum(total[side]);
        inverse[side] = 1.0f / total[side];
        const uint row = own + tile_row(LANE) + 8u * side;
        if (tile_column(LANE) == 0u && row < p.queries) {
            logarithms[(ulong(batch) * p.heads + head) * p.queries + row] =
                fma(precise::log(total[side]), LOG2_E, largest[side]);
        }
    }
    const ulong stride = ulong(p.heads) * DIM;
    store_sums(sums, inverse, y + ulong(batch) * p.queries * stride + head * DIM, stride, own, p.queries, LANE);
}
