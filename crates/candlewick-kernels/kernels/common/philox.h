// Philox4x32-10: random numbers from a counter, so that a mask can be made again instead of kept.
// Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11.
//
// Dropout's definition, shared with every other implementation of it in the project: element e of a row-major
// tensor takes word e % 4 of the block with counter (e / 4 low, e / 4 high, 0, 0) and key (seed low, seed high),
// and is kept where that word is at least round(p · 2³²).

// The four words of a block.
DEVFN void philox(ulong block, uint key_low, uint key_high, THREAD uint* words) {
    uint c0 = uint(block), c1 = uint(block >> 32), c2 = 0u, c3 = 0u;
    for (uint round = 0u; round < 10u; round++) {
        const uint high0 = mulhi(0xd2511f53u, c0), low0 = 0xd2511f53u * c0;
        const uint high1 = mulhi(0xcd9e8d57u, c2), low1 = 0xcd9e8d57u * c2;
        c0 = high1 ^ c1 ^ key_low;
        c1 = low1;
        c2 = high0 ^ c3 ^ key_high;
        c3 = low0;
        key_low += 0x9e3779b9u;
        key_high += 0xbb67ae85u;
    }
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
}

struct DropoutParams {
    uint seed_low;
    uint seed_high;
    uint threshold;  // round(p · 2³²)
    float scale;     // 1 / (1 − p)
};

// Applies dropout to the chunk that starts at `element`. A chunk wider than 1 starts at a multiple of 4.
DEVFN void dropout_chunk(PARAM(DropoutParams, dropout), ulong element, THREAD float* values) {
    uint words[4];
    for (uint i = 0u; i < WIDTH; i++) {
        if (i % 4u == 0u) philox((element + i) / 4u, dropout.seed_low, dropout.seed_high, words);
        const bool kept = words[(uint(element) + i) % 4u] >= dropout.threshold;
        values[i] = kept ? values[i] * dropout.scale : 0.0f;
    }
}
