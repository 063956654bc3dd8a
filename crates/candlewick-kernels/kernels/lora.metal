// The low-rank update, x → S → y: forward of LoRA, and, with the gradient in x's place, its backward for x.
//
//   S = scale · drop(x) · Aᵀ        [rows, RANK]
//   y = drop'(S · B) + base         [rows, outputs]
//
// Here A is [RANK, inputs] and B is [RANK, outputs] whatever the caller's layout: strides say how they lie.
// Forward: x, A, B, dropout on the input. Backward: the gradient of y takes x's place, B takes A's, A takes B's, and
// dropout falls on the output; S is then what the gradient of A needs, and is kept in memory if KEEP.
//
// Work. A threadgroup owns ROWS rows and computes their S once, in threadgroup memory, then all their outputs:
// rows · RANK · (inputs + outputs) multiplications and no more. (A kernel that lets every output element compute
// its own x·A does `outputs` times the first part, and is slower than two matrix products.)
//
// Memory. x once, base once, y once; A and B once per row block, from the cache after the first.
//
// Launch. One threadgroup per row block. S is cut into tasks, a tile of RANK_TILE ranks of one slice of the columns
// each, for the simdgroups to share: with few rows, slices are what keeps a big threadgroup busy. The slices' sums
// are added in their order, so that the same input gives the same bits.
//
// y may be the same buffer as base: each element is read and then written by one thread.

struct LoraParams {
    uint rows;
    uint inputs;
    uint outputs;
    uint a_rank_stride;
    uint a_column_stride;
    uint b_rank_stride;
    uint b_column_stride;
    float scale;
    DropoutParams dropout;
};

#define RANK_TILES ((RANK + RANK_TILE - 1u) / RANK_TILE)
#define DROP_INPUT (DROPOUT == 1)
#define DROP_OUTPUT (DROPOUT == 2)

// Adds x · Aᵀ of WIDTH columns and RANK_TILE ranks to `sums`, [ROWS, RANK_TILE].
DEVFN void multiply(THREAD const float* x, DEVICE const ADAPTER* a, PARAM(LoraParams, p), uint first_rank, uint column,
                    uint row_count, THREAD float* sums) {
    DEVICE const ADAPTER* from = a + ulong(first_rank) * p.a_rank_stride + ulong(column) * p.a_column_stride;
    float w[WIDTH];
#if A_ALONG_RANKS
    // A tile is WIDTH ranks of one column, and RANK is a multiple of it.
    for (uint i = 0u; i < WIDTH; i++) {
        load_chunk(from + ulong(i) * p.a_column_stride, w);
        for (uint row = 0u; row < ROWS; row++) {
            if (row >= row_count) continue;
            for (uint r = 0u; r < RANK_TILE; r++)
                sums[row * RANK_TILE + r] = fma(x[row * WIDTH + i], w[r], sums[row * RANK_TILE + r]);
        }
    }
#else
    for (uint r = 0u; r < RANK_TILE; r++) {
        if (RANK % RANK_TILE != 0 && first_rank + r >= RANK) continue;
#if A_ALONG_COLUMNS
        load_chunk(from + ulong(r) * p.a_rank_stride, w);
#else
        DEVICE const ADAPTER* of_rank = from + ulong(r) * p.a_rank_stride;
        for (uint i = 0u; i < WIDTH; i++) w[i] = to_f32(of_rank[ulong(i) * p.a_column_stride]);
#endif
        for (uint row = 0u; row < ROWS; row++) {
            if (row >= row_count) continue;
            for (uint i = 0u; i < WIDTH; i++)
                sums[row * RANK_TILE + r] = fma(x[row * WIDTH + i], w[i], sums[row * RANK_TILE + r]);
        }
    }
#endif
}

