// The dialect on CUDA: C++ for NVRTC, with no header and no include path.
// Every word is explained in docs/kernel-dialect.md.
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long long ulong;

// ---- places: CUDA's pointers are generic ----
// Upper case everywhere: a lower-case `#define device` would break __device__, a macro itself.
#define DEVICE
#define THREADGROUP
#define THREAD

// ---- declarations ----
#define DEVFN __device__ __forceinline__
#define KERNEL(name, ...) extern "C" __global__ void name(__VA_ARGS__)
#define PARAM(Struct, name) const Struct name
#define TG_ARRAY(Type, name, count) __shared__ Type name[count]
typedef long long INT64;
#define SIMDGROUP_SIZE 32u
#define UNROLL _Pragma("unroll")
#define INFINITY __int_as_float(0x7f800000)

// ---- positions: threadgroups lie along x, and are whole simdgroups ----
#define TG_POS blockIdx
#define TID threadIdx
#define TG_SIZE blockDim
#define LANE (threadIdx.x % SIMDGROUP_SIZE)
#define SIMD_ID (threadIdx.x / SIMDGROUP_SIZE)
#define N_SIMD (blockDim.x / SIMDGROUP_SIZE)

// ---- barriers and simdgroup operations ----
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
#define threadgroup_barrier(flags) __syncthreads()
// The butterfly leaves the same bits in every lane: a + b and b + a are equal.
#define SIMD_BUTTERFLY(v, combined)                                        \
    for (uint mask = SIMDGROUP_SIZE / 2u; mask != 0u; mask /= 2u) {         \
        const auto other = __shfl_xor_sync(0xffffffffu, v, int(mask));      \
        v = combined;                                                       \
    }                                                                       \
    return v;
DEVFN float simd_sum(float v) { SIMD_BUTTERFLY(v, v + other) }
DEVFN uint simd_sum(uint v) { SIMD_BUTTERFLY(v, v + other) }
DEVFN float simd_max(float v) { SIMD_BUTTERFLY(v, fmaxf(v, other)) }
DEVFN uint simd_min(uint v) { SIMD_BUTTERFLY(v, v < other ? v : other) }

// ---- arithmetic ----
DEVFN uint mulhi(uint a, uint b) { return __umulhi(a, b); }
namespace precise {
DEVFN float exp(float v) { return expf(v); }
DEVFN float exp2(float v) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(v));
    return power;
}
DEVFN float log(float v) { return logf(v); }
DEVFN float sqrt(float v) { return sqrtf(v); }
}  // namespace precise
template <typename To> DEVFN To as_type(uint v);
template <> DEVFN float as_type<float>(uint v) { return __uint_as_float(v); }
template <typename To> DEVFN To as_type(float v);
template <> DEVFN uint as_type<uint>(float v) { return __float_as_uint(v); }

// ---- storage types: memory holds them, arithmetic is in float ----
struct half {
    ushort bits;
    half() = default;
    __device__ explicit half(float v) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v)); }
};
struct bfloat {
    ushort bits;
    bfloat() = default;
    __device__ explicit bfloat(float v) {
#if __CUDA_ARCH__ >= 800
        uint pair;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(0.0f), "f"(v));
        bits = ushort(pair);
#else
        const uint u = __float_as_uint(v);
        const uint rounded = u + 0x7fffu + ((u >> 16) & 1u);
        bits = (u & 0x7fffffffu) > 0x7f800000u ? ushort((u >> 16) | 0x40u) : ushort(rounded >> 16);
#endif
    }
};
DEVFN float to_f32(float v) { return v; }
DEVFN float to_f32(half v) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
    return f;
}
DEVFN float to_f32(bfloat v) { return __uint_as_float(uint(v.bits) << 16); }
template <typename U> DEVFN U from_f32(float v) { return U(v); }

