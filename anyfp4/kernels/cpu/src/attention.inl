// Attention of a few query rows over one KV head of one sequence (the definition is in ops/attention.py). Sums are float64
// with an error bound, settled as in dense.inl. Rows are taken up to three at a time, which share what is loaded.
//
// Two ways, same bits: one token over a bfloat16 cache reads keys and values where they lie and widens them in registers
// (attention_one.inl); anything else widens a tile of keys and of values, which all rows of the item meet
// (attention_tiles.inl).

constexpr int64_t KEY_TILE = 32;
constexpr int ROWS = 3;  // at a time: with four vectors each, they fill the registers of AVX2

struct AttentionScratch {
    float *scores, *row;           // [rows, span], [dim]
    double *weights, *q64, *kv64;  // [rows, span], [rows, dim], [KEY_TILE, dim]
    double* sums;                  // [rows, dim]
    float* total;                  // [rows]
    RowBound* q_bound;             // [rows]
    const uint16_t** pointers;     // [span]
};

// What an item is: query rows r = token x group_heads + head, and the keys that each sees.
struct AttentionView {
    int64_t from, to;  // keys that some row sees
    int64_t group_heads, rows, span, kv_head, first, window;
    int64_t row_from(int64_t r) const {
        const int64_t position = first + r / group_heads;
        return window && position + 1 > window ? position + 1 - window : 0;
    }
    int64_t row_to(int64_t r) const { return first + r / group_heads + 1; }
};

static inline AttentionView attention_view(const AttentionArgs& a, const AttentionItem& i) {
    AttentionView v;
    v.group_heads = i.h1 - i.h0;
    v.rows = (i.end - i.begin) * v.group_heads;
    v.kv_head = i.h0 / (a.heads / a.kv_heads);
    v.first = a.context_len[i.sequence] - (a.query_start[i.sequence + 1] - i.begin);
    v.window = a.window;
    v.from = v.row_from(0);
    v.to = v.row_to(v.rows - 1);
    v.span = v.to - v.from;
    return v;
}

static AttentionScratch attention_layout(const AttentionArgs& a, const AttentionView& v, void* memory, int64_t* bytes) {
    double* p = static_cast<double*>(memory);
    AttentionScratch s;
    s.weights = p;
    s.q64 = s.weights + v.rows * v.span;
    s.kv64 = s.q64 + v.rows * a.dim;
    s.sums = s.kv64 + KEY_TILE * a.dim;
    s.pointers = reinterpret_cast<const uint16_t**>(s.sums + v.rows * a.dim);
    s.q_bound = reinterpret_cast<RowBound*>(s.pointers + v.span);
    s.scores = reinterpret_cast<float*>(s.q_bound + v.rows);
    s.row = s.scores + v.rows * v.span;
    s.total = s.row + a.dim;
    *bytes = reinterpret_cast<uint8_t*>(s.total + v.rows) - static_cast<uint8_t*>(memory);
    return s;
}

static int64_t attention_scratch(const AttentionArgs& a, const AttentionItem& item) {
    int64_t bytes;
    alignas(64) char nowhere[1];
    attention_layout(a, attention_view(a, item), nowhere, &bytes);
    return bytes;
}

static inline int64_t cache_offset(const AttentionArgs& a, int64_t sequence, int64_t key, int64_t kv_head) {
    const int64_t block = a.block_table[sequence * a.table_stride + key / a.block_size];
    return ((block * a.block_size + key % a.block_size) * a.kv_heads + kv_head) * a.dim;
}

// At least the largest norm of the rows: infinite if they are not finite.
static inline double norm_bound(const Magnitudes& m, int64_t dim) {
    return m.finite() ? double(float_of(m.top)) * sqrt(double(dim)) * (1 + 0x1p-20) : INFINITY;
}

