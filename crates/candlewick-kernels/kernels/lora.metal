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

// Adds S · B of WIDTH columns to `update`, [ROWS, WIDTH].
DEVFN void expand(THREADGROUP const float* s, DEVICE const ADAPTER* b, PARAM(LoraParams, p), uint column,
                  THREAD float* update) {
    DEVICE const ADAPTER* from = b + ulong(column) * p.b_column_stride;
    float w[WIDTH];
#if B_ALONG_RANKS
    // WIDTH ranks of one column at a time: RANK is a multiple of WIDTH.
    for (uint i = 0u; i < WIDTH; i++) {
        for (uint rank = 0u; rank < RANK; rank += WIDTH) {
            load_chunk(from + ulong(i) * p.b_column_stride + rank, w);
            for (uint row = 0u; row < ROWS; row++) {
                for (uint r = 0u; r < WIDTH; r++)
                    update[row * WIDTH + i] = fma(s[row * RANK + rank + r], w[r], update[row * WIDTH + i]);
            }
        }
    }
#else
    for (uint rank = 0u; rank < RANK; rank++) {
#if B_ALONG_COLUMNS
        load_chunk(from + ulong(rank) * p.b_rank_stride, w);
#else
        DEVICE const ADAPTER* of_rank = from + ulong(rank) * p.b_rank_stride;
        for (uint i = 0u; i < WIDTH; i++) w[i] = to_f32(of_rank[ulong(i) * p.b_column_stride]);
#endif
        for (uint row = 0u; row < ROWS; row++) {
            const float share = s[row * RANK + rank];
            for (uint i = 0u; i < WIDTH; i++) update[row * WIDTH + i] = fma(share, w[i], update[row * WIDTH + i]);
        }
    }
#endif
}

KERNEL(lora_update, DEVICE const T* x, DEVICE const ADAPTER* a, DEVICE const ADAPTER* b, DEVICE const T* base,
       DEVICE T* y, DEVICE float* kept, PARAM(LoraParams, p)) {
    TG_ARRAY(float, s, SLICES * ROWS * RANK);
    const uint first_row = TG_POS.x * ROWS;
    const uint row_count = p.rows - first_row < ROWS ? p.rows - first_row : ROWS;
    project(x, a, p, first_row, row_count, s, LANE, SIMD_ID);
    if (KEEP) {
        for (uint i = TID.x; i < row_count * RANK; i += TG_SIZE.x) kept[ulong(first_row) * RANK + i] = s[i];
    }
    if (UPDATE) {
        for (uint column = TID.x * WIDTH; column < p.outputs; column += TG_SIZE.x * WIDTH) {
            float update[ROWS * WIDTH];
            for (uint i = 0u; i < ROWS * WIDTH; i++) update[i] = 0.0f;
            expand(s, b, p, column, update);
            for (uint row = 0u; row < ROWS; row++) {
                if (row >= row_count) continue;
                THREAD float* chunk = update + row * WIDTH;
                const ulong at = ulong(first_row + row) * p.outputs + column;
                if (DROP_OUTPUT) dropout_chunk(p.dropout, at, chunk);
                if (BASE) {
                    float sum[WIDTH];
                    load_chunk(base + at, sum);
                    for (uint i = 0u; i < WIDTH; i++) chunk[i] += sum[i];
                }
                store_chunk(y + at, chunk);
            }
        }
    }
}
