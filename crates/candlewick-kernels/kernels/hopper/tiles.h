// Tiles of matrices on Hopper (compute capability 9.0): they arrive in shared memory by themselves (TMA), barriers there
// count their bytes, and four simdgroups multiply them where they lie (wgmma). PTX ISA 8.0, sections on
// cp.async.bulk.tensor, mbarrier and wgmma.mma_async.
//
// A tile is a box of 16-bit values in rows of 32 or 128 bytes, in the order that the unit of that swizzle writes and reads.
// It lies at a multiple of 1024 bytes. What lies outside of the matrix arrives as zeros and is not stored.

// A matrix, as the host describes it: CUtensorMap.
struct __align__(64) TensorMap { ulong words[16]; };
#define MAP(name) const __grid_constant__ TensorMap name

#define BOX 64u                              // columns of a tile, and rows but for factors of a product
#define ROW_BYTES 128u                       // of a tile of 64 columns
#define BOX_BYTES (BOX * ROW_BYTES)
#define UNIT 16u                             // what one product sums over
#define ATOM_BYTES 1024u                     // 8 rows of 128 bytes
#define TEAM_THREADS 128u                    // four simdgroups, a team, multiply together

DEVFN uint shared_address(const void* p) { return uint(__cvta_generic_to_shared(p)); }

// ---- barriers: a phase ends when so many have arrived and all bytes that they expect are there ----
DEVFN void barrier_init(uint barrier, uint arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes barriers known to the units that arrive at them, in this threadgroup and in its cluster.
DEVFN void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVFN void barrier_arrive(uint barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
DEVFN void barrier_expect(uint barrier, uint bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits for the end of a phase of this parity; the first one's is 0. A barrier that is new has ended one of parity 1.
DEVFN void barrier_wait(uint barrier, uint parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra finished;\nbra again;\nfinished:\n}" ::"r"(barrier), "r"(parity) : "memory");
}

// A ring of places for tiles: which one is next, and the parity of its phase.
struct Turn {
    uint place, parity;
    DEVFN void next(uint places) {
        place++;
        if (place == places) {
            place = 0u;
            parity ^= 1u;
        }
    }
};

// ---- tiles ----
DEVFN void prefetch(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
DEVFN void load_tile(uint to, const TensorMap* map, uint row, uint column, uint barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
        ::"r"(to), "l"(map), "r"(barrier), "r"(column), "r"(row) : "memory");
}
DEVFN void store_tile(const TensorMap* map, uint row, uint column, uint from) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];\ncp.async.bulk.commit_group;"
        ::"l"(map), "r"(from), "r"(column), "r"(row) : "memory");
}
// Waits until all stores of this thread but `AFTER` have read their tiles.
template <uint AFTER> DEVFN void stores_have_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(AFTER) : "memory");
}
// Shared memory that threads have written is what the next store reads.
DEVFN void written_for_stores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Waits for all of a team.
DEVFN void team_barrier(uint team) { asm volatile("bar.sync %0, %1;" ::"r"(1u + team), "n"(TEAM_THREADS) : "memory"); }

// ---- products ----
// How a tile's values lie, as a product reads them. `leading` is the distance of its boxes where rows are summed over;
// `stride` that of 8 rows. SWIZZLE: 1 for rows of 128 bytes, 3 for rows of 32.
template <uint SWIZZLE> DEVFN ulong describe(uint address, uint leading, uint stride) {
    // Beyond the size of shared memory an address says whose of a cluster's it is.
    return ulong((address & 0x3ffffu) >> 4) | ulong(leading >> 4) << 16 | ulong(stride >> 4) << 32 | ulong(SWIZZLE) << 62;
}
// What is in the registers of sums is there before a product, and a product's own order is kept.
DEVFN void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVFN void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until all groups of products but `AFTER` are done.
template <uint AFTER> DEVFN void products_done() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(AFTER) : "memory");
}
// After the wait for their products: the sums are there now, and nothing that reads them may move before it.
template <uint COUNT> DEVFN void sums_are_there(float (&sums)[COUNT]) {
    UNROLL for (uint i = 0u; i < COUNT; i++) asm volatile("" : "+f"(sums[i])::"memory");
}
