// The dialect on Metal: Metal Shading Language 3.1, handed as text to newLibraryWithSource.
// Every word is explained in docs/kernel-dialect.md. Compile with fast math off: it makes exp(-INFINITY) non-zero.
#include <metal_stdlib>
using namespace metal;

// ---- places ----
#define DEVICE device
#define THREADGROUP threadgroup
#define THREAD thread

// ---- declarations ----
#define DEVFN static inline
// Positions are hidden arguments; all are uint3 because Metal wants equal vector widths.
// Buffers take their indices from the order of declaration, the PARAM struct's comes last.
#define KERNEL(name, ...) kernel void name(__VA_ARGS__, \
    uint3 TG_POS [[threadgroup_position_in_grid]], uint3 TID [[thread_position_in_threadgroup]], \
    uint3 TG_SIZE [[threads_per_threadgroup]], uint LANE [[thread_index_in_simdgroup]], \
    uint SIMD_ID [[simdgroup_index_in_threadgroup]], uint N_SIMD [[simdgroups_per_threadgroup]])
#define PARAM(Struct, name) constant Struct& name
#define TG_ARRAY(Type, name, count) threadgroup Type name[count]
typedef long INT64;
#define SIMDGROUP_SIZE 32u
#define UNROLL _Pragma("clang loop unroll(full)")

// ---- storage types: memory holds them, arithmetic is in float ----
DEVFN float to_f32(float v) { return v; }
DEVFN float to_f32(half v) { return float(v); }
DEVFN float to_f32(bfloat v) { return float(v); }
template <typename U> DEVFN U from_f32(float v) { return U(v); }

// Two 16-bit values in one word, the lower address in the lower half.
DEVFN float2 unpack2(uint word, half) {
    const half2 stored = as_type<half2>(word);
    float2 pair;
    pair.x = float(stored.x);
    pair.y = float(stored.y);
    return pair;
}
DEVFN float2 unpack2(uint word, bfloat) {
    float2 pair;
    pair.x = as_type<float>(word << 16);
    pair.y = as_type<float>(word & 0xffff0000u);
    return pair;
}
DEVFN uint pack2(float low, float high, half) {
    half2 stored;
    stored.x = half(low);
    stored.y = half(high);
    return as_type<uint>(stored);
}
DEVFN uint pack2(float low, float high, bfloat) {
    return uint(as_type<ushort>(bfloat(low))) | (uint(as_type<ushort>(bfloat(high))) << 16);
}

// ---- 16 bytes at an address that is a multiple of 16 ----
template <typename U> DEVFN uint4 vector_load(DEVICE const U* p) { return *(DEVICE const uint4*)p; }
template <typename U> DEVFN void vector_store(DEVICE U* p, uint4 v) { *(DEVICE uint4*)p = v; }

// ---- tiles: 16 × 16 values that a simdgroup holds, four of its 8 × 8 matrices ----
// A lane holds two neighbours of a row of each matrix: the value 4i + 2j + c is row 8i, column 8j + c after its first.
#define TILE 16u
template <typename U> struct TileLeft { U values[8]; };
template <typename U> struct TileRight { U values[8]; };
struct TileSum { float values[8]; };
DEVFN uint tile_row(uint lane) { return (lane / 4u & 4u) + lane / 2u % 4u; }
DEVFN uint tile_column(uint lane) { return (lane / 4u & 2u) * 2u + lane % 2u * 2u; }
DEVFN float tile_row_sum(float v) {
    v += simd_shuffle_xor(v, ushort(1));
    return v + simd_shuffle_xor(v, ushort(8));
}
DEVFN float tile_row_max(float v) {
    v = fmax(v, simd_shuffle_xor(v, ushort(1)));
    return fmax(v, simd_shuffle_xor(v, ushort(8)));
}
template <typename U>
DEVFN void tile_load_left(thread TileLeft<U>& tile, device const U* from, uint stride, uint rows, uint lane) {
    for (uint e = 0u; e < 8u; e++) {
        const uint row = tile_row(lane) + e / 4u * 8u;
        tile.values[e] = row < rows ? from[ulong(row) * stride + tile_column(lane) + e / 2u % 2u * 8u + e % 2u] : U(0.0f);
    }
}
template <typename U>
DEVFN void tile_values(thread U* values, threadgroup const U* from, uint row_stride, uint column_stride, uint lane) {
    threadgroup const U* first = from + tile_row(lane) * row_stride + tile_column(lane) * column_stride;
    for (uint e = 0u; e < 8u; e++) {
        values[e] = first[e / 4u * 8u * row_stride + (e / 2u % 2u * 8u + e % 2u) * column_stride];
    }
}
template <typename U>
DEVFN void tile_load_right(thread TileRight<U>& tile, threadgroup const U* from, uint stride, uint lane) {
    tile_values(tile.values, from, stride, 1u, lane);
}
template <typename U>
DEVFN void tile_load_right_transposed(thread TileRight<U>& tile, threadgroup const U* from, uint stride, uint lane) {
    tile_values(tile.values, from, 1u, stride, lane);
}
template <typename U> DEVFN void tile_round_left(thread TileLeft<U>& tile, thread const TileSum& sum) {
    for (uint e = 0u; e < 8u; e++) tile.values[e] = U(sum.values[e]);
}
template <typename U> DEVFN void tile_matrix(thread simdgroup_matrix<U, 8, 8>& matrix, thread const U* pair) {
    matrix.thread_elements()[0] = pair[0];
    matrix.thread_elements()[1] = pair[1];
}
template <typename U>
DEVFN void tile_multiply(thread TileSum& sum, thread const TileLeft<U>& left, thread const TileRight<U>& right) {
    for (uint i = 0u; i < 2u; i++) {
        for (uint j = 0u; j < 2u; j++) {
            thread float* pair = sum.values + 4u * i + 2u * j;
            simdgroup_matrix<float, 8, 8> total;
            tile_matrix(total, pair);
            for (uint k = 0u; k < 2u; k++) {
                simdgroup_matrix<U, 8, 8> a, b;
                tile_matrix(a, left.values + 4u * i + 2u * k);
                tile_matrix(b, right.values + 4u * k + 2u * j);
                simdgroup_multiply_accumulate(total, a, b, total);
            }
            pair[0] = total.thread_elements()[0];
            pair[1] = total.thread_elements()[1];
        }
    }
}
