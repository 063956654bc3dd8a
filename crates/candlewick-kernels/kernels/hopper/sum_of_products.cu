// y = L · R + l · r + bias of product.h, with l as somebody has computed it.

struct ProductParams {
    uint rows;
    uint columns;
    uint inner;
    uint rank;
};

extern "C" __global__ void __launch_bounds__((1u + TEAMS) * TEAM_THREADS, 1) __cluster_dims__(CLUSTER, 1, 1)
    sum_of_products(MAP(left), MAP(right), MAP(low_left), MAP(low_right), MAP(result), const T* bias,
                    PARAM(ProductParams, p)) {
    extern __shared__ char shared[];
    const uint start = (shared_address(shared) + ATOM_BYTES - 1u) / ATOM_BYTES * ATOM_BYTES;
    const uint results = start + STAGES * STAGE_BYTES;
    const Ring ring = {start, results + RESULTS_BYTES};
    const uint here = rank_in_cluster(), team = threadIdx.x / TEAM_THREADS;
    if (threadIdx.x == TEAMS * TEAM_THREADS) {
        prefetch(&left);
        prefetch(&right);
    }
    if (threadIdx.x == 0u) {
        ring.begin();
        barriers_ready();
    }
    cluster_barrier();
    const uint steps = parts(p.inner, BOX), low_steps = parts(p.rank, BOX);
    const uint all = parts(p.rows, CLUSTER * PART_ROWS) * parts(p.columns, PART_COLUMNS);
    const uint first = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
    uint row, column;
    if (team == TEAMS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == TEAMS * TEAM_THREADS) {
            Asker asker = {ring, {0u, 1u}};
            for (uint part = first; part < all; part += clusters) {
                locate(part, p.rows, p.columns, row, column);
                for (uint step = 0u; step < steps + low_steps; step++) {
                    const bool low = step >= steps;
                    const TensorMap *l = low ? &low_left : &left, *r = low ? &low_right : &right;
                    const uint inner = (low ? step - steps : step) * BOX;
                    const uint place = asker.next(STAGE_BYTES);
                    load_tile(ring.tiles(place), l, row + here * PART_ROWS, inner, ring.full(place));
                    load_right(ring, place, r, inner, column, here);
                }
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        Reader reader = {ring, {0u, 0u}, team, STAGES};
        for (uint part = first; part < all; part += clusters) {
            locate(part, p.rows, p.columns, row, column);
            float d[128];
            // Two loops, not one with a choice in it: a choice between products makes each wait for the one before.
            for (uint step = 0u; step < steps; step++) reader.step(d, step != 0u);
            for (uint done = 0u; done < p.rank; done += BOX) {
                const uint place = reader.next();
                const Tiles tiles(ring.tiles(place), team);
                const uint units = parts(p.rank - done < BOX ? p.rank - done : BOX, UNIT);
                _Pragma("unroll 1") for (uint unit = 0u; unit < units; unit++) {
                    products_begin();
                    tiles.add(d, unit, true);
                }
                products_end();
                products_done<1u>();
                reader.leave_before();
                reader.before = place;
            }
            products_done<0u>();
            sums_are_there(d);
            reader.leave_before();
            store_result(&result, results, team, row + here * PART_ROWS + team * BOX, column, d, bias, p.columns);
        }
        if (threadIdx.x % TEAM_THREADS == 0u) stores_have_read<0u>();
    }
    // Nobody leaves while another one arrives at its barriers.
    cluster_barrier();
}
