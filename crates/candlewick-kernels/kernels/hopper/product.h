// A product of matrices with a low-rank one as the last steps of its sum: what its kernels share.
//
//   y [rows, columns] = L [rows, inner] · R [inner, columns] + l [rows, rank] · r [rank, columns] + bias, rounded once
//
// R and r lie as they are if TURNED (the backward: weight and A), else as their transposes (the forward: weight and B).
//
// Why. A base product is bound by arithmetic. A low-rank update of its own writes y once more, or reads it, which takes a
// tenth of the product's time; as the last steps of the sum it takes rank / inner of it.
//
// Work. Two threadgroups, a cluster, own 256 × 256 values of y, one 128 rows of each; they take part after part, in bands
// of GROUP parts so that those at work at once share rows and columns in the second-level cache. A step of the sum is 64
// wide. One thread asks for the steps' tiles: the rows of its own half, and a half of the columns for both (multicast).
// Two teams of four simdgroups multiply 64 rows each, with all 256 columns: 128 sums a thread.
//
// Here threads 0 to 255 are the two teams, and the rest the asker's simdgroups, which give their registers to the teams.

#define STAGES 4u
#define CLUSTER 2u
#define TEAMS 2u
#define PART_ROWS 128u                       // of one threadgroup
#define PART_COLUMNS 256u
#define GROUP 8u
#define LEFT_BYTES (PART_ROWS * ROW_BYTES)
#define RIGHT_BYTES (PART_COLUMNS * ROW_BYTES)
#define STAGE_BYTES (LEFT_BYTES + RIGHT_BYTES)
#define RESULT_COLUMNS 32u                   // of a tile of y
#define RESULT_ROW_BYTES (RESULT_COLUMNS * 2u)
#define RESULT_BYTES (BOX * RESULT_ROW_BYTES)
#define RESULTS_BYTES (TEAMS * 2u * RESULT_BYTES)

// The way from one UNIT of a step to the next, and from one box of R to the next where its rows are summed over.
#if TURNED
#define RIGHT_UNIT (2u * ATOM_BYTES)
#define RIGHT_LEADING BOX_BYTES
#define RIGHT_ACROSS "1"
#else
#define RIGHT_UNIT (UNIT * 2u)
#define RIGHT_LEADING 16u
#define RIGHT_ACROSS "0"
#endif
#define LEFT_UNIT (UNIT * 2u)

#define SUM4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUM16(i) SUM4(i), SUM4(i + 4), SUM4(i + 8), SUM4(i + 12)
#define SUM64(i) SUM16(i), SUM16(i + 16), SUM16(i + 32), SUM16(i + 48)
// d [64, 256] of a team (+)= left [64, UNIT] · right [UNIT, 256]
DEVFN void multiply(float (&d)[128], ulong left, ulong right, bool adds) {
    asm volatile(
        "{\n.reg .pred adds;\nsetp.ne.u32 adds, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." ELEMENT "." ELEMENT " {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
        "%128, %129, adds, 1, 1, 0, " RIGHT_ACROSS ";\n}"
        : SUM64(0), SUM64(64) : "l"(left), "l"(right), "r"(uint(adds)));
}

// ---- the cluster ----
DEVFN uint rank_in_cluster() {
    uint rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
DEVFN void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// No memory is handed over that threads have written, so that no order beyond the barrier's own is asked for: a release
// for the whole cluster waits for memory, in each step.
DEVFN void barrier_arrive_at(uint barrier, uint threadgroup) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier), "r"(threadgroup) : "memory");
}
// At the same place of every threadgroup, and counted at its own barrier.
DEVFN void load_tile_for_all(uint to, const TensorMap* map, uint row, uint column, uint barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4}], [%2], %5;"
        ::"r"(to), "l"(map), "r"(barrier), "r"(column), "r"(row), "h"(ushort((1u << CLUSTER) - 1u)) : "memory");
}

DEVFN uint parts(uint size, uint of) { return (size + of - 1u) / of; }

// Where a cluster's part of y begins.
DEVFN void locate(uint index, uint rows, uint columns, THREAD uint& row, THREAD uint& column) {
    const uint down = parts(rows, CLUSTER * PART_ROWS), across = parts(columns, PART_COLUMNS);
    const uint band = index / (GROUP * across), first = band * GROUP, within = index - first * across;
    const uint height = down - first < GROUP ? down - first : GROUP;
    row = (first + within % height) * CLUSTER * PART_ROWS;
    column = within / height * PART_COLUMNS;
}

// ---- tiles on their way ----
// Places for tiles from `start` on, and their barriers. full[i]: the tiles of place i are there. empty[i]: the four teams of
// the cluster have read them, because each threadgroup writes into both.
#define RING_BARRIERS (2u * STAGES)
struct Ring {
    uint start, barriers;
    DEVFN uint tiles(uint place) const { return start + place * STAGE_BYTES; }
    DEVFN uint full(uint place) const { return barriers + place * 8u; }
    DEVFN uint empty(uint place) const { return barriers + (STAGES + place) * 8u; }
    DEVFN void begin() const {
        for (uint place = 0u; place < STAGES; place++) {
            barrier_init(full(place), 1u);
            barrier_init(empty(place), CLUSTER * TEAMS);
        }
    }
};

