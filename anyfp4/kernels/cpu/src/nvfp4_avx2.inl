// NVFP4 tiles with AVX2 and FMA: one register holds 8 rows, four bytes each. See kernels.h for layout and arithmetic.
//
// Per block of 16 and 8 rows: 10 operations to unpack (when not done beforehand), 9 for the integer dot product, 4 for
// the scales, 6 for the float64 part; a chunk of 16 rows, 576 bytes, costs about 245 operations in all.

static const uint8_t ROW_ORDER[TILE] = {0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15};

// 2 x value of each code, and that + 12.
static inline __m256i signed_table() {
    return _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
}
static inline __m256i offset_table() { return _mm256_add_epi8(signed_table(), _mm256_set1_epi8(CODE_OFFSET)); }

// Looks up the low and the high nibbles.
static inline void unpack_codes(__m256i packed, __m256i table, __m256i* low, __m256i* high) {
    const __m256i mask = _mm256_set1_epi8(0x0F);
    *low = _mm256_shuffle_epi8(table, _mm256_and_si256(packed, mask));
    *high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask));
}

// Scales of rows 8 half .. 8 half + 7 to float64, in the order of unpacklo/unpackhi. p: the sixteen of a block.
static inline void normal_scales(const uint8_t* p, int half, __m256d* lo, __m256d* hi) {
    const __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8 * half)));
    const __m256i high_half = _mm256_slli_epi32(codes, 17);
    *lo = _mm256_castsi256_pd(_mm256_unpacklo_epi32(_mm256_setzero_si256(), high_half));
    *hi = _mm256_castsi256_pd(_mm256_unpackhi_epi32(_mm256_setzero_si256(), high_half));
}

// The same of plain codes: each byte goes to the seventh of its eight.
struct alignas(32) Spread {
    int8_t byte[4][32];
    constexpr Spread() : byte() {
        const int row[4][4] = {{0, 1, 4, 5}, {2, 3, 6, 7}, {8, 9, 12, 13}, {10, 11, 14, 15}};
        for (int v = 0; v < 4; ++v)
            for (int i = 0; i < 32; ++i) byte[v][i] = int8_t(i % 8 == 6 ? row[v][i / 8] : -128);
    }
};
static constexpr Spread SPREAD;
static inline void plain_scales(const uint8_t* p, int half, __m256d* lo, __m256d* hi) {
    const __m256i codes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
    const __m256i* spread = (const __m256i*)SPREAD.byte[2 * half];
    *lo = _mm256_castsi256_pd(_mm256_shuffle_epi8(codes, _mm256_load_si256(spread)));
    *hi = _mm256_castsi256_pd(_mm256_shuffle_epi8(codes, _mm256_load_si256(spread + 1)));
}
static inline void load_scales(const uint8_t* p, bool plain, int half, __m256d* lo, __m256d* hi) {
    if (plain) plain_scales(p, half, lo, hi);
    else normal_scales(p, half, lo, hi);
}

// There are 16 registers, and the compiler spills accumulators to keep what it could load again. This says nothing to the
// processor; after it, nothing that was loaded through the pointer is remembered.
template <typename T>
static inline void forget(const T*& p) {
    asm("" : "+r"(p));
}

static inline __m256i broadcast4(const void* p) { return _mm256_set1_epi32(*(const int32_t*)p); }

// D = bias + sum of u x s over four groups of four bytes, in each 32-bit lane; u unsigned, s signed. The operand with
// the offset is the unsigned one: the weight in gemv, where its table is free to choose; the activation in gemm, where
// the weight can then be read as a memory operand. With two hardware threads busy the front end, three instructions
// a cycle, is what limits all this.
static inline __m256i dot16(__m256i u0, __m256i u1, __m256i u2, __m256i u3, __m256i s0, __m256i s1, __m256i s2,
                            __m256i s3, __m256i bias) {
#ifdef ANYFP4_VNNI
    __m256i d = _mm256_dpbusd_avx_epi32(bias, u0, s0);
    d = _mm256_dpbusd_avx_epi32(d, u1, s1);
    d = _mm256_dpbusd_avx_epi32(d, u2, s2);
    return _mm256_dpbusd_avx_epi32(d, u3, s3);
#else
    // eight products of at most 24 x 12 in each 16-bit lane: 2304, and at most 6400 of bias
    __m256i a = _mm256_add_epi16(_mm256_maddubs_epi16(u0, s0), _mm256_maddubs_epi16(u1, s1));
    __m256i b = _mm256_add_epi16(_mm256_maddubs_epi16(u2, s2), _mm256_maddubs_epi16(u3, s3));
    return _mm256_madd_epi16(_mm256_add_epi16(_mm256_add_epi16(a, bias), b), _mm256_set1_epi16(1));
#endif
}

