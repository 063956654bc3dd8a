// The gradients of LoRA's factors: a tall product with a small result.
//
//   result[r, c] = Σ_rows s[row, r] · drop(x)[row, c]
//
// For A, s is scale · grad · Bᵀ and x the layer's input, with its dropout made again from the counter; for B, s is
// scale · drop(x) · Aᵀ and x the gradient. lora.metal leaves s in memory, [rows, RANK] floats.
//
// Memory. x is read once per tile of RANK_TILE ranks, s from the cache; the result is small.
//
// Launch. A thread owns WIDTH columns and RANK_TILE ranks, in registers, for the rows part, part + parts, …. Grid:
// column stretches × parts × rank tiles. Each part leaves its own sum, laid out as the gradient will be
// (rank_stride, column_stride), and column_sum adds the parts in their order: same input, same bits.

struct LoraGradientParams {
    uint rows;
    uint columns;
    uint parts;
    uint rank_stride;
    uint column_stride;
    DropoutParams dropout;
};

// One row's s of this thread's ranks; every thread of the threadgroup reads the same ones.
DEVFN void load_shares(DEVICE const float* s, ulong row, uint first_rank, THREAD float* shares) {
    DEVICE const float* from = s + row * RANK + first_rank;
#if WIDTH > 1 && RANK % 4 == 0 && RANK_TILE % 4 == 0
    for (uint r = 0u; r < RANK_TILE; r += 4u) {
        if (RANK % RANK_TILE != 0 && first_rank + r >= RANK) continue;
        const uint4 v = vector_load(from + r);
        shares[r] = as_type<float>(v.x);
        shares[r + 1u] = as_type<float>(v.y);
        shares[r + 2u] = as_type<float>(v.z);
        shares[r + 3u] = as_type<float>(v.w);
    }
#else
    for (uint r = 0u; r < RANK_TILE; r++) {
        if (RANK % RANK_TILE == 0 || first_rank + r < RANK) shares[r] = from[r];
    }
#endif
}

KERNEL(lora_gradient, DEVICE const float* s, DEVICE const T* x, DEVICE float* partial, PARAM(LoraGradientParams, p)) {
    const uint column = (TG_POS.x * TG_SIZE.x + TID.x) * WIDTH;
    const uint part = TG_POS.y, first_rank = TG_POS.z * RANK_TILE;
    if (column >= p.columns) return;
    float sums[RANK_TILE * WIDTH];
    for (uint i = 0u; i < RANK_TILE * WIDTH; i++) sums[i] = 0.0f;
    for (uint row = part; row < p.rows; row += p.parts) {
        const ulong at = ulong(row) * p.columns + column;
        float chunk[WIDTH];
        load_chunk(x + at, chunk);
        if (DROPOUT) dropout_chunk(p.dropout, at, chunk);
        float shares[RANK_TILE];
        load_shares(s, row, first_rank, shares);
        for (uint r = 0u; r < RANK_TILE; r++) {
            if (RANK % RANK_TILE != 0 && first_rank + r >= RANK) continue;
            for (uint i = 0u; i < WIDTH; i++) sums[r * WIDTH + i] = fma(shares[r], chunk[i], sums[r * WIDTH + i]);
        }
    }
    DEVICE float* part_sums = partial + ulong(part) * RANK * p.columns;
    for (uint r = 0u; r < RANK_TILE; r++) {
        if (RANK % RANK_TILE != 0 && first_rank + r >= RANK) continue;
        DEVICE float* to = part_sums + ulong(first_rank + r) * p.rank_stride + ulong(column) * p.column_stride;
        for (uint i = 0u; i < WIDTH; i++) to[ulong(i) * p.column_stride] = sums[r * WIDTH + i];
    }
}
