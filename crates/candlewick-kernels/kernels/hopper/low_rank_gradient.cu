// One pass over the gradient g [rows, columns] of a low-rank product's result, for both that need it:
//
//   e = scale · g · B     [rows, rank], for the gradients of x and A
//   d = gᵀ · h            [columns, rank], B's gradient
//
// Work. A threadgroup owns 256 columns of `rows_of_part` rows, and goes through them 64 rows at a time. One simdgroup asks
// for the tiles of g and h; a team of four multiplies: 64 rows with the 256 rows of B that are here, which gives a part of
// these rows' e, and the transposes of the tiles with h, whose sum is a part of these columns' d.
//
// Memory. g once. The parts of e take 2·RANK/256 of g's bytes, once there and once back, from the second-level cache where
// they fit; those of d less. low_rank_gradient_sum adds them up in their order: same inputs, same bits.
//
// Ranks come in chunks of UNIT, up to RANK; what is beyond `rank` is zero, and the sums leave it out.

#define STAGES (RANK == 16u ? 3u : 2u)       // two threadgroups share a multiprocessor
#define BOXES 4u
#define CHUNKS (RANK / UNIT)
#define PART_COLUMNS (BOXES * BOX)
#define CHUNK_ROW_BYTES (UNIT * 2u)
#define CHUNK_BYTES (BOX * CHUNK_ROW_BYTES)  // 64 rows of h, or of B
#define G_BYTES (BOXES * BOX_BYTES)
#define H_BYTES (CHUNKS * CHUNK_BYTES)
#define B_BYTES (BOXES * CHUNKS * CHUNK_BYTES)
#define STAGE_BYTES ((G_BYTES + H_BYTES + ATOM_BYTES - 1u) / ATOM_BYTES * ATOM_BYTES)

struct GradientParams {
    uint rows;
    uint columns;
    uint rows_of_part;
    float scale;
};

#define SUM4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
// d [64, UNIT] of the team (+)= left [64, UNIT] · right [UNIT, UNIT], whose rows lie in one piece; those of `left` as well,
// or, if LEFT_ACROSS, its columns.
template <bool LEFT_ACROSS> DEVFN void multiply(THREAD float* d, ulong left, ulong right, bool adds) {
    asm volatile(
        "{\n.reg .pred adds;\nsetp.ne.u32 adds, %10, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32." ELEMENT "." ELEMENT
        " {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, adds, 1, 1, %11, 1;\n}"
        : SUM4(0), SUM4(4) : "l"(left), "l"(right), "r"(uint(adds)), "n"(int(LEFT_ACROSS)));
}

// Where things lie in shared memory, from a multiple of 1024 bytes on.
struct Room {
    uint start;
    DEVFN uint g(uint place, uint box) const { return start + place * STAGE_BYTES + box * BOX_BYTES; }
    DEVFN uint h(uint place, uint chunk) const { return g(place, BOXES) + chunk * CHUNK_BYTES; }
    DEVFN uint b(uint box, uint chunk) const {
        return start + STAGES * STAGE_BYTES + (box * CHUNKS + chunk) * CHUNK_BYTES;
    }
    DEVFN uint b_is_here() const { return b(BOXES, 0u); }
    DEVFN uint full(uint place) const { return b_is_here() + (1u + place) * 8u; }
    DEVFN uint empty(uint place) const { return b_is_here() + (1u + STAGES + place) * 8u; }
};

// A thread's share of a sum [64, UNIT], scaled, to rows of RANK values that begin at `to`: two neighbours of row `row` and
// of the eighth after it, in columns `column` and 8 further.
DEVFN void keep(DEVICE float* to, uint row, uint rows, uint column, THREAD const float* d, float scale) {
    UNROLL for (uint half = 0u; half < 2u; half++) {
        UNROLL for (uint down = 0u; down < 2u; down++) {
            if (row + down * 8u >= rows) continue;
            THREAD const float* v = d + half * 4u + down * 2u;
            *(float2*)(to + ulong(row + down * 8u) * RANK + column + half * 8u) =
                make_float2(v[0] * scale, v[1] * scale);
        }
    }
}

