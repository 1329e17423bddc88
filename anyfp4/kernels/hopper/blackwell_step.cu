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

// A thread's part of a record.
struct Part {
    uint4 codes;
    uint2 scales;
};

INLINE Part part_of(uint32 record, int thread) {
    return {load_shared_16(record + thread * 16), load_shared_8(record + CODES + (thread >> 2) * 8)};
}

// A chunk and eight tokens, by a warp, from the number `token` on: v plus the products. Float64 holds the accumulator and four
// blocks exactly as long as nothing is cut: as long as no accumulator has reached the limit.
INLINE void add_tokens(float (&v)[4], const uint32 (&a)[16], const uint2 &scales, const uint32 (&right)[8], float limit, int chunk,
                       int token, int thread) {
    const float most = fmaxf(fmaxf(fabsf(v[0]), fabsf(v[1])), fmaxf(fabsf(v[2]), fabsf(v[3])));
    float d[16];
#pragma unroll
    for (int j = 0; j < 16; j++) d[j] = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; j++) multiply(d + 4 * j, a + 4 * j, right + 2 * j);
    if (!__any_sync(0xFFFFFFFFu, most >= fabsf(limit))) {
#pragma unroll
        for (int e = 0; e < 4; e++)
            v[e] = __double2float_rz(v[e] + ((static_cast<double>(d[e]) + d[4 + e]) + (static_cast<double>(d[8 + e]) + d[12 + e])));
        return;
    }
    const uint32 no_sign = 0x7FFF7FFFu;
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
        const int at = token + 2 * (thread & 3) + (e & 1);
        float block[4];
        int exponents[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int column = 4 * chunk + j;
            uint32 info = 0;
            if (at < token_scales.tokens && column < token_scales.blocks)
                info = token_scales.info[static_cast<long long>(at) * token_scales.blocks + column];
            block[j] = d[4 * j + e];
            exponents[j] = there >> (4 * j + e) & 1 ? (e >> 1 ? lower[j] : upper[j]) + exponent_of(info & 0x7F) : ABSENT;
        }
        v[e] = add_cut(v[e], block, exponents);
    }
}

// By a warp: the accumulators in `sums` (four numbers of a thread and eight tokens in a row, 128 threads after each other) plus
// `count` chunks from number `first` on: their records, their boxes of tokens and limits lie in a row.
#if SYNC
__device__ __noinline__  // its registers would be missing where they count
#else
INLINE  // a call would make wgmma wait
#endif
void add_chunks(uint32 sums, uint32 record, uint32 x, const float *limits, int first, int count, uint32 exponent, int thread) {
    const uint32 row = thread & 7, lane_at = row * 128 + ((((thread >> 3) & 3) ^ row) << 4);
#pragma unroll 1
    for (int c = 0; c < count; c++, record += RECORD, x += X_BYTES) {
        const Part part = part_of(record, thread);
        const float limit = limits[c];
        uint32 a[16];
        unpack_chunk(part.codes, part.scales, exponent, a);
#pragma unroll 1
        for (int i = 0; i < TOKENS / 8; i++) {
            uint32 right[8];
            load_matrices(x + lane_at + i * 1024, right);
            load_matrices(x + (lane_at ^ 64) + i * 1024, right + 4);
            const uint32 at = sums + (i * 128 + thread) * 16;
            const uint4 bits = load_shared_16(at);
            float v[4] = {__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z), __uint_as_float(bits.w)};
            add_tokens(v, a, part.scales, right, limit, first + c, 8 * i, thread);
            store_shared_16(at, v[0], v[1], v[2], v[3]);
        }
    }
}
