// A row and the team of threads that shares it.
//
//   ROW_SIMDGROUPS  simdgroups in a team. 1: every simdgroup has its own row, and no barrier is ever needed.
//                   More: the whole threadgroup is one team.
//   ITEMS           chunks of a row that each thread keeps in registers, so that memory is read once.
//                   0: the row is too long for that; it is walked, and read again by every pass.
//
// A pass over a row is the same text for both: a row that is held is loaded before the first, one that is LOOPED chunk by
// chunk in each. Chunk k of thread t starts at column (k · team + t) · WIDTH, so that a team reads a
// contiguous stretch at a time.

#define ROW_THREADS (ROW_SIMDGROUPS * SIMDGROUP_SIZE)
#define LOOPED (ITEMS == 0)
#if ITEMS == 0
#define HELD WIDTH
#else
#define HELD (ITEMS * WIDTH)
#endif

struct Team {
    THREADGROUP float* scratch;  // ROW_SCRATCH floats
    uint lane;
    uint simdgroup;
    uint turn;  // which half of the scratch is next
};

// The number of this thread's team among all teams of the grid.
DEVFN uint team_index(THREAD const Team& team, uint threadgroup_index, uint simdgroups) {
    return (threadgroup_index * simdgroups + team.simdgroup) / uint(ROW_SIMDGROUPS);
}

DEVFN uint row_chunks(uint columns) {
#if ITEMS == 0
    return (columns + (ROW_THREADS * WIDTH - 1u)) / (ROW_THREADS * WIDTH);
#else
    return ITEMS;
#endif
}

DEVFN uint chunk_column(THREAD const Team& team, uint k) {
    const uint thread_in_team = (team.simdgroup % uint(ROW_SIMDGROUPS)) * SIMDGROUP_SIZE + team.lane;
    return (k * ROW_THREADS + thread_in_team) * WIDTH;
}

// Where chunk k lies in an array of HELD floats.
DEVFN uint held_at(uint k) {
#if ITEMS == 0
    return 0u;
#else
    return k * WIDTH;
#endif
}

// A row as memory holds it. All of its loads are under way before the first value is needed, which matters: a thread
// that unpacks one chunk before it asks for the next waits for memory once for each. Kernels that walk many rows load the
// next before they need it. A row that does not fit into registers is not held.
#if ITEMS == 0
#define PACKED_ITEMS 1
#else
#define PACKED_ITEMS ITEMS
#endif

DEVFN void load_packed_row(THREAD const Team& team, DEVICE const T* row, THREAD PackedChunk* packed, uint columns) {
    if (!LOOPED) {
        for (uint k = 0u; k < PACKED_ITEMS; k++) {
            const uint column = chunk_column(team, k);
            if (column < columns) packed[k] = load_packed(row + column);
        }
    }
}

DEVFN void unpack_row(THREAD const Team& team, THREAD const PackedChunk* packed, THREAD float* values, uint columns) {
    if (!LOOPED) {
        for (uint k = 0u; k < PACKED_ITEMS; k++) {
            if (chunk_column(team, k) < columns) unpack_chunk(packed[k], values + held_at(k));
        }
    }
}

DEVFN void load_row(THREAD const Team& team, DEVICE const T* row, THREAD float* values, uint columns) {
    PackedChunk packed[PACKED_ITEMS];
    load_packed_row(team, row, packed, columns);
    unpack_row(team, packed, values, columns);
}

// Whether a thread that walks many rows keeps its part of the weight packed too: where that does not cost a threadgroup
// its neighbour on the multiprocessor.
#define HOLDS_WEIGHT (ITEMS == 1 || ITEMS == 2)

// Chunk k of the weight, which packed holds or memory.
DEVFN void load_weight(DEVICE const T* chunk, THREAD const PackedChunk* packed, uint k, THREAD float* values) {
    if (HOLDS_WEIGHT) {
        unpack_chunk(packed[k], values);
    } else {
        load_chunk(chunk, values);
    }
}

// Floats of the scratch: two places of one reduction each.
#define ROW_SCRATCH (2u * 4u * SIMDGROUP_SIZE)

// Where the next reduction's values of all simdgroups meet. Two places in turn need one barrier for each reduction: who
// writes to a place again has passed the barrier of the other, which nobody reaches before having read this one.
DEVFN THREADGROUP float* next_place(THREAD Team& team) {
    THREADGROUP float* place = team.scratch + team.turn * (4u * SIMDGROUP_SIZE);
    team.turn ^= 1u;
    return place;
}

// COUNT sums over the team (at most 4) at once, the same bits in every thread: each simdgroup sums its own values, then
// every thread sums the simdgroups' in their order.
template <uint COUNT> DEVFN void row_sums(THREAD Team& team, THREAD float* sums) {
    for (uint i = 0u; i < COUNT; i++) sums[i] = simd_sum(sums[i]);
#if ROW_SIMDGROUPS > 1
    THREADGROUP float* place = next_place(team);
    if (team.lane == 0u) {
        for (uint i = 0u; i < COUNT; i++) place[i * ROW_SIMDGROUPS + team.simdgroup] = sums[i];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = 0u; i < COUNT; i++) {
        sums[i] = place[i * ROW_SIMDGROUPS];
        for (uint s = 1u; s < ROW_SIMDGROUPS; s++) sums[i] += place[i * ROW_SIMDGROUPS + s];
    }
#endif
}

DEVFN float row_sum(THREAD Team& team, float v) {
    row_sums<1u>(team, &v);
    return v;
}

// The largest v of the team. A NaN may be ignored here: it must show in a sum.
DEVFN float row_max(THREAD Team& team, float v) {
    v = simd_max(v);
#if ROW_SIMDGROUPS > 1
    THREADGROUP float* place = next_place(team);
    if (team.lane == 0u) place[team.simdgroup] = v;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint s = 0u; s < ROW_SIMDGROUPS; s++) v = fmax(v, place[s]);
#endif
    return v;
}

// A power of two to divide a row by whose largest magnitude is given, so that its squares stay in range: the division
// is exact. Between 2^-126 and 2^126, so that it has a normal inverse.
DEVFN float row_scale(float largest) {
    const float power = as_type<float>(as_type<uint>(largest) & 0x7f800000u);
    return fmin(fmax(power, 1.17549435e-38f), 8.5070592e+37f);
}
