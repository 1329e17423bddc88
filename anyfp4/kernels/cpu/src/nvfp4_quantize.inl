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

// The doubled magnitudes are 0 1 2 3 4 6 8 12; between two of them a tie goes to the even code.
#if defined(__AVX2__)
// The largest magnitude of a block; as integers, magnitudes order like floats, and NaN lies above all.
static inline float largest(const float* v) {
    const __m256i mask = _mm256_set1_epi32(0x7FFFFFFF);
    const __m256i a = _mm256_and_si256(_mm256_loadu_si256((const __m256i*)v), mask);
    const __m256i b = _mm256_and_si256(_mm256_loadu_si256((const __m256i*)(v + 8)), mask);
    const __m256i m = _mm256_max_epi32(a, b);
    __m128i x = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
    x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4E));
    x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0xB1));
    return float_of(uint32_t(_mm_cvtsi128_si32(x)));
}

// Eight magnitudes to doubled ones; a comparison that holds is -1.
static inline __m256i doubled_magnitude(__m256 m) {
    auto above = [&](float limit) { return _mm256_castps_si256(_mm256_cmp_ps(m, _mm256_set1_ps(limit), _CMP_GT_OQ)); };
    auto reach = [&](float limit) { return _mm256_castps_si256(_mm256_cmp_ps(m, _mm256_set1_ps(limit), _CMP_GE_OQ)); };
    const __m256i ones = _mm256_add_epi32(_mm256_add_epi32(above(0.25f), reach(0.75f)),
                                          _mm256_add_epi32(above(1.25f), reach(1.75f)));
    const __m256i twos = _mm256_add_epi32(above(2.5f), reach(3.5f)), four = above(5.0f);
    const __m256i sum = _mm256_add_epi32(_mm256_slli_epi32(_mm256_add_epi32(_mm256_add_epi32(four, four), twos), 1), ones);
    return _mm256_sub_epi32(_mm256_setzero_si256(), sum);
}

// Codes of v r, doubled, plus `offset`; their sum and the sum of their magnitudes, both without the offset.
static inline void quantize_block(const float* v, float r, int offset, int8_t* code, int* sum, int* magnitude) {
    const __m256 sign = _mm256_set1_ps(-0.0f), factor = _mm256_set1_ps(r);
    const __m256 a = _mm256_mul_ps(_mm256_loadu_ps(v), factor), b = _mm256_mul_ps(_mm256_loadu_ps(v + 8), factor);
    const __m256i da = doubled_magnitude(_mm256_andnot_ps(sign, a)), db = doubled_magnitude(_mm256_andnot_ps(sign, b));
    const __m256i ca = _mm256_sign_epi32(da, _mm256_or_si256(_mm256_castps_si256(a), _mm256_set1_epi32(1)));
    const __m256i cb = _mm256_sign_epi32(db, _mm256_or_si256(_mm256_castps_si256(b), _mm256_set1_epi32(1)));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5);
    auto pack = [&](__m256i lo, __m256i hi) {  // sixteen bytes in order
        const __m256i words = _mm256_packs_epi32(lo, hi);
        return _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(_mm256_packs_epi16(words, words), order));
    };
    const __m128i codes = pack(ca, cb), zero = _mm_setzero_si128();
    _mm_storeu_si128((__m128i*)code, _mm_add_epi8(codes, _mm_set1_epi8(int8_t(offset))));
    auto total = [&](__m128i bytes) {
        const __m128i s = _mm_sad_epu8(bytes, zero);
        return _mm_cvtsi128_si32(s) + _mm_extract_epi16(s, 4);
    };
    *magnitude = total(pack(da, db));
    *sum = total(_mm_add_epi8(codes, _mm_set1_epi8(CODE_OFFSET))) - CODE_OFFSET * BLOCK;
}
#else
static inline float largest(const float* v) {
    uint32_t top = 0;
    for (int i = 0; i < BLOCK; ++i) {
        const uint32_t m = bits_of(v[i]) & 0x7FFFFFFF;
        top = m > top ? m : top;
    }
    return float_of(top);
}

static inline void quantize_block(const float* v, float r, int offset, int8_t* code, int* sum, int* magnitude) {
    for (int i = 0; i < BLOCK; ++i) {
        const float q = v[i] * r, m = fabsf(q);
        const int d = (m > 0.25f) + (m >= 0.75f) + (m > 1.25f) + (m >= 1.75f) + 2 * (m > 2.5f) + 2 * (m >= 3.5f) +
                      4 * (m > 5.0f);
        const int c = q < 0.0f ? -d : d;
        *magnitude += d;
        *sum += c;
        code[i] = int8_t(c + offset);
    }
}
#endif

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
        float amax = largest(v);
        float wanted = g * (amax * sixth);
        uint8_t byte = float_to_e4m3(wanted);
        float s = e4m3_to_float(byte);
        bool nan = byte == 0x7F;
        float r = g / s;
        int sum = 0, magnitude = 0;
        if (byte == 0 || nan) {  // s = 0: all codes 0
            memset(code, offset, BLOCK);
        } else {
            quantize_block(v, r, offset, code, &sum, &magnitude);
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
        scale[b] = nan ? 0 : normal_scale(byte);
    }
    *info = result;
}
