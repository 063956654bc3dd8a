// Attention forward (attention.metal has the mathematics) by Hopper's units, as FlashAttention-3 (Shah et al., 2024) does it.
//
// Work. A threadgroup owns ROWS queries of a head, each of its teams 64, and walks the keys from the last that are seen to
// the first: those that a mask cuts come first. One thread asks for the tiles. While the unit multiplies a block's weights
// with its values, the team computes the weights of the next one, whose scores were asked for before; and what one team
// leaves idle of the unit, the others' products take.
//
// Order. Keys and values have barriers of their own, because keys are read, and free again, half a turn earlier.
//
// Launch: blockIdx.x is the head of a batch, y the block of queries, from the last on.

#define ROWS (TEAMS * BOX)

// Where things lie in shared memory, from a multiple of 1024 bytes on.
struct Room {
    uint queries;
    DEVFN uint keys(uint place) const { return queries + HEAD_BYTES(ROWS) + place * HEAD_BYTES(WALK); }
    DEVFN uint values(uint place) const { return keys(STAGES + place); }
    DEVFN uint queries_are_here() const { return values(STAGES); }
    DEVFN uint full_keys(uint place) const { return queries_are_here() + (1u + place) * 8u; }
    DEVFN uint full_values(uint place) const { return full_keys(STAGES + place); }
    DEVFN uint empty_keys(uint place) const { return full_values(STAGES + place); }
    DEVFN uint empty_values(uint place) const { return empty_keys(STAGES + place); }
};

// A team's rows, two a thread: the greatest score so far, times the scale, and this thread's share of the sum of exponentials.
struct Softmax {
    float largest[2], total[2], scale;

    // Scores of a block become its exponentials; what was summed with the maximum before is to be multiplied by `shrink`.
    DEVFN void take(float (&scores)[WALK / 2u], float (&shrink)[2]) {
        UNROLL for (uint side = 0u; side < 2u; side++) {
            float larger = LOWEST;
            UNROLL for (uint i = 0u; i < WALK / 8u; i++)
                larger = fmaxf(larger, fmaxf(scores[4u * i + 2u * side], scores[4u * i + 2u * side + 1u]));
            larger = fmaxf(tile_row_max(larger) * scale, largest[side]);
            shrink[side] = precise::exp2(largest[side] - larger);
            largest[side] = larger;
            float sum = 0.0f;
            UNROLL for (uint i = 0u; i < WALK / 8u; i++) {
                UNROLL for (uint e = 0u; e < 2u; e++) {
                    THREAD float& v = scores[4u * i + 2u * side + e];
                    v = precise::exp2(fma(v, scale, -larger));
                    sum += v;
                }
            }
            total[side] = fma(total[side], shrink[side], sum);
        }
    }
};

struct Team {
    Room room;
    uint team;
    uint sees[2];  // keys, of the thread's two rows
    Softmax softmax;
    Turn turn;
    Turn before;   // the place of the values that come next
    float y[DIM / 2u];
    float scores[WALK / 2u];
    uint weights[WALK / 4u];

    DEVFN void ask_for_scores() {
        dot_rows<ROWS>(scores, room.queries + team * TEAM_BYTES, room.keys(turn.place));
        products_end();
    }
    DEVFN void hide(uint start) {
        UNROLL for (uint i = 0u; i < WALK / 2u; i++) {
            if (start + own_column() + i / 4u * 8u + i % 2u >= sees[i / 2u % 2u]) scores[i] = -INFINITY;
        }
    }
    DEVFN void scores_are_read() {
        sums_are_there(scores);
        if (in_team() == 0u) barrier_arrive(room.empty_keys(turn.place));
    }
    DEVFN void first(uint start) {
        barrier_wait(room.full_keys(turn.place), turn.parity);
        products_begin();
        ask_for_scores();
        products_done<0u>();
        scores_are_read();
        hide(start);
        float shrink[2];
        softmax.take(scores, shrink);
        round_sums(weights, scores);
        next();
    }
    // The scores of the block at `start`, and the values of the one before it.
    template <bool CUT> DEVFN void step(uint start) {
        barrier_wait(room.full_keys(turn.place), turn.parity);
        barrier_wait(room.full_values(before.place), before.parity);
        products_begin();
        ask_for_scores();
        add_values();
        products_done<1u>();
        scores_are_read();
        if (CUT) hide(start);
        float shrink[2];
        softmax.take(scores, shrink);
        values_are_added();
        UNROLL for (uint i = 0u; i < DIM / 2u; i++) y[i] *= shrink[i / 2u % 2u];
        round_sums(weights, scores);
        next();
    }
    DEVFN void last() {
        barrier_wait(room.full_values(before.place), before.parity);
        products_begin();
        add_values();
        values_are_added();
    }

