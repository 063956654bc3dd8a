// A chunk: WIDTH consecutive values that one thread reads or writes at once, as floats in its registers.
//
// WIDTH is 16 bytes' worth of T (4 floats, 8 halves) where every chunk's address is a multiple of 16 bytes, and 1
// elsewhere: then neighbouring threads read neighbouring elements, which coalesces as well, in more instructions.
// U may be wider than T (f32 weights beside bf16 rows): such a chunk is two vectors.

//
// A PackedChunk is a chunk of T as memory holds it: what a thread keeps of values that it will need later.

#if WIDTH == 1

typedef T PackedChunk;

DEVFN PackedChunk load_packed(DEVICE const T* from) { return from[0]; }

DEVFN void unpack_chunk(PackedChunk packed, THREAD float* values) { values[0] = to_f32(packed); }

template <typename U> DEVFN void load_chunk(DEVICE const U* from, THREAD float* values) {
    values[0] = to_f32(from[0]);
}

template <typename U> DEVFN void store_chunk(DEVICE U* to, THREAD const float* values) {
    to[0] = from_f32<U>(values[0]);
}

#else

typedef uint4 PackedChunk;

DEVFN PackedChunk load_packed(DEVICE const T* from) { return vector_load(from); }

DEVFN void load_chunk(DEVICE const float* from, THREAD float* values) {
    for (uint i = 0u; i < WIDTH; i += 4u) {
        const uint4 v = vector_load(from + i);
        values[i] = as_type<float>(v.x);
        values[i + 1u] = as_type<float>(v.y);
        values[i + 2u] = as_type<float>(v.z);
        values[i + 3u] = as_type<float>(v.w);
    }
}

DEVFN void store_chunk(DEVICE float* to, THREAD const float* values) {
    for (uint i = 0u; i < WIDTH; i += 4u) {
        uint4 v;
        v.x = as_type<uint>(values[i]);
        v.y = as_type<uint>(values[i + 1u]);
        v.z = as_type<uint>(values[i + 2u]);
        v.w = as_type<uint>(values[i + 3u]);
        vector_store(to + i, v);
    }
}

#if WIDTH == 4

DEVFN void unpack_chunk(PackedChunk packed, THREAD float* values) {
    values[0] = as_type<float>(packed.x);
    values[1] = as_type<float>(packed.y);
    values[2] = as_type<float>(packed.z);
    values[3] = as_type<float>(packed.w);
}

#else

template <typename U> DEVFN void unpack_to(uint word, THREAD float* values) {
    const float2 pair = unpack2(word, U());
    values[0] = pair.x;
    values[1] = pair.y;
}

template <typename U> DEVFN void load_chunk(DEVICE const U* from, THREAD float* values) {
    const uint4 v = vector_load(from);
    unpack_to<U>(v.x, values);
    unpack_to<U>(v.y, values + 2);
    unpack_to<U>(v.z, values + 4);
    unpack_to<U>(v.w, values + 6);
}

DEVFN void unpack_chunk(PackedChunk packed, THREAD float* values) {
    unpack_to<T>(packed.x, values);
    unpack_to<T>(packed.y, values + 2);
    unpack_to<T>(packed.z, values + 4);
    unpack_to<T>(packed.w, values + 6);
}

template <typename U> DEVFN void store_chunk(DEVICE U* to, THREAD const float* values) {
    uint4 v;
    v.x = pack2(values[0], values[1], U());
    v.y = pack2(values[2], values[3], U());
    v.z = pack2(values[4], values[5], U());
    v.w = pack2(values[6], values[7], U());
    vector_store(to, v);
}

#endif
#endif
