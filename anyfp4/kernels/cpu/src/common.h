// Number formats as scalars, shared by every translation unit. Everything here is static: a translation unit built
// for a newer instruction set must not lend its copy of an inline function to one built for an older.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace anyfp4 {

enum DType : int { F32 = 0, BF16 = 1, F16 = 2, F8 = 3, NVFP4 = 4 };

static inline int64_t dtype_size(int dtype) { return dtype == F32 ? 4 : dtype == F8 ? 1 : 2; }

static inline uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}
static inline float float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}
static inline uint64_t bits_of(double x) {
    uint64_t u;
    memcpy(&u, &x, 8);
    return u;
}
static inline double double_of(uint64_t u) {
    double x;
    memcpy(&x, &u, 8);
    return x;
}
// 2^k, -1022 <= k <= 1023
static inline double pow2(int k) { return double_of(uint64_t(k + 1023) << 52); }

static inline float bf16_to_float(uint16_t h) { return float_of(uint32_t(h) << 16); }

// Nearest, ties to even. `nan`: the bit pattern that a NaN becomes.
static inline uint16_t float_to_bf16(float x, uint16_t nan) {
    uint32_t u = bits_of(x);
    uint16_t rounded = uint16_t((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
    return (u & 0x7FFFFFFF) > 0x7F800000 ? nan : rounded;
}

static inline float f16_to_float(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7FFF;
    // 2^112 moves the exponent from a bias of 15 to one of 127, subnormal numbers included
    float finite = float_of(magnitude << 13) * 0x1p112f;
    uint32_t u = magnitude >= 0x7C00 ? 0x7F800000 | (magnitude << 13) | (magnitude > 0x7C00 ? 0x400000 : 0)
                                     : bits_of(finite);
    return float_of(sign | u);
}

// Nearest, ties to even; a NaN keeps its sign and upper bits and becomes quiet, as in hardware.
static inline uint16_t float_to_f16(float x) {
    uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000, m = u & 0x7FFFFFFF;
    uint32_t normal = (m + 0xFFF + ((m >> 13) & 1) - (112u << 23)) >> 13;
    // below 2^-14: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits of the sum
    uint32_t subnormal = bits_of(float_of(m) + 0.5f) - bits_of(0.5f);
    uint32_t h = m < 0x38800000 ? subnormal : normal;
    h = m >= 0x477FF000 ? 0x7C00 : h;
    h = m > 0x7F800000 ? 0x7E00 | ((m >> 13) & 0x3FF) : h;
    return uint16_t(sign | h);
}

// E4M3 (no infinity; 0x7F and 0xFF are NaN).
static inline float e4m3_to_float(uint8_t b) {
    uint32_t magnitude = b & 0x7F;
    uint32_t u = magnitude == 0x7F ? 0x7FC00000u : bits_of(float_of(magnitude << 20) * 0x1p120f);
    return float_of((uint32_t(b & 0x80) << 24) | u);
}

// Nearest, ties to even, saturating at +-448; NaN stays NaN.
static inline uint8_t float_to_e4m3(float x) {
    uint32_t u = bits_of(x), sign = (u >> 24) & 0x80, m = u & 0x7FFFFFFF;
    uint32_t normal = (m + 0x7FFFF + ((m >> 20) & 1) - (120u << 23)) >> 20;
    // below 2^-6: adding 2^14 leaves the rounded multiple of 2^-9 in the low bits of the sum
    uint32_t subnormal = bits_of(float_of(m) + 0x1p14f) - bits_of(0x1p14f);
    uint32_t b = m < 0x3C800000 ? subnormal : normal;
    b = m >= 0x43E00000 ? 0x7E : b;
    b = m > 0x7F800000 ? 0x7F : b;
    return uint8_t(sign | b);
}

static inline float load_float(const void* p, int64_t i, int dtype) {
    switch (dtype) {
        case F32: return static_cast<const float*>(p)[i];
        case BF16: return bf16_to_float(static_cast<const uint16_t*>(p)[i]);
        case F16: return f16_to_float(static_cast<const uint16_t*>(p)[i]);
        default: return e4m3_to_float(static_cast<const uint8_t*>(p)[i]);
    }
}

static inline void store_float(void* p, int64_t i, int dtype, float x, uint16_t bf16_nan) {
    switch (dtype) {
        case F32: static_cast<float*>(p)[i] = x; break;
        case BF16: static_cast<uint16_t*>(p)[i] = float_to_bf16(x, bf16_nan); break;
        case F16: static_cast<uint16_t*>(p)[i] = float_to_f16(x); break;
        default: static_cast<uint8_t*>(p)[i] = float_to_e4m3(x); break;
    }
}

static const float CODE_VALUES[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

static inline const void* element(const void* p, int64_t i, int dtype) {
    return static_cast<const uint8_t*>(p) + i * dtype_size(dtype);
}
static inline void* element(void* p, int64_t i, int dtype) {
    return static_cast<uint8_t*>(p) + i * dtype_size(dtype);
}

}  // namespace anyfp4