// Two 16-bit values in one word, the lower address in the lower half.
DEVFN float2 unpack2(uint word, half) {
    float2 pair;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(pair.x), "=f"(pair.y) : "r"(word));
    return pair;
}
DEVFN float2 unpack2(uint word, bfloat) {
    float2 pair;
    pair.x = __uint_as_float(word << 16);
    pair.y = __uint_as_float(word & 0xffff0000u);
    return pair;
}
#if __CUDA_ARCH__ >= 800
DEVFN uint pack2(float low, float high, half) {
    uint word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
DEVFN uint pack2(float low, float high, bfloat) {
    uint word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
#else
template <typename U> DEVFN uint pack2(float low, float high, U) {
    return uint(U(low).bits) | (uint(U(high).bits) << 16);
}
#endif

// ---- 16 bytes at an address that is a multiple of 16 ----
template <typename U> DEVFN uint4 vector_load(DEVICE const U* p) { return *(const uint4*)p; }
template <typename U> DEVFN void vector_store(DEVICE U* p, uint4 v) { *(uint4*)p = v; }

// ---- tiles: 16 × 16 values that a simdgroup holds, as the matrix units of sm_80 and later take them ----
#if __CUDA_ARCH__ >= 800
#define TILE 16u
template <typename U> struct TileLeft { uint words[4]; };
template <typename U> struct TileRight { uint words[4]; };
struct TileSum { float values[8]; };
DEVFN uint tile_row(uint lane) { return lane / 4u; }
DEVFN uint tile_column(uint lane) { return lane % 4u * 2u; }
DEVFN float tile_row_sum(float v) {
    v += __shfl_xor_sync(0xffffffffu, v, 1);
    return v + __shfl_xor_sync(0xffffffffu, v, 2);
}
DEVFN float tile_row_max(float v) {
    v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
    return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}
// Four 8 × 8 matrices, whose rows are at the addresses that lanes 0 to 7, 8 to 15, 16 to 23 and 24 to 31 give.
DEVFN void tile_matrices(uint* words, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "r"(uint(__cvta_generic_to_shared(row))) : "memory");
}
DEVFN void tile_matrices_transposed(uint* words, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "r"(uint(__cvta_generic_to_shared(row))) : "memory");
}
template <typename U> DEVFN void tile_load_left(TileLeft<U>& tile, const U* from, uint stride, uint rows, uint lane) {
    for (uint i = 0u; i < 4u; i++) {
        const uint row = tile_row(lane) + i % 2u * 8u;
        const U* pair = from + ulong(row) * stride + tile_column(lane) + i / 2u * 8u;
        tile.words[i] = row < rows ? *(const uint*)pair : 0u;
    }
}
template <typename U> DEVFN void tile_load_right(TileRight<U>& tile, const U* from, uint stride, uint lane) {
    tile_matrices_transposed(tile.words, from + lane % 16u * stride + lane / 16u * 8u);
}
template <typename U> DEVFN void tile_load_right_transposed(TileRight<U>& tile, const U* from, uint stride, uint lane) {
    tile_matrices(tile.words, from + (lane % 8u + lane / 16u * 8u) * stride + lane / 8u % 2u * 8u);
}
template <typename U> DEVFN void tile_round_left(TileLeft<U>& tile, const TileSum& sum) {
    tile.words[0] = pack2(sum.values[0], sum.values[1], U());
    tile.words[1] = pack2(sum.values[4], sum.values[5], U());
    tile.words[2] = pack2(sum.values[2], sum.values[3], U());
    tile.words[3] = pack2(sum.values[6], sum.values[7], U());
}
#define TILE_MULTIPLY(type)                                                                                    \
    for (uint side = 0u; side < 2u; side++) {                                                                  \
        float* upper = sum.values + 2u * side;                                                                 \
        float* lower = upper + 4u;                                                                             \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, " \
            "{%8, %9}, {%0, %1, %2, %3};"                                                                      \
            : "+f"(upper[0]), "+f"(upper[1]), "+f"(lower[0]), "+f"(lower[1])                                   \
            : "r"(left.words[0]), "r"(left.words[1]), "r"(left.words[2]), "r"(left.words[3]),                  \
              "r"(right.words[2u * side]), "r"(right.words[2u * side + 1u]));                                  \
    }
DEVFN void tile_multiply(TileSum& sum, const TileLeft<half>& left, const TileRight<half>& right) { TILE_MULTIPLY("f16") }
DEVFN void tile_multiply(TileSum& sum, const TileLeft<bfloat>& left, const TileRight<bfloat>& right) {
    TILE_MULTIPLY("bf16")
}
#endif
