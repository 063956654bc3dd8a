// The sum of the rows of a matrix of floats: the second stage of every gradient that sums over rows.
//
//   total[c] = Σ_p partial[p, c]
//
// A threadgroup takes SIMDGROUP_SIZE columns, one a lane, so that each simdgroup reads whole cache lines; its
// simdgroups share the rows: rows s, s + simdgroups, … are simdgroup s's. The simdgroups' sums meet in threadgroup
// memory and are added in their order. Order depends on shapes alone: same input, same bits.

struct ColumnSumParams {
    uint parts;
    uint columns;
};

KERNEL(column_sum, DEVICE const float* partial, DEVICE T* total, PARAM(ColumnSumParams, p)) {
    TG_ARRAY(float, strips, SIMDGROUP_SIZE * STRIPS);
    const uint column = TG_POS.x * SIMDGROUP_SIZE + LANE;
    float sum = 0.0f;
    if (column < p.columns) {
        for (uint part = SIMD_ID; part < p.parts; part += STRIPS) sum += partial[ulong(part) * p.columns + column];
    }
    strips[SIMD_ID * SIMDGROUP_SIZE + LANE] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (SIMD_ID == 0u && column < p.columns) {
        for (uint strip = 1u; strip < STRIPS; strip++) sum += strips[strip * SIMDGROUP_SIZE + LANE];
        total[column] = from_f32<T>(sum);
    }
}
