// Block-wise FP8: y = bias + sum over blocks j of K, in order, of float32(dot of block j) x scales. A block's dot product
// is the exact sum rounded once; everything after it is float32, each operation rounded once (ops/linear.py).

// At least the norm of 128 E4M3 numbers, all of which are multiples of 2^-9. Between two such blocks every product is a
// multiple of 2^-18 and every sum below 2^25: float64 adds them exactly, so the error interval is needed only for
// activations that stay unquantized.
constexpr double BLOCK_NORM = 5069;  // 448 sqrt(128) = 5068.5
constexpr int E4M3_UNIT = -9;
typedef float vf4 __attribute__((vector_size(16)));

// The dot product of a block where float64 may have rounded it to `sum`, or met a NaN.
static float block_dot(const Fp8BlockArgs& a, double sum, int64_t t, int64_t row, int64_t begin, int64_t n,
                       const RowBound& bound) {
    const double norms = double(bound.norm) * BLOCK_NORM;
    float y;
    if (!a.w_nan[row] && norms < 0x1p1000 && decided(sum, double(n + 3) * 0x1p-53 * norms, &y)) return y;
    const float* x = a.x32 + t * a.k + begin;
    const uint8_t* w = a.w + row * a.k + begin;
    return exact_dot(n, [&](int64_t i) { return x[i]; }, [&](int64_t i) { return e4m3_to_float(w[i]); });
}

// A row as float64, in the order and the unit in which fp8_dot4 meets it, with zeros up to a multiple of VD.
static inline void fp8_widen(const uint8_t* w, int64_t n, double* out) {
    const vu mask = E4M3_MASK - vu{};
    int64_t i = 0;
    for (; i + 8 * VD <= n; i += 8 * VD) {
        const vi v = *reinterpret_cast<const vi_bytes*>(w + i);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const vu bits = (vu)((v << 8 * j) >> 7);
            store(out + i + 2 * j * VD, (vd)(bits & mask));
            store(out + i + (2 * j + 1) * VD, (vd)((bits << 32) & mask));
        }
    }
    for (; i < n; ++i) out[i] = moved(w[i]);
    for (; i % VD; ++i) out[i] = 0;
}

// Dot products of a block of T tokens with four widened rows; all lie FP8_BLOCK apart.
template <int T>
static inline void block_dots(const double* x, const double* w, int64_t n, double (*out)[4]) {
    dot_block<T>(x, FP8_BLOCK, w, FP8_BLOCK, (n + VD - 1) / VD * VD, out);
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < 4; ++r) out[t][r] *= 0x1p216;
}

// Rows begin <= n < end of the product with all m <= FP8_BLOCK_TOKENS tokens; begin is a multiple of 4.
static void fp8_block_rows(const Fp8BlockArgs& a, int64_t begin, int64_t end) {
    const int64_t blocks = (a.k + FP8_BLOCK - 1) / FP8_BLOCK;
    double wide[4 * FP8_BLOCK], sum[FP8_BLOCK_TOKENS][4];
    vf4 acc[FP8_BLOCK_TOKENS];
    for (int64_t row = begin; row < end; row += 4) {
        const int rows = int(end - row < 4 ? end - row : 4);
        const float* w_scale = a.w_scale + row / FP8_BLOCK * blocks;  // the same for all four
        bool nan = false;
        for (int r = 0; r < rows; ++r) nan |= a.w_nan[row + r] != 0;
        for (int64_t t = 0; t < a.m; ++t) acc[t] = vf4{};
        for (int64_t j = 0; j < blocks; ++j) {
            const int64_t at = j * FP8_BLOCK, n = a.k - at < FP8_BLOCK ? a.k - at : FP8_BLOCK;
            const uint8_t* w = a.w + row * a.k + at;
            const double* x = a.x64 + j * a.m * FP8_BLOCK;
            if (a.in_place) {
                for (int64_t t = 0; t < a.m; ++t) fp8_dot4(x + t * FP8_BLOCK, w, a.k, rows, n, sum[t]);
            } else {
                // with fewer than four, the last stands in for the rest
                for (int r = 0; r < 4; ++r) fp8_widen(w + (r < rows ? r : rows - 1) * a.k, n, wide + r * FP8_BLOCK);
                int64_t t = 0;
                for (; t + 2 <= a.m; t += 2) block_dots<2>(x + t * FP8_BLOCK, wide, n, sum + t);
                if (t < a.m) block_dots<1>(x + t * FP8_BLOCK, wide, n, sum + t);
            }
            for (int64_t t = 0; t < a.m; ++t) {
                const RowBound bound = a.x_bound[j * a.m + t];
                vf4 dot = {float(sum[t][0]), float(sum[t][1]), float(sum[t][2]), float(sum[t][3])};
                dot += vf4{};  // -0 + 0 = +0
                if (nan || !(double(bound.norm) * BLOCK_NORM < pow2(53 + bound.unit + E4M3_UNIT)))
                    for (int r = 0; r < rows; ++r) dot[r] = block_dot(a, sum[t][r], t, row + r, at, n, bound);
                acc[t] += dot * (a.x_scale ? a.x_scale[j * a.m + t] * w_scale[j] : w_scale[j]);
            }
        }
        for (int64_t t = 0; t < a.m; ++t)
            for (int r = 0; r < rows; ++r) {
                float y = acc[t][r];
                if (y != y) y = float_of(0x7FC00000);
                if (a.bias) y += a.bias[row + r];
                store_float(a.out, t * a.n + row + r, a.out_dtype, y, a.bf16_nan);
            }
    }
}
