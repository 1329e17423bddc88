// NVFP4 tiles in plain C++: the arithmetic of kernels.h with the products written as they are. Blocks are exact in
// float64 whatever the instructions, so no offset and no fused operation is needed.

static const uint8_t ROW_ORDER[TILE] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
static const int8_t CODE_TABLE[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

static void nvfp4_unpack(const uint8_t* tile, bool plain, int64_t chunks, UnpackedTile* out) {
    for (int64_t i = 0; i < 4 * chunks; ++i) {
        const uint8_t* chunk = tile + i / 4 * CHUNK_BYTES;
        int8_t* codes = reinterpret_cast<int8_t*>(out->codes[i]);
        for (int g = 0; g < 2; ++g)
            for (int j = 0; j < 64; ++j) {
                const uint8_t packed = chunk[128 * (i % 4) + 64 * g + j];
                codes[128 * g + j] = CODE_TABLE[packed & 0xF];
                codes[128 * g + 64 + j] = CODE_TABLE[packed >> 4];
            }
        for (int r = 0; r < TILE; ++r)
            out->scale[i][r] = double_of(uint64_t(chunk[CHUNK_CODES + TILE * (i % 4) + r]) << (plain ? 48 : 49));
    }
}

// x_offset: what has been added to the codes of x.
static inline void add_chunks(const UnpackedTile* w, int64_t chunks, const TokenChunk* x, int x_offset, double* acc,
                              double* peak) {
    for (int64_t i = 0; i < 4 * chunks; ++i) {
        const int8_t* codes = reinterpret_cast<const int8_t*>(w->codes[i]);
        int32_t dot[TILE] = {};
        for (int g = 0; g < 4; ++g)
            for (int r = 0; r < TILE; ++r)
                for (int j = 0; j < 4; ++j)
                    dot[r] += int32_t(codes[64 * g + 4 * r + j]) * (x[i / 4].codes[i % 4 * BLOCK + 4 * g + j] - x_offset);
        for (int r = 0; r < TILE; ++r) acc[r] += (double(dot[r]) * x[i / 4].factor[i % 4].s) * w->scale[i][r];
        if (i % 4 != 3) continue;
        for (int r = 0; r < TILE; ++r) {
            acc[r] = double_of(bits_of(acc[r]) & ~((uint64_t(1) << 29) - 1));
            if (peak) peak[r] = fabs(acc[r]) > peak[r] ? fabs(acc[r]) : peak[r];
        }
    }
}

static void nvfp4_gemm(const UnpackedTile* w, int64_t chunks, const TokenChunk* x, double* acc, double* peak) {
    add_chunks(w, chunks, x, CODE_OFFSET, acc, peak);
}

static void nvfp4_gemv(const uint8_t* tile, bool plain, int64_t chunks, const TokenChunk* x, const int32_t*,
                       double* acc, double* peak) {
    UnpackedTile w;
    for (int r = 0; r < TILE; ++r) acc[r] = 0.0;
    for (int r = 0; peak && r < TILE; ++r) peak[r] = 0.0;
    for (int64_t i = 0; i < chunks; ++i) {
        nvfp4_unpack(tile + i * CHUNK_BYTES, plain, 1, &w);
        add_chunks(&w, 1, x + i, 0, acc, peak);
    }
}
