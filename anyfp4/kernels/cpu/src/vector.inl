// float64 vectors of the instruction set: `vd` and `vf` hold as many float64 and float32 numbers. GCC's and Clang's
// vector extension gives the operators; fused multiply-add is only used where results do not depend on it.

#if defined(__AVX512F__)
#define VD 8
#elif defined(__AVX2__)
#define VD 4
#else
#define VD 2
#endif
typedef double vd __attribute__((vector_size(8 * VD)));
typedef double vd_unaligned __attribute__((vector_size(8 * VD), aligned(4), may_alias));
typedef float vf __attribute__((vector_size(4 * VD)));
typedef float vf_unaligned __attribute__((vector_size(4 * VD), aligned(4), may_alias));

static inline vd load(const double* p) { return *reinterpret_cast<const vd_unaligned*>(p); }
static inline vd load(const float* p) {
    const vf v = *reinterpret_cast<const vf_unaligned*>(p);
    return __builtin_convertvector(v, vd);
}
static inline void store(double* p, vd v) { *reinterpret_cast<vd_unaligned*>(p) = v; }
static inline void store(float* p, vd v) { *reinterpret_cast<vf_unaligned*>(p) = __builtin_convertvector(v, vf); }
static inline vd splat(double x) { return x - vd{}; }

// a b + c, fused or not: for sums whose rounding is settled afterwards.
static inline vd madd(vd a, vd b, vd c) {
#if defined(__AVX512F__)
    return (vd)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
    return (vd)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
    return a * b + c;
#endif
}

static inline double total(vd v) {
    double sum = v[0];
    for (int i = 1; i < VD; ++i) sum += v[i];
    return sum;
}

// The four totals.
static inline void totals(const vd* v, double* out) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
    __m256d half[4];  // GCC 12 warns inside the unmasked forms
    for (int i = 0; i < 4; ++i)
        half[i] = _mm512_maskz_extractf64x4_pd(0xF, (__m512d)v[i], 0) + _mm512_maskz_extractf64x4_pd(0xF, (__m512d)v[i], 1);
#else
    const __m256d half[4] = {(__m256d)v[0], (__m256d)v[1], (__m256d)v[2], (__m256d)v[3]};
#endif
    const __m256d a = _mm256_hadd_pd(half[0], half[1]), b = _mm256_hadd_pd(half[2], half[3]);
    _mm256_storeu_pd(out, _mm256_add_pd(_mm256_permute2f128_pd(a, b, 0x21), _mm256_blend_pd(a, b, 0xC)));
#else
    for (int i = 0; i < 4; ++i) out[i] = total(v[i]);
#endif
}

// Dot products of T rows a + t a_stride with four rows b + r b_stride, in float64, any order. With three there are 12 sums,
// which take 7 loads for 12 multiply-adds; one alone takes 5 for 4, and loads are then the limit.
template <int T>
static inline void dot_block(const double* a, int64_t a_stride, const double* b, int64_t b_stride, int64_t n,
                             double (*out)[4]) {
    vd sum[T][4];
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < 4; ++r) sum[t][r] = splat(0);
    int64_t i = 0;
    for (; i + VD <= n; i += VD) {
        vd x[T];
        for (int t = 0; t < T; ++t) x[t] = load(a + t * a_stride + i);
        for (int r = 0; r < 4; ++r) {
            const vd y = load(b + r * b_stride + i);
            for (int t = 0; t < T; ++t) sum[t][r] = madd(x[t], y, sum[t][r]);
        }
    }
    for (int t = 0; t < T; ++t) totals(sum[t], out[t]);
    for (; i < n; ++i)
        for (int t = 0; t < T; ++t)
            for (int r = 0; r < 4; ++r) out[t][r] += a[t * a_stride + i] * b[r * b_stride + i];
}

