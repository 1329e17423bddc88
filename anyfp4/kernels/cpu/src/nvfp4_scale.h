// The codes of a block scale in the prepared weight. A tile without subnormal scales, and so nearly every one, has the
// plain code: E4M3's magnitude shifted left by 1, which is the seventh byte of the float64 scale x 2^-1016, so that
// spreading bytes is all it takes to load a scale. Elsewhere the normal code, E << 3 | m for (1 + m/8) x 2^(E - 10) and
// 0 for zero: E4M3 without its sign and with its subnormal numbers m x 2^-9 normalised. Shifted left by 17 it is the
// upper half of the float64 scale x 2^-1013. (Plain codes of subnormal numbers would be float64's own subnormal ones,
// which some processors multiply slowly, and a caller may have switched off.)
#pragma once

#include "common.h"

namespace anyfp4 {

static inline uint8_t normal_scale(uint8_t e4m3) {
    int field = (e4m3 >> 3) & 0xF, m = e4m3 & 7;
    if (field) return uint8_t((field + 3) << 3 | m);
    if (m == 0) return 0;
    int shift = m >= 4 ? 1 : m >= 2 ? 2 : 3;  // to bring the leading bit to 8
    return uint8_t((4 - shift) << 3 | ((m << shift) & 7));
}

static inline uint8_t plain_scale(uint8_t magnitude) { return uint8_t(magnitude << 1); }
static inline uint8_t plain_to_normal(uint8_t plain) { return plain ? uint8_t((plain >> 1) + (3 << 3)) : 0; }

static inline uint8_t plain_to_e4m3(uint8_t plain) { return uint8_t(plain >> 1); }
static inline uint8_t normal_to_e4m3(uint8_t normal) {
    const int field = (normal >> 3) - 3;
    if (normal == 0 || field > 0) return normal ? uint8_t(field << 3 | (normal & 7)) : uint8_t(0);
    return uint8_t((8 | (normal & 7)) >> (1 - field));
}

// Significand (0..15) and exponent as in formats/e4m3.py: value = significand x 2^(exponent - 3), subnormal numbers
// keeping the exponent -6.
static inline void split_scale(uint8_t normal, int* significand, int* exponent) {
    int e = (normal >> 3) - 10, m = 8 | (normal & 7);
    if (normal == 0) {
        *significand = 0;
        *exponent = -6;
    } else if (e < -6) {
        *significand = m >> (-6 - e);
        *exponent = -6;
    } else {
        *significand = m;
        *exponent = e;
    }
}

}  // namespace anyfp4
