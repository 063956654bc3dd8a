// Dropout's mask alone, for products that are a library's: what is kept stays as it is, the rest becomes 0.
//
// The factor 1 / (1 − p) is left to the product that follows, which multiplies its sums by it in f32: masked values are not
// rounded a second time.
//
// Memory. One pass. y may be the same buffer as x: each element is read and then written by one thread.
//
// Launch. Flat: thread t takes chunk t. WIDTH divides a row, so that no element is left over.

struct LoraMaskParams {
    uint chunks;
    DropoutParams dropout;  // its scale is 1
};

KERNEL(lora_mask, DEVICE const T* x, DEVICE T* y, PARAM(LoraMaskParams, p)) {
    const uint chunk_index = TG_POS.x * TG_SIZE.x + TID.x;
    if (chunk_index >= p.chunks) return;
    const ulong at = ulong(chunk_index) * WIDTH;
    float values[WIDTH];
    load_chunk(x + at, values);
    dropout_chunk(p.dropout, at, values);
    store_chunk(y + at, values);
}
