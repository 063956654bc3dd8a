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
