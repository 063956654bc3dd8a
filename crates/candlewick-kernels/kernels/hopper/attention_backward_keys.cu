// The gradients of attention's keys and values (attention_backward.metal has the mathematics) by Hopper's units.
//
// Work. A threadgroup owns ROWS keys of a head, each of its teams 64, and walks the queries of all heads that share them, in
// order: no two threadgroups write to one place, so that the bits are the same each time. One thread asks for the
// tiles, and a simdgroup beside it brings the queries' logarithms and dots.
//
// Launch: blockIdx.x is the head of a batch, y the block of keys, from the first on: under a mask these have most to do. Where
// all threadgroups are at work at once, two a multiprocessor, the second half comes from the last block on: who shares a
// multiprocessor with one that has much to do has little.

#define ROWS (TEAMS * BOX)

// Where things lie in shared memory, from a multiple of 1024 bytes on.
struct Room {
    uint keys;
    DEVFN uint values() const { return keys + HEAD_BYTES(ROWS); }
    DEVFN uint queries(uint place) const { return values() + HEAD_BYTES(ROWS) + place * HEAD_BYTES(WALK); }
    DEVFN uint grads(uint place) const { return queries(STAGES + place); }
    DEVFN uint logarithms(uint place) const { return grads(STAGES) + place * WALK * 4u; }
    DEVFN uint dots(uint place) const { return logarithms(STAGES + place); }
    DEVFN uint own_are_here() const { return dots(STAGES); }
    DEVFN uint full(uint place) const { return own_are_here() + (1u + place) * 8u; }
    DEVFN uint empty(uint place) const { return full(STAGES + place); }
};

// The first query that sees a key.
DEVFN uint seeing(PARAM(HeadsParams, p), uint key) {
    const uint hidden = p.keys - p.queries;
    return CAUSAL && key > hidden ? key - hidden : 0u;
}

struct Team {
    Room room;
    uint team;
    uint since[2];  // the first queries that see the thread's two keys
    float scale;
    Turn turn;
    float grad_k[DIM / 2u], grad_v[DIM / 2u];
    float weights[WALK / 2u], of_weights[WALK / 2u];
    uint rounded[WALK / 4u], of_scores[WALK / 4u];

    template <bool CUT> DEVFN void step(uint start) {
        barrier_wait(room.full(turn.place), turn.parity);
        products_begin();
        dot_rows<ROWS>(weights, room.keys + team * TEAM_BYTES, room.queries(turn.place));
        products_end();
        dot_rows<ROWS>(of_weights, room.values() + team * TEAM_BYTES, room.grads(turn.place));
        products_end();
        products_done<1u>();
        sums_are_there(weights);
        UNROLL for (uint i = 0u; i < WALK / 8u; i++) {
            const float2 logarithm = shared_pair(room.logarithms(turn.place) + (own_column() + 8u * i) * 4u);
            UNROLL for (uint e = 0u; e < 4u; e++) {
                THREAD float& v = weights[4u * i + e];
                v = precise::exp2(fma(v, scale, -(e % 2u == 0u ? logarithm.x : logarithm.y)));
                if (CUT && start + own_column() + 8u * i + e % 2u < since[e / 2u]) v = 0.0f;
            }
        }
        round_sums(rounded, weights);
        products_begin();
        add_rows(grad_v, rounded, room.grads(turn.place));
        products_end();
        products_done<1u>();
        sums_are_there(of_weights);
        UNROLL for (uint i = 0u; i < WALK / 8u; i++) {
            const float2 dot = shared_pair(room.dots(turn.place) + (own_column() + 8u * i) * 4u);
            UNROLL for (uint e = 0u; e < 4u; e++)
                weights[4u * i + e] *= of_weights[4u * i + e] - (e % 2u == 0u ? dot.x : dot.y);
        }
        round_sums(of_scores, weights);
        products_begin();
        add_rows(grad_k, of_scores, room.queries(turn.place));
        products_end();
        products_done<0u>();
        sums_are_there(grad_k);
        sums_are_there(grad_v);
        // Each thread has read numbers of its own.
        barrier_arrive(room.empty(turn.place));
        turn.next(STAGES);
    }
};

