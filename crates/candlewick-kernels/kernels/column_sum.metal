// The sum of the rows of a matrix of floats: the second stage of every gradient that sums over rows.
//
//   total[c] = Σ_p partial[p, c]
//
// A threadgroup takes SIMDGROUP_SIZE columns, one a lane, so that each simdgroup reads whole cache lines; its
// simdgroups share the rows: rows s, s + simdgroups, … are simdgroup s's. The simdgroups' sums meet in threadgroup
// memory and are added in their order. The order depends on the launch alone: same input, same bits.
//
// A second matrix of the same shape is summed by the same launch, TG_POS.y = 1: a norm's bias beside its weight.

// Partial rows that a simdgroup reads before it adds them.
#define AHEAD 8u

struct ColumnSumParams {
    uint parts;
    uint columns;
};

KERNEL(column_sum, DEVICE const float* first_partial, DEVICE T* first_total, DEVICE const float* second_partial,
       DEVICE T* second_total, PARAM(ColumnSumParams, p)) {
    TG_ARRAY(float, strips, SIMDGROUP_SIZE * STRIPS);
    DEVICE const float* partial = TG_POS.y == 0u ? first_partial : second_partial;
    DEVICE T* total = TG_POS.y == 0u ? first_total : second_total;
    const uint column = TG_POS.x * SIMDGROUP_SIZE + LANE;
    float sum = 0.0f;
    if (column < p.columns) {
        for (uint first = SIMD_ID; first < p.parts; first += AHEAD * STRIPS) {
            float values[AHEAD];
            UNROLL
            for (uint i = 0u; i < AHEAD; i++) {
                const uint part = first + i * STRIPS;
                values[i] = part < p.parts ? partial[ulong(part) * p.columns + column] : 0.0f;
            }
            UNROLL
            for (uint i = 0u; i < AHEAD; i++) sum += values[i];
        }
    }
    strips[SIMD_ID * SIMDGROUP_SIZE + LANE] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (SIMD_ID == 0u && column < p.columns) {
        for (uint strip = 1u; strip < STRIPS; strip++) sum += strips[strip * SIMDGROUP_SIZE + LANE];
        total[column] = from_f32<T>(sum);
    }
}
