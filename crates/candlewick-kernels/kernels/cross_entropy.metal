// Cross-entropy of logits [n, v] against target classes [n]: mean over counted rows, forward and backward.
//
//   lse   = log Σ exp(x)
//   loss  = Σ_counted (lse − x[target]) / counted
//   dx    = (exp(x − lse) − [column = target]) · g / counted          0 in rows that do not count
//
// Memory. Forward reads the logits once, whatever the vocabulary: each thread carries a maximum and a sum of
// exponentials relative to it, and threads combine theirs at the end. It leaves lse in two numbers a row, the maximum
// and the sum of exp(x − maximum): in one, a large maximum would swallow the logarithm of the sum. Backward reads the
// logits once and writes the gradient once; no softmax is ever stored.
//
// The mean is taken by one threadgroup in a second launch: the order of additions depends on n alone, so the same
// input gives the same bits. A target beyond the vocabulary is never used as an address: the row counts for
// nothing, the first such row's number is left in `invalid`, for a host that waits to report (NO_ROW: there is none),
// and the loss is NaN, for one that does not.
//
// Targets are read as 64-bit or 32-bit integers, by TARGET.

struct CrossEntropyParams {
    uint rows;
    uint columns;
    uint ignore_low;  // the class that does not count, as two halves of 64 bits
    uint ignore_high;
    uint ignoring;    // 0: there is none
};

#define LOWEST -3.402823466e+38f
#define NO_ROW 0xffffffffu

DEVFN bool is_ignored(INT64 target, uint ignoring, uint low, uint high) {
    return ignoring != 0u && target == INT64((ulong(high) << 32) | low);
}

DEVFN bool is_class(INT64 target, uint columns) { return target >= 0 && target < INT64(columns); }

KERNEL(cross_entropy_rows, DEVICE const T* logits, DEVICE const TARGET* targets, DEVICE float* lse,
       DEVICE float* losses, PARAM(CrossEntropyParams, p)) {
    TG_ARRAY(float, scratch, ROW_SCRATCH);
    Team team = {scratch, LANE, SIMD_ID, 0u};
    const uint row = team_index(team, TG_POS.x, N_SIMD);
    if (row >= p.rows) return;
    DEVICE const T* logits_row = logits + ulong(row) * p.columns;

    float largest = LOWEST;
    float sum = 0.0f;
    for (uint k = 0u; k < row_chunks(p.columns); k++) {
        const uint column = chunk_column(team, k);
        if (column >= p.columns) continue;
        float x[WIDTH];
        load_chunk(logits_row + column, x);
        const float before = largest;
        for (uint i = 0u; i < WIDTH; i++) largest = fmax(largest, x[i]);
        sum *= precise::exp(before - largest);
        for (uint i = 0u; i < WIDTH; i++) sum += precise::exp(x[i] - largest);
    }
    const float own = largest;
    largest = row_max(team, largest);
    sum = row_sum(team, sum * precise::exp(own - largest));
    if (chunk_column(team, 0u) == 0u) {
        const INT64 target = INT64(targets[row]);
        const bool ignored = is_ignored(target, p.ignoring, p.ignore_low, p.ignore_high);
        const bool counted = is_class(target, p.columns) && !ignored;
        lse[ulong(row) * 2u] = largest;
        lse[ulong(row) * 2u + 1u] = sum;
        losses[row] = counted ? precise::log(sum) - (to_f32(logits_row[uint(target)]) - largest) : 0.0f;
    }
}

KERNEL(cross_entropy_mean, DEVICE const float* losses, DEVICE const TARGET* targets, DEVICE float* loss,
       DEVICE float* counted, DEVICE uint* invalid, PARAM(CrossEntropyParams, p)) {
    TG_ARRAY(float, scratch, ROW_SCRATCH);
    TG_ARRAY(uint, counts, SIMDGROUP_SIZE);
    TG_ARRAY(uint, firsts, SIMDGROUP_SIZE);
    Team team = {scratch, LANE, SIMD_ID, 0u};
    float sum = 0.0f;
    uint count = 0u;
    uint first_invalid = NO_ROW;
    for (uint row = TID.x; row < p.rows; row += ROW_THREADS) {
        const INT64 target = INT64(targets[row]);
        if (is_ignored(target, p.ignoring, p.ignore_low, p.ignore_high)) continue;
        if (is_class(target, p.columns)) {
            sum += losses[row];
            count += 1u;
        } else if (row < first_invalid) {
            first_invalid = row;
        }
    }
    sum = row_sum(team, sum);
    count = simd_sum(count);
    first_invalid = simd_min(first_invalid);
    if (LANE == 0u) {
        counts[SIMD_ID] = count;
        firsts[SIMD_ID] = first_invalid;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (TID.x == 0u) {
        for (uint i = 1u; i < uint(ROW_SIMDGROUPS); i++) {
            count += counts[i];
            if (firsts[i] < first_invalid) first_invalid = firsts[i];
        }
        const float mean = count == 0u ? 0.0f : sum / float(count);
        loss[0] = first_invalid == NO_ROW ? mean : as_type<float>(0x7fc00000u);
        counted[0] = float(count);
        invalid[0] = first_invalid;
    }
}

KERNEL(cross_entropy_backward, DEVICE const T* logits, DEVICE const TARGET* targets, DEVICE const float* lse,
       DEVICE const float* counted, DEVICE const float* grad, DEVICE T* grad_logits, PARAM(CrossEntropyParams, p)) {
    TG_ARRAY(float, scratch, ROW_SCRATCH);
    const Team team = {scratch, LANE, SIMD_ID, 0u};
    const uint row = team_index(team, TG_POS.x, N_SIMD);
    if (row >= p.rows) return;
    const ulong start = ulong(row) * p.columns;
    const INT64 target = INT64(targets[row]);
    const bool counts = is_class(target, p.columns) && !is_ignored(target, p.ignoring, p.ignore_low, p.ignore_high);
    const float factor = counts ? grad[0] / counted[0] : 0.0f;
    const float largest = lse[ulong(row) * 2u];
    const float share = factor / lse[ulong(row) * 2u + 1u];
    for (uint k = 0u; k < row_chunks(p.columns); k++) {
        const uint column = chunk_column(team, k);
        if (column >= p.columns) continue;
        float x[WIDTH];
        if (counts) {
            load_chunk(logits + start + column, x);
            for (uint i = 0u; i < WIDTH; i++) {
                const float hit = column + i == uint(target) ? 1.0f : 0.0f;
                x[i] = precise::exp(x[i] - largest) * share - hit * factor;
            }
        } else {
            for (uint i = 0u; i < WIDTH; i++) x[i] = 0.0f;
        }
        store_chunk(grad_logits + start + column, x);
    }
}
