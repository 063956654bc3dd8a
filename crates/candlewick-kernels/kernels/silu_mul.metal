// SwiGLU's product, silu(gate) · up, forward and backward.
//
//   y     = a·σ(a)·u                          a = gate, u = up, σ(a) = 1 / (1 + exp(−a))
//   da    = g · u · σ(a) · (1 + a·(1 − σ(a)))
//   du    = g · a · σ(a)
//
// Memory. One pass: forward reads two tensors and writes one, backward reads three and writes two. Nothing is saved
// but the inputs.
//
// Launch. Flat: thread t takes chunk t; the elements after the last whole chunk are
// taken one each by the first threads.

struct SiluMulParams {
    uint chunks;        // whole chunks
    uint tail;          // elements after them, fewer than WIDTH
};

DEVFN float sigmoid(float v) { return 1.0f / (1.0f + precise::exp(-v)); }

// 1 + a·(1 − σ(a)), whose limit for a → −∞ times σ(a) is 0: kept finite so that 0 · ∞ cannot appear.
DEVFN float silu_slope(float a, float s) { return s * (1.0f + fmax(a, -3e38f) * (1.0f - s)); }

KERNEL(silu_mul, DEVICE const T* gate, DEVICE const T* up, DEVICE T* y, PARAM(SiluMulParams, p)) {
    const uint thread_index = TG_POS.x * TG_SIZE.x + TID.x;
    if (thread_index < p.chunks) {
        const ulong at = ulong(thread_index) * WIDTH;
        float a[WIDTH], u[WIDTH];
        load_chunk(gate + at, a);
        load_chunk(up + at, u);
        for (uint i = 0u; i < WIDTH; i++) a[i] = a[i] * sigmoid(a[i]) * u[i];
        store_chunk(y + at, a);
    }
    if (thread_index < p.tail) {
        const ulong at = ulong(p.chunks) * WIDTH + thread_index;
        const float a = to_f32(gate[at]);
        y[at] = from_f32<T>(a * sigmoid(a) * to_f32(up[at]));
    }
}

KERNEL(silu_mul_backward, DEVICE const T* gate, DEVICE const T* up, DEVICE const T* grad, DEVICE T* grad_gate,
       DEVICE T* grad_up, PARAM(SiluMulParams, p)) {
    const uint thread_index = TG_POS.x * TG_SIZE.x + TID.x;
    if (thread_index < p.chunks) {
        const ulong at = ulong(thread_index) * WIDTH;
        float a[WIDTH], u[WIDTH], g[WIDTH];
        load_chunk(gate + at, a);
        load_chunk(up + at, u);
        load_chunk(grad + at, g);
        for (uint i = 0u; i < WIDTH; i++) {
            const float s = sigmoid(a[i]);
            u[i] = g[i] * u[i] * silu_slope(a[i], s);
            g[i] = g[i] * (a[i] * s);
        }
        if (GATE_GRAD) store_chunk(grad_gate + at, u);
        if (UP_GRAD) store_chunk(grad_up + at, g);
    }
    if (thread_index < p.tail) {
        const ulong at = ulong(p.chunks) * WIDTH + thread_index;
        const float a = to_f32(gate[at]), g = to_f32(grad[at]), s = sigmoid(a);
        if (GATE_GRAD) grad_gate[at] = from_f32<T>(g * to_f32(up[at]) * silu_slope(a, s));
        if (UP_GRAD) grad_up[at] = from_f32<T>(g * (a * s));
    }
}
