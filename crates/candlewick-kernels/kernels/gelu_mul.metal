// GeGLU's product, gelu(gate) · up, forward and backward, with the GELU that is made of a tanh.
//
//   gelu(a) = a · (1 + tanh z) / 2 = a · σ(2z)          z = √(2/π) · (a + 0.044715·a³)
//   y  = gelu(a) · u                                    a = gate, u = up
//   da = g · u · (σ(2z) + a · σ(2z) · (1 − σ(2z)) · 2z')        z' = √(2/π) · (1 + 3 · 0.044715·a²)
//   du = g · gelu(a)
//
// Memory and launch. As silu_mul: one pass, a thread a chunk, the elements after the last whole chunk one each.
//
// Limits. σ needs no tanh, whose sum with 1 would lose the digits of a small result. Beyond |a| = 16, σ(2z) is 1 or
// 0 to the last bit and the rest of the slope is 0, so z and z' take a clamped a, whose cube cannot overflow.

struct GeluMulParams {
    uint chunks;  // whole chunks
    uint tail;    // elements after them, fewer than WIDTH
};

#define TWO_ROOT_TWO_OVER_PI 1.595769122f
#define CUBIC 0.044715f

DEVFN float clamped(float a) { return fmax(fmin(a, 16.0f), -16.0f); }

DEVFN float twice_z(float a) {
    const float c = clamped(a);
    return TWO_ROOT_TWO_OVER_PI * fma(CUBIC * c * c, c, c);
}

// σ(2z)
DEVFN float gate_share(float a) { return a != a ? a : 1.0f / (1.0f + precise::exp(-twice_z(a))); }

// gelu'(a), given s = σ(2z). σ·(1 − σ) is e/(1 + e)² with e = exp(−|2z|): no digits are lost near 1.
DEVFN float gelu_slope(float a, float s) {
    const float c = clamped(a);
    const float twice_slope = TWO_ROOT_TWO_OVER_PI * fma(3.0f * CUBIC * c, c, 1.0f);
    const float e = precise::exp(-fabs(twice_z(a)));
    const float larger = 1.0f / (1.0f + e);
    return fma(c * (e * larger * larger), twice_slope, s);
}

KERNEL(gelu_mul, DEVICE const T* gate, DEVICE const T* up, DEVICE T* y, PARAM(GeluMulParams, p)) {
    const uint thread_index = TG_POS.x * TG_SIZE.x + TID.x;
    if (thread_index < p.chunks) {
        const ulong at = ulong(thread_index) * WIDTH;
        float a[WIDTH], u[WIDTH];
        load_chunk(gate + at, a);
        load_chunk(up + at, u);
        for (uint i = 0u; i < WIDTH; i++) a[i] = a[i] * gate_share(a[i]) * u[i];
        store_chunk(y + at, a);
    }
    if (thread_index < p.tail) {
        const ulong at = ulong(p.chunks) * WIDTH + thread_index;
        const float a = to_f32(gate[at]);
        y[at] = from_f32<T>(a * gate_share(a) * to_f32(up[at]));
    }
}

KERNEL(gelu_mul_backward, DEVICE const T* gate, DEVICE const T* up, DEVICE const T* grad, DEVICE T* grad_gate,
       DEVICE T* grad_up, PARAM(GeluMulParams, p)) {
    const uint thread_index = TG_POS.x * TG_SIZE.x + TID.x;
    if (thread_index < p.chunks) {
        const ulong at = ulong(thread_index) * WIDTH;
        float a[WIDTH], u[WIDTH], g[WIDTH];
        load_chunk(gate + at, a);
        load_chunk(up + at, u);
        load_chunk(grad + at, g);
        for (uint i = 0u; i < WIDTH; i++) {
            const float s = gate_share(a[i]);
            u[i] = g[i] * u[i] * gelu_slope(a[i], s);
            g[i] = g[i] * (a[i] * s);
        }
        if (GATE_GRAD) store_chunk(grad_gate + at, u);
        if (UP_GRAD) store_chunk(grad_up + at, g);
    }
    if (thread_index < p.tail) {
        const ulong at = ulong(p.chunks) * WIDTH + thread_index;
        const float a = to_f32(gate[at]), g = to_f32(grad[at]), s = gate_share(a);
        if (GATE_GRAD) grad_gate[at] = from_f32<T>(g * to_f32(up[at]) * gelu_slope(a, s));
        if (UP_GRAD) grad_up[at] = from_f32<T>(g * (a * s));
    }
}
