// NVFP4 tiles with AVX-512 VNNI: one register holds all 16 rows of a tile. See kernels.h for layout and arithmetic.

static const uint8_t ROW_ORDER[TILE] = {0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15};

// 2 x value of each code, and that + 12.
static inline __m512i signed_table() {
    return _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
}
static inline __m512i offset_table() { return _mm512_add_epi8(signed_table(), _mm512_set1_epi8(CODE_OFFSET)); }

static inline void unpack_codes(__m512i packed, __m512i table, __m512i* low, __m512i* high) {
    const __m512i mask = _mm512_set1_epi8(0x0F);
    *low = _mm512_shuffle_epi8(table, _mm512_and_si512(packed, mask));
    *high = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask));
}

static inline void load_scales(const uint8_t* p, bool plain, __m512d* lo, __m512d* hi) {
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
    const __m512i high_half = plain ? _mm512_slli_epi32(codes, 16) : _mm512_slli_epi32(codes, 17);
    *lo = _mm512_castsi512_pd(_mm512_unpacklo_epi32(_mm512_setzero_si512(), high_half));
    *hi = _mm512_castsi512_pd(_mm512_unpackhi_epi32(_mm512_setzero_si512(), high_half));
}

static inline __m512i broadcast4(const void* p) { return _mm512_set1_epi32(*(const int32_t*)p); }

struct Accumulator {
    __m512d lo, hi;
};

static inline void add_block(__m512i d, BlockFactor f, __m512d sw_lo, __m512d sw_hi, Accumulator* acc) {
    const __m512i magic = _mm512_set1_epi32(0x43300000);
    const __m512d s = _mm512_set1_pd(f.s), c = _mm512_set1_pd(f.c);
    __m512d d_lo = _mm512_castsi512_pd(_mm512_unpacklo_epi32(d, magic));
    __m512d d_hi = _mm512_castsi512_pd(_mm512_unpackhi_epi32(d, magic));
    acc->lo = _mm512_fmadd_pd(_mm512_fmadd_pd(d_lo, s, c), sw_lo, acc->lo);
    acc->hi = _mm512_fmadd_pd(_mm512_fmadd_pd(d_hi, s, c), sw_hi, acc->hi);
}

static inline __m512d truncate24(__m512d acc) {
    return _mm512_castsi512_pd(
        _mm512_and_si512(_mm512_castpd_si512(acc), _mm512_set1_epi64(~((int64_t(1) << 29) - 1))));
}

template <bool TRACK>
static inline void end_chunk(Accumulator* acc, Accumulator* peak) {
    acc->lo = truncate24(acc->lo);
    acc->hi = truncate24(acc->hi);
    if (TRACK) {
        peak->lo = _mm512_max_pd(peak->lo, _mm512_abs_pd(acc->lo));
        peak->hi = _mm512_max_pd(peak->hi, _mm512_abs_pd(acc->hi));
    }
}

template <bool TRACK, bool PLAIN>
static inline void gemv(const uint8_t* tile, int64_t chunks, const TokenChunk* x, const int32_t* bias, double* acc_out,
                        double* peak_out) {
    Accumulator acc{_mm512_setzero_pd(), _mm512_setzero_pd()}, peak = acc;
    for (int64_t i = 0; i < chunks; ++i, tile += CHUNK_BYTES) {
        for (int line = 0; line < CHUNK_BYTES; line += 64)
            _mm_prefetch((const char*)(tile + PREFETCH_CHUNKS * CHUNK_BYTES + line), _MM_HINT_T0);
        for (int b = 0; b < 4; ++b) {
            __m512i w[4];
            __m512d sw_lo, sw_hi;
            unpack_codes(_mm512_load_si512(tile + 128 * b), offset_table(), &w[0], &w[1]);
            unpack_codes(_mm512_load_si512(tile + 128 * b + 64), offset_table(), &w[2], &w[3]);
            load_scales(tile + CHUNK_CODES + 16 * b, PLAIN, &sw_lo, &sw_hi);
            __m512i d = _mm512_set1_epi32(bias[4 * i + b]);
            for (int j = 0; j < 4; ++j)
                d = _mm512_dpbusd_epi32(d, w[j], broadcast4(x[i].codes + 16 * b + 4 * j));
            add_block(d, x[i].factor[b], sw_lo, sw_hi, &acc);
        }
        end_chunk<TRACK>(&acc, &peak);
    }
    _mm512_storeu_pd(acc_out, acc.lo);
    _mm512_storeu_pd(acc_out + 8, acc.hi);
    if (TRACK) {
        _mm512_storeu_pd(peak_out, peak.lo);
        _mm512_storeu_pd(peak_out + 8, peak.hi);
    }
}

