// The gradient of attention's queries (attention_backward.metal has the mathematics) by Hopper's units, and Σ g∘y of each row,
// which that of the keys needs, too.
//
// Work. As the forward: a threadgroup owns ROWS queries of a head, walks the keys from the last to the first, and one thread
// asks for tiles. The products with the keys go on while those of the next block are asked for.
//
// Launch: blockIdx.x is the head of a batch, y the block of queries, from the last on.

#define ROWS (TEAMS * BOX)

// Where things lie in shared memory, from a multiple of 1024 bytes on.
struct Room {
    uint queries;
    DEVFN uint grads() const { return queries + HEAD_BYTES(ROWS); }
    DEVFN uint results() const { return grads() + HEAD_BYTES(ROWS); }
    DEVFN uint keys(uint place) const { return results() + HEAD_BYTES(ROWS) + place * HEAD_BYTES(WALK); }
    DEVFN uint values(uint place) const { return keys(STAGES + place); }
    DEVFN uint own_are_here() const { return values(STAGES); }
    DEVFN uint full(uint place) const { return own_are_here() + (1u + place) * 8u; }
    DEVFN uint empty(uint place) const { return full(STAGES + place); }
};

struct Team {
    Room room;
    uint team;
    uint sees[2];  // keys, of the thread's two rows
    float scale, logarithms[2], dots[2];
    Turn turn;
    uint before;   // the place of keys that a product may still read
    float grad_q[DIM / 2u];
    float weights[WALK / 2u];
    float of_weights[WALK / 2u];
    uint of_scores[WALK / 4u];

    // Σ g∘y of the team's rows: two threads a row, each with half of it.
    DEVFN void find_dots() {
        const uint row = in_team() / 2u, half = in_team() % 2u;
        float dot = 0.0f;
        UNROLL for (uint i = 0u; i < DIM / 16u; i++) {
            const uint chunk = half * (DIM / 16u) + i;
            const uint at = chunk / 8u * ROWS * ROW_BYTES + team * TEAM_BYTES + row * ROW_BYTES + (chunk ^ row) % 8u * 16u;
            const uint4 a = shared_vector(room.grads() + at), b = shared_vector(room.results() + at);
            dot = fma_pairs(a.x, b.x, fma_pairs(a.y, b.y, fma_pairs(a.z, b.z, fma_pairs(a.w, b.w, dot))));
        }
        dot += __shfl_xor_sync(0xffffffffu, dot, 1);
        // A simdgroup's 16 rows are those that two threads each have found.
        UNROLL for (uint side = 0u; side < 2u; side++)
            dots[side] = __shfl_sync(0xffffffffu, dot, int(2u * (LANE / 4u + 8u * side)));
    }
    DEVFN void release() {
        if (before != STAGES && in_team() == 0u) barrier_arrive(room.empty(before));
    }
    template <bool CUT> DEVFN void step(uint start) {
        barrier_wait(room.full(turn.place), turn.parity);
        products_begin();
        dot_rows<ROWS>(weights, room.queries + team * TEAM_BYTES, room.keys(turn.place));
        products_end();
        dot_rows<ROWS>(of_weights, room.grads() + team * TEAM_BYTES, room.values(turn.place));
        products_end();
        products_done<1u>();
        sums_are_there(weights);
        release();
        UNROLL for (uint i = 0u; i < WALK / 2u; i++) {
            const uint side = i / 2u % 2u;
            weights[i] = precise::exp2(fma(weights[i], scale, -logarithms[side]));
        }
        products_done<0u>();
        sums_are_there(of_weights);
        UNROLL for (uint i = 0u; i < WALK / 2u; i++) {
            const uint side = i / 2u % 2u;
            const bool hidden = CUT && start + own_column() + i / 4u * 8u + i % 2u >= sees[side];
            weights[i] = hidden ? 0.0f : weights[i] * (of_weights[i] - dots[side]);
        }
        round_sums(of_scores, weights);
        products_begin();
        add_rows(grad_q, of_scores, room.keys(turn.place));
        products_end();
        before = turn.place;
        turn.next(STAGES);
    }
};

extern "C" __global__ void __launch_bounds__(HEADS_THREADS, AT_ONCE)
    attention_backward_queries(MAP(q), MAP(k), MAP(v), MAP(y), MAP(grad), MAP(grad_q), const float* logarithms, float* dots,
                               PARAM(HeadsParams, p)) {
    extern __shared__ char shared[];
    const Room room = {(shared_address(shared) + ATOM_BYTES - 1u) / ATOM_BYTES * ATOM_BYTES};
    const uint team = own_team();
    if (threadIdx.x == 0u) {
        barrier_init(room.own_are_here(), 1u);
        for (uint place = 0u; place < STAGES; place++) {
            barrier_init(room.full(place), 1u);
            barrier_init(room.empty(place), TEAMS);
        }
        barriers_ready();
    }
    __syncthreads();
    const uint head = blockIdx.x % p.heads, batch = blockIdx.x / p.heads;
    const uint block = (gridDim.y - 1u - blockIdx.y) * ROWS;
    const uint blocks = (visible_keys(p, block + ROWS - 1u) + WALK - 1u) / WALK;
    if (team == TEAMS) {
        ASKERS_REGISTERS();
        if (threadIdx.x == TEAMS * TEAM_THREADS) {
            prefetch(&q);
            prefetch(&k);
            prefetch(&v);
            prefetch(&y);
            prefetch(&grad);
            prefetch(&grad_q);
            const uint here = room.own_are_here();
            barrier_expect(here, 3u * HEAD_BYTES(ROWS));
            load_rows(room.queries, &q, ROWS, block, head, batch, here);
            load_rows(room.grads(), &grad, ROWS, block, head, batch, here);
            load_rows(room.results(), &y, ROWS, block, head, batch, here);
            Turn turn = {0u, 1u};
            for (uint left = blocks; left-- > 0u;) {
                const uint full = room.full(turn.place);
                barrier_wait(room.empty(turn.place), turn.parity);
                barrier_expect(full, 2u * HEAD_BYTES(WALK));
                load_rows(room.keys(turn.place), &k, WALK, left * WALK, head / p.shared, batch, full);
                load_rows(room.values(turn.place), &v, WALK, left * WALK, head / p.shared, batch, full);
                turn.next(STAGES);
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
        t.before = STAGES;
        UNROLL for (uint i = 0u; i < DIM / 2u; i++) t.grad_q[i] = 0.0f;
        barrier_wait(room.own_are_here(), 0u);
        t.find_dots();
        UNROLL for (uint side = 0u; side < 2u; side++) {
            const uint row = own + own_row() + 8u * side;
            const ulong at = (ulong(batch) * p.heads + head) * p.queries + row;
            t.sees[side] = visible_keys(p, row);
            t.logarithms[side] = row < p.queries ? logarithms[at] : INFINITY;
            if (own_column() == 0u && row < p.queries) dots[at] = t.dots[side];
        }
        // Blocks before this one are seen by all of the team's queries.
        const uint whole = visible_keys(p, own) / WALK;
        uint left = blocks;
        while (left > whole) t.step<true>(--left * WALK);
        while (left > 0u) t.step<false>(--left * WALK);
        products_done<0u>();
        sums_are_there(t.grad_q);
        const float scales[2] = {p.scale, p.scale};
        store_rows<ROWS>(&grad_q, t.grad_q, scales, room.queries, team, own, head, batch);
        if (in_team() == 0u) stores_have_read<0u>();
    }
}
