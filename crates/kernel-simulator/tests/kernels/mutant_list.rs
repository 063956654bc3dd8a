//! The planted bugs, by the file they are planted in.

use crate::mutants::{Change, Mutant, Shown};
use candlewick_kernels::Plan;
use kernel_simulator::Kind;

const fn text(
    shown_by: Shown,
    name: &'static str,
    kinds: &'static [Kind],
    from: &'static str,
    to: &'static str,
) -> Mutant {
    Mutant { name, shown_by, change: Change::Text(from, to), kinds }
}

const fn plan(shown_by: Shown, name: &'static str, kinds: &'static [Kind], change: fn(&mut Plan)) -> Mutant {
    Mutant { name, shown_by, change: Change::Plan(change), kinds }
}

const RACE: &[Kind] = &[Kind::Race];
const GRID_RACE: &[Kind] = &[Kind::GridRace];
const ANY_RACE: &[Kind] = &[Kind::Race, Kind::GridRace];
const OUT_OF_BOUNDS: &[Kind] = &[Kind::OutOfBounds];
const UNINITIALISED: &[Kind] = &[Kind::Uninitialised];
const UNWRITTEN: &[Kind] = &[Kind::Unwritten];
const WRITE_TO_INPUT: &[Kind] = &[Kind::WriteToInput];
const DIVERGENT_BARRIER: &[Kind] = &[Kind::DivergentBarrier];
const DIVERGENT_SIMD: &[Kind] = &[Kind::DivergentSimd];
const MISALIGNED: &[Kind] = &[Kind::Misaligned];
const LIMIT: &[Kind] = &[Kind::Limit];