static inline void add_block(__m256i d, __m256d s, __m256d c, __m256d sw_lo, __m256d sw_hi, __m256d* lo,
                             __m256d* hi) {
    const __m256i magic = _mm256_set1_epi32(0x43300000);
    __m256d d_lo = _mm256_castsi256_pd(_mm256_unpacklo_epi32(d, magic));
    __m256d d_hi = _mm256_castsi256_pd(_mm256_unpackhi_epi32(d, magic));
    *lo = _mm256_fmadd_pd(_mm256_fmadd_pd(d_lo, s, c), sw_lo, *lo);
    *hi = _mm256_fmadd_pd(_mm256_fmadd_pd(d_hi, s, c), sw_hi, *hi);
}

// The end of a chunk: truncation toward zero to 24 bits.
static inline __m256d truncate24(__m256d acc) {
    return _mm256_and_pd(acc, _mm256_castsi256_pd(_mm256_set1_epi64x(~((int64_t(1) << 29) - 1))));
}
static inline __m256d peak_of(__m256d peak, __m256d acc) {
    return _mm256_max_pd(peak, _mm256_andnot_pd(_mm256_set1_pd(-0.0), acc));
}

struct Accumulator {
    __m256d v[4];

    void load(const double* p) {
        for (int i = 0; i < 4; ++i) v[i] = _mm256_loadu_pd(p + 4 * i);
    }
    void store(double* p) const {
        for (int i = 0; i < 4; ++i) _mm256_storeu_pd(p + 4 * i, v[i]);
    }
    void zero() {
        for (auto& x : v) x = _mm256_setzero_pd();
    }
};

// Every line, some 4 KiB ahead: the loop is too slow per byte for the processor's own prefetcher to be far enough in
// front (measured: 6 GB/s without, 16 with).
static inline void prefetch_chunk(const uint8_t* tile) {
    for (int line = 0; line < CHUNK_BYTES; line += 64)
        _mm_prefetch((const char*)(tile + PREFETCH_CHUNKS * CHUNK_BYTES + line), _MM_HINT_T0);
}

// One block of rows 8 half .. 8 half + 7: codes at p and p + 64, the token's codes at x.
template <bool PLAIN>
static inline void gemv_block(const uint8_t* p, const uint8_t* scales, int half, const int8_t* x,
                              const BlockFactor* factor, const int32_t* bias, __m256i table, __m256d* lo, __m256d* hi) {
    __m256i w0, w1, w2, w3;
    __m256d sw_lo, sw_hi;
    unpack_codes(_mm256_load_si256((const __m256i*)p), table, &w0, &w1);
    unpack_codes(_mm256_load_si256((const __m256i*)(p + 64)), table, &w2, &w3);
    const __m256i d = dot16(w0, w1, w2, w3, broadcast4(x), broadcast4(x + 4), broadcast4(x + 8), broadcast4(x + 12),
                            _mm256_set1_epi32(*bias));
    load_scales(scales, PLAIN, half, &sw_lo, &sw_hi);
    add_block(d, _mm256_set1_pd(factor->s), _mm256_set1_pd(factor->c), sw_lo, sw_hi, lo, hi);
}

template <bool TRACK, bool PLAIN>
static inline void gemv(const uint8_t* tile, int64_t chunks, const TokenChunk* x, const int32_t* bias, double* acc_out,
                        double* peak_out) {
    Accumulator acc, peak;
    acc.zero();
    peak.zero();
    const __m256i table = offset_table();
    for (int64_t i = 0; i < chunks; ++i, tile += CHUNK_BYTES, ++x, bias += 4) {
        prefetch_chunk(tile);
        for (int b = 0; b < 4; ++b) {
            const TokenChunk* token = x;
            for (int half = 0; half < 2; ++half) {
                gemv_block<PLAIN>(tile + 128 * b + 32 * half, tile + CHUNK_CODES + 16 * b, half, token->codes + 16 * b,
                                  &token->factor[b], bias + b, table, &acc.v[2 * half], &acc.v[2 * half + 1]);
                forget(token);
                forget(bias);
            }
        }
        for (int j = 0; j < 4; ++j) {
            acc.v[j] = truncate24(acc.v[j]);
            if (TRACK) peak.v[j] = peak_of(peak.v[j], acc.v[j]);
        }
    }
    acc.store(acc_out);
    if (TRACK) peak.store(peak_out);
}

