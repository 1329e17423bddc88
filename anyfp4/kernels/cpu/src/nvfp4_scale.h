// The stored code of a block scale: E << 3 | m for (1 + m/8) x 2^(E - 10), 0 for zero. E4M3 without its sign and with
// its subnormal numbers m x 2^-9 normalised.
#pragma once

#include "common.h"

namespace anyfp4 {

static inline uint8_t stored_scale(uint8_t e4m3) {
    int field = (e4m3 >> 3) & 0xF, m = e4m3 & 7;
    if (field) return uint8_t((field + 3) << 3 | m);
    if (m == 0) return 0;
    int shift = m >= 4 ? 1 : m >= 2 ? 2 : 3;  // to bring the leading bit to 8
    return uint8_t((4 - shift) << 3 | ((m << shift) & 7));
}

// Significand (0..15) and exponent as in formats/e4m3.py: value = significand x 2^(exponent - 3), subnormal numbers
// keeping the exponent -6.
static inline void split_scale(uint8_t stored, int* significand, int* exponent) {
    int e = (stored >> 3) - 10, m = 8 | (stored & 7);
    if (stored == 0) {
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
