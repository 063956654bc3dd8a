// y of product.h with l = scale · L · P, computed on the way, and what else an adapter needs of L while its tiles are here.
//
//   P [inner, rank], rank at most UNIT
//   The forward: L = x, R = weight, P = A and r = B, as their transposes. Leaves y and l = h.
//   TURNED, the backward: L = g, R = weight, P = B and r = A. Leaves the gradient of x, and in parts those of the factors,
//     d = Lᵀ · k [inner, rank] for B, with k = h,
//     c = inputᵀ · l [columns, rank] for A, with input = x and l = e.
//
// Why. The base product is bound by arithmetic, and what the adapter adds to it by memory: on its own each of h, d with e,
// and c reads a matrix as large as x or y once more.
//
// Work. Every part of y needs l. One column of parts could compute it, and all others would wait; so `leads` columns do,
// each in `slice` steps of its sum, and leave parts of l in memory. When all are there each lead adds up a share of the
// rows, in the leads' order: same inputs, same bits. Half of the leads begin with their slice, so that l is there before
// the last steps. d comes of the same steps; c of four boxes of the input that follow the last steps but LATE.
//
// Progress. A part waits for the leads of its band, which are no more parts than there are clusters, and clusters take
// parts in order. So the first of all unfinished parts is at work, and what it waits for is at work, too, or done: if all
// clusters are, which the launch asks for.
//
// counters: one for 128 rows of L, 0 before and after. Leads count twice, when a part of l and when a share is there; then
// who has read l.

#define PROJECTION_BYTES (BOX * UNIT * 2u)   // a step's tile of P
#define FEW_FLOATS (PART_ROWS * UNIT)        // a threadgroup's rows of l, or of k
#define FEW_BYTES (FEW_FLOATS * 2u)
#define FEW_EIGHT (8u * UNIT * 2u)           // eight of these rows
#define FEW_UNIT (2u * FEW_EIGHT)
#define GATHERERS (TEAM_THREADS - SIMDGROUP_SIZE)
#define LATE 4u

struct AdaptedParams {
    uint rows;
    uint columns;
    uint inner;
    uint rank;
    uint leads;
    uint slice;
    float scale;
};

// d [64, UNIT] of the team (+)= left [64, UNIT] · right [UNIT, UNIT]. ACROSS: its columns lie in one piece each, instead of
// what is summed over.
template <int LEFT_ACROSS, int FEW_ACROSS>
DEVFN void multiply_few(float (&d)[8], ulong left, ulong right, bool adds) {
    asm volatile(
        "{\n.reg .pred adds;\nsetp.ne.u32 adds, %10, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32." ELEMENT "." ELEMENT
        " {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, adds, 1, 1, %11, %12;\n}"
        : SUM4(0), SUM4(4) : "l"(left), "l"(right), "r"(uint(adds)), "n"(LEFT_ACROSS), "n"(FEW_ACROSS));
}

// Where things lie in shared memory behind the ring's tiles, and barriers behind the ring's.
struct Room {
    uint start;
    DEVFN uint projection(uint place) const { return start + STAGES * STAGE_BYTES + place * PROJECTION_BYTES; }
    DEVFN uint kept() const { return projection(STAGES); }
    DEVFN uint low() const { return kept() + FEW_BYTES; }
    DEVFN uint results() const { return low() + FEW_BYTES; }
    // A part of l on its way out, where the team's results go later.
    DEVFN uint part(uint team) const { return results() + team * 2u * RESULT_BYTES; }
    DEVFN Ring ring() const { return {start, results() + RESULTS_BYTES}; }
    DEVFN uint barrier(uint index) const { return ring().barriers + (RING_BARRIERS + index) * 8u; }
    DEVFN uint kept_is_full() const { return barrier(0u); }
    DEVFN uint kept_is_empty() const { return barrier(1u); }
    DEVFN uint low_is_full() const { return barrier(2u); }
    DEVFN uint low_is_empty() const { return barrier(3u); }
    DEVFN uint part_is_full() const { return barrier(4u); }
    DEVFN uint part_is_empty() const { return barrier(5u); }
};

// ---- what threadgroups tell each other ----
DEVFN uint count(uint* counter) {
    uint before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}