static void nvfp4_gemv(const uint8_t* tile, bool plain, int64_t chunks, const TokenChunk* x, const int32_t* bias,
                       double* acc, double* peak) {
    if (peak) (plain ? gemv<true, true> : gemv<true, false>)(tile, chunks, x, bias, acc, peak);
    else (plain ? gemv<false, true> : gemv<false, false>)(tile, chunks, x, bias, acc, peak);
}

static void nvfp4_unpack(const uint8_t* tile, bool plain, int64_t chunks, UnpackedTile* out) {
    const __m256i table = signed_table(), ones = _mm256_set1_epi8(1), twelve = _mm256_set1_epi32(CODE_OFFSET);
    for (int64_t i = 0; i < 4 * chunks; ++i) {
        const uint8_t* chunk = tile + i / 4 * CHUNK_BYTES;
        for (int half = 0; half < 2; ++half) {
            const uint8_t* p = chunk + 128 * (i % 4) + 32 * half;
            __m256i w[4], sum = _mm256_setzero_si256();
            unpack_codes(_mm256_load_si256((const __m256i*)p), table, &w[0], &w[1]);
            unpack_codes(_mm256_load_si256((const __m256i*)(p + 64)), table, &w[2], &w[3]);
            for (int j = 0; j < 4; ++j) {
                _mm256_store_si256((__m256i*)(out->codes[i] + 64 * j + 32 * half), w[j]);
                sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(ones, w[j]));
            }
            sum = _mm256_mullo_epi32(_mm256_madd_epi16(sum, _mm256_set1_epi16(1)), twelve);
            _mm256_store_si256((__m256i*)(out->bias[i] + 8 * half),
                               _mm256_sub_epi32(_mm256_set1_epi32(DOT_OFFSET), sum));
            __m256d lo, hi;
            load_scales(chunk + CHUNK_CODES + TILE * (i % 4), plain, half, &lo, &hi);
            _mm256_store_pd(out->scale[i] + 8 * half, lo);
            _mm256_store_pd(out->scale[i] + 8 * half + 4, hi);
        }
    }
}

template <bool TRACK>
static inline void gemm(const UnpackedTile* w, int64_t chunks, const TokenChunk* x, double* acc_io, double* peak_io) {
    Accumulator acc, peak;
    acc.load(acc_io);
    if (TRACK) peak.load(peak_io);
    const uint8_t* codes = w->codes[0];
    const int32_t* bias = w->bias[0];
    const double* scale = w->scale[0];
    for (int64_t i = 0; i < chunks; ++i, ++x) {
        for (int b = 0; b < 4; ++b, codes += BLOCK * TILE, scale += TILE, bias += TILE) {
            const __m256i x0 = broadcast4(x->codes + 16 * b), x1 = broadcast4(x->codes + 16 * b + 4);
            const __m256i x2 = broadcast4(x->codes + 16 * b + 8), x3 = broadcast4(x->codes + 16 * b + 12);
            const __m256d s = _mm256_set1_pd(x->factor[b].s), c = _mm256_set1_pd(x->factor[b].c);
            for (int half = 0; half < 2; ++half) {
                const __m256i* p = (const __m256i*)(codes + 32 * half);
                const __m256i d = dot16(x0, x1, x2, x3, _mm256_load_si256(p), _mm256_load_si256(p + 2),
                                        _mm256_load_si256(p + 4), _mm256_load_si256(p + 6),
                                        _mm256_load_si256((const __m256i*)(bias + 8 * half)));
                add_block(d, s, c, _mm256_load_pd(scale + 8 * half), _mm256_load_pd(scale + 8 * half + 4),
                          &acc.v[2 * half], &acc.v[2 * half + 1]);
            }
        }
        for (int j = 0; j < 4; ++j) {
            acc.v[j] = truncate24(acc.v[j]);
            if (TRACK) peak.v[j] = peak_of(peak.v[j], acc.v[j]);
        }
    }
    acc.store(acc_io);
    if (TRACK) peak.store(peak_io);
}

static void nvfp4_gemm(const UnpackedTile* w, int64_t chunks, const TokenChunk* x, double* acc, double* peak) {
    if (peak) gemm<true>(w, chunks, x, acc, peak);
    else gemm<false>(w, chunks, x, acc, peak);
}
