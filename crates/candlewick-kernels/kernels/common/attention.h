// What attention's kernels share: rows that a simdgroup owns as tiles, rows that a threadgroup stages to walk over, and
// which queries and keys meet.
//
//   DIM         the width of a head, a multiple of TILE
//   SIMDGROUPS  simdgroups in a threadgroup, each of which owns TILE rows of one side
//   WALK        rows of the other side that are staged at a time, a multiple of TILE
//   CAUSAL      whether query i sees the keys up to i + keys − queries, and no more

#define ROWS (SIMDGROUPS * TILE)
#define THREADS (SIMDGROUPS * SIMDGROUP_SIZE)
#define WIDE (DIM / TILE)
#define ROW_VECTORS (DIM / 8u)
// Staged rows are one vector apart, so that eight of them lie in different banks.
#define STAGED_VECTORS (ROW_VECTORS + 1u)
#define STAGED_ROW (STAGED_VECTORS * 8u)
// Vectors of a block that a thread stages.
#define SHARE ((WALK * ROW_VECTORS + THREADS - 1u) / THREADS)
#define LOWEST -3.402823466e+38f
#define LOG2_E 1.44269504f

// Where row (batch, token, head) of a tensor begins, in elements.
struct AttentionRows {
    uint batch;
    uint token;
    uint head;
};

struct AttentionParams {
    uint queries;
    uint keys;
    uint heads;   // of queries
    uint shared;  // heads of queries for one of keys
    float scale;
    AttentionRows q;
    AttentionRows k;
    AttentionRows v;
    AttentionRows grad;
};

DEVFN ulong head_start(PARAM(AttentionRows, rows), uint batch, uint head) {
    return ulong(batch) * rows.batch + ulong(head) * rows.head;
}

// The share of the thread at a position in WALK rows of a head from `first` on, zeros from row `end` on.
DEVFN void fetch(DEVICE const T* head, uint stride, uint first, uint end, THREAD uint4* share, uint position) {
    UNROLL
    for (uint i = 0u; i < SHARE; i++) {
        const uint row = (i * THREADS + position) / ROW_VECTORS;
        const uint vector = (i * THREADS + position) % ROW_VECTORS;
        share[i].x = 0u;
        share[i].y = 0u;
        share[i].z = 0u;
        share[i].w = 0u;
        if (row < WALK && first + row < end) {
            share[i] = vector_load(head + ulong(first + row) * stride + vector * 8u);
        }
    }
}

DEVFN void stage(THREAD const uint4* share, THREADGROUP uint4* to, uint position) {
    UNROLL
    for (uint i = 0u; i < SHARE; i++) {
        const uint row = (i * THREADS + position) / ROW_VECTORS;
        const uint vector = (i * THREADS + position) % ROW_VECTORS;
        if (row < WALK) to[row * STAGED_VECTORS + vector] = share[i];
    }
}

// The 16 rows of a simdgroup, zeros from row `end` on.
DEVFN void load_own(DEVICE const T* head, uint stride, uint own, uint end, THREAD TileLeft<T>* tiles, uint lane) {
    const uint rows = own < end ? end - own : 0u;
    UNROLL
    for (uint i = 0u; i < WIDE; i++) {
        tile_load_left(tiles[i], head + ulong(own) * stride + i * TILE, stride, rows, lane);
    }
}

// own · staged rowsᵀ: products of each of 16 rows with each of 16 others.
DEVFN void dot_rows(THREAD const TileLeft<T>* own, THREADGROUP const T* staged, THREAD TileSum& sum, uint lane) {
    for (uint e = 0u; e < 8u; e++) sum.values[e] = 0.0f;
    UNROLL
    for (uint i = 0u; i < WIDE; i++) {
        TileRight<T> rows;
        tile_load_right_transposed(rows, staged + i * TILE, STAGED_ROW, lane);
        tile_multiply(sum, own[i], rows);
    }
}

// sums += weights · 16 staged rows.
DEVFN void add_rows(THREAD const TileSum& weights, THREADGROUP const T* staged, THREAD TileSum* sums, uint lane) {
    TileLeft<T> left;
    tile_round_left(left, weights);
    UNROLL
    for (uint i = 0u; i < WIDE; i++) {
        TileRight<T> rows;
        tile_load_right(rows, staged + i * TILE, STAGED_ROW, lane);
        tile_multiply(sums[i], left, rows);
    }
}

DEVFN void clear_sums(THREAD TileSum* sums) {
    UNROLL
    for (uint i = 0u; i < WIDE; i++) {
        for (uint e = 0u; e < 8u; e++) sums[i].values[e] = 0.0f;
    }
}

// 16 rows of sums, each times its factor, to contiguous rows of all heads; none from row `end` on.
DEVFN void store_sums(THREAD const TileSum* sums, THREAD const float* factors, DEVICE T* to, ulong stride, uint first,
                      uint end, uint lane) {
    for (uint side = 0u; side < 2u; side++) {
        const uint row = first + tile_row(lane) + 8u * side;
        if (row >= end) continue;
        DEVICE T* row_start = to + ulong(row) * stride + tile_column(lane);
        UNROLL
        for (uint i = 0u; i < WIDE; i++) {
            for (uint half_tile = 0u; half_tile < 2u; half_tile++) {
                const uint e = 4u * side + 2u * half_tile;
                DEVICE uint* pair = (DEVICE uint*)(row_start + i * TILE + 8u * half_tile);
                pair[0] = pack2(sums[i].values[e] * factors[side], sums[i].values[e + 1u] * factors[side], T());
            }
        }
    }
}

// How far the walk over keys goes for queries up to `last`, exclusive.
DEVFN uint visible_keys(PARAM(AttentionParams, p), uint last) {
    const uint seen = last + (p.keys - p.queries);
    return CAUSAL && seen < p.keys ? seen : p.keys;
}

// Whether query and key meet: both exist, and the mask lets them.
DEVFN bool is_visible(PARAM(AttentionParams, p), uint query, uint key) {
    return query < p.queries && key < p.keys && (!CAUSAL || key <= query + (p.keys - p.queries));
}

// Whether all of so many queries and keys meet.
DEVFN bool all_visible(PARAM(AttentionParams, p), uint query, uint queries, uint key, uint keys) {
    return query + queries <= p.queries && key + keys <= p.keys &&
           (!CAUSAL || key + keys <= query + 1u + (p.keys - p.queries));
}
