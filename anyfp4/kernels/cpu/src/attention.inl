// Attention of a few query rows over one KV head of one sequence (the definition is in ops/attention.py). Keys and
// values are widened to float64 a tile at a time and meet all rows of the item: the query heads of a group, and in a
// prefill several tokens. Sums are float64 with an error bound, settled as in dense.inl.

constexpr int64_t KEY_TILE = 32;

struct AttentionScratch {
    float *scores, *row;           // [rows, span], [dim]
    double *weights, *q64, *kv64;  // [rows, span], [rows, dim], [KEY_TILE, dim]
    double *sums, *q_norm;         // [rows, dim], [rows]
    int* q_unit;                   // [rows]
};

static inline int64_t span_begin(const AttentionArgs& a, int64_t position) {
    return a.window && position + 1 > a.window ? position + 1 - a.window : 0;
}

static inline int64_t first_position(const AttentionArgs& a, const AttentionItem& i) {
    return a.context_len[i.sequence] - (a.query_start[i.sequence + 1] - i.begin);
}

// Keys that some row of the item sees: from, to.
static inline void item_span(const AttentionArgs& a, const AttentionItem& i, int64_t* from, int64_t* to) {
    const int64_t first = first_position(a, i);
    *from = span_begin(a, first);
    *to = first + (i.end - i.begin);
}

static AttentionScratch attention_layout(const AttentionArgs& a, const AttentionItem& item, void* memory,
                                         int64_t* bytes) {
    int64_t from, to;
    item_span(a, item, &from, &to);
    const int64_t rows = (item.end - item.begin) * (item.h1 - item.h0), span = to - from;
    double* p = static_cast<double*>(memory);
    AttentionScratch s;
    s.weights = p;
    s.q64 = s.weights + rows * span;
    s.kv64 = s.q64 + rows * a.dim;
    s.sums = s.kv64 + KEY_TILE * a.dim;
    s.q_norm = s.sums + rows * a.dim;
    s.scores = reinterpret_cast<float*>(s.q_norm + rows);
    s.row = s.scores + rows * span;
    s.q_unit = reinterpret_cast<int*>(s.row + a.dim);
    *bytes = (rows * span + 2 * rows * a.dim + KEY_TILE * a.dim + rows) * 8 + (rows * span + a.dim + rows) * 4;
    return s;
}

static int64_t attention_scratch(const AttentionArgs& a, const AttentionItem& item) {
    int64_t bytes;
    attention_layout(a, item, nullptr, &bytes);
    return bytes;
}

static inline int64_t cache_offset(const AttentionArgs& a, int64_t sequence, int64_t key, int64_t kv_head) {
    const int64_t block = a.block_table[sequence * a.table_stride + key / a.block_size];
    return ((block * a.block_size + key % a.block_size) * a.kv_heads + kv_head) * a.dim;
}

// Keys (or values) from <= key < to as float64 rows.
static Magnitudes widen_tile(const AttentionArgs& a, const void* cache, int64_t sequence, int64_t kv_head, int64_t from,
                           int64_t to, float* row, double* out) {
    Magnitudes all = Magnitudes::none();
    for (int64_t key = from; key < to; ++key) {
        load_row(cache, cache_offset(a, sequence, key, kv_head), a.dim, a.cache_dtype, row);
        all.join(widen(row, a.dim, out + (key - from) * a.dim));
    }
    return all;
}

// sums[d ...] += sum over keys of weights[key] v[key][d ...], N vectors of it.
template <int N>
static inline void add_values_strip(const double* weights, const double* v, int64_t keys, int64_t dim, double* sums) {
    vd s[N];
    for (int j = 0; j < N; ++j) s[j] = load(sums + j * VD);
    for (int64_t key = 0; key < keys; ++key, v += dim) {
        const vd w = splat(weights[key]);
        for (int j = 0; j < N; ++j) s[j] = madd(w, load(v + j * VD), s[j]);
    }
    for (int j = 0; j < N; ++j) store(sums + j * VD, s[j]);
}

static inline void add_values(const double* weights, const double* v, int64_t keys, int64_t dim, double* sums) {
    int64_t d = 0;
    for (; d + 8 * VD <= dim; d += 8 * VD) add_values_strip<8>(weights, v + d, keys, dim, sums + d);
    for (; d + 2 * VD <= dim; d += 2 * VD) add_values_strip<2>(weights, v + d, keys, dim, sums + d);
    for (; d < dim; ++d)
        for (int64_t key = 0; key < keys; ++key) sums[d] += weights[key] * v[key * dim + d];
}

// At least the largest norm of the rows: infinite if they are not finite.
static inline double norm_bound(const Magnitudes& m, int64_t dim) {
    return m.finite() ? double(float_of(m.top)) * sqrt(double(dim)) * (1 + 0x1p-20) : INFINITY;
}

