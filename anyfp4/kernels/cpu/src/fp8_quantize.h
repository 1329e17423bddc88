// Dynamic FP8 quantization of activations, as ops/linear.py defines it.
#pragma once

#include "common.h"

namespace anyfp4 {

// E4M3(x (1 / scale)) as floats, in place.
static inline void fp8_round(float* x, int64_t n, float scale) {
    const float inverse = 1.0f / scale;
    for (int64_t i = 0; i < n; ++i) x[i] = e4m3_to_float(float_to_e4m3(x[i] * inverse));
}

// Likewise with a scale of their own, which is returned: amax / 448, or 1 where amax is below 2^-117.
static inline float fp8_quantize(float* x, int64_t n) {
    uint32_t top = 0;  // as integers, magnitudes order like floats, and NaN lies above all
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t m = bits_of(x[i]) & 0x7FFFFFFF;
        top = m > top ? m : top;
    }
    const float scale = top < bits_of(0x1p-117f) ? 1.0f : float_of(top) / 448.0f;
    fp8_round(x, n, scale);
    return scale;
}

}  // namespace anyfp4