static void nvfp4_gemv(const uint8_t* tile, bool plain, int64_t chunks, const TokenChunk* x, const int32_t* bias,
                       double* acc, double* peak) {
    if (peak) (plain ? gemv<true, true> : gemv<true, false>)(tile, chunks, x, bias, acc, peak);
    else (plain ? gemv<false, true> : gemv<false, false>)(tile, chunks, x, bias, acc, peak);
}

static void nvfp4_unpack(const uint8_t* tile, bool plain, int64_t chunks, UnpackedTile* out) {
    for (int64_t i = 0; i < 4 * chunks; ++i) {
        const uint8_t* chunk = tile + i / 4 * CHUNK_BYTES;
        __m512i sum = _mm512_setzero_si512();
        for (int g = 0; g < 2; ++g) {
            __m512i w[2];
            unpack_codes(_mm512_load_si512(chunk + 128 * (i % 4) + 64 * g), signed_table(), &w[0], &w[1]);
            for (int j = 0; j < 2; ++j) {
                _mm512_store_si512(out->codes[i] + 128 * g + 64 * j, w[j]);
                sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(CODE_OFFSET), w[j]);
            }
        }
        _mm512_store_si512(out->bias[i], _mm512_sub_epi32(_mm512_set1_epi32(DOT_OFFSET), sum));
        __m512d lo, hi;
        load_scales(chunk + CHUNK_CODES + TILE * (i % 4), plain, &lo, &hi);
        _mm512_store_pd(out->scale[i], lo);
        _mm512_store_pd(out->scale[i] + 8, hi);
    }
}

template <bool TRACK>
static inline void gemm(const UnpackedTile* w, int64_t chunks, const TokenChunk* x, double* acc_io, double* peak_io) {
    Accumulator acc{_mm512_loadu_pd(acc_io), _mm512_loadu_pd(acc_io + 8)}, peak = acc;
    if (TRACK) peak = {_mm512_loadu_pd(peak_io), _mm512_loadu_pd(peak_io + 8)};
    for (int64_t i = 0; i < chunks; ++i) {
        for (int64_t b = 4 * i; b < 4 * i + 4; ++b) {
            const int8_t* codes = x[i].codes + BLOCK * (b % 4);
            __m512i d = _mm512_load_si512(w->bias[b]);
            for (int j = 0; j < 4; ++j)
                d = _mm512_dpbusd_epi32(d, broadcast4(codes + 4 * j), _mm512_load_si512(w->codes[b] + 64 * j));
            add_block(d, x[i].factor[b % 4], _mm512_load_pd(w->scale[b]), _mm512_load_pd(w->scale[b] + 8), &acc);
        }
        end_chunk<TRACK>(&acc, &peak);
    }
    _mm512_storeu_pd(acc_io, acc.lo);
    _mm512_storeu_pd(acc_io + 8, acc.hi);
    if (TRACK) {
        _mm512_storeu_pd(peak_io, peak.lo);
        _mm512_storeu_pd(peak_io + 8, peak.hi);
    }
}

static void nvfp4_gemm(const UnpackedTile* w, int64_t chunks, const TokenChunk* x, double* acc, double* peak) {
    if (peak) gemm<true>(w, chunks, x, acc, peak);
    else gemm<false>(w, chunks, x, acc, peak);
}