static void attention(const AttentionArgs& a, const AttentionItem& item, void* memory) {
    int64_t from, to, bytes;
    item_span(a, item, &from, &to);
    const AttentionScratch s = attention_layout(a, item, memory, &bytes);
    const int64_t group_heads = item.h1 - item.h0, rows = (item.end - item.begin) * group_heads, span = to - from;
    const int64_t kv_head = item.h0 / (a.heads / a.kv_heads), dim = a.dim, first = first_position(a, item);
    auto q_offset = [&](int64_t r) {
        return (item.begin + r / group_heads) * a.q_stride + (item.h0 + r % group_heads) * dim;
    };
    auto row_from = [&](int64_t r) { return span_begin(a, first + r / group_heads); };
    auto row_to = [&](int64_t r) { return first + r / group_heads + 1; };

    for (int64_t r = 0; r < rows; ++r) {
        load_row(a.q, q_offset(r), dim, a.dtype, s.row);
        const Magnitudes m = widen(s.row, dim, s.q64 + r * dim);
        s.q_norm[r] = norm_bound(m, dim);
        s.q_unit[r] = m.unit();
        for (int64_t d = 0; d < dim; ++d) s.sums[r * dim + d] = 0.0;
    }

    // scores
    const double unit = double(dim + 3) * 0x1p-53;
    for (int64_t tile = from; tile < to; tile += KEY_TILE) {
        const int64_t tile_end = to - tile < KEY_TILE ? to : tile + KEY_TILE;
        const Magnitudes keys = widen_tile(a, a.k_cache, item.sequence, kv_head, tile, tile_end, s.row, s.kv64);
        const double k_norm = norm_bound(keys, dim);
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t begin = row_from(r) > tile ? row_from(r) : tile;
            const int64_t end = row_to(r) < tile_end ? row_to(r) : tile_end;
            const double norms = k_norm * s.q_norm[r];
            const bool exact = norms < pow2(53 + keys.unit() + s.q_unit[r]);
            for (int64_t key = begin; key < end; key += 4) {
                const int n = int(end - key < 4 ? end - key : 4);
                const double* k0 = s.kv64 + (key - tile) * dim;
                double sum[4];
                dot4(s.q64 + r * dim, k0, k0 + (n > 1 ? dim : 0), k0 + (n > 2 ? 2 * dim : 0), k0 + (n > 3 ? 3 * dim : 0),
                     dim, sum);
                for (int j = 0; j < n; ++j) {
                    float score;
                    if (exact) {
                        score = float(sum[j]) + 0.0f;
                    } else if (!(norms < 0x1p1000 && decided(sum[j], unit * norms, &score))) {
                        const double *qr = s.q64 + r * dim, *kr = k0 + j * dim;
                        score = exact_dot(dim, [&](int64_t d) { return float(qr[d]); },
                                          [&](int64_t d) { return float(kr[d]); });
                    }
                    s.scores[r * span + key + j - from] = score * a.scale;
                }
            }
        }
    }

    // weights, and their totals in the place of the norms
    for (int64_t r = 0; r < rows; ++r) {
        float* scores = s.scores + r * span;
        double* weights = s.weights + r * span;
        const int64_t begin = row_from(r) - from, n = row_to(r) - row_from(r);
        for (int64_t i = 0; i < begin; ++i) weights[i] = 0.0;
        for (int64_t i = begin + n; i < span; ++i) weights[i] = 0.0;
        const float top = row_max(scores + begin, n);
        for (int64_t i = begin; i < begin + n; ++i) scores[i] = exp_one(scores[i] - top);
        for (int64_t i = begin; i < begin + n; ++i) weights[i] = scores[i];
        s.q_norm[r] = exact_total(scores + begin, n);
    }

    // values
    Magnitudes values = Magnitudes::none();
    for (int64_t tile = from; tile < to; tile += KEY_TILE) {
        const int64_t tile_end = to - tile < KEY_TILE ? to : tile + KEY_TILE;
        values.join(widen_tile(a, a.v_cache, item.sequence, kv_head, tile, tile_end, s.row, s.kv64));
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t begin = row_from(r) > tile ? row_from(r) : tile;
            const int64_t end = row_to(r) < tile_end ? row_to(r) : tile_end;
            if (begin < end)
                add_values(s.weights + r * span + begin - from, s.kv64 + (begin - tile) * dim, end - begin, dim,
                           s.sums + r * dim);
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        const float total_weight = float(s.q_norm[r]);
        const double bound = values.finite() && total_weight < INFINITY
                                 ? double(span + 3) * 0x1p-53 * double(total_weight) * (1 + 0x1p-20) *
                                       double(float_of(values.top))
                                 : INFINITY;
        for (int64_t d = 0; d < dim; ++d) {
            float value;
            if (!(bound < 0x1p1000 && decided(s.sums[r * dim + d], bound, &value))) {
                const int64_t begin = row_from(r);
                const float* w = s.scores + r * span + begin - from;
                value = exact_dot(row_to(r) - begin, [&](int64_t i) { return w[i]; }, [&](int64_t i) {
                    return load_float(a.v_cache, cache_offset(a, item.sequence, begin + i, kv_head) + d, a.cache_dtype);
                });
            }
            s.row[d] = value / total_weight * a.v_scale;
        }
        const int64_t at = ((item.begin + r / group_heads) * a.heads + item.h0 + r % group_heads) * dim;
        store_row(element(a.out, at, a.dtype), dim, a.dtype, s.row, a.bf16_nan);
    }
}
