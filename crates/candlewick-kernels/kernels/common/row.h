// A row and the team of threads that shares it.
//
//   ROW_SIMDGROUPS  simdgroups in a team. 1: every simdgroup has its own row, and no barrier is ever needed.
//                   More: the whole threadgroup is one team.
//   ITEMS           chunks of a row that each thread keeps in registers, so that memory is read once.
//                   0: the row is too long for that; it is walked, and read again by every pass.
//
// A pass over a row is the same text for both: in pass one every chunk is loaded, later passes load it again
// only where LOOPED. Chunk k of thread t starts at column (k · team + t) · WIDTH, so that a team reads a
// contiguous stretch at a time.

#define ROW_THREADS (ROW_SIMDGROUPS * SIMDGROUP_SIZE)
#define LOOPED (ITEMS == 0)
#if ITEMS == 0
#define HELD WIDTH
#else
#define HELD (ITEMS * WIDTH)
#endif

struct Team {
    THREADGROUP float* scratch;  // SIMDGROUP_SIZE floats
    uint lane;
    uint simdgroup;
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

// Loads a row that fits into registers; one that does not is loaded by every pass.
DEVFN void load_row(THREAD const Team& team, DEVICE const T* row, THREAD float* values, uint columns) {
    if (!LOOPED) {
        for (uint k = 0u; k < row_chunks(columns); k++) {
            const uint column = chunk_column(team, k);
            if (column < columns) load_chunk(row + column, values + held_at(k));
        }
    }
}

// A row as memory holds it, for kernels that walk many rows and load the next before they need it. One that does not
// fit into registers is not held.
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

// The sum of v over the team, the same bits in every thread: each simdgroup sums its own values, then every
// simdgroup sums the sums, in the same order. The second barrier lets the scratch be used again.
DEVFN float row_sum(THREAD const Team& team, float v) {
    v = simd_sum(v);
#if ROW_SIMDGROUPS > 1
    if (team.lane == 0u) team.scratch[team.simdgroup] = v;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    v = simd_sum(team.lane < uint(ROW_SIMDGROUPS) ? team.scratch[team.lane] : 0.0f);
    threadgroup_barrier(mem_flags::mem_threadgroup);
#endif
    return v;
}

// Two sums for the barriers of one. The scratch has 2 · SIMDGROUP_SIZE floats.
DEVFN void row_sum2(THREAD const Team& team, THREAD float& a, THREAD float& b) {
    a = simd_sum(a);
    b = simd_sum(b);
#if ROW_SIMDGROUPS > 1
    if (team.lane == 0u) {
        team.scratch[team.simdgroup] = a;
        team.scratch[SIMDGROUP_SIZE + team.simdgroup] = b;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const bool taken = team.lane < uint(ROW_SIMDGROUPS);
    a = simd_sum(taken ? team.scratch[team.lane] : 0.0f);
    b = simd_sum(taken ? team.scratch[SIMDGROUP_SIZE + team.lane] : 0.0f);
    threadgroup_barrier(mem_flags::mem_threadgroup);
#endif
}

// Three sums for the barriers of one. The scratch has 3 · SIMDGROUP_SIZE floats.
DEVFN void row_sum3(THREAD const Team& team, THREAD float& a, THREAD float& b, THREAD float& c) {
    a = simd_sum(a);
    b = simd_sum(b);
    c = simd_sum(c);
#if ROW_SIMDGROUPS > 1
    if (team.lane == 0u) {
        team.scratch[team.simdgroup] = a;
        team.scratch[SIMDGROUP_SIZE + team.simdgroup] = b;
        team.scratch[2u * SIMDGROUP_SIZE + team.simdgroup] = c;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const bool taken = team.lane < uint(ROW_SIMDGROUPS);
    a = simd_sum(taken ? team.scratch[team.lane] : 0.0f);
    b = simd_sum(taken ? team.scratch[SIMDGROUP_SIZE + team.lane] : 0.0f);
    c = simd_sum(taken ? team.scratch[2u * SIMDGROUP_SIZE + team.lane] : 0.0f);
    threadgroup_barrier(mem_flags::mem_threadgroup);
#endif
}

// The largest v of the team. A NaN may be ignored here: it must show in a sum.
DEVFN float row_max(THREAD const Team& team, float v) {
    v = simd_max(v);
#if ROW_SIMDGROUPS > 1
    if (team.lane == 0u) team.scratch[team.simdgroup] = v;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    v = simd_max(team.lane < uint(ROW_SIMDGROUPS) ? team.scratch[team.lane] : -INFINITY);
    threadgroup_barrier(mem_flags::mem_threadgroup);
#endif
    return v;
}

// A power of two to divide a row by whose largest magnitude is given, so that its squares stay in range: the division
// is exact. Between 2^-126 and 2^126, so that it has a normal inverse.
DEVFN float row_scale(float largest) {
    const float power = as_type<float>(as_type<uint>(largest) & 0x7f800000u);
    return fmin(fmax(power, 1.17549435e-38f), 8.5070592e+37f);
}
