// The dialect in the simulator: C++17 for the host's compiler (GCC or clang).
// Every word is explained in docs/kernel-dialect.md.
//
// The text is compiled with -fsanitize=thread but linked without that library: the simulator supplies the
// __tsan_* callbacks and so sees every load and store. What it cannot see that way, it is told through the
// functions of the next block. They are all this header and the simulator's runtime have to agree on.
// No header is included: hundreds of texts are compiled, and reading <cmath> takes longer than the rest.
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;  // glibc has exactly this
typedef __SIZE_TYPE__ size_t;
typedef __UINT32_TYPE__ uint32_t;

// A barrier may wait in any function: calls in two branches stay two places, and one call stays one.
#ifdef __clang__
#define SIMULATOR_ONE_PLACE __attribute__((nomerge, convergent))
#else
#define SIMULATOR_ONE_PLACE
#endif

extern "C" {
struct SimulatorContext {
    uint32_t threadgroup[3];  // TG_POS
    uint32_t thread[3];       // TID
    uint32_t threads[3];      // TG_SIZE
    uint32_t lane;            // LANE
    uint32_t simdgroup;       // SIMD_ID
    uint32_t simdgroups;      // N_SIMD
};
enum SimulatorSimd {
    SIMULATOR_SUM_F32, SIMULATOR_SUM_U32, SIMULATOR_MAX_F32, SIMULATOR_MIN_U32, SIMULATOR_TILE_ROW_SUM, SIMULATOR_TILE_ROW_MAX
};
// One simdgroup operation: gives this lane's bits, returns this lane's result. All lanes must come to the same site.
SIMULATOR_ONE_PLACE uint32_t simulator_simd(uint32_t operation, uint32_t bits, const char* file, int line);
// sum += left · right of tiles, to which each lane gives its own 8 values. All lanes must come to the same site.
SIMULATOR_ONE_PLACE void simulator_tile_multiply(float* sum, const float* left, const float* right, const char* file, int line);
// A threadgroup barrier; flags: 1 device memory, 2 threadgroup memory.
SIMULATOR_ONE_PLACE void simulator_barrier(uint32_t flags, const char* file, int line);
// This threadgroup's array of that name. Called by every thread, in the same order.
void* simulator_threadgroup_array(size_t bytes, size_t align, const char* name, const char* file, int line);
// A vector access is about to happen: check the alignment. The access itself comes through __tsan_*.
void simulator_vector(const void* address, size_t bytes, uint32_t is_write, const char* file, int line);
// One call of fma().
void simulator_multiply(void);
}

// Each KERNEL exports simulator_kernel_<name>(arguments, context): arguments[i] points to the i-th buffer, the
// last to the bytes of the PARAM struct. simulator_kernel_<name>_signature holds the number of buffers and the size of
// that struct, to compare with the launch. A host that links several texts into one image may choose another name.
#ifndef SIMULATOR_KERNEL
#define SIMULATOR_KERNEL(name) simulator_kernel_##name
#endif
#define SIMULATOR_HIDDEN __attribute__((no_sanitize("thread")))
// Functions too small to appear in a call stack.
#define SIMULATOR_TINY static inline __attribute__((always_inline, unused))
#define SIMULATOR_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

struct float2 { float x, y; };
struct uint3 { uint x, y, z; };
struct alignas(16) uint4 { uint x, y, z, w; };

// ---- places ----
#define DEVICE
#define THREADGROUP
#define THREAD