// Row r's scores for the keys key .. key + n - 1, from their float64 sums.
static inline void settle_scores(const AttentionArgs& a, const AttentionItem& item, const AttentionView& v,
                                 const AttentionScratch& s, int64_t r, int64_t key, int64_t n, const double* sum,
                                 double k_norm, int k_unit) {
    const double norms = k_norm * double(s.q_bound[r].norm), unit = double(a.dim + 3) * 0x1p-53;
    float* scores = s.scores + r * v.span + key - v.from;
    if (norms < pow2(53 + k_unit + s.q_bound[r].unit)) {  // no float64 sum was rounded
        for (int64_t j = 0; j < n; ++j) scores[j] = (float(sum[j]) + 0.0f) * a.scale;
        return;
    }
    for (int64_t j = 0; j < n; ++j) {
        float score;
        if (!(norms < 0x1p1000 && decided(sum[j], unit * norms, &score))) {
            const int64_t q = (item.begin + r / v.group_heads) * a.q_stride + (item.h0 + r % v.group_heads) * a.dim;
            const int64_t k = cache_offset(a, item.sequence, key + j, v.kv_head);
            score = exact_dot(a.dim, [&](int64_t d) { return load_float(a.q, q + d, a.dtype); },
                              [&](int64_t d) { return load_float(a.k_cache, k + d, a.cache_dtype); });
        }
        scores[j] = score * a.scale;
    }
}

// Scores to weights (times `factor`, for the way that meets them), and their totals.
static inline void softmax_rows(const AttentionView& v, const AttentionScratch& s, double factor) {
    for (int64_t r = 0; r < v.rows; ++r) {
        const int64_t begin = v.row_from(r) - v.from, n = v.row_to(r) - v.row_from(r);
        float* scores = s.scores + r * v.span + begin;
        double* weights = s.weights + r * v.span + begin;
        const float top = row_max(scores, n);
        for (int64_t i = 0; i < n; ++i) scores[i] = exp_one(scores[i] - top);
        for (int64_t i = 0; i < n; ++i) weights[i] = double(scores[i]) * factor;
        s.total[r] = exact_total(scores, n);
    }
}

// From the float64 sums of values to the output rows.
static inline void settle_values(const AttentionArgs& a, const AttentionItem& item, const AttentionView& v,
                                 const AttentionScratch& s, const Magnitudes& values) {
    for (int64_t r = 0; r < v.rows; ++r) {
        const double* sums = s.sums + r * a.dim;
        const float total = s.total[r];
        const double bound = values.finite() && total < INFINITY ? double(v.span + 3) * 0x1p-53 * double(total) *
                                                                       (1 + 0x1p-20) * double(float_of(values.top))
                                                                 : INFINITY;
        bool open = !(bound < 0x1p1000);
        for (int64_t d = 0; d < a.dim; ++d) {
            const float low = float(sums[d] - bound), high = float(sums[d] + bound);
            s.row[d] = low + 0.0f;
            open |= low != high;
        }
        for (int64_t d = 0; open && d < a.dim; ++d) {
            if (bound < 0x1p1000 && decided(sums[d], bound, &s.row[d])) continue;
            const int64_t begin = v.row_from(r);
            const float* w = s.scores + r * v.span + begin - v.from;
            s.row[d] = exact_dot(v.row_to(r) - begin, [&](int64_t i) { return w[i]; }, [&](int64_t i) {
                return load_float(a.v_cache, cache_offset(a, item.sequence, begin + i, v.kv_head) + d, a.cache_dtype);
            });
        }
        for (int64_t d = 0; d < a.dim; ++d) s.row[d] = s.row[d] / total * a.v_scale;
        const int64_t at = ((item.begin + r / v.group_heads) * a.heads + item.h0 + r % v.group_heads) * a.dim;
        store_row(element(a.out, at, a.dtype), a.dim, a.dtype, s.row, a.bf16_nan);
    }
}

// Calls f(first row, how many) until `rows` rows are done: by three, or by two where three would leave a single one.
template <typename F>
static inline void by_rows(int64_t rows, F&& f) {
    for (int64_t r = 0; r < rows;) {
        const int64_t left = rows - r;
        const int n = left == 4 || left == 2 ? 2 : left >= ROWS ? ROWS : 1;
        f(r, n);
        r += n;
    }
}
