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