extern "C" __global__ void __launch_bounds__(TEAM_THREADS + SIMDGROUP_SIZE)
    low_rank_gradient(MAP(g), MAP(b), MAP(h), float* e_parts, float* d_parts, PARAM(GradientParams, p)) {
    extern __shared__ char shared[];
    const Room room = {(shared_address(shared) + ATOM_BYTES - 1u) / ATOM_BYTES * ATOM_BYTES};
    if (threadIdx.x == 0u) {
        barrier_init(room.b_is_here(), 1u);
        for (uint place = 0u; place < STAGES; place++) {
            barrier_init(room.full(place), 1u);
            barrier_init(room.empty(place), 1u);
        }
        barriers_ready();
    }
    __syncthreads();
    const uint first_column = blockIdx.x * PART_COLUMNS, first_row = blockIdx.y * p.rows_of_part;
    const uint end = p.rows - first_row < p.rows_of_part ? p.rows : first_row + p.rows_of_part;
    if (threadIdx.x >= TEAM_THREADS) {
        if (threadIdx.x == TEAM_THREADS) {
            barrier_expect(room.b_is_here(), B_BYTES);
            for (uint box = 0u; box < BOXES; box++) {
                for (uint chunk = 0u; chunk < CHUNKS; chunk++)
                    load_tile(room.b(box, chunk), &b, first_column + box * BOX, chunk * UNIT, room.b_is_here());
            }
            Turn turn = {0u, 1u};
            for (uint row = first_row; row < end; row += BOX) {
                const uint full = room.full(turn.place);
                barrier_wait(room.empty(turn.place), turn.parity);
                barrier_expect(full, G_BYTES + H_BYTES);
                for (uint box = 0u; box < BOXES; box++)
                    load_tile(room.g(turn.place, box), &g, row, first_column + box * BOX, full);
                for (uint chunk = 0u; chunk < CHUNKS; chunk++)
                    load_tile(room.h(turn.place, chunk), &h, row, chunk * UNIT, full);
                turn.next(STAGES);
            }
        }
        return;
    }
    const uint own_row = threadIdx.x / SIMDGROUP_SIZE * 16u + LANE / 4u, own_column = LANE % 4u * 2u;
    float e[CHUNKS][8], d[BOXES][CHUNKS][8];
    barrier_wait(room.b_is_here(), 0u);
    Turn turn = {0u, 0u};
    for (uint row = first_row; row < end; row += BOX) {
        barrier_wait(room.full(turn.place), turn.parity);
        products_begin();
        UNROLL for (uint box = 0u; box < BOXES; box++) {
            UNROLL for (uint unit = 0u; unit < BOX / UNIT; unit++) {
                const uint at = room.g(turn.place, box), across = unit * UNIT * 2u, down = unit * 2u * ATOM_BYTES;
                UNROLL for (uint chunk = 0u; chunk < CHUNKS; chunk++) {
                    const uint in_chunk = unit * UNIT * CHUNK_ROW_BYTES, eight = 8u * CHUNK_ROW_BYTES;
                    multiply<false>(e[chunk], describe<1u>(at + across, 16u, ATOM_BYTES),
                                    describe<3u>(room.b(box, chunk) + in_chunk, 16u, eight), box + unit != 0u);
                    multiply<true>(d[box][chunk], describe<1u>(at + down, 16u, ATOM_BYTES),
                                   describe<3u>(room.h(turn.place, chunk) + in_chunk, 16u, eight),
                                   row != first_row || unit != 0u);
                }
            }
        }
        products_end();
        products_done<0u>();
        UNROLL for (uint chunk = 0u; chunk < CHUNKS; chunk++) sums_are_there(e[chunk]);
        if (threadIdx.x == 0u) barrier_arrive(room.empty(turn.place));
        DEVICE float* to = e_parts + ulong(blockIdx.x) * p.rows * RANK;
        UNROLL for (uint chunk = 0u; chunk < CHUNKS; chunk++)
            keep(to, row + own_row, p.rows, chunk * UNIT + own_column, e[chunk], p.scale);
        turn.next(STAGES);
    }
    DEVICE float* to = d_parts + ulong(blockIdx.y) * p.columns * RANK;
    UNROLL for (uint box = 0u; box < BOXES; box++) {
        UNROLL for (uint chunk = 0u; chunk < CHUNKS; chunk++) {
            const uint column = first_column + box * BOX + own_row;
            sums_are_there(d[box][chunk]);
            keep(to, column, p.columns, chunk * UNIT + own_column, d[box][chunk], 1.0f);
        }
    }
}

struct SumParams {
    uint rows;
    uint columns;
    uint rank;
    uint e_parts;
    uint d_parts;
};

// Four neighbours of a matrix [count, rank], the sums of parts whose rows have RANK values.
DEVFN float4 sum_of_parts(DEVICE const float* parts, uint count, uint rank, uint index, uint number) {
    DEVICE const float* from = parts + ulong(index / rank) * RANK + index % rank;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    _Pragma("unroll 8") for (uint part = 0u; part < number; part++) {
        const float4 v = *(const float4*)(from + ulong(part) * count * RANK);
        sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
    }
    return sum;
}
DEVFN void put(DEVICE float* to, float4 v) { *(float4*)to = v; }
template <typename U> DEVFN void put(DEVICE U* to, float4 v) {
    *(uint2*)to = make_uint2(pack2(v.x, v.y, U()), pack2(v.z, v.w, U()));
}

// Threads of the first rows · rank / 4 take e, the others d.
extern "C" __global__ void low_rank_gradient_sum(const float* e_parts, const float* d_parts, T* e, FACTOR* d,
                                                 PARAM(SumParams, p)) {
    const uint thread = blockIdx.x * blockDim.x + threadIdx.x;
    const uint of_e = p.rows * p.rank / 4u, of_d = p.columns * p.rank / 4u;
    if (thread < of_e) {
        const uint index = thread * 4u;
        put(e + index, sum_of_parts(e_parts, p.rows, p.rank, index, p.e_parts));
    } else if (thread - of_e < of_d) {
        const uint index = (thread - of_e) * 4u;
        put(d + index, sum_of_parts(d_parts, p.columns, p.rank, index, p.d_parts));
    }
}