#[rustfmt::skip]
pub const MUTANTS: &[Mutant] = &[
    // ---- common/row.h ----
    text(Shown::RmsNorm, "row_sums: no barrier before the sums are read", RACE,
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n    for (uint i = 0u; i < COUNT", "for (uint i = 0u; i < COUNT"),
    text(Shown::RmsNorm, "row_sums: a barrier that orders nothing", RACE,
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n    for (uint i = 0u; i < COUNT",
        "threadgroup_barrier(mem_flags::mem_none);\n    for (uint i = 0u; i < COUNT"),
    text(Shown::RmsNorm, "row_sums: a barrier that orders the wrong memory", RACE,
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n    for (uint i = 0u; i < COUNT",
        "threadgroup_barrier(mem_flags::mem_device);\n    for (uint i = 0u; i < COUNT"),
    text(Shown::Softmax, "next_place: the same place again", RACE, "team.turn ^= 1u;", ""),
    text(Shown::Softmax, "next_place: beyond the scratch", OUT_OF_BOUNDS, "team.turn ^= 1u;", "team.turn += 2u;"),
    text(Shown::RmsNorm, "row_sums: one simdgroup more is added", UNINITIALISED, "s < ROW_SIMDGROUPS; s++) sums", "s <= ROW_SIMDGROUPS; s++) sums"),
    text(Shown::RmsNorm, "row_sums: every lane writes its simdgroup's sums", RACE,
        "if (team.lane == 0u) {\n        for (uint i = 0u; i < COUNT", "{\n        for (uint i = 0u; i < COUNT"),
    text(Shown::RmsNorm, "row_sums: written beyond the scratch", OUT_OF_BOUNDS,
        "place[i * ROW_SIMDGROUPS + team.simdgroup] =", "place[i * ROW_SIMDGROUPS + team.simdgroup * 50u] ="),
    text(Shown::Softmax, "row_max: a barrier for the first simdgroup only", DIVERGENT_BARRIER,
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n    for (uint s = 0u",
        "if (team.simdgroup == 0u) threadgroup_barrier(mem_flags::mem_threadgroup);\n    for (uint s = 0u"),
    text(Shown::RmsNorm, "row_sums: a barrier for the first lanes only", DIVERGENT_SIMD,
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n    for (uint i = 0u; i < COUNT",
        "if (team.lane == 0u) threadgroup_barrier(mem_flags::mem_threadgroup);\n    for (uint i = 0u; i < COUNT"),
    text(Shown::RmsNorm, "row_sums: a simd operation for some lanes only", DIVERGENT_SIMD,
        "sums[i] = simd_sum(sums[i]);", "if (team.lane < 7u) sums[i] = simd_sum(sums[i]);"),
    text(Shown::Softmax, "row_max: no barrier before the maxima are read", RACE,
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n    for (uint s = 0u", "for (uint s = 0u"),

    // ---- common/chunk.h ----
    text(Shown::RmsNorm, "load_chunk: one element further", MISALIGNED, "vector_load(from + i)", "vector_load(from + i + 1u)"),
    text(Shown::Softmax, "store_chunk: one vector further", OUT_OF_BOUNDS, "vector_store(to + i, v)", "vector_store(to + i + 4u, v)"),

    // ---- rms_norm.metal ----
    text(Shown::RmsNormManyRows, "rows beyond the last", OUT_OF_BOUNDS, "if (row >= p.rows) return;", ""),
    text(Shown::RmsNorm, "columns beyond the last are scaled", OUT_OF_BOUNDS,
        "if (column >= p.columns) continue;\n        THREAD float* chunk", "THREAD float* chunk"),
    text(Shown::RmsNorm, "columns beyond the last are loaded", OUT_OF_BOUNDS, "if (column < columns) packed[k] =", "packed[k] ="),
    text(Shown::RmsNorm, "the result goes where x came from", WRITE_TO_INPUT,
        "store_chunk(y_row + column, chunk)", "store_chunk((DEVICE T*)x_row + column, chunk)"),
    text(Shown::RmsNorm, "every row goes to the first", GRID_RACE,
        "DEVICE T* y_row = y + ulong(row) * p.columns", "DEVICE T* y_row = y"),
    text(Shown::RmsNorm, "a chunk is left out", UNWRITTEN,
        "store_chunk(y_row + column, chunk)", "if (column != 400u) store_chunk(y_row + column, chunk)"),
    text(Shown::RmsNormBackward, "a row that never ends", &[Kind::Endless], "row += p.teams", "row += 0u"),
    text(Shown::RmsNormBackward, "all teams share a partial row", GRID_RACE, "partial + ulong(first) * p.columns", "partial"),
    text(Shown::RmsNormWalkedBackward, "partial sums that start with nothing", UNINITIALISED,
        "row == first ? kept[i] : partial_row[column + i] + kept[i]", "partial_row[column + i] + kept[i]"),
    text(Shown::RmsNormBackward, "the sums of the weight go to the wrong stretch", OUT_OF_BOUNDS,
        "store_chunk(partial_row + column,", "store_chunk(partial_row + p.columns + column,"),
    text(Shown::RmsNormBackward, "the weight's partial sums are not stored", UNINITIALISED,
        "if (column < p.columns) store_chunk(partial_row", "if (column < p.columns / 2u) store_chunk(partial_row"),

    // ---- column_sum.metal ----
    text(Shown::RmsNormWalkedBackward, "column_sum: no barrier", RACE,
        "= sum;\n    threadgroup_barrier(mem_flags::mem_threadgroup);", "= sum;"),
    text(Shown::RmsNormBackward, "column_sum: columns beyond the last are read", OUT_OF_BOUNDS,
        "if (column < p.columns) {\n        for (uint first", "{\n        for (uint first"),
    text(Shown::RmsNormBackward, "column_sum: columns beyond the last are written", OUT_OF_BOUNDS,
        "if (SIMD_ID == 0u && column < p.columns)", "if (SIMD_ID == 0u)"),
    text(Shown::RmsNormWalkedBackward, "column_sum: every simdgroup writes the total", RACE,
        "if (SIMD_ID == 0u && column < p.columns)", "if (column < p.columns)"),
    text(Shown::RmsNormBackward, "column_sum: too few strips", OUT_OF_BOUNDS,
        "TG_ARRAY(float, strips, SIMDGROUP_SIZE * STRIPS)", "TG_ARRAY(float, strips, SIMDGROUP_SIZE * (STRIPS - 1u))"),
    text(Shown::RmsNormBackward, "column_sum: a strip too many is added", OUT_OF_BOUNDS, "strip < STRIPS", "strip <= STRIPS"),

    // ---- softmax.metal ----
    text(Shown::Softmax, "threads without columns leave", DIVERGENT_SIMD,
        "    const uint visible = visible_columns(",
        "    if (chunk_column(team, 0u) >= p.columns) return;\n    const uint visible = visible_columns("),
    text(Shown::Softmax, "one helper, called in two branches", DIVERGENT_SIMD,
        "largest = row_max(team, largest);",
        "if (LANE % 2u == 0u) largest = row_max(team, largest); else largest = row_max(team, 2.0f * largest);"),
    text(Shown::SoftmaxBackward, "every row goes to the first", GRID_RACE, "grad_x + start + column", "grad_x + column"),
    text(Shown::SoftmaxBackward, "the gradient is read from the row after", OUT_OF_BOUNDS,
        "load_packed_row(team, grad + start, packed_grad", "load_packed_row(team, grad + start + p.columns, packed_grad"),

    // ---- layer_norm.metal ----
    text(Shown::LayerNorm, "columns beyond the last are loaded", OUT_OF_BOUNDS,
        "if (column < columns) packed[k] =", "packed[k] ="),
    text(Shown::LayerNormBackward, "columns beyond the last are loaded ahead", OUT_OF_BOUNDS,
        "if (column < columns) packed[k] =", "packed[k] ="),
    text(Shown::LayerNormBackward, "rows beyond the last are loaded ahead", OUT_OF_BOUNDS, "if (p.rows - row > p.teams)", "if (p.rows > 0u)"),
    text(Shown::LayerNormBackward, "four sums have the scratch of one", OUT_OF_BOUNDS,
        "#define ROW_SCRATCH (2u * 4u * SIMDGROUP_SIZE)", "#define ROW_SCRATCH 8u"),
    text(Shown::LayerNormBackward, "both column sums are one total", ANY_RACE, "? first_total : second_total", "? first_total : first_total"),
    text(Shown::LayerNorm, "the bias is read beyond its end", OUT_OF_BOUNDS, "load_chunk(bias + column, b)", "load_chunk(bias + column + 4u, b)"),
    text(Shown::LayerNormBackward, "the bias' partial sums go to the weight's", UNINITIALISED,
        "bias_row = bias_partial +", "bias_row = weight_partial +"),
    text(Shown::LayerNormBackward, "a private array is overrun", OUT_OF_BOUNDS, "bias_sums[held_at(k) + i] += g[i]", "bias_sums[held_at(k) + i + HELD] += g[i]"),
    text(Shown::LayerNorm, "too little scratch", OUT_OF_BOUNDS,
        "TG_ARRAY(float, scratch, ROW_SCRATCH);\n    Team team = {scratch, LANE, SIMD_ID, 0u};\n    const uint row",
        "TG_ARRAY(float, scratch, 4);\n    Team team = {scratch, LANE, SIMD_ID, 0u};\n    const uint row"),
    text(Shown::LayerNorm, "more scratch than the launch says", LIMIT,
        "TG_ARRAY(float, scratch, ROW_SCRATCH);\n    Team team = {scratch, LANE, SIMD_ID, 0u};\n    const uint row",
        "TG_ARRAY(float, scratch, ROW_SCRATCH + 1u);\n    Team team = {scratch, LANE, SIMD_ID, 0u};\n    const uint row"),
    text(Shown::LayerNorm, "more scratch than any device has", LIMIT,
        "TG_ARRAY(float, scratch, ROW_SCRATCH);\n    Team team = {scratch, LANE, SIMD_ID, 0u};\n    const uint row",
        "TG_ARRAY(float, scratch, 8193);\n    Team team = {scratch, LANE, SIMD_ID, 0u};\n    const uint row"),
    text(Shown::LayerNorm, "a division by zero", &[Kind::Undefined],
        "    const uint row = team_index(team, TG_POS.x, N_SIMD);", "    const uint row = team_index(team, TG_POS.x, N_SIMD) + 1u / (LANE / SIMDGROUP_SIZE);"),

    // ---- rope.metal ----
    text(Shown::Rope, "units beyond the last", OUT_OF_BOUNDS, "if (unit >= p.units) return;", ""),
    text(Shown::Rope, "the tables' rows are taken for longer", OUT_OF_BOUNDS, "ulong(position) * (p.rotary / 2u)", "ulong(position) * p.rotary"),
    text(Shown::Rope, "heads share their rows", ANY_RACE, "DEVICE T* y_row = y + ulong(row) * p.columns", "DEVICE T* y_row = y + ulong(position) * p.columns"),
    text(Shown::Rope, "the second half is not stored", UNWRITTEN, "store_chunk(y_row + high, z + WIDTH);", ""),
    text(Shown::Rope, "x is read one element further", MISALIGNED, "load_chunk(x_row + low, z);", "load_chunk(x_row + low + 1u, z);"),
    text(Shown::RopeInterleaved, "what passes through is lost", UNWRITTEN, "store_chunk(y_row + column, passing);", ""),
    text(Shown::RopeInterleaved, "each batch entry has the table after its own", OUT_OF_BOUNDS,
        "ulong(batch) * p.table_stride", "ulong(batch + 1u) * p.table_stride"),

    // ---- silu_mul.metal ----
    text(Shown::SiluMul, "one element after the tail", OUT_OF_BOUNDS,
        "if (thread_index < p.tail) {\n        const ulong at = ulong(p.chunks) * WIDTH + thread_index;\n        const float a = to_f32(gate[at]);",
        "if (thread_index <= p.tail) {\n        const ulong at = ulong(p.chunks) * WIDTH + thread_index;\n        const float a = to_f32(gate[at]);"),
    text(Shown::SiluMul, "one chunk after the last", OUT_OF_BOUNDS,
        "if (thread_index < p.chunks) {\n        const ulong at = ulong(thread_index) * WIDTH;\n        float a[WIDTH], u[WIDTH];",
        "if (thread_index <= p.chunks) {\n        const ulong at = ulong(thread_index) * WIDTH;\n        float a[WIDTH], u[WIDTH];"),
    text(Shown::SiluMul, "a tail that overlaps the last chunk", ANY_RACE, "        y[at] = from_f32<T>(", "        y[at - 1u] = from_f32<T>("),
    text(Shown::SiluMul, "a tail that is not written", UNWRITTEN, "        y[at] = from_f32<T>(", "        if (at == 0u) y[at] = from_f32<T>("),
    text(Shown::SiluMulBackward, "a gradient that goes where up came from", WRITE_TO_INPUT,
        "store_chunk(grad_up + at, g)", "store_chunk((DEVICE T*)up + at, g)"),
    text(Shown::SiluMulBackward, "both gradients go to one", ANY_RACE,
        "if (UP_GRAD) grad_up[at] =", "if (UP_GRAD) grad_up[at - 1u] ="),

    // ---- gelu_mul.metal ----
    text(Shown::GeluMulBackward, "the tail's gradient is not written", UNWRITTEN, "if (GATE_GRAD) grad_gate[at] =", "if (!GATE_GRAD) grad_gate[at] ="),
    text(Shown::GeluMulBackward, "the gradients are exchanged half-way", ANY_RACE, "store_chunk(grad_up + at, g)", "store_chunk(grad_gate + at, g); if (at > 0u) store_chunk(grad_gate + at - WIDTH, g)"),

    // ---- cross_entropy.metal ----
    text(Shown::CrossEntropy, "an ignored target is used as an address", OUT_OF_BOUNDS,
        "counted ? precise::log(sum) - (to_f32(logits_row[uint(target)]) - largest) : 0.0f",
        "precise::log(sum) - (to_f32(logits_row[uint(target)]) - largest)"),
    text(Shown::CrossEntropy, "every thread writes the row's result", RACE, "if (chunk_column(team, 0u) == 0u)", ""),
    text(Shown::CrossEntropy, "rows that do not count leave no lse", UNWRITTEN,
        "lse[ulong(row) * 2u] = largest;", "if (counted) lse[ulong(row) * 2u] = largest;"),
    text(Shown::CrossEntropy, "mean: no barrier before the counts are read", RACE,
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n    if (TID.x == 0u)", "if (TID.x == 0u)"),
    text(Shown::CrossEntropy, "mean: every lane writes the counts", RACE, "if (LANE == 0u) {\n        counts", "{\n        counts"),
    text(Shown::CrossEntropy, "mean: one simdgroup too many is counted", UNINITIALISED,
        "i < uint(ROW_SIMDGROUPS); i++) {\n            count", "i <= uint(ROW_SIMDGROUPS); i++) {\n            count"),
    text(Shown::CrossEntropyBackward, "rows that do not count get no gradient", UNWRITTEN,
        "store_chunk(grad_logits + start", "if (counts) store_chunk(grad_logits + start"),

    // ---- lora.metal ----
    text(Shown::Lora, "no barrier before the slices are added", RACE,
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n    for (uint i = simdgroup", "for (uint i = simdgroup"),
    text(Shown::Lora, "no barrier before S is used", RACE,
        "s[i] = sum * p.scale;\n    }\n    threadgroup_barrier(mem_flags::mem_threadgroup);", "s[i] = sum * p.scale;\n    }"),
    text(Shown::Lora, "a barrier that orders nothing before S is used", RACE,
        "s[i] = sum * p.scale;\n    }\n    threadgroup_barrier(mem_flags::mem_threadgroup);",
        "s[i] = sum * p.scale;\n    }\n    threadgroup_barrier(mem_flags::mem_none);"),
    text(Shown::Lora, "every lane writes the sum", RACE, "if (lane == 0u) s[", "s["),
    text(Shown::Lora, "too little room for S", OUT_OF_BOUNDS,
        "TG_ARRAY(float, s, SLICES * ROWS * RANK)", "TG_ARRAY(float, s, SLICES * ROWS * RANK - 1)"),
    text(Shown::Lora, "a lane stays out of a simd operation", DIVERGENT_SIMD,
        "const float sum = simd_sum(sums", "const float sum = lane == 31u ? 0.0f : simd_sum(sums"),
    text(Shown::Lora, "x beyond its columns", OUT_OF_BOUNDS, "column < p.inputs; column", "column <= p.inputs; column"),
    text(Shown::Lora, "y beyond its columns", OUT_OF_BOUNDS, "if (column >= p.outputs) continue;", ""),
    text(Shown::Lora, "B beyond its columns", OUT_OF_BOUNDS, "if (UPDATE && column < p.outputs)", "if (UPDATE)"),
    text(Shown::LoraBackward, "S is kept in the first rows only", ANY_RACE, "kept[ulong(first_row) * RANK + i]", "kept[i]"),

    // ---- lora_gradient.metal ----
    text(Shown::LoraBackward, "columns beyond the last", OUT_OF_BOUNDS, "if (column >= p.columns) return;", ""),
    text(Shown::LoraBackwardManyRows, "all parts share their sums", GRID_RACE, "partial + ulong(part) * RANK * p.columns", "partial"),
    text(Shown::LoraBackward, "tiles that begin at the second rank", &[Kind::Misaligned, Kind::OutOfBounds, Kind::Uninitialised], "first_rank = TG_POS.z * RANK_TILE;", "first_rank = TG_POS.z * RANK_TILE + 1u;"),

    // ---- adam.metal ----
    text(Shown::Adam, "the next moments share a place", &[Kind::Unwritten], "store_chunk(next_second + at, v)", "store_chunk(next_first + at, v)"),
    text(Shown::Adam, "the gradient takes the next value", WRITE_TO_INPUT, "store_chunk(next_value + at, x)", "store_chunk((DEVICE T*)gradient + at, x)"),

    // ---- add.metal ----
    text(Shown::Add, "the elements after the last chunk are left out", UNWRITTEN, "if (thread_index < p.tail)", "if (thread_index + 1u < p.tail)"),
    text(Shown::Add, "chunks beyond the last", OUT_OF_BOUNDS, "if (thread_index < p.chunks)", "if (thread_index <= p.chunks)"),

    // ---- common/attention.h ----
    text(Shown::Attention, "keys beyond the last are staged", OUT_OF_BOUNDS, "if (row < WALK && first + row < end)", "if (row < WALK)"),
    text(Shown::Attention, "queries beyond the last are loaded", OUT_OF_BOUNDS, "const uint rows = own < end ? end - own : 0u;", "const uint rows = TILE;"),
    text(Shown::Attention, "queries beyond the last are stored", OUT_OF_BOUNDS, "if (row >= end) continue;", ""),
    text(Shown::Attention, "vectors beyond the block", OUT_OF_BOUNDS, "if (row < WALK) to[", "to["),
    text(Shown::Attention, "staged rows that do not begin at vectors", MISALIGNED,
        "tile_load_right(rows, staged + i * TILE, STAGED_ROW, lane)", "tile_load_right(rows, staged + i * TILE + 4u, STAGED_ROW, lane)"),
    text(Shown::Attention, "a staged row is as long as a head", &[Kind::Uninitialised, Kind::OutOfBounds],
        "tile_load_right_transposed(rows, staged + i * TILE, STAGED_ROW, lane)",
        "tile_load_right_transposed(rows, staged + i * TILE, STAGED_ROW + 8u, lane)"),

    // ---- attention.metal ----
    text(Shown::Attention, "no barrier before a block is read", RACE,
        "stage(next_values, staged_values, TID.x);\n        threadgroup_barrier(mem_flags::mem_threadgroup);",
        "stage(next_values, staged_values, TID.x);"),
    text(Shown::Attention, "no barrier before the next block is staged", RACE,
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n        stage(next_keys", "stage(next_keys"),
    text(Shown::Attention, "a simdgroup without keys skips the barriers", DIVERGENT_BARRIER,
        "if (start >= visible_keys(p, own + TILE)) continue;", "if (start >= visible_keys(p, own + TILE)) break;"),
    text(Shown::Attention, "lanes above the mask stay out of the maximum", DIVERGENT_SIMD,
        "larger[side] = fmax(tile_row_max(larger[side]) * scale, largest[side]);",
        "if (tile_column(LANE) < 4u) larger[side] = fmax(tile_row_max(larger[side]) * scale, largest[side]);"),
    text(Shown::Attention, "every lane of a row writes its logarithm", RACE,
        "if (tile_column(LANE) == 0u && row < p.queries)", "if (row < p.queries)"),
    text(Shown::Attention, "the last query has no logarithm", UNWRITTEN,
        "if (tile_column(LANE) == 0u && row < p.queries)", "if (tile_column(LANE) == 0u && row + 1u < p.queries)"),

    // ---- attention_backward.metal ----
    text(Shown::AttentionBackward, "rows beyond the last are multiplied", OUT_OF_BOUNDS, "if (query >= p.queries) return;", ""),
    text(Shown::AttentionBackward, "no barrier before keys are read", RACE,
        "stage(next_values, staged_values, TID.x);\n        threadgroup_barrier(mem_flags::mem_threadgroup);",
        "stage(next_values, staged_values, TID.x);"),
    text(Shown::AttentionBackward, "no barrier before the next queries are staged", RACE,
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n        stage(next_queries", "stage(next_queries"),
    text(Shown::AttentionBackward, "logarithms beyond the last query", OUT_OF_BOUNDS, "exists ? logarithms[row] : INFINITY", "logarithms[row]"),
    text(Shown::AttentionBackward, "the gradients of keys and values share a place", &[Kind::Unwritten, Kind::Race],
        "store_sums(of_values, ones, grad_v + to", "store_sums(of_values, ones, grad_k + to"),
    plan(Shown::AttentionBackward, "the products of rows come last", UNINITIALISED, |plan| plan.launches.rotate_left(1)),

    // ---- launches ----
    plan(Shown::RmsNorm, "threads that do not fill a simdgroup", LIMIT, |plan| plan.launches[0].threads = 48),
    plan(Shown::RmsNorm, "more threads than any device has", LIMIT, |plan| plan.launches[0].threads = 2048),
    plan(Shown::RmsNorm, "no threadgroup memory", LIMIT, |plan| plan.launches[0].threadgroup_bytes = 0),
    plan(Shown::RmsNorm, "more threadgroup memory than any device has", LIMIT, |plan| plan.launches[0].threadgroup_bytes = 40_000),
    plan(Shown::RmsNorm, "an empty grid", LIMIT, |plan| plan.launches[0].threadgroups[1] = 0),
    plan(Shown::RmsNorm, "a grid too small", UNWRITTEN, |plan| plan.launches[0].threadgroups[0] -= 1),
    plan(Shown::RmsNorm, "every row twice", GRID_RACE, |plan| plan.launches[0].threadgroups[1] = 2),
    plan(Shown::RmsNorm, "an argument is missing", LIMIT, |plan| plan.launches[0].arguments.truncate(2)),
    plan(Shown::RmsNorm, "a parameter is missing", LIMIT, |plan| plan.launches[0].params.truncate(12)),
    plan(Shown::RmsNorm, "x and the weight are exchanged", OUT_OF_BOUNDS, |plan| plan.launches[0].arguments.swap(0, 1)),
    plan(Shown::RmsNorm, "x and y are exchanged", UNINITIALISED, |plan| plan.launches[0].arguments.swap(0, 2)),
    plan(Shown::RmsNormBackward, "the second stage comes first", UNINITIALISED, |plan| plan.launches.swap(0, 1)),
    plan(Shown::RmsNormBackward, "the second stage is missing", UNWRITTEN, |plan| plan.launches.truncate(1)),

    // ---- lora_mask.metal ----
    text(Shown::LoraMask, "chunks beyond the last", OUT_OF_BOUNDS, "if (chunk_index >= p.chunks) return;", ""),
    text(Shown::LoraMask, "every second chunk", UNWRITTEN, "if (chunk_index >= p.chunks) return;", "if (chunk_index >= p.chunks || chunk_index % 2u == 1u) return;"),
    text(Shown::LoraMask, "the mask goes where x came from", WRITE_TO_INPUT, "store_chunk(y + at, values)", "store_chunk((DEVICE T*)x + at, values)"),
];
