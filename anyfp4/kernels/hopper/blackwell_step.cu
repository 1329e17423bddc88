// One chunk of K in blackwell numerics where the cheap way may be wrong: block by block. After blackwell_limits.cu.

const int ABSENT = -139;

// Toward zero to a multiple of 2^shift.
INLINE long long cut(long long v, int shift) {
    long long magnitude = (v < 0 ? -v : v) >> shift << shift;
    return v < 0 ? -magnitude : magnitude;
}

// numerics/blackwell.py's step in integers, in units of 2⁻²⁰ (times the products' 2⁻⁷): all are below 2⁶⁰. exponents: of the
// blocks, ABSENT where a product is not there.
INLINE float add_cut(float acc, const float (&d)[4], const int (&exponents)[4]) {
    const float to_units = 134217728.0f;
    int largest = acc == 0.0f ? ABSENT : static_cast<int>((__float_as_uint(acc) >> 23) & 255) - 127 + UNIT_EXPONENT;
#pragma unroll
    for (int j = 0; j < 4; j++) largest = max(largest, exponents[j]);
    const int shift = min(max(largest - 15, 0), 62);
    long long total = cut(__float2ll_rz(acc * to_units), shift);
    bool number = acc == acc;
#pragma unroll
    for (int j = 0; j < 4; j++) total += cut(__float2ll_rz(d[j] * to_units), shift), number = number && d[j] == d[j];
    return number ? __ll2float_rz(total) * (1.0f / to_units) : __uint_as_float(0x7FFFFFFFu);
}

// The block scales' exponents of a row, from its word in a record.
INLINE void row_exponents(uint32 word, int (&e)[4]) {
    word = rotate_left(word, 28);
#pragma unroll
    for (int j = 0; j < 4; j++) e[j] = max(static_cast<int>(word >> (8 * j + 3) & 31) - 22, -6);
}

struct Chunk {
    uint32 x;            // of the tokens, in shared memory
    const uint16 *info;  // of the first token, or null past the end of the tokens
    int stride, tokens, blocks;
};

// By a warp: the accumulators in `sums` (four numbers of a thread and eight tokens in a row, 128 threads after each
// other) plus the chunk. Exact as long as nothing is cut (float64 holds the accumulator and four blocks), or, if `cuts`, whatever
// is cut.
INLINE void add_chunk(uint32 sums, const Chunk &chunk, const uint32 (&a)[16], const uint2 &scales, bool cuts, int thread) {
    const uint32 row = thread & 7, lane_at = row * 128 + ((((thread >> 3) & 3) ^ row) << 4), no_sign = 0x7FFF7FFFu;
#pragma unroll 1
    for (int i = 0; i < TOKENS / 8; i++) {
        uint32 right[8];
        load_matrices(chunk.x + lane_at + i * 1024, right);
        load_matrices(chunk.x + (lane_at ^ 64) + i * 1024, right + 4);
        float d[16];
#pragma unroll
        for (int j = 0; j < 16; j++) d[j] = 0.0f;
#pragma unroll
        for (int j = 0; j < 4; j++) multiply(d + 4 * j, a + 4 * j, right + 2 * j);
        const uint32 at = sums + (i * 128 + thread) * 16;
        const uint4 bits = load_shared_16(at);
        float v[4] = {__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z), __uint_as_float(bits.w)};
        if (!cuts) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                double sum = (static_cast<double>(d[e]) + d[4 + e]) + (static_cast<double>(d[8 + e]) + d[12 + e]);
                v[e] = __double2float_rz(v[e] + sum);
            }
        } else {
            uint32 there = 0;  // a bit for each of d where the block has a product
            int upper[4], lower[4];
            row_exponents(scales.x, upper);
            row_exponents(scales.y, lower);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const uint32 left[4] = {a[4 * j] & no_sign, a[4 * j + 1] & no_sign, a[4 * j + 2] & no_sign, a[4 * j + 3] & no_sign};
                const uint32 some[2] = {right[2 * j] & no_sign, right[2 * j + 1] & no_sign};
                float sizes[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                multiply(sizes, left, some);
#pragma unroll
                for (int e = 0; e < 4; e++) there |= (sizes[e] > 0.0f ? 1u : 0u) << (4 * j + e);
            }
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int token = 8 * i + 2 * (thread & 3) + (e & 1);
                float block[4];
                int exponents[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    uint32 info = token < chunk.tokens && j < chunk.blocks ? chunk.info[static_cast<long long>(token) * chunk.stride + j] : 0;
                    block[j] = d[4 * j + e];
                    exponents[j] = there >> (4 * j + e) & 1 ? (e >> 1 ? lower[j] : upper[j]) + exponent_of(info & 0x7F) : ABSENT;
                }
                v[e] = add_cut(v[e], block, exponents);
            }
        }
        store_shared_16(at, v[0], v[1], v[2], v[3]);
    }
}