// The asker's way along a ring.
struct Asker {
    Ring ring;
    Turn turn;
    // The next place, once it is empty; so many bytes fill it.
    DEVFN uint next(uint bytes) {
        const uint place = turn.place;
        barrier_wait(ring.empty(place), turn.parity);
        barrier_expect(ring.full(place), bytes);
        turn.next(STAGES);
        return place;
    }
};

// Rows [inner, inner + BOX) of a right factor for columns from `column` on: this threadgroup's half, for both.
DEVFN void load_right(Ring ring, uint place, const TensorMap* right, uint inner, uint column, uint here) {
    const uint to = ring.tiles(place) + LEFT_BYTES + here * RIGHT_BYTES / CLUSTER, full = ring.full(place);
    const uint from = column + here * PART_COLUMNS / CLUSTER;
#if TURNED
    load_tile_for_all(to, right, inner, from, full);
    load_tile_for_all(to + BOX_BYTES, right, inner, from + BOX, full);
#else
    load_tile_for_all(to, right, from, inner, full);
#endif
}

// One team's products of the tiles of one place.
struct Tiles {
    ulong left, right;
    DEVFN Tiles(uint at, uint team)
        : left(describe<1u>(at + team * LEFT_BYTES / TEAMS, 16u, ATOM_BYTES)),
          right(describe<1u>(at + LEFT_BYTES, RIGHT_LEADING, ATOM_BYTES)) {}
    DEVFN void add(float (&d)[128], uint unit, bool adds) const {
        multiply(d, left + unit * (LEFT_UNIT / 16u), right + unit * (RIGHT_UNIT / 16u), adds);
    }
};

// A team's way along a ring. It says that a place is empty one step late, when the products of the next are on their way.
struct Reader {
    Ring ring;
    Turn turn;
    uint team;
    uint before;  // the place whose products may be under way, STAGES if none is
    DEVFN uint next() {
        const uint place = turn.place;
        barrier_wait(ring.full(place), turn.parity);
        turn.next(STAGES);
        return place;
    }
    DEVFN void leave(uint place) const {
        const uint thread = threadIdx.x % TEAM_THREADS;
        if (thread < CLUSTER) barrier_arrive_at(ring.empty(place), thread);
    }
    DEVFN void leave_before() {
        if (before != STAGES) leave(before);
        before = STAGES;
    }
    // A step of the base product's sum.
    DEVFN void step(float (&d)[128], bool adds) {
        const uint place = next();
        const Tiles tiles(ring.tiles(place), team);
        products_begin();
        UNROLL for (uint unit = 0u; unit < BOX / UNIT; unit++) tiles.add(d, unit, adds || unit != 0u);
        products_end();
        products_done<1u>();
        leave_before();
        before = place;
    }
};

// ---- results ----
// Two neighbours of a row, [.., d, next d, ..].
DEVFN void add_bias(DEVICE const T* bias, uint column, uint columns, THREAD float* d) {
    if (column >= columns) return;
    const float2 pair = unpack2(*(const uint*)(bias + column), T());
    d[0] += pair.x;
    d[1] += pair.y;
    d[2] += pair.x;
    d[3] += pair.y;
}

// A team's 64 × 256 values of y from (row, column) on, rounded, by way of its two tiles at `results`, which
// take turns.
DEVFN void store_result(const TensorMap* result, uint results, uint team, uint row, uint column, float (&d)[128],
                        DEVICE const T* bias, uint columns) {
    const uint thread = threadIdx.x % TEAM_THREADS;
    // Of the 64 rows of a tile, the one whose 16 bytes this thread's address gives to stmatrix.
    const uint own_row = thread / SIMDGROUP_SIZE * 16u + LANE % 16u;
    UNROLL for (uint box = 0u; box < PART_COLUMNS / RESULT_COLUMNS; box++) {
        const uint to = results + (team * 2u + box % 2u) * RESULT_BYTES;
        if (thread == 0u) stores_have_read<1u>();
        team_barrier(team);
        UNROLL for (uint unit = 0u; unit < RESULT_COLUMNS / UNIT; unit++) {
            THREAD float* v = d + (box * RESULT_COLUMNS + unit * UNIT) / 2u;
#if BIAS
            const uint at = column + box * RESULT_COLUMNS + unit * UNIT + LANE % 4u * 2u;
            add_bias(bias, at, columns, v);
            add_bias(bias, at + 8u, columns, v + 4u);
#endif
            const uint chunk = (unit * 2u + LANE / 16u) ^ (own_row / 2u % 4u);
            asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                             to + own_row * RESULT_ROW_BYTES + chunk * 16u),
                         "r"(pack2(v[0], v[1], T())), "r"(pack2(v[2], v[3], T())),
                         "r"(pack2(v[4], v[5], T())), "r"(pack2(v[6], v[7], T()))
                         : "memory");
        }
        written_for_stores();
        team_barrier(team);
        if (thread == 0u) store_tile(result, row, column + box * RESULT_COLUMNS, to);
    }
}
