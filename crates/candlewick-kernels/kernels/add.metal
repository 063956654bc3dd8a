// The sum of two tensors, y = a + b, in f32 and rounded once: the residual stream, and gradients that meet.
//
// Memory. One pass: two tensors are read and one written.
// Launch. Flat: thread t takes chunk t; the elements after the last whole chunk are taken one each by the first threads.

struct AddParams {
    uint chunks;        // whole chunks
    uint tail;          // elements after them, fewer than WIDTH
};

KERNEL(add, DEVICE const T* a, DEVICE const T* b, DEVICE T* y, PARAM(AddParams, p)) {
    const uint thread_index = TG_POS.x * TG_SIZE.x + TID.x;
    if (thread_index < p.chunks) {
        const ulong at = ulong(thread_index) * WIDTH;
        float sum[WIDTH], other[WIDTH];
        load_chunk(a + at, sum);
        load_chunk(b + at, other);
        for (uint i = 0u; i < WIDTH; i++) sum[i] += other[i];
        store_chunk(y + at, sum);
    }
    if (thread_index < p.tail) {
        const ulong at = ulong(p.chunks) * WIDTH + thread_index;
        y[at] = from_f32<T>(to_f32(a[at]) + to_f32(b[at]));
    }
}