// S of this threadgroup's rows, [ROWS, RANK] at the start of `s`, which has room for one such array per slice.
DEVFN void project(DEVICE const T* x, DEVICE const ADAPTER* a, PARAM(LoraParams, p), uint first_row, uint row_count,
                   THREADGROUP float* s, uint lane, uint simdgroup) {
    for (uint task = simdgroup; task < RANK_TILES * SLICES; task += SIMDGROUPS) {
        const uint first_rank = task % RANK_TILES * RANK_TILE, slice = task / RANK_TILES;
        float sums[ROWS * RANK_TILE];
        for (uint i = 0u; i < ROWS * RANK_TILE; i++) sums[i] = 0.0f;
        const uint first_column = (slice * SIMDGROUP_SIZE + lane) * WIDTH, step = SLICES * SIMDGROUP_SIZE * WIDTH;
        for (uint column = first_column; column < p.inputs; column += step) {
            float chunk[ROWS * WIDTH];
            for (uint row = 0u; row < ROWS; row++) {
                if (row >= row_count) continue;
                const ulong at = ulong(first_row + row) * p.inputs + column;
                load_chunk(x + at, chunk + row * WIDTH);
                if (DROP_INPUT) dropout_chunk(p.dropout, at, chunk + row * WIDTH);
            }
            multiply(chunk, a, p, first_rank, column, row_count, sums);
        }
        for (uint r = 0u; r < RANK_TILE; r++) {
            if (RANK % RANK_TILE != 0 && first_rank + r >= RANK) continue;
            for (uint row = 0u; row < ROWS; row++) {
                const float sum = simd_sum(sums[row * RANK_TILE + r]);
                if (lane == 0u) s[(slice * ROWS + row) * RANK + first_rank + r] = sum;
            }
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = simdgroup * SIMDGROUP_SIZE + lane; i < ROWS * RANK; i += SIMDGROUPS * SIMDGROUP_SIZE) {
        float sum = s[i];
        for (uint slice = 1u; slice < SLICES; slice++) sum += s[slice * ROWS * RANK + i];
        s[i] = sum * p.scale;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
}

// UP_TILE ranks of UP_WIDTH columns of B, from `first_rank` on, [UP_TILE, UP_WIDTH].
DEVFN void load_up(DEVICE const ADAPTER* b, PARAM(LoraParams, p), uint first_rank, uint column, THREAD float* w) {
    DEVICE const ADAPTER* from = b + ulong(first_rank) * p.b_rank_stride + ulong(column) * p.b_column_stride;
#if B_ALONG_RANKS
    // RANK and UP_TILE are multiples of WIDTH.
    for (uint i = 0u; i < UP_WIDTH; i++) {
        for (uint rank = 0u; rank < UP_TILE; rank += WIDTH) {
            if (RANK % UP_TILE != 0 && first_rank + rank >= RANK) continue;
            float ranks[WIDTH];
            load_chunk(from + ulong(i) * p.b_column_stride + rank, ranks);
            for (uint r = 0u; r < WIDTH; r++) w[(rank + r) * UP_WIDTH + i] = ranks[r];
        }
    }
#else
    for (uint rank = 0u; rank < UP_TILE; rank++) {
        if (RANK % UP_TILE != 0 && first_rank + rank >= RANK) continue;
        DEVICE const ADAPTER* of_rank = from + ulong(rank) * p.b_rank_stride;
#if B_ALONG_COLUMNS
        load_chunk(of_rank, w + rank * WIDTH);
#else
        for (uint i = 0u; i < UP_WIDTH; i++) w[rank * UP_WIDTH + i] = to_f32(of_rank[ulong(i) * p.b_column_stride]);
#endif
    }
#endif
}

// Adds S · B of those ranks and columns to `update`, [ROWS, UP_WIDTH].
DEVFN void expand(THREADGROUP const float* s, uint first_rank, THREAD const float* w, THREAD float* update) {
    for (uint rank = 0u; rank < UP_TILE; rank++) {
        if (RANK % UP_TILE != 0 && first_rank + rank >= RANK) continue;
        for (uint row = 0u; row < ROWS; row++) {
            const float share = s[row * RANK + first_rank + rank];
            for (uint i = 0u; i < UP_WIDTH; i++)
                update[row * UP_WIDTH + i] = fma(share, w[rank * UP_WIDTH + i], update[row * UP_WIDTH + i]);
        }
    }
}

// Writes UP_WIDTH columns of y.
DEVFN void finish(THREAD float* update, DEVICE const T* base, DEVICE T* y, PARAM(LoraParams, p), ulong at) {
#if UP_WIDTH == WIDTH
    if (DROP_OUTPUT) dropout_chunk(p.dropout, at, update);
    if (BASE) {
        float sum[WIDTH];
        load_chunk(base + at, sum);
        for (uint i = 0u; i < WIDTH; i++) update[i] += sum[i];
    }
    store_chunk(y + at, update);
#else
    y[at] = from_f32<T>(BASE ? update[0] + to_f32(base[at]) : update[0]);
#endif
}

KERNEL(lora_update, DEVICE const T* x, DEVICE const ADAPTER* a, DEVICE const ADAPTER* b, DEVICE const T* base,
       DEVICE T* y, DEVICE float* kept, PARAM(LoraParams, p)) {
    TG_ARRAY(float, s, SLICES * ROWS * RANK);
    const uint first_row = TG_POS.x * ROWS;
    const uint row_count = p.rows - first_row < ROWS ? p.rows - first_row : ROWS;
    // A thread's columns are UP_COLUMNS pieces of UP_WIDTH, `stretch` apart.
    const uint first_column = TID.x * UP_WIDTH, stretch = TG_SIZE.x * UP_WIDTH;
    float w[UP_COLUMNS * UP_TILE * UP_WIDTH];
    for (uint j = 0u; j < UP_COLUMNS; j++) {
        const uint column = first_column + j * stretch;
        if (UPDATE && column < p.outputs) load_up(b, p, 0u, column, w + j * UP_TILE * UP_WIDTH);
    }
    project(x, a, p, first_row, row_count, s, LANE, SIMD_ID);
    if (KEEP) {
        for (uint i = TID.x; i < row_count * RANK; i += TG_SIZE.x) kept[ulong(first_row) * RANK + i] = s[i];
    }
    if (UPDATE) {
        for (uint columns = first_column; columns < p.outputs; columns += UP_COLUMNS * stretch) {
            for (uint j = 0u; j < UP_COLUMNS; j++) {
                const uint column = columns + j * stretch;
                if (column >= p.outputs) continue;
                THREAD float* of_column = w + j * UP_TILE * UP_WIDTH;
                float update[ROWS * UP_WIDTH];
                for (uint i = 0u; i < ROWS * UP_WIDTH; i++) update[i] = 0.0f;
                for (uint rank = 0u; rank < RANK; rank += UP_TILE) {
                    if (rank != 0u || columns != first_column) load_up(b, p, rank, column, of_column);
                    expand(s, rank, of_column, update);
                }
                for (uint row = 0u; row < ROWS; row++) {
                    if (row < row_count)
                        finish(update + row * UP_WIDTH, base, y, p, ulong(first_row + row) * p.outputs + column);
                }
            }
        }
    }
}
