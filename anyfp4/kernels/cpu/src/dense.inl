// Dot products of activations with rows of an unquantized, FP8 or weight-only NVFP4 matrix: in float64, then the float32
// that both ends of the error interval round to (ops/exact.py), or, if they differ, the exact sum.

// bfloat16 becomes float64 by moving: exponent and fraction stand three bits further right in the upper half of the
// word. An arithmetic shift by 3 of a 32-bit lane brings them there, a mask clears the copies of the sign, and the
// result is the number times 2^-896 (subnormal numbers included). Of four neighbours in 64 bits, 3 and 1 share one
// shift, 2 and 0 need another. That is 9 operations for 16 numbers, where widening conversions take 20. So x is stored
// by threes, ones, twos and zeros, times 2^800, which leaves 2^-96 to undo.
//
// E4M3 likewise, seven bits further right, times 2^-1016: of eight neighbours in 64 bits, 7 and 3 share a shift, and so
// do 6 and 2, 5 and 1, 4 and 0. A NaN becomes a number, so for rows that hold one the result does not count.
typedef int32_t vi __attribute__((vector_size(8 * VD)));
typedef int32_t vi_unaligned __attribute__((vector_size(8 * VD), aligned(2), may_alias));
typedef int32_t vi_bytes __attribute__((vector_size(8 * VD), aligned(1), may_alias));
typedef uint64_t vu __attribute__((vector_size(8 * VD)));

static inline RowBound row_bound(const float* x, int64_t k) {
    double lane[8] = {};
    int64_t i = 0;
    for (; i + 8 <= k; i += 8)
        for (int j = 0; j < 8; ++j) lane[j] += double(x[i + j]) * double(x[i + j]);
    for (; i < k; ++i) lane[0] += double(x[i]) * double(x[i]);
    double sum = 0;
    for (int j = 0; j < 8; ++j) sum += lane[j];
    // the factors cover all roundings
    return {float(sqrt(sum) * (1 + 0x1p-20)) * (1 + 0x1p-20f), magnitudes(x, k).unit()};
}

// x in the order in which rows with `count` neighbours in 64 bits are read; returns how many there are.
template <int count>
static inline int64_t interleave(const float* x, int64_t k, const int (&neighbour)[count], double* out) {
    int64_t i = 0;
    for (; i + count * VD <= k; i += count * VD)
        for (int j = 0; j < count; ++j)
            for (int l = 0; l < VD; ++l) out[i + j * VD + l] = double(x[i + count * l + neighbour[j]]) * 0x1p800;
    return i;
}

static void dense_prepare_x(const float* x, int64_t k, int in_place, double* out, RowBound* bound) {
    static const int of_bf16[4] = {3, 1, 2, 0}, of_e4m3[8] = {7, 3, 6, 2, 5, 1, 4, 0};
    *bound = row_bound(x, k);
    int64_t i = 0;
    if (in_place == BF16) i = interleave(x, k, of_bf16, out);
    if (in_place == F8) i = interleave(x, k, of_e4m3, out);
    for (; i < k; ++i) out[i] = in_place == F8 ? x[i] * 0x1p800 : x[i];
}

constexpr uint64_t E4M3_MASK = 0x80FE000000000000;

static inline double moved(uint8_t e4m3) {
    return double_of(uint64_t(e4m3 & 0x80) << 56 | uint64_t(e4m3 & 0x7F) << 49);
}

// Four rows of bfloat16 with x from dense_prepare_x; with fewer than four, the last stands in for the rest.
static inline void bf16_dot4(const double* x, const uint16_t* w, int rows, int64_t k, double* out) {
    const uint16_t* row[4];
    for (int r = 0; r < 4; ++r) row[r] = w + (r < rows ? r : rows - 1) * k;
    const vu mask = 0x8FFFE00000000000 - vu{};
    vd acc[4] = {splat(0), splat(0), splat(0), splat(0)};
    int64_t i = 0;
    for (; i + 4 * VD <= k; i += 4 * VD) {
        const vd x3 = load(x + i), x1 = load(x + i + VD), x2 = load(x + i + 2 * VD), x0 = load(x + i + 3 * VD);
        for (int r = 0; r < 4; ++r) {
            __builtin_prefetch(row[r] + i + 4 * k);  // the next four rows
            const vi v = *reinterpret_cast<const vi_unaligned*>(row[r] + i);
            const vu odd = (vu)(v >> 3), even = (vu)((v << 16) >> 3);
            acc[r] = madd((vd)(odd & mask), x3, acc[r]);
            acc[r] = madd((vd)((odd << 32) & mask), x1, acc[r]);
            acc[r] = madd((vd)(even & mask), x2, acc[r]);
            acc[r] = madd((vd)((even << 32) & mask), x0, acc[r]);
        }
    }
    for (int r = 0; r < 4; ++r) {
        out[r] = total(acc[r]) * 0x1p96;
        for (int64_t j = i; j < k; ++j) out[r] += x[j] * bf16_to_float(row[r][j]);
    }
}

