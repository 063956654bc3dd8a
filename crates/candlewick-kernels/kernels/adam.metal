// One step of Adam or AdamW for one parameter (Kingma and Ba, 2015; Loshchilov and Hutter, 2019), with torch's arithmetic:
//
//   g ← g + l2·θ        m ← m + (1 − β₁)·(g − m)        v ← β₂·v + (1 − β₂)·g²
//   θ ← shrink·θ − rate · m / (√v·part + ε)
//
// Memory. One pass: four tensors are read and three written. The next value may take the place of the value: a thread writes
// what it has read, and nothing else.
// Launch. Flat: thread t takes chunk t; the elements after the last whole chunk are taken one each by the first threads.

struct AdamParams {
    uint chunks;   // whole chunks
    uint tail;     // elements after them, fewer than WIDTH
    float new1;    // 1 − β₁
    float old2;    // β₂
    float new2;    // 1 − β₂
    float eps;
    float rate;    // the learning rate over 1 − β₁ᵗ
    float part;    // 1 / √(1 − β₂ᵗ)
    float shrink;  // 1 − the learning rate times λ in AdamW
    float l2;      // λ in Adam
};

DEVFN void adam_step(PARAM(AdamParams, p), THREAD float& m, THREAD float& v, float gradient, THREAD float& value) {
    const float g = p.l2 == 0.0f ? gradient : gradient + value * p.l2;
    m += (g - m) * p.new1;
    v = v * p.old2 + g * g * p.new2;
    value = value * p.shrink - m / (precise::sqrt(v) * p.part + p.eps) * p.rate;
}

KERNEL(adam, DEVICE const T* first, DEVICE const T* second, DEVICE const T* gradient, DEVICE const T* value,
       DEVICE T* next_value, DEVICE T* next_first, DEVICE T* next_second, PARAM(AdamParams, p)) {
    const uint thread_index = TG_POS.x * TG_SIZE.x + TID.x;
    if (thread_index < p.chunks) {
        const ulong at = ulong(thread_index) * WIDTH;
        float m[WIDTH], v[WIDTH], g[WIDTH], x[WIDTH];
        load_chunk(first + at, m);
        load_chunk(second + at, v);
        load_chunk(gradient + at, g);
        load_chunk(value + at, x);
        for (uint i = 0u; i < WIDTH; i++) adam_step(p, m[i], v[i], g[i], x[i]);
        store_chunk(next_value + at, x);
        store_chunk(next_first + at, m);
        store_chunk(next_second + at, v);
    }
    if (thread_index < p.tail) {
        const ulong at = ulong(p.chunks) * WIDTH + thread_index;
        float m = to_f32(first[at]), v = to_f32(second[at]), x = to_f32(value[at]);
        adam_step(p, m, v, to_f32(gradient[at]), x);
        next_value[at] = from_f32<T>(x);
        next_first[at] = from_f32<T>(m);
        next_second[at] = from_f32<T>(v);
    }
}
