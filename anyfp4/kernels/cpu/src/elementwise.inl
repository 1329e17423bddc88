// RMSNorm, SiLU, rotary embedding and log-softmax, a row or a token at a time. Each float32 operation is rounded once,
// as in the reference; the loops are plain so that the compiler vectorizes them.

static inline void store_row(void* out, int64_t n, int dtype, const float* x, uint16_t nan) {
    switch (dtype) {
        case F32: memcpy(out, x, size_t(n) * 4); break;
        case BF16: {
            uint16_t* p = static_cast<uint16_t*>(out);
            for (int64_t i = 0; i < n; ++i) p[i] = float_to_bf16(x[i], nan);
            break;
        }
        case F16: {
            uint16_t* p = static_cast<uint16_t*>(out);
            for (int64_t i = 0; i < n; ++i) p[i] = float_to_f16(x[i]);
            break;
        }
        default: {
            uint8_t* p = static_cast<uint8_t*>(out);
            for (int64_t i = 0; i < n; ++i) p[i] = float_to_e4m3(x[i]);
        }
    }
}

constexpr int64_t STRIP = 256;  // elements that pass through registers and a small buffer at a time

// y = x / sqrt(mean(x^2) + eps) w. If `residual` is given, x + residual, rounded, is written to residual_out and takes
// the place of x. scratch: [k].
static void rms_norm(const void* x, const void* residual, void* residual_out, const void* w, int w_dtype, void* y,
                     int64_t k, int dtype, float eps, float* v, uint16_t nan) {
    load_row(x, 0, k, dtype, v);
    if (residual) {
        float r[STRIP];
        for (int64_t i = 0; i < k; i += STRIP) {
            const int64_t n = k - i < STRIP ? k - i : STRIP;
            load_row(residual, i, n, dtype, r);
            for (int64_t j = 0; j < n; ++j) v[i + j] += r[j];
            store_row(element(residual_out, i, dtype), n, dtype, v + i, nan);
            load_row(residual_out, i, n, dtype, v + i);
        }
    }
    vd s0 = splat(0), s1 = s0;
    int64_t i = 0;
    for (; i + 2 * VD <= k; i += 2 * VD) {
        const vd a = load(v + i), b = load(v + i + VD);
        s0 = madd(a, a, s0);
        s1 = madd(b, b, s1);
    }
    double sum = total(s0 + s1);
    for (; i < k; ++i) sum += double(v[i]) * double(v[i]);
    float square_sum;
    if (!(sum < 0x1p1000 && decided(sum, sum * double(k + 3) * 0x1p-53, &square_sum))) {
        auto element_of = [&](int64_t j) { return v[j]; };
        square_sum = exact_dot(k, element_of, element_of);
    }
    const float inverse = 1.0f / sqrtf(square_sum / float(k) + eps);
    float wf[STRIP];
    for (int64_t j = 0; j < k; j += STRIP) {
        const int64_t n = k - j < STRIP ? k - j : STRIP;
        load_row(w, j, n, w_dtype, wf);
        for (int64_t l = 0; l < n; ++l) wf[l] = v[j + l] * inverse * wf[l];
        store_row(element(y, j, dtype), n, dtype, wf, nan);
    }
}

static void silu_mul(const void* gate_up, void* y, int64_t width, int dtype, uint16_t nan) {
    float g[STRIP], u[STRIP];
    for (int64_t i = 0; i < width; i += STRIP) {
        const int64_t n = width - i < STRIP ? width - i : STRIP;
        load_row(gate_up, i, n, dtype, g);
        load_row(gate_up, width + i, n, dtype, u);
        float e[STRIP];
        for (int64_t j = 0; j < n; ++j) e[j] = exp_one(-g[j]);
        for (int64_t j = 0; j < n; ++j) g[j] = g[j] / (1.0f + e[j]) * u[j];
        store_row(element(y, i, dtype), n, dtype, g, nan);
    }
}

// One head of 2 half elements.
static void rope(const void* x, void* y, const float* cos_sin, int64_t half, int dtype, uint16_t nan) {
    float a[STRIP], b[STRIP], c[STRIP];
    for (int64_t i = 0; i < half; i += STRIP) {
        const int64_t n = half - i < STRIP ? half - i : STRIP;
        const float *cosine = cos_sin + i, *sine = cos_sin + half + i;
        load_row(x, i, n, dtype, a);
        load_row(x, half + i, n, dtype, b);
        for (int64_t j = 0; j < n; ++j) c[j] = a[j] * cosine[j] - b[j] * sine[j];
        store_row(element(y, i, dtype), n, dtype, c, nan);
        for (int64_t j = 0; j < n; ++j) c[j] = b[j] * cosine[j] + a[j] * sine[j];
        store_row(element(y, half + i, dtype), n, dtype, c, nan);
    }
}

// The largest element, or NaN if there is one.
static inline float row_max(const float* x, int64_t n) {
    float top = x[0];
    bool nan = false;
    for (int64_t i = 0; i < n; ++i) {
        top = x[i] > top ? x[i] : top;
        nan |= x[i] != x[i];
    }
    return nan ? float_of(0x7FC00000) : top;
}

static void log_softmax(const float* x, float* y, int64_t n, float* weights) {
    const float top = row_max(x, n);
    for (int64_t i = 0; i < n; ++i) {
        y[i] = x[i] - top;
        weights[i] = exp_one(y[i]);
    }
    const float normaliser = log_one(exact_total(weights, n));
    for (int64_t i = 0; i < n; ++i) y[i] = y[i] - normaliser;
}