// Four rows of E4M3, `stride` apart, with x from dense_prepare_x; with fewer than four, the last stands in for the rest.
static inline void fp8_dot4(const double* x, const uint8_t* w, int64_t stride, int rows, int64_t k, double* out) {
    const uint8_t* row[4];
    for (int r = 0; r < 4; ++r) row[r] = w + (r < rows ? r : rows - 1) * stride;
    const vu mask = E4M3_MASK - vu{};
    vd acc[4] = {splat(0), splat(0), splat(0), splat(0)}, more[4] = {splat(0), splat(0), splat(0), splat(0)};
    int64_t i = 0;
    for (; i + 8 * VD <= k; i += 8 * VD) {
        for (int r = 0; r < 4; ++r) __builtin_prefetch(row[r] + i + 4 * stride);  // the next four rows
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const vd high = load(x + i + 2 * j * VD), low = load(x + i + (2 * j + 1) * VD);
            for (int r = 0; r < 4; ++r) {
                const vi v = *reinterpret_cast<const vi_bytes*>(row[r] + i);
                const vu bits = (vu)((v << 8 * j) >> 7);
                acc[r] = madd((vd)(bits & mask), high, acc[r]);
                more[r] = madd((vd)((bits << 32) & mask), low, more[r]);
            }
        }
    }
    for (int r = 0; r < 4; ++r) acc[r] += more[r];
    totals(acc, out);
    for (int r = 0; r < 4; ++r) {
        for (int64_t j = i; j < k; ++j) out[r] += x[j] * moved(row[r][j]);
        out[r] *= 0x1p216;
    }
}

// Row of the weight as float32.
static void weight_row(const DenseArgs& a, int64_t row, float* out) {
    if (a.w_dtype != NVFP4) {
        load_row(a.w, row * a.k, a.k, a.w_dtype, out);
        return;
    }
    const uint8_t* packed = static_cast<const uint8_t*>(a.w) + row * (a.k / 2);
    const uint8_t* scale = a.block_scale + row * (a.k / BLOCK);
    for (int64_t b = 0; b < a.k / BLOCK; ++b) {
        const float s = e4m3_to_float(scale[b]);
        for (int j = 0; j < BLOCK / 2; ++j) {
            const uint8_t byte = packed[b * (BLOCK / 2) + j];
            out[b * BLOCK + 2 * j] = CODE_VALUES[byte & 0xF] * s;
            out[b * BLOCK + 2 * j + 1] = CODE_VALUES[byte >> 4] * s;
        }
    }
}

static void dense_bounds(const DenseArgs& a, int64_t begin, int64_t end, RowBound* bounds) {
    for (int64_t n = begin; n < end; ++n) {
        weight_row(a, n, a.w32);
        bounds[n] = row_bound(a.w32, a.k);
    }
}

// Output n of token t from its float64 sum.
static inline void settle_dense(const DenseArgs& a, int64_t t, int64_t n, double unit, double sum) {
    float y;
    const RowBound bx = a.x_bound[t], bw = a.w_bound[n];
    const double norms = double(bx.norm) * double(bw.norm);
    // norms that are not finite: an infinity or a NaN among the factors, or nearly
    if (norms < pow2(53 + bx.unit + bw.unit)) {
        y = float(sum) + 0.0f;
    } else if (!(norms < 0x1p1000 && decided(sum, unit * norms, &y))) {
        const float* xf = a.x32 + t * a.k;
        weight_row(a, n, a.w32);
        y = exact_dot(a.k, [&](int64_t i) { return xf[i]; }, [&](int64_t i) { return a.w32[i]; });
    }
    if (a.row_scale) y *= a.token_scale ? a.token_scale[t] * a.row_scale[n] : a.row_scale[n];
    if (a.bias) y += a.bias[n];
    store_float(a.out, t * a.n + n, a.out_dtype, y, a.bf16_nan);
}

// Rows begin <= n < end of the product with all m tokens.
static void dense_rows(const DenseArgs& a, int64_t begin, int64_t end) {
    const double unit = double(a.k + 3) * 0x1p-53;
    for (int64_t n = begin; n < end; n += 4) {
        const int rows = int(end - n < 4 ? end - n : 4);
        if (!a.in_place) {
            for (int r = 0; r < 4; ++r) {
                double* wide = a.w64 + r * a.k;
                if (r >= rows) {
                    memset(wide, 0, size_t(a.k) * 8);
                    continue;
                }
                weight_row(a, n + r, a.w32);
                widen(a.w32, a.k, wide);
            }
        }
        for (int64_t t = 0; t < a.m;) {
            double sum[3][4];
            const double* x = a.x64 + t * a.k;
            int tokens = 1;
            if (a.in_place && a.w_dtype == F8) {
                fp8_dot4(x, static_cast<const uint8_t*>(a.w) + n * a.k, a.k, rows, a.k, sum[0]);
            } else if (a.in_place) {
                bf16_dot4(x, static_cast<const uint16_t*>(a.w) + n * a.k, rows, a.k, sum[0]);
            } else if (t + 3 <= a.m) {
                tokens = 3;
                dot_block<3>(x, a.k, a.w64, a.k, a.k, sum);
            } else {
                dot_block<1>(x, a.k, a.w64, a.k, a.k, sum);
            }
            for (int i = 0; i < tokens; ++i, ++t)
                for (int r = 0; r < rows; ++r) settle_dense(a, t, n + r, unit, sum[i][r]);
        }
    }
}