// ---- declarations ----
#define DEVFN static inline __attribute__((unused)) SIMULATOR_ONE_PLACE
#define KERNEL(name, ...)                                                                          \
    static void name(const SimulatorContext& simulator_context, __VA_ARGS__);                      \
    extern "C" SIMULATOR_HIDDEN void SIMULATOR_KERNEL(name)(void** arguments,                       \
                                                           const SimulatorContext* context) {      \
        simulator::call(&name, arguments, *context);                                               \
    }                                                                                              \
    extern "C" {                                                                                   \
    extern const uint32_t SIMULATOR_KERNEL(name##_signature)[2];                                   \
    const uint32_t SIMULATOR_KERNEL(name##_signature)[2] = {                                       \
        simulator::Signature<decltype(&name)>::buffers, simulator::Signature<decltype(&name)>::param_bytes};  \
    }                                                                                              \
    static void name(const SimulatorContext& simulator_context, __VA_ARGS__)
#define PARAM(Struct, name) const Struct& name
#define TG_ARRAY(Type, name, count)                                              \
    Type(&name)[count] = *static_cast<Type(*)[count]>(simulator_threadgroup_array( \
        sizeof(Type) * (count), alignof(Type), #name, __FILE__, __LINE__))
typedef long long INT64;
#define SIMDGROUP_SIZE 32u
#define UNROLL

namespace simulator {
// A buffer argument is its address; the PARAM struct is copied onto the thread's own stack.
template <typename A> struct Argument;  // a kernel takes DEVICE pointers, then one PARAM(Struct, name)
template <typename E> struct Argument<E*> {
    SIMULATOR_HIDDEN static E* get(void* p) { return static_cast<E*>(p); }
};
template <typename S> struct Argument<const S&> {
    SIMULATOR_HIDDEN static S get(void* p) { return *static_cast<const S*>(p); }
};
template <size_t... I> struct Indices {};
template <size_t N, size_t... I> struct UpTo : UpTo<N - 1, N - 1, I...> {};
template <size_t... I> struct UpTo<0, I...> { typedef Indices<I...> type; };
template <typename... A, size_t... I>
SIMULATOR_HIDDEN static inline void call_with(void (*kernel)(const SimulatorContext&, A...), void** arguments,
                                              const SimulatorContext& context, Indices<I...>) {
    kernel(context, Argument<A>::get(arguments[I])...);
}
template <typename... A>
SIMULATOR_HIDDEN static inline void call(void (*kernel)(const SimulatorContext&, A...), void** arguments,
                                         const SimulatorContext& context) {
    const SimulatorContext own = context;
    call_with(kernel, arguments, own, typename UpTo<sizeof...(A)>::type());
}
template <typename A, typename... Rest> struct Last : Last<Rest...> {};
template <typename S> struct Last<const S&> { static constexpr uint32_t bytes = sizeof(S); };
template <typename Kernel> struct Signature;
template <typename... A> struct Signature<void (*)(const SimulatorContext&, A...)> {
    static constexpr uint32_t buffers = sizeof...(A) - 1;
    static constexpr uint32_t param_bytes = Last<A...>::bytes;
};
template <typename To, typename From> SIMULATOR_TINY To bits(From v) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    __builtin_memcpy(&to, &v, sizeof to);
    return to;
}
}  // namespace simulator

// ---- positions ----
#define TG_POS (uint3{simulator_context.threadgroup[0], simulator_context.threadgroup[1], simulator_context.threadgroup[2]})
#define TID (uint3{simulator_context.thread[0], simulator_context.thread[1], simulator_context.thread[2]})
#define TG_SIZE (uint3{simulator_context.threads[0], simulator_context.threads[1], simulator_context.threads[2]})
#define LANE (simulator_context.lane)
#define SIMD_ID (simulator_context.simdgroup)
#define N_SIMD (simulator_context.simdgroups)

// ---- barriers and simdgroup operations ----
enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
DEVFN mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }
DEVFN void threadgroup_barrier(mem_flags flags, SIMULATOR_SITE) { simulator_barrier(uint(flags), file, line); }
DEVFN float simd_sum(float v, SIMULATOR_SITE) {
    return simulator::bits<float>(simulator_simd(SIMULATOR_SUM_F32, simulator::bits<uint>(v), file, line));
}
DEVFN uint simd_sum(uint v, SIMULATOR_SITE) { return simulator_simd(SIMULATOR_SUM_U32, v, file, line); }
DEVFN float simd_max(float v, SIMULATOR_SITE) {
    return simulator::bits<float>(simulator_simd(SIMULATOR_MAX_F32, simulator::bits<uint>(v), file, line));
}
DEVFN uint simd_min(uint v, SIMULATOR_SITE) { return simulator_simd(SIMULATOR_MIN_U32, v, file, line); }

// ---- arithmetic ----
#define INFINITY __builtin_inff()
SIMULATOR_TINY float fma(float a, float b, float c) {
    simulator_multiply();
    return __builtin_fmaf(a, b, c);
}
SIMULATOR_TINY float fabs(float v) { return __builtin_fabsf(v); }
SIMULATOR_TINY float fmax(float a, float b) { return __builtin_fmaxf(a, b); }
SIMULATOR_TINY float fmin(float a, float b) { return __builtin_fminf(a, b); }
SIMULATOR_TINY uint mulhi(uint a, uint b) { return uint((ulong(a) * b) >> 32); }
namespace precise {
SIMULATOR_TINY float exp(float v) { return __builtin_expf(v); }
SIMULATOR_TINY float exp2(float v) { return __builtin_exp2f(v); }
SIMULATOR_TINY float log(float v) { return __builtin_logf(v); }
SIMULATOR_TINY float sqrt(float v) { return __builtin_sqrtf(v); }
}  // namespace precise
template <typename To, typename From> SIMULATOR_TINY To as_type(From v) { return simulator::bits<To>(v); }

// ---- storage types: memory holds them, arithmetic is in float ----
// GCC does not announce the copy of a struct from or to an argument or a result. A copy of `bits` it does.
struct half {
    ushort bits;
    half() = default;
    half(const half& other) : bits(other.bits) {}
    half& operator=(const half& other) { bits = other.bits; return *this; }
    explicit half(float v) : bits(simulator::bits<ushort>(static_cast<_Float16>(v))) {}
};
struct bfloat {
    ushort bits;
    bfloat() = default;
    bfloat(const bfloat& other) : bits(other.bits) {}
    bfloat& operator=(const bfloat& other) { bits = other.bits; return *this; }
    explicit bfloat(float v) {
        const uint u = simulator::bits<uint>(v);
        const uint rounded = u + 0x7fffu + ((u >> 16) & 1u);  // to the nearest, ties to even
        bits = (u & 0x7fffffffu) > 0x7f800000u ? ushort((u >> 16) | 0x40u) : ushort(rounded >> 16);
    }
};
SIMULATOR_TINY float to_f32(float v) { return v; }
SIMULATOR_TINY float to_f32(half v) { return float(simulator::bits<_Float16>(v.bits)); }
SIMULATOR_TINY float to_f32(bfloat v) { return simulator::bits<float>(uint(v.bits) << 16); }
template <typename U> SIMULATOR_TINY U from_f32(float v) { return U(v); }

// Two 16-bit values in one word, the lower address in the lower half.
template <typename U> SIMULATOR_TINY float2 unpack2(uint word, U) {
    return float2{to_f32(simulator::bits<U>(ushort(word))), to_f32(simulator::bits<U>(ushort(word >> 16)))};
}
template <typename U> SIMULATOR_TINY uint pack2(float low, float high, U) {
    return uint(U(low).bits) | (uint(U(high).bits) << 16);
}

// ---- 16 bytes at an address that is a multiple of 16 ----
template <typename U> DEVFN uint4 vector_load(DEVICE const U* p, SIMULATOR_SITE) {
    simulator_vector(p, sizeof(uint4), 0, file, line);
    return *reinterpret_cast<const uint4*>(p);
}
template <typename U> DEVFN void vector_store(DEVICE U* p, uint4 v, SIMULATOR_SITE) {
    simulator_vector(p, sizeof(uint4), 1, file, line);
    *reinterpret_cast<uint4*>(p) = v;
}

// ---- tiles: 16 × 16 values that a simdgroup holds; the lanes hold them as on Metal ----
#define TILE 16u
template <typename U> struct TileLeft { float values[8]; };
template <typename U> struct TileRight { float values[8]; };
struct TileSum { float values[8]; };
DEVFN uint tile_row(uint lane) { return (lane / 4u & 4u) + lane / 2u % 4u; }
DEVFN uint tile_column(uint lane) { return (lane / 4u & 2u) * 2u + lane % 2u * 2u; }
DEVFN float tile_row_sum(float v, SIMULATOR_SITE) {
    return simulator::bits<float>(simulator_simd(SIMULATOR_TILE_ROW_SUM, simulator::bits<uint>(v), file, line));
}
DEVFN float tile_row_max(float v, SIMULATOR_SITE) {
    return simulator::bits<float>(simulator_simd(SIMULATOR_TILE_ROW_MAX, simulator::bits<uint>(v), file, line));
}
template <typename U>
DEVFN void tile_load_left(TileLeft<U>& tile, const U* from, uint stride, uint rows, uint lane) {
    for (uint e = 0u; e < 8u; e++) {
        const uint row = tile_row(lane) + e / 4u * 8u;
        const U* value = from + ulong(row) * stride + tile_column(lane) + e / 2u % 2u * 8u + e % 2u;
        tile.values[e] = row < rows ? to_f32(*value) : 0.0f;
    }
}
template <typename U>
DEVFN void simulator_tile_values(float* values, const U* from, uint row_stride, uint column_stride, uint lane) {
    const U* first = from + tile_row(lane) * row_stride + tile_column(lane) * column_stride;
    for (uint e = 0u; e < 8u; e++) {
        values[e] = to_f32(first[e / 4u * 8u * row_stride + (e / 2u % 2u * 8u + e % 2u) * column_stride]);
    }
}
// CUDA reads eight values of a row at once: their address is checked as that of a vector.
template <typename U>
DEVFN void tile_load_right(TileRight<U>& tile, const U* from, uint stride, uint lane, SIMULATOR_SITE) {
    simulator_vector(from + lane % TILE * stride, sizeof(uint4), 0, file, line);
    simulator_tile_values(tile.values, from, stride, 1u, lane);
}
template <typename U>
DEVFN void tile_load_right_transposed(TileRight<U>& tile, const U* from, uint stride, uint lane, SIMULATOR_SITE) {
    simulator_vector(from + lane % TILE * stride, sizeof(uint4), 0, file, line);
    simulator_tile_values(tile.values, from, 1u, stride, lane);
}
template <typename U> DEVFN void tile_round_left(TileLeft<U>& tile, const TileSum& sum) {
    for (uint e = 0u; e < 8u; e++) tile.values[e] = to_f32(U(sum.values[e]));
}
template <typename U>
DEVFN void tile_multiply(TileSum& sum, const TileLeft<U>& left, const TileRight<U>& right, SIMULATOR_SITE) {
    simulator_tile_multiply(sum.values, left.values, right.values, file, line);
}