extern "C" __global__ void __launch_bounds__(HEADS_THREADS, AT_ONCE)
    attention_backward_keys(MAP(q), MAP(k), MAP(v), MAP(grad), MAP(grad_k), MAP(grad_v), const float* logarithms,
                            const float* dots, PARAM(HeadsParams, p)) {
    extern __shared__ char shared[];
    const Room room = {(shared_address(shared) + ATOM_BYTES - 1u) / ATOM_BYTES * ATOM_BYTES};
    const uint team = own_team();
    if (threadIdx.x == 0u) {
        barrier_init(room.own_are_here(), 1u);
        for (uint place = 0u; place < STAGES; place++) {
            barrier_init(room.full(place), 1u + SIMDGROUP_SIZE);
            barrier_init(room.empty(place), TEAMS * TEAM_THREADS);
        }
        barriers_ready();
    }
    __syncthreads();
    const uint kv_heads = p.heads / p.shared;
    const uint kv_head = blockIdx.x % kv_heads, batch = blockIdx.x / kv_heads;
    const uint block = (blockIdx.y < p.middle ? blockIdx.y : gridDim.y - 1u - (blockIdx.y - p.middle)) * ROWS;
    const uint first = seeing(p, block) / WALK * WALK, head = kv_head * p.shared;
    if (team == TEAMS) {
        ASKERS_REGISTERS();
        const uint simdgroup = in_team() / SIMDGROUP_SIZE;
        Turn turn = {0u, 1u};
        if (in_team() == 0u) {
            prefetch(&q);
            prefetch(&k);
            prefetch(&v);
            prefetch(&grad);
            prefetch(&grad_k);
            prefetch(&grad_v);
            const uint here = room.own_are_here();
            barrier_expect(here, 2u * HEAD_BYTES(ROWS));
            load_rows(room.keys, &k, ROWS, block, kv_head, batch, here);
            load_rows(room.values(), &v, ROWS, block, kv_head, batch, here);
            for (uint i = 0u; i < p.shared; i++) {
                for (uint start = first; start < p.queries; start += WALK) {
                    const uint full = room.full(turn.place);
                    barrier_wait(room.empty(turn.place), turn.parity);
                    barrier_expect(full, 2u * HEAD_BYTES(WALK));
                    load_rows(room.queries(turn.place), &q, WALK, start, head + i, batch, full);
                    load_rows(room.grads(turn.place), &grad, WALK, start, head + i, batch, full);
                    turn.next(STAGES);
                }
            }
        } else if (simdgroup == 1u) {
            for (uint i = 0u; i < p.shared; i++) {
                const ulong row = (ulong(batch) * p.heads + head + i) * p.queries;
                for (uint start = first; start < p.queries; start += WALK) {
                    barrier_wait(room.empty(turn.place), turn.parity);
                    UNROLL for (uint j = LANE; j < WALK; j += SIMDGROUP_SIZE) {
                        const bool exists = start + j < p.queries;
                        // A query beyond the last has no weights.
                        put_shared(room.logarithms(turn.place) + j * 4u, exists ? logarithms[row + start + j] : INFINITY);
                        put_shared(room.dots(turn.place) + j * 4u, exists ? dots[row + start + j] : 0.0f);
                    }
                    barrier_arrive(room.full(turn.place));
                    turn.next(STAGES);
                }
            }
        }
    } else {
        TEAMS_REGISTERS();
        const uint own = block + team * BOX;
        Team t;
        t.room = room;
        t.team = team;
        t.scale = p.scale * LOG2_E;
        t.turn = {0u, 0u};
        UNROLL for (uint side = 0u; side < 2u; side++) {
            t.since[side] = seeing(p, own + own_row() + 8u * side);
        }
        UNROLL for (uint i = 0u; i < DIM / 2u; i++) t.grad_k[i] = t.grad_v[i] = 0.0f;
        // Queries from this one on see all of the team's keys.
        const uint whole = seeing(p, own + BOX - 1u);
        barrier_wait(room.own_are_here(), 0u);
        for (uint i = 0u; i < p.shared; i++) {
            uint start = first;
            for (; start < whole && start < p.queries; start += WALK) t.step<true>(start);
            for (; start < p.queries; start += WALK) t.step<false>(start);
        }
        const float scales[2] = {p.scale, p.scale}, ones[2] = {1.0f, 1.0f};
        store_rows<ROWS>(&grad_k, t.grad_k, scales, room.keys, team, own, kv_head, batch);
        store_rows<ROWS>(&grad_v, t.grad_v, ones, room.values(), team, own, kv_head, batch);
        if (in_team() == 0u) stores_have_read<0u>();
    }
}
