// Activation quantization (the formula is in formats/nvfp4.py), one row at a time, written so that a compiler
// vectorizes the loops over a block of 16.

static inline void load_row(const void* x, int64_t begin, int64_t n, int dtype, float* out) {
    switch (dtype) {
        case F32: memcpy(out, static_cast<const float*>(x) + begin, size_t(n) * 4); break;
        case BF16: {
            const uint16_t* p = static_cast<const uint16_t*>(x) + begin;
            for (int64_t i = 0; i < n; ++i) out[i] = bf16_to_float(p[i]);
            break;
        }
        case F16: {
            const uint16_t* p = static_cast<const uint16_t*>(x) + begin;
            for (int64_t i = 0; i < n; ++i) out[i] = f16_to_float(p[i]);
            break;
        }
        default: {
            const uint8_t* p = static_cast<const uint8_t*>(x) + begin;
            for (int64_t i = 0; i < n; ++i) out[i] = e4m3_to_float(p[i]);
        }
    }
}

// Rounds to dtype and back, in place.
static inline void round_row(float* x, int64_t n, int dtype) {
    if (dtype == BF16)
        for (int64_t i = 0; i < n; ++i) x[i] = bf16_to_float(float_to_bf16(x[i], 0x7FC0));
    if (dtype == F16)
        for (int64_t i = 0; i < n; ++i) x[i] = f16_to_float(float_to_f16(x[i]));
}

static void nvfp4_quantize(const void* x, int dtype, int64_t k, const float* pre, float g, int offset, TokenChunk* out,
                           int64_t stride, int32_t* bias, uint8_t* scale, TokenInfo* info) {
    const float sixth = float(1.0 / 6.0);
    TokenInfo result{9, -7, false, 0.0};
    for (int64_t b = 0; b < (k + CHUNK - 1) / CHUNK * 4; ++b) {
        TokenChunk* chunk = out + b / 4 / PIECE_CHUNKS * stride + b / 4 % PIECE_CHUNKS;
        int8_t* code = chunk->codes + b % 4 * BLOCK;
        BlockFactor* factor = chunk->factor + b % 4;
        if (b * BLOCK >= k) {  // padding
            memset(code, offset, BLOCK);
            *factor = {0.0, 0.0};
            bias[b] = DOT_OFFSET;
            scale[b] = 0;
            continue;
        }
        float v[BLOCK];
        load_row(x, b * BLOCK, BLOCK, dtype, v);
        if (pre) {
            float factors[BLOCK];
            memcpy(factors, pre + b * BLOCK, sizeof factors);
            round_row(factors, BLOCK, dtype);
            for (int i = 0; i < BLOCK; ++i) v[i] *= factors[i];
            round_row(v, BLOCK, dtype);
        }
        uint32_t top = 0;  // as integers, magnitudes order like floats, and NaN lies above all
        for (int i = 0; i < BLOCK; ++i) {
            uint32_t m = bits_of(v[i]) & 0x7FFFFFFF;
            top = m > top ? m : top;
        }
        float amax = float_of(top);
        float wanted = g * (amax * sixth);
        uint8_t byte = float_to_e4m3(wanted);
        float s = e4m3_to_float(byte);
        bool nan = byte == 0x7F;
        float r = g / s;
        int sum = 0, magnitude = 0;
        if (byte == 0 || nan) {  // s = 0: all codes 0
            memset(code, offset, BLOCK);
        } else {
            int32_t c[BLOCK];
            for (int i = 0; i < BLOCK; ++i) {
                float q = v[i] * r;
                float m = fabsf(q);
                // the doubled magnitudes 0 1 2 3 4 6 8 12; a tie goes to the even code
                int32_t d = (m > 0.25f) + (m >= 0.75f) + (m > 1.25f) + (m >= 1.75f) + 2 * (m > 2.5f) +
                            2 * (m >= 3.5f) + 4 * (m > 5.0f);
                c[i] = q < 0.0f ? -d : d;
                magnitude += d;
            }
            for (int i = 0; i < BLOCK; ++i) {
                sum += c[i];
                code[i] = int8_t(c[i] + offset);
            }
        }
        result.nan |= nan;
        if (byte != 0 && !nan) {
            int field = byte >> 3;
            int e = field ? field - 7 : -6;
            result.e_min = e < result.e_min ? e : result.e_min;
            result.e_max = e > result.e_max ? e : result.e_max;
            result.l1 += 0.5 * magnitude * double(s);
        }
        double factor_s = nan ? 0.0 : double(s) * pow2(FACTOR_EXPONENT);
        *factor = {factor_s, -(0x1p52 + DOT_OFFSET) * factor_s};
        bias[b] = DOT_OFFSET - 12 * sum;
        scale[b] = nan ? 0 : stored_scale(byte);
    }
    *info = result;
}
