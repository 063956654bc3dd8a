// Attention's heads in tiles: rows are tokens of DIM values, 64 or 128, in boxes of 64 beside each other.
//
// A team multiplies 64 rows of its own with rows that a threadgroup walks. What the first product leaves in its registers
// is the left side of the next one, rounded to 16 bits.

struct HeadsParams {
    uint queries;
    uint keys;
    uint heads;   // of queries
    uint shared;  // heads of queries for one of keys
    float scale;
    uint middle;  // rows of the grid from here on come in reverse, where blocks are of keys
};

#define BOXES (DIM / BOX)
#define HEADS_THREADS ((1u + TEAMS) * TEAM_THREADS)
#define AT_ONCE (TEAMS == 1u ? 2u : 1u)      // threadgroups that a multiprocessor has room for
#define HEAD_BYTES(rows) ((rows) * DIM * 2u)
#define TEAM_BYTES (BOX * ROW_BYTES)          // of a box, what lies before the next team's rows
#define LOG2_E 1.44269504f
#define LOWEST -3.40282347e+38f

// The asker's simdgroups give their registers to the teams.
#define ASKERS_REGISTERS() asm volatile("setmaxnreg.dec.sync.aligned.u32 24;")
#if TEAMS == 1u
#define TEAMS_REGISTERS() asm volatile("setmaxnreg.inc.sync.aligned.u32 232;")
#elif TEAMS == 2u
#define TEAMS_REGISTERS() asm volatile("setmaxnreg.inc.sync.aligned.u32 240;")
#else
#define TEAMS_REGISTERS() asm volatile("setmaxnreg.inc.sync.aligned.u32 160;")
#endif

// ---- rows of a head, from memory and back: what lies beyond the tokens arrives as zeros and is not stored ----
DEVFN void load_rows(uint to, const TensorMap* map, uint rows, uint token, uint head, uint batch, uint barrier) {
    UNROLL for (uint box = 0u; box < BOXES; box++) {
        asm volatile(
            "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
            "[%0], [%1, {%3, %4, %5, %6}], [%2];"
            ::"r"(to + box * rows * ROW_BYTES), "l"(map), "r"(barrier), "r"(box * BOX), "r"(token), "r"(head), "r"(batch)
            : "memory");
    }
}

// ---- shared memory, word by word ----
DEVFN uint4 shared_vector(uint at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
    return v;
}
DEVFN float2 shared_pair(uint at) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(at) : "memory");
    return v;
}
DEVFN void put_shared(uint at, float v) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(v) : "memory"); }

// ---- products ----
#define SUM4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUM16(i) SUM4(i), SUM4(i + 4), SUM4(i + 8), SUM4(i + 12)
#define SUM32(i) SUM16(i), SUM16(i + 16)
#define LIST32                                                                                                         \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LIST64                                                                                                         \
    LIST32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                        \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PRODUCT(n) "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." ELEMENT "." ELEMENT