DEVFN void wait_for(const uint* counter, uint value) {
    uint now;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
    } while (now < value);
}
// What threads have written to memory and the units for tiles read.
DEVFN void handed_over() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
// Waits for all gatherers.
DEVFN void gatherers_barrier() { asm volatile("bar.sync %0, %1;" ::"n"(1u + TEAMS), "n"(GATHERERS) : "memory"); }
DEVFN float4 get_shared(uint from) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(from) : "memory");
    return v;
}
DEVFN void put_shared(uint to, float a, float b, float c, float d) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

// The order in which a part takes steps, and which of them, in that order, are its slice: none if it is no lead.
struct Order {
    uint first, begin, end;
    DEVFN Order(uint column, uint steps, PARAM(AdaptedParams, p)) : first(0u), begin(0u), end(0u) {
        const uint lead = column / PART_COLUMNS;
        if (lead >= p.leads) return;
        begin = lead * p.slice;
        end = begin + p.slice < steps ? begin + p.slice : steps;
        if (lead < p.leads / 2u) return;
        first = begin;
        end -= begin;
        begin = 0u;
    }
    DEVFN uint step(uint index, uint steps) const { return first + index < steps ? first + index : first + index - steps; }
    DEVFN bool leads() const { return begin != end; }
};

// Adds up the leads' parts of l, 128 rows from `row` on, for one lead's share of them.
DEVFN void gather(DEVICE const float* from, DEVICE T* l, uint row, uint lead, uint gatherer, PARAM(AdaptedParams, p)) {
    const uint share = parts(FEW_FLOATS / 4u, p.leads), begin = lead * share;
    const uint end = begin + share < FEW_FLOATS / 4u ? begin + share : FEW_FLOATS / 4u;
    for (uint piece = begin + gatherer; piece < end; piece += GATHERERS) {
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        DEVICE const float* at = from + piece * 4u;
        _Pragma("unroll 8") for (uint other = 0u; other < p.leads; other++) {
            const float4 v = __ldcg((const float4*)(at + other * FEW_FLOATS));
            sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
        }
        // As a team's threads have their shares of a sum: two rows eight apart, and columns 8 further in the second half.
        const uint thread = piece / 2u, column = thread % 4u * 2u + piece % 2u * 8u;
        const uint first = row + thread / SIMDGROUP_SIZE * 16u + thread % SIMDGROUP_SIZE / 4u;
        const uint pairs[2] = {pack2(sum.x * p.scale, sum.y * p.scale, T()),
                               pack2(sum.z * p.scale, sum.w * p.scale, T())};
        UNROLL for (uint i = 0u; i < 2u; i++) {
            const uint at_row = first + i * 8u;
            if (at_row < p.rows && column < p.rank) *(uint*)(l + ulong(at_row) * p.rank + column) = pairs[i];
        }
    }
}

#if TURNED
// sums [64, UNIT] = tileᵀ · few, of 128 rows.
DEVFN void multiply_across(float (&sums)[8], uint tile, uint few) {
    const ulong left = describe<1u>(tile, 16u, ATOM_BYTES), right = describe<3u>(few, 16u, FEW_EIGHT);
    UNROLL for (uint unit = 0u; unit < PART_ROWS / UNIT; unit++)
        multiply_few<1, 1>(sums, left + unit * (2u * ATOM_BYTES / 16u), right + unit * (FEW_UNIT / 16u), unit != 0u);
}
// Leaves them as these rows' part [columns, UNIT] of a gradient, from `column` on.
DEVFN void leave_part(float (&sums)[8], DEVICE float* all_parts, uint row, uint column, uint columns) {
    sums_are_there(sums);
    const uint at = column + threadIdx.x % TEAM_THREADS / SIMDGROUP_SIZE * 16u + LANE / 4u;
    DEVICE float* to = all_parts + (ulong(row / PART_ROWS) * columns + at) * UNIT + LANE % 4u * 2u;
    UNROLL for (uint i = 0u; i < 4u; i++) {
        const uint down = i % 2u * 8u, right = i / 2u * 8u;
        if (at + down < columns) *(float2*)(to + down * UNIT + right) = make_float2(sums[2u * i], sums[2u * i + 1u]);
    }
}
#endif