    DEVFN void next() {
        before = turn;
        turn.next(STAGES);
    }
    DEVFN void add_values() {
        add_rows(y, weights, room.values(before.place));
        products_end();
    }
    DEVFN void values_are_added() {
        products_done<0u>();
        sums_are_there(y);
        if (in_team() == 0u) barrier_arrive(room.empty_values(before.place));
    }
};

extern "C" __global__ void __launch_bounds__(HEADS_THREADS, AT_ONCE)
    attention(MAP(q), MAP(k), MAP(v), MAP(y), float* logarithms, PARAM(HeadsParams, p)) {
    extern __shared__ char shared[];
    const Room room = {(shared_address(shared) + ATOM_BYTES - 1u) / ATOM_BYTES * ATOM_BYTES};
    const uint team = own_team();
    if (threadIdx.x == 0u) {
        barrier_init(room.queries_are_here(), 1u);
        for (uint place = 0u; place < STAGES; place++) {
            barrier_init(room.full_keys(place), 1u);
            barrier_init(room.full_values(place), 1u);
            barrier_init(room.empty_keys(place), TEAMS);
            barrier_init(room.empty_values(place), TEAMS);
        }
        barriers_ready();
    }
    __syncthreads();
    const uint head = blockIdx.x % p.heads, batch = blockIdx.x / p.heads;
    const uint block = (gridDim.y - 1u - blockIdx.y) * ROWS;
    uint start = (visible_keys(p, block + ROWS - 1u) - 1u) / WALK * WALK;
    if (team == TEAMS) {
        ASKERS_REGISTERS();
        if (threadIdx.x == TEAMS * TEAM_THREADS) {
            prefetch(&q);
            prefetch(&k);
            prefetch(&v);
            prefetch(&y);
            barrier_expect(room.queries_are_here(), HEAD_BYTES(ROWS));
            load_rows(room.queries, &q, ROWS, block, head, batch, room.queries_are_here());
            Turn turn = {0u, 1u};
            for (;; start -= WALK) {
                barrier_wait(room.empty_keys(turn.place), turn.parity);
                barrier_expect(room.full_keys(turn.place), HEAD_BYTES(WALK));
                load_rows(room.keys(turn.place), &k, WALK, start, head / p.shared, batch, room.full_keys(turn.place));
                barrier_wait(room.empty_values(turn.place), turn.parity);
                barrier_expect(room.full_values(turn.place), HEAD_BYTES(WALK));
                load_rows(room.values(turn.place), &v, WALK, start, head / p.shared, batch, room.full_values(turn.place));
                turn.next(STAGES);
                if (start == 0u) break;
            }
        }
    } else {
        TEAMS_REGISTERS();
        const uint own = block + team * BOX;
        Team t;
        t.room = room;
        t.team = team;
        t.softmax.scale = p.scale * LOG2_E;
        t.turn = {0u, 0u};
        UNROLL for (uint side = 0u; side < 2u; side++) {
            t.sees[side] = visible_keys(p, own + own_row() + 8u * side);
            t.softmax.largest[side] = LOWEST;
            t.softmax.total[side] = 0.0f;
        }
        UNROLL for (uint i = 0u; i < DIM / 2u; i++) t.y[i] = 0.0f;
        // Keys before this one are seen by all of the team's queries.
        const uint whole = visible_keys(p, own) / WALK * WALK;
        barrier_wait(room.queries_are_here(), 0u);
        t.first(start);
        while (start > whole) t.step<true>(start -= WALK);
        while (start > 0u) t.step<false>(start -= WALK);
        t.last();

        float inverse[2];
        UNROLL for (uint side = 0u; side < 2u; side++) {
            const float total = tile_row_sum(t.softmax.total[side]);
            inverse[side] = 1.0f / total;
            const uint row = own + own_row() + 8u * side;
            if (own_column() == 0u && row < p.queries) {
                logarithms[(ulong(batch) * p.heads + head) * p.queries + row] =
                    fma(precise::log(total), LOG2_E, t.softmax.largest[side]);
            }
        }
        store_rows<ROWS>(&y, t.y, inverse, room.queries, team, own, head, batch);
        if (in_team() == 0u) stores_have_read<0u>();
    }
}
