// The kernel's side of the simulator: linked into every kernel's image.
//
// A kernel is compiled with -fsanitize=thread and linked without that library. Each of its loads and stores is
// preceded by a call of a __tsan_ function; those below pass it on to the simulator, with the address it came
// from. So does the dialect's simulator.h for what is not a load or a store. Nothing is decided here: the
// simulator (src/hooks.rs) fills the table, in this order, before the first kernel runs.
#include <cstddef>
#include <cstdint>

#define HIDDEN __attribute__((visibility("hidden")))
#define CALLER __builtin_return_address(0)

struct Hooks {
    void (*access)(const void* address, size_t bytes, bool write, const void* caller);
    void (*vector)(const void* address, size_t bytes, bool write, const void* caller);
    void (*enter)(const void* caller);
    void (*leave)();
    uint32_t (*simd)(uint32_t operation, uint32_t bits, const char* file, uint32_t line);
    void (*tile_multiply)(float* sum, const float* left, const float* right, const char* file, uint32_t line);
    void (*barrier)(uint32_t flags, const char* file, uint32_t line);
    void* (*threadgroup_array)(const char* name, size_t bytes, const void* caller);
    void (*multiply)();
    void (*undefined)(bool out_of_bounds, const char* what, const void* caller);
};
static Hooks hooks;

extern "C" {
__attribute__((visibility("default"))) void simulator_attach(const Hooks* table) { hooks = *table; }

// ---- simulator.h ----
HIDDEN uint32_t simulator_simd(uint32_t operation, uint32_t bits, const char* file, int line) {
    return hooks.simd(operation, bits, file, uint32_t(line));
}
HIDDEN void simulator_tile_multiply(float* sum, const float* left, const float* right, const char* file, int line) {
    hooks.tile_multiply(sum, left, right, file, uint32_t(line));
}
HIDDEN void simulator_barrier(uint32_t flags, const char* file, int line) { hooks.barrier(flags, file, uint32_t(line)); }
HIDDEN void* simulator_threadgroup_array(size_t bytes, size_t, const char* name, const char*, int) {
    return hooks.threadgroup_array(name, bytes, CALLER);
}
HIDDEN void simulator_vector(const void* address, size_t bytes, uint32_t write, const char*, int) {
    hooks.vector(address, bytes, write != 0, CALLER);
}
HIDDEN void simulator_multiply() { hooks.multiply(); }

// ---- loads, stores and calls ----
#define ACCESS(bytes)                                                                                        \
    HIDDEN void __tsan_read##bytes(void* p) { hooks.access(p, bytes, false, CALLER); }                       \
    HIDDEN void __tsan_write##bytes(void* p) { hooks.access(p, bytes, true, CALLER); }                       \
    HIDDEN void __tsan_unaligned_read##bytes(void* p) { hooks.access(p, bytes, false, CALLER); }             \
    HIDDEN void __tsan_unaligned_write##bytes(void* p) { hooks.access(p, bytes, true, CALLER); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
HIDDEN void __tsan_read_range(void* p, size_t bytes) { hooks.access(p, bytes, false, CALLER); }
HIDDEN void __tsan_write_range(void* p, size_t bytes) { hooks.access(p, bytes, true, CALLER); }
// clang copies and clears structs through these; the built-ins must not become calls of themselves.
HIDDEN void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
    hooks.access(from, bytes, false, CALLER);
    hooks.access(to, bytes, true, CALLER);
    return __builtin_memmove(to, from, bytes);
}
HIDDEN void* __tsan_memmove(void* to, const void* from, size_t bytes) {
    hooks.access(from, bytes, false, CALLER);
    hooks.access(to, bytes, true, CALLER);
    return __builtin_memmove(to, from, bytes);
}
HIDDEN void* __tsan_memset(void* to, int byte, size_t bytes) {
    hooks.access(to, bytes, true, CALLER);
    return __builtin_memset(to, byte, bytes);
}
HIDDEN void __tsan_func_entry(void* caller) { hooks.enter(caller); }
HIDDEN void __tsan_func_exit() { hooks.leave(); }
HIDDEN void __tsan_init() {}

// ---- -fsanitize=bounds and its kin, without their library ----
// Their first argument describes the place; the caller's address says it as well.
#define UNDEFINED(name, arguments, out_of_bounds, what)                                                      \
    HIDDEN void __ubsan_handle_##name arguments { hooks.undefined(out_of_bounds, what, CALLER); }
UNDEFINED(out_of_bounds, (void*, void*), true, "the index is outside a private or threadgroup array")
UNDEFINED(shift_out_of_bounds, (void*, void*, void*), false, "the shift is as wide as the value, or wider")
UNDEFINED(divrem_overflow, (void*, void*, void*), false, "a division by zero")
UNDEFINED(add_overflow, (void*, void*, void*), false, "signed overflow")
UNDEFINED(sub_overflow, (void*, void*, void*), false, "signed overflow")
UNDEFINED(mul_overflow, (void*, void*, void*), false, "signed overflow")
UNDEFINED(negate_overflow, (void*, void*), false, "signed overflow")
}