// What the elements of a row have in common. All are multiples of 2^unit (zeros aside), so if |a| |b| < 2^(53 + units)
// for two rows, float64 sums their products without any rounding. bfloat16 rows are mostly like that; and sums exactly
// halfway between two float32 numbers, which no error interval can decide, are common among them.
struct Magnitudes {
    uint32_t top;     // the largest magnitude's bit pattern; 0x7F800000 and above: not finite
    uint32_t bottom;  // the smallest non-zero one's, less 1
    uint32_t bits;    // of all fractions together

    static Magnitudes none() { return {0, 0xFFFFFFFFu, 0}; }
    void join(const Magnitudes& other) {
        top = other.top > top ? other.top : top;
        bottom = other.bottom < bottom ? other.bottom : bottom;
        bits |= other.bits;
    }
    bool finite() const { return top < 0x7F800000; }
    int unit() const {
        if (top == 0) return 0;
        const int field = int((bottom + 1) >> 23);
        const int zeros = bits ? __builtin_ctz(bits) : 23;
        return (field ? field : 1) - 150 + zeros;
    }
};

static inline Magnitudes magnitudes(const float* x, int64_t n) {
    uint32_t top = 0, bottom = 0xFFFFFFFFu, bits = 0;
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t m = bits_of(x[i]) & 0x7FFFFFFF;
        top = m > top ? m : top;
        bottom = m - 1 < bottom ? m - 1 : bottom;
        bits |= m & 0x7FFFFF;
    }
    return {top, bottom, bits};
}

// The float32 row as float64.
static inline Magnitudes widen(const float* x, int64_t n, double* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = x[i];
    return magnitudes(x, n);
}

// exp as ops/elementary.py defines it, operation by operation.
static inline float exp_one(float x) {
    double v = x;
    v = v < -104.0 ? -104.0 : v;
    v = v > 89.0 ? 89.0 : v;
    const double shifter = 0x1.8p52;
    const double shifted = v * 1.4426950408889634 + shifter;  // the integer is in the low bits
    const double n = shifted - shifter;
    const double r = (v - n * 0.6931471803691238) - n * 1.9082149292705877e-10;
    double p = 1.0 / 362880;
    p = p * r + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    return float(p * double_of((bits_of(shifted) + 1023) << 52));
}

// ln as ops/elementary.py defines it.
static inline float log_one(float x) {
    const double v = x;
    const uint64_t bits = bits_of(v);
    const int exponent = int(bits >> 52 & 0x7FF) - 1023;
    double m = double_of((bits & 0xFFFFFFFFFFFFFull) | uint64_t(1023) << 52);
    const bool high = m > 1.4142135623730951;
    m = high ? m * 0.5 : m;
    const double e = exponent + (high ? 1 : 0);
    const double s = (m - 1.0) / (m + 1.0);
    const double z = s * s;
    const double c[8] = {2.0 / 15, 2.0 / 13, 2.0 / 11, 2.0 / 9, 2.0 / 7, 2.0 / 5, 2.0 / 3, 2.0};
    double p = c[0];
    for (int i = 1; i < 8; ++i) p = p * z + c[i];
    float result = float(e * 0.6931471803691238 + (e * 1.9082149292705877e-10 + s * p));
    if (x == 0) result = -INFINITY;
    if (x == INFINITY) result = x;
    if (x < 0 || x != x) result = float_of(0x7FC00000);
    return result;
}

// Exact sum of non-negative numbers (or NaN), rounded once.
static inline float exact_total(const float* x, int64_t n) {
    vd s0 = splat(0), s1 = s0;
    int64_t i = 0;
    for (; i + 2 * VD <= n; i += 2 * VD) {
        s0 += load(x + i);
        s1 += load(x + i + VD);
    }
    double sum = total(s0 + s1);
    for (; i < n; ++i) sum += x[i];
    float result;
    if (sum < 0x1p1000 && decided(sum, sum * double(n + 3) * 0x1p-53, &result)) return result;
    return exact_dot(n, [&](int64_t j) { return x[j]; }, [](int64_t) { return 1.0f; });
}
