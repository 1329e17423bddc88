// The definition of numerics/blackwell.py, one output at a time, for the few outputs whose exponents lie so far apart
// that the truncation of single terms shows.
#include "kernels.h"
#include "nvfp4_linear.h"
#include "nvfp4_scale.h"

namespace anyfp4 {
namespace {

constexpr int ABSENT = -10000;
// doubled value of each code
constexpr int8_t DOUBLED[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// Truncates v x 2^shift toward zero.
int64_t shifted(int64_t v, int shift) {
    if (shift >= 0) return v * (int64_t(1) << shift);
    const int64_t magnitude = (v < 0 ? -v : v) >> (shift < -63 ? 63 : -shift);
    return v < 0 ? -magnitude : magnitude;
}

}  // namespace

double nvfp4_exact_output(const uint8_t* tile, bool plain, int r, int64_t chunks, const TokenChunk* x, int64_t stride, int offset,
                          const uint8_t* scale) {
    double acc = 0.0;
    for (int64_t i = 0; i < chunks; ++i, tile += CHUNK_BYTES) {
        const int8_t* codes = x[i / PIECE_CHUNKS * stride + i % PIECE_CHUNKS].codes;
        int64_t term[4];  // in units of 2^(exponent - 8)
        int exponent[4];
        int largest = acc == 0.0 ? ABSENT : ilogb(acc);
        for (int b = 0; b < 4; ++b) {
            int sig_a, sig_w, e_a, e_w, dot = 0;
            bool present = false;
            split_scale(scale[4 * i + b], &sig_a, &e_a);
            const uint8_t stored = tile[CHUNK_CODES + TILE * b + r];
            split_scale(plain ? plain_to_normal(stored) : stored, &sig_w, &e_w);
            for (int j = 0; j < BLOCK; ++j) {
                const uint8_t byte = tile[64 * (2 * b + j / 8) + 4 * r + j % 4];
                const int w = DOUBLED[(j & 4) ? byte >> 4 : byte & 0xF];
                const int product = w * (codes[BLOCK * b + j] - offset);
                dot += product;
                present |= product != 0;
            }
            present &= sig_a * sig_w != 0;
            term[b] = int64_t(dot) * sig_a * sig_w;
            exponent[b] = present ? e_a + e_w : ABSENT;
            largest = exponent[b] > largest ? exponent[b] : largest;
        }
        if (largest == ABSENT) continue;
        // 2^(largest - 35) is the unit; terms are below 2^19 x 2^27 of it, the accumulator below 2^36
        int64_t sum = int64_t(trunc(acc * pow2(35 - largest)));
        for (int b = 0; b < 4; ++b)
            if (exponent[b] != ABSENT) sum += shifted(term[b], exponent[b] - largest + 27);
        acc = double_of(bits_of(double(sum) * pow2(largest - 35)) & ~((uint64_t(1) << 29) - 1));
        if (acc == 0.0) acc = 0.0;
    }
    return acc;
}

}  // namespace anyfp4
