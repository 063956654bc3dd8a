// Rotary position embedding: pairs of columns turned by an angle that depends on the position.
//
//   y₀ = x₀·cos − x₁·sin        y₁ = x₁·cos + x₀·sin
//
// Half layout pairs columns (i, i + rot/2); interleaved pairs (2i, 2i + 1). Columns from rot on pass through.
// The backward is the same turn the other way: the gradient's plan sets `direction` to −1.
//
// Memory. x once, y once; the tables are small and shared by all heads. x is read through its strides (its last
// dimension is contiguous), so a transposed [b, t, h, d] needs no copy; y is contiguous [b, h, t, d].
//
// Launch. Flat over units: a unit is WIDTH pairs, or one chunk of the columns that pass through. Units of a row are
// neighbours, so that a simdgroup reads neighbouring memory.

struct RopeParams {
    uint units;           // of the whole tensor
    uint units_per_row;   // the first `pair_units` of them turn pairs, the rest pass through
    uint pair_units;
    uint heads;
    uint positions;
    uint columns;
    uint rotary;          // columns that turn: twice the tables' width
    uint batch_stride;    // x's strides, in elements
    uint head_stride;
    uint position_stride;
    uint table_stride;    // elements from one batch entry's table to the next; 0 where all share one
    float direction;      // 1, or −1 for the inverse
};

KERNEL(rope, DEVICE const T* x, DEVICE const TABLE* cosines, DEVICE const TABLE* sines, DEVICE T* y,
       PARAM(RopeParams, p)) {
    const uint unit = TG_POS.x * TG_SIZE.x + TID.x;
    if (unit >= p.units) return;
    const uint row = unit / p.units_per_row, in_row = unit % p.units_per_row;
    const uint position = row % p.positions, head = row / p.positions % p.heads, batch = row / p.positions / p.heads;
    const ulong in_entry = ulong(head) * p.head_stride + ulong(position) * p.position_stride;
    DEVICE const T* x_row = x + ulong(batch) * p.batch_stride + in_entry;
    DEVICE T* y_row = y + ulong(row) * p.columns;

    if (in_row >= p.pair_units) {
        const uint column = p.rotary + (in_row - p.pair_units) * WIDTH;
        float passing[WIDTH];
        load_chunk(x_row + column, passing);
        store_chunk(y_row + column, passing);
        return;
    }
    const uint pair = in_row * WIDTH;
    const ulong at = ulong(batch) * p.table_stride + ulong(position) * (p.rotary / 2u) + pair;
    float c[WIDTH], s[WIDTH];
    load_chunk(cosines + at, c);
    load_chunk(sines + at, s);
    // Two chunks hold the WIDTH pairs.
    const uint low = INTERLEAVED ? 2u * pair : pair, high = INTERLEAVED ? 2u * pair + WIDTH : pair + p.rotary / 2u;
    float z[2 * WIDTH];
    load_chunk(x_row + low, z);
    load_chunk(x_row + high, z + WIDTH);
    for (uint i = 0u; i < WIDTH; i++) {
        const uint i0 = INTERLEAVED ? 2u * i : i, i1 = INTERLEAVED ? 2u * i + 1u : i + WIDTH;
        const float x0 = z[i0], x1 = z[i1], turn = s[i] * p.direction;
        z[i0] = fma(x0, c[i], -(x1 * turn));
        z[i1] = fma(x1, c[i], x0 * turn);
    }
    store_chunk(y_row + low, z);
    store_chunk(y_row + high, z + WIDTH);
}
