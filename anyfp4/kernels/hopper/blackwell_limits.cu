// Which chunks of a tile may be added in the cheap way, and up to which accumulator. After linear_copy.cu.
//
// Of 64 columns, the products of a token and a row are multiples of u = 2^(low − 8), low the sum of the smallest exponents
// of their block scales there. By Cauchy and Schwarz their magnitudes add up to no more than the product of the two norms.
// Where that is below 2²⁴ u the matrix instruction adds all 64 exactly, in any order, to a float32: no exponent it aligns to
// exceeds u's by more than 23, and it keeps 25 bits.
//
// The instruction of the definition cuts a term at 2^(E − 35). No block's sum is cut if E ≤ low + 27; E is the largest
// exponent of the accumulator, so it must be below 2^(low + 28), or that of a block, `high`. Nor is the accumulator: if E is
// its own exponent its 24 bits lie above 2^(E − 35), and if it is a block's, high ≤ lowest + 27 will do, for every sum is a
// multiple of 2^(lowest − 8), lowest the smallest of all of K. By the same two bounds the accumulator and four blocks span at
// most 50 bits, which float64 adds exactly.
//
// All this is asked of a tile of rows and of tokens at once, by the largest norm and exponent and the smallest of each. No
// accumulator exceeds the product of the norms of all of K (cutting makes it smaller): where that is below 2^(low + 28) there is
// no need to look.

// of numerics/blackwell.py
const int SLACK = 27;
// products come with a factor of 2⁻⁷
const int UNIT_EXPONENT = 7;

INLINE int exponent_of(uint32 bits) { return max(static_cast<int>(bits >> 3), 1) - 7; }
INLINE float power_of_two(int e) { return __uint_as_float(static_cast<uint32>(e + 127) << 23); }

// E4M3 without sign as float
INLINE float scale_value(uint32 bits) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(static_cast<uint16>(bits << 7)));
    return f * 256.0f;
}

// In shared memory, for each chunk of K: the largest (norm / 2^low)² of a token as float bits, the smallest and the largest
// scale of the tokens; for all: the smallest scale, the largest norm² of a chunk. For each row tile and chunk the limit: an
// accumulator's magnitude below which nothing is cut, ANY if none reaches it, negative if the products may not add exactly.
struct Table {
    uint32 *norm, *low, *high, *lowest, *size;
    float *limit;
};

const uint32 ANY_BITS = 0x7F800000;

INLINE void clear(const Table &t, int chunks, int thread, int threads) {
    for (int c = thread; c < chunks; c += threads) t.norm[c] = 0, t.low[c] = 0x7F, t.high[c] = 0;
    if (thread == 0) *t.lowest = 0x7F, *t.size = 0;
}

// The block scales of the tokens; in shared memory, for registers are wanted elsewhere.
struct Scales {
    const uint16 *info;  // of the first token
    int blocks, tokens;
};
__shared__ Scales token_scales;

// What quantize.cu says of a token's four blocks of a chunk: scale, and a quarter of the sum of squared codes above it.
INLINE void load_blocks(const uint16 *from, int count, bool whole, uint32 (&block)[4]) {
    if (whole) {
        uint2 v = *reinterpret_cast<const uint2 *>(from);
        block[0] = v.x & 0xFFFF, block[1] = v.x >> 16, block[2] = v.y & 0xFFFF, block[3] = v.y >> 16;
    } else {
#pragma unroll
        for (int j = 0; j < 4; j++) block[j] = j < count ? from[j] : 0;
    }
}

// By all computing warps: lanes take chunks, warps chunks and tokens.
INLINE void gather(const Table &t, const Scales &scales, int chunks, int warp, int lane) {
    const uint16 *info = scales.info;
    const int blocks = scales.blocks, tokens = scales.tokens;
    const int warps = WARPGROUPS * 4, passes = (chunks + 31) >> 5, slices = max(1, min(tokens, warps / passes));
#pragma unroll 1
    for (int unit = warp; unit < passes * slices; unit += warps) {
        const int pass = unit / slices, chunk = pass * 32 + lane;
        if (chunk >= chunks) continue;
        float norm = 0.0f, size = 0.0f;
        uint32 low = 0x7F, high = 0;
#pragma unroll 4
        for (int token = unit - pass * slices; token < tokens; token += slices) {
            uint32 block[4], least = 0x7F;
            load_blocks(info + static_cast<long long>(token) * blocks + chunk * 4, blocks - chunk * 4, (blocks & 3) == 0, block);
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                uint32 bits = block[j] & 0x7F;
                float s = scale_value(bits);
                sum += static_cast<float>(block[j] >> 8) * (s * s);
                least = min(least, bits ? bits : 0x7F);
                high = max(high, bits == 0x7F ? 0 : bits);  // what is NaN stays NaN, cut or not
            }
            low = min(low, least);
            size = fmaxf(size, 4.0f * sum);
            norm = fmaxf(norm, 4.0f * sum * power_of_two(-2 * exponent_of(least)));
        }
        atomicMax(t.norm + chunk, __float_as_uint(norm));
        atomicMin(t.low + chunk, low);
        atomicMax(t.high + chunk, high);
        atomicMin(t.lowest, low);
        atomicMax(t.size, __float_as_uint(size));
    }
}

// What is known of a record: the square of the largest norm / 2^low; exponents + 64 in bytes, low, high and the lowest of
// K; the square of the largest norm of a row of all of K.
struct Bound {
    float norm;
    uint32 exponents;
    float whole;
};

INLINE void set_limits(const Table &t, const Bound *bounds, int chunks, int count, int thread) {
#pragma unroll 1
    for (int i = thread; i < count * chunks; i += WARPGROUPS * 128) {
        const int c = i % chunks;
        const Bound w = bounds[i];
        const int low = exponent_of(t.low[c]) + static_cast<int>(w.exponents & 255) - 64;
        const int high = exponent_of(t.high[c]) + static_cast<int>(w.exponents >> 8 & 255) - 64;
        const int lowest = exponent_of(*t.lowest) + static_cast<int>(w.exponents >> 16 & 255) - 64;
        // here and below with room for what rounding the norms has lost
        const bool exact = __uint_as_float(t.norm[c]) * w.norm < 4.29e9f;  // 2³²
        const bool free = 1.001f * chunks * __uint_as_float(*t.size) * w.whole < power_of_two(2 * (low + SLACK + 1));
        float limit = power_of_two(low + SLACK + 1 - UNIT_EXPONENT);
        if (high - lowest > SLACK)
            limit = 0.0f;
        else if (free && exact)
            limit = __uint_as_float(ANY_BITS);
        t.limit[i] = exact ? limit : -limit;
    }
}