extern "C" __global__ void __launch_bounds__((1u + TEAMS) * TEAM_THREADS, 1) __cluster_dims__(CLUSTER, 1, 1)
#if TURNED
    adapted_product(MAP(left), MAP(right), MAP(projection), MAP(low_left), MAP(low_right), MAP(result), MAP(kept),
                    MAP(input), T* l, float* l_parts, uint* counters, float* d_parts, float* c_parts,
                    PARAM(AdaptedParams, p)) {
    DEVICE const T* bias = nullptr;
#else
    adapted_product(MAP(left), MAP(right), MAP(projection), MAP(low_left), MAP(low_right), MAP(result), T* l,
                    float* l_parts, uint* counters, const T* bias, PARAM(AdaptedParams, p)) {
#endif
    extern __shared__ char shared[];
    const Room room = {(shared_address(shared) + ATOM_BYTES - 1u) / ATOM_BYTES * ATOM_BYTES};
    const Ring ring = room.ring();
    const uint here = rank_in_cluster(), team = threadIdx.x / TEAM_THREADS;
    if (threadIdx.x == TEAMS * TEAM_THREADS) {
        prefetch(&left);
        prefetch(&right);
        prefetch(&projection);
    }
    if (threadIdx.x == 0u) {
        ring.begin();
        barrier_init(room.kept_is_full(), 1u);
        barrier_init(room.kept_is_empty(), TEAMS);
        barrier_init(room.low_is_full(), 1u);
        barrier_init(room.low_is_empty(), TEAMS);
        barrier_init(room.part_is_full(), TEAMS * TEAM_THREADS);
        barrier_init(room.part_is_empty(), GATHERERS);
        barriers_ready();
    }
    cluster_barrier();
    // In pairs, because d takes two steps at a time.
    const uint steps = parts(p.inner, 2u * BOX) * 2u;
    const uint across = parts(p.columns, PART_COLUMNS), all = parts(p.rows, CLUSTER * PART_ROWS) * across;
    const uint first = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
    uint row, column;
    if (team == TEAMS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        if (threadIdx.x == TEAMS * TEAM_THREADS) {
            Asker asker = {ring, {0u, 1u}};
#if TURNED
            uint kept_parity = 1u;
#endif
            for (uint part = first; part < all; part += clusters) {
                locate(part, p.rows, p.columns, row, column);
                row += here * PART_ROWS;
                const Order order(column, steps, p);
#if TURNED
                if (order.leads()) {
                    barrier_wait(room.kept_is_empty(), kept_parity);
                    barrier_expect(room.kept_is_full(), FEW_BYTES);
                    load_tile(room.kept(), &kept, row, 0u, room.kept_is_full());
                    kept_parity ^= 1u;
                }
#endif
                for (uint index = 0u; index < steps; index++) {
                    const uint inner = order.step(index, steps) * BOX;
                    const bool projects = index >= order.begin && index < order.end;
                    const uint place = asker.next(projects ? STAGE_BYTES + PROJECTION_BYTES : STAGE_BYTES);
                    load_tile(ring.tiles(place), &left, row, inner, ring.full(place));
                    load_right(ring, place, &right, inner, column, here);
#if TURNED
                    if (projects) load_tile(room.projection(place), &projection, inner, 0u, ring.full(place));
                    if (index + LATE + 1u != steps && index + LATE / 2u + 1u != steps) continue;
                    const uint box = index + LATE + 1u == steps ? 0u : 2u;
                    for (uint i = box; i < box + 2u; i++) {
                        const uint of_input = asker.next(LEFT_BYTES);
                        load_tile(ring.tiles(of_input), &input, row, column + i * BOX, ring.full(of_input));
                    }
#else
                    if (projects) load_tile(room.projection(place), &projection, 0u, inner, ring.full(place));
#endif
                }
                load_right(ring, asker.next(RIGHT_BYTES), &low_right, 0u, column, here);
            }
        } else if (threadIdx.x >= TEAMS * TEAM_THREADS + SIMDGROUP_SIZE) {
            const uint gatherer = threadIdx.x - (TEAMS * TEAM_THREADS + SIMDGROUP_SIZE);
            uint part_parity = 0u, low_parity = 1u;
            for (uint part = first; part < all; part += clusters) {
                locate(part, p.rows, p.columns, row, column);
                row += here * PART_ROWS;
                const uint lead = column / PART_COLUMNS;
                DEVICE float* of_rows = l_parts + ulong(row / PART_ROWS) * p.leads * FEW_FLOATS;
                uint* counter = counters + row / PART_ROWS;
                if (lead < p.leads) {
                    barrier_wait(room.part_is_full(), part_parity);
                    part_parity ^= 1u;
                    _Pragma("unroll 1") for (uint piece = gatherer; piece < FEW_FLOATS / 4u; piece += GATHERERS) {
                        const uint of_team = piece / (FEW_FLOATS / 4u / TEAMS), at = piece % (FEW_FLOATS / 4u / TEAMS);
                        *(float4*)(of_rows + lead * FEW_FLOATS + piece * 4u) = get_shared(room.part(of_team) + at * 16u);
                    }
                    barrier_arrive(room.part_is_empty());
                    gatherers_barrier();
                    if (gatherer == 0u) count(counter);
                    wait_for(counter, p.leads);
                    gather(of_rows, l, row, lead, gatherer, p);
                    handed_over();
                    gatherers_barrier();
                    if (gatherer == 0u) count(counter);
                }
                if (gatherer == 0u) {
                    barrier_wait(room.low_is_empty(), low_parity);
                    barrier_expect(room.low_is_full(), FEW_BYTES);
                    wait_for(counter, 2u * p.leads);
                    handed_over();
                    load_tile(room.low(), &low_left, row, 0u, room.low_is_full());
                    if (count(counter) + 1u == 2u * p.leads + across) *counter = 0u;
                    low_parity ^= 1u;
                }
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
        const uint thread = threadIdx.x % TEAM_THREADS;
        Reader reader = {ring, {0u, 0u}, team, STAGES};
        uint low_parity = 0u, lead_parity = 0u;
        for (uint part = first; part < all; part += clusters) {
            locate(part, p.rows, p.columns, row, column);
            row += here * PART_ROWS;
            const Order order(column, steps, p);
            float d[128];
            uint index = 0u;
            // Loops one after another, not one with choices in it: a choice between products makes each wait for the one
            // before.
            for (; index < order.begin; index++) reader.step(d, index != 0u);
            if (order.leads()) {
                float of_l[8];
#if TURNED
                barrier_wait(room.kept_is_full(), lead_parity);
                for (; index < order.end; index += 2u) {
                    float of_d[8];
                    uint places[2];
                    UNROLL for (uint i = 0u; i < 2u; i++) {
                        places[i] = reader.next();
                        const Tiles tiles(ring.tiles(places[i]), team);
                        const ulong from = describe<3u>(room.projection(places[i]), 16u, FEW_EIGHT);
                        products_begin();
                        UNROLL for (uint unit = 0u; unit < BOX / UNIT; unit++) {
                            tiles.add(d, unit, index + i + unit != 0u);
                            multiply_few<0, 1>(of_l, tiles.left + unit * (LEFT_UNIT / 16u), from + unit * (FEW_UNIT / 16u),
                                               index + i + unit != order.begin);
                        }
                        if (i == 1u) multiply_across(of_d, ring.tiles(team == 0u ? places[0] : places[1]), room.kept());
                        products_end();
                        if (i == 0u) {
                            products_done<1u>();
                            reader.leave_before();
                        }
                    }
                    products_done<0u>();
                    reader.leave(places[0]);
                    reader.leave(places[1]);
                    leave_part(of_d, d_parts, row, (order.step(index, steps) + team) * BOX, p.inner);
                }
                if (thread == 0u) barrier_arrive(room.kept_is_empty());
#else
                for (; index < order.end; index++) {
                    const uint place = reader.next();
                    const Tiles tiles(ring.tiles(place), team);
                    const ulong from = describe<1u>(room.projection(place), 16u, ATOM_BYTES);
                    products_begin();
                    UNROLL for (uint unit = 0u; unit < BOX / UNIT; unit++) {
                        tiles.add(d, unit, index + unit != 0u);
                        multiply_few<0, 0>(of_l, tiles.left + unit * (LEFT_UNIT / 16u), from + unit * (LEFT_UNIT / 16u),
                                           index + unit != order.begin);
                    }
                    products_end();
                    products_done<1u>();
                    reader.leave_before();
                    reader.before = place;
                }
                products_done<0u>();
                reader.leave_before();
#endif
                sums_are_there(of_l);
                if (thread == 0u) stores_have_read<0u>();
                team_barrier(team);
                const uint to = room.part(team) + thread * 32u;
                put_shared(to, of_l[0], of_l[1], of_l[2], of_l[3]);
                put_shared(to + 16u, of_l[4], of_l[5], of_l[6], of_l[7]);
                barrier_arrive(room.part_is_full());
            }
#if TURNED
            for (; index < steps - LATE; index++) reader.step(d, index != 0u);
            barrier_wait(room.low_is_full(), low_parity);
            UNROLL for (uint box = 0u; box < PART_COLUMNS / BOX; box += 2u) {
                float of_c[8];
                const uint places[2] = {reader.next(), reader.next()};
                products_begin();
                multiply_across(of_c, ring.tiles(team == 0u ? places[0] : places[1]), room.low());
                products_end();
                products_done<0u>();
                reader.leave_before();
                reader.leave(places[0]);
                reader.leave(places[1]);
                reader.step(d, true);
                leave_part(of_c, c_parts, row, column + (box + team) * BOX, p.columns);
                reader.step(d, true);
            }
#else
            for (; index < steps; index++) reader.step(d, index != 0u);
            barrier_wait(room.low_is_full(), low_parity);
#endif
            const uint place = reader.next();
            const Tiles tiles(ring.tiles(place), team);
            products_begin();
            multiply(d, describe<3u>(room.low() + team * (FEW_BYTES / TEAMS), 16u, FEW_EIGHT), tiles.right, true);
            products_end();
            products_done<0u>();
            sums_are_there(d);
            reader.leave_before();
            reader.leave(place);
            low_parity ^= 1u;
            if (thread == 0u) barrier_arrive(room.low_is_empty());
            if (order.leads()) {
                barrier_wait(room.part_is_empty(), lead_parity);
                lead_parity ^= 1u;
            }
            store_result(&result, room.results(), team, row + team * BOX, column, d, bias, p.columns);
        }
        if (thread == 0u) stores_have_read<0u>();
    }
    // Nobody leaves while another one arrives at its barriers.
    cluster_barrier();
}

#if TURNED
#define SUM_COLUMNS 32u                      // of a threadgroup
#define SUM_GROUPS 4u                        // of its threads, which share the parts
#define SUM_FLOATS (SUM_COLUMNS * UNIT)

struct SumParams {
    uint parts;
    uint rank;
    uint d_columns;
    uint c_columns;
};

// The sums of parts [parts, columns, UNIT], in a fixed order: d [d_columns, rank], and the transpose of c, [rank, c_columns].
extern "C" __global__ void __launch_bounds__(SUM_GROUPS* SUM_FLOATS / 4u)
    adapted_product_sum(const float* d_parts, const float* c_parts, FACTOR* d, FACTOR* c, PARAM(SumParams, p)) {
    __shared__ float4 sums[SUM_GROUPS * SUM_FLOATS / 4u];
    const uint of_d = parts(p.d_columns, SUM_COLUMNS);
    const bool is_c = blockIdx.x >= of_d;
    const uint first = (is_c ? blockIdx.x - of_d : blockIdx.x) * SUM_COLUMNS;
    const uint columns = is_c ? p.c_columns : p.d_columns;
    const uint group = threadIdx.x / (SUM_FLOATS / 4u), piece = threadIdx.x % (SUM_FLOATS / 4u);
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (first + piece * 4u / UNIT < columns) {
        DEVICE const float* from = (is_c ? c_parts : d_parts) + ulong(first) * UNIT + piece * 4u;
        _Pragma("unroll 8") for (uint part = group; part < p.parts; part += SUM_GROUPS) {
            const float4 v = *(const float4*)(from + ulong(part) * columns * UNIT);
            sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
        }
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    const float* each = (const float*)sums;
    for (uint i = threadIdx.x; i < SUM_FLOATS; i += SUM_GROUPS * SUM_FLOATS / 4u) {
        const uint column = is_c ? i % SUM_COLUMNS : i / UNIT, rank = is_c ? i / SUM_COLUMNS : i % UNIT;
        float total = 0.0f;
        UNROLL for (uint g = 0u; g < SUM_GROUPS; g++) total += each[g * SUM_FLOATS + column * UNIT + rank];
        if (first + column >= columns || rank >= p.rank) continue;
        if (is_c) {
            c[ulong(rank) * columns + first + column] = from_f32<FACTOR>(total);
        } else {
            d[ulong(first + column) * p.rank + rank] = from_f32<FACTOR>(total);
        }
    }
}
#endif