// d [64, 64 or 128] of a team (+)= left [64, UNIT] · rightᵀ, of tiles.
DEVFN void multiply(float (&d)[32], ulong left, ulong right, bool adds) {
    asm volatile("{\n.reg .pred adds;\nsetp.ne.u32 adds, %34, 0;\n" PRODUCT("64") " {" LIST32 "}, %32, %33, adds, 1, 1, 0, 0;\n}"
                 : SUM32(0) : "l"(left), "l"(right), "r"(uint(adds)));
}
DEVFN void multiply(float (&d)[64], ulong left, ulong right, bool adds) {
    asm volatile("{\n.reg .pred adds;\nsetp.ne.u32 adds, %66, 0;\n" PRODUCT("128") " {" LIST64 "}, %64, %65, adds, 1, 1, 0, 0;\n}"
                 : SUM32(0), SUM32(32) : "l"(left), "l"(right), "r"(uint(adds)));
}
// d [64, 64 or 128] += left [64, UNIT], which the team has, · right [UNIT, 64 or 128], a tile.
#define LEFT "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3])
DEVFN void multiply(float (&d)[32], const uint* left, ulong right) {
    asm volatile(PRODUCT("64") " {" LIST32 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;" : SUM32(0) : LEFT, "l"(right));
}
DEVFN void multiply(float (&d)[64], const uint* left, ulong right) {
    asm volatile(PRODUCT("128") " {" LIST64 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : SUM32(0), SUM32(32) : LEFT, "l"(right));
}

// d [64, WIDTH] = left · rightᵀ over DIM: 64 rows of a tile of LEFT_ROWS, all WIDTH rows of the other.
template <uint LEFT_ROWS, uint COUNT> DEVFN void dot_rows(float (&d)[COUNT], uint left, uint right) {
    UNROLL for (uint unit = 0u; unit < DIM / UNIT; unit++) {
        const uint box = unit / (BOX / UNIT), across = unit % (BOX / UNIT) * UNIT * 2u;
        multiply(d, describe<1u>(left + box * LEFT_ROWS * ROW_BYTES + across, 16u, ATOM_BYTES),
                 describe<1u>(right + box * 2u * COUNT * ROW_BYTES + across, 16u, ATOM_BYTES), unit != 0u);
    }
}
// d [64, DIM] += own [64, 4 · COUNT] · right, a tile of as many rows.
template <uint COUNT> DEVFN void add_rows(float (&d)[DIM / 2u], const uint (&own)[COUNT], uint right) {
    UNROLL for (uint unit = 0u; unit < COUNT / 4u; unit++) {
        multiply(d, own + unit * 4u,
                 describe<1u>(right + unit * 2u * ATOM_BYTES, 4u * COUNT * ROW_BYTES, ATOM_BYTES));
    }
}

// ---- what a team has of a sum [64, columns]: of four neighbours two lie in row own_row(), columns own_column() + 8i and one
// further, and two in the eighth row after it ----
// The same in all lanes, as far as the compiler knows: products must not be in divergent paths.
DEVFN uint own_team() { return __shfl_sync(0xffffffffu, threadIdx.x / TEAM_THREADS, 0); }
DEVFN uint in_team() { return threadIdx.x % TEAM_THREADS; }
DEVFN uint own_row() { return in_team() / SIMDGROUP_SIZE * 16u + LANE / 4u; }
DEVFN uint own_column() { return LANE % 4u * 2u; }

// sum + a · b of two pairs of 16-bit values
DEVFN float fma_pairs(uint a, uint b, float sum) {
    const float2 left = unpack2(a, T()), right = unpack2(b, T());
    return fma(left.x, right.x, fma(left.y, right.y, sum));
}

template <uint COUNT> DEVFN void round_sums(uint (&to)[COUNT / 2u], const float (&sums)[COUNT]) {
    UNROLL for (uint i = 0u; i < COUNT / 2u; i++) to[i] = pack2(sums[2u * i], sums[2u * i + 1u], T());
}

// A team's results, scaled, to its 64 of the ROWS rows of a tile that nobody reads any more, and from there to memory.
template <uint ROWS>
DEVFN void store_rows(const TensorMap* map, const float (&sums)[DIM / 2u], const float (&factor)[2], uint tile, uint team,
                      uint token, uint head, uint batch) {
    const uint row = in_team() / SIMDGROUP_SIZE * 16u + LANE % 16u;
    const uint at = tile + team * TEAM_BYTES;
    UNROLL for (uint unit = 0u; unit < DIM / UNIT; unit++) {
        const uint box = unit / (BOX / UNIT), chunk = (unit % (BOX / UNIT) * 2u + LANE / 16u) ^ (row % 8u);
        THREAD const float* v = sums + unit * (UNIT / 2u);
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                         at + box * ROWS * ROW_BYTES + row * ROW_BYTES + chunk * 16u),
                     "r"(pack2(v[0] * factor[0], v[1] * factor[0], T())), "r"(pack2(v[2] * factor[1], v[3] * factor[1], T())),
                     "r"(pack2(v[4] * factor[0], v[5] * factor[0], T())), "r"(pack2(v[6] * factor[1], v[7] * factor[1], T()))
                     : "memory");
    }
    written_for_stores();
    team_barrier(team);
    if (in_team() == 0u) {
        UNROLL for (uint box = 0u; box < BOXES; box++) {
            asm volatile(
                "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
                ::"l"(map), "r"(at + box * ROWS * ROW_BYTES), "r"(box * BOX), "r"(token), "r"(head), "r"(batch) : "memory");
        }
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    }
}

// How many keys a query sees.
DEVFN uint visible_keys(PARAM(HeadsParams, p), uint query) {
    const uint seen = query + 1u + (p.keys - p.queries);
    return CAUSAL && seen < p.keys ? seen : p.keys;
}
