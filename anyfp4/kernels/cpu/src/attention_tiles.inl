// Keys and values widened to float64 a tile at a time. A tile of keys is held by dimension, so that a vector is one
// dimension of several keys and a score needs no sum across a vector.

// Keys from <= key < to as columns of kt [dim, KEY_TILE]; missing ones zero.
static Magnitudes widen_keys(const AttentionArgs& a, const AttentionItem& item, const AttentionView& v, int64_t from,
                             int64_t to, float* row, double* kt) {
    Magnitudes all = Magnitudes::none();
    for (int64_t key = from; key < to; ++key) {
        load_row(a.k_cache, cache_offset(a, item.sequence, key, v.kv_head), a.dim, a.cache_dtype, row);
        all.join(magnitudes(row, a.dim));
        for (int64_t d = 0; d < a.dim; ++d) kt[d * KEY_TILE + key - from] = row[d];
    }
    for (int64_t d = 0; d < a.dim; ++d)
        for (int64_t i = to - from; i < KEY_TILE; ++i) kt[d * KEY_TILE + i] = 0.0;
    return all;
}

// Values as rows of [KEY_TILE, dim].
static Magnitudes widen_values(const AttentionArgs& a, const AttentionItem& item, const AttentionView& v, int64_t from,
                               int64_t to, float* row, double* out) {
    Magnitudes all = Magnitudes::none();
    for (int64_t key = from; key < to; ++key) {
        load_row(a.v_cache, cache_offset(a, item.sequence, key, v.kv_head), a.dim, a.cache_dtype, row);
        all.join(widen(row, a.dim, out + (key - from) * a.dim));
    }
    return all;
}

// sums[r][key] of R rows q [R, dim] with the keys begin <= key < end of a tile, and some beside them.
template <int R>
static inline void tile_scores(const double* q, int64_t dim, const double* kt, int64_t begin, int64_t end,
                               double (*sums)[KEY_TILE]) {
    constexpr int64_t STEP = 4 * VD;
    static_assert(KEY_TILE % STEP == 0, "");
    for (int64_t key = begin / STEP * STEP; key < end; key += STEP) {
        vd acc[R][4];
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < 4; ++j) acc[r][j] = splat(0);
        for (int64_t d = 0; d < dim; ++d) {
            vd k[4];
            for (int j = 0; j < 4; ++j) k[j] = load(kt + d * KEY_TILE + key + j * VD);
            for (int r = 0; r < R; ++r) {
                const vd x = splat(q[r * dim + d]);
                for (int j = 0; j < 4; ++j) acc[r][j] = madd(x, k[j], acc[r][j]);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < 4; ++j) store(&sums[r][key + j * VD], acc[r][j]);
    }
}

// sums [R, dim] += sum over keys of weights[r][key] v[key]; rows of weights are `stride` apart.
template <int R>
static inline void tile_values(const double* weights, int64_t stride, const double* v, int64_t keys, int64_t dim,
                               double* sums) {
    int64_t d = 0;
    for (; d + 4 * VD <= dim; d += 4 * VD) {
        vd acc[R][4];
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < 4; ++j) acc[r][j] = load(sums + r * dim + d + j * VD);
        for (int64_t key = 0; key < keys; ++key) {
            vd x[4];
            for (int j = 0; j < 4; ++j) x[j] = load(v + key * dim + d + j * VD);
            for (int r = 0; r < R; ++r) {
                const vd w = splat(weights[r * stride + key]);
                for (int j = 0; j < 4; ++j) acc[r][j] = madd(w, x[j], acc[r][j]);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < 4; ++j) store(sums + r * dim + d + j * VD, acc[r][j]);
    }
    for (; d < dim; ++d)
        for (int r = 0; r < R; ++r)
            for (int64_t key = 0; key < keys; ++key) sums[r * dim + d] += weights[r * stride + key] * v[key * dim + d];
}

static void attention_tiles(const AttentionArgs& a, const AttentionItem& item, const AttentionView& v,
                            const AttentionScratch& s) {
    const int64_t dim = a.dim;
    for (int64_t r = 0; r < v.rows; ++r) {
        const int64_t q = (item.begin + r / v.group_heads) * a.q_stride + (item.h0 + r % v.group_heads) * dim;
        load_row(a.q, q, dim, a.dtype, s.row);
        dense_prepare_x(s.row, dim, F32, s.q64 + r * dim, &s.q_bound[r]);
    }
    for (int64_t tile = v.from; tile < v.to; tile += KEY_TILE) {
        const int64_t tile_end = v.to - tile < KEY_TILE ? v.to : tile + KEY_TILE;
        const Magnitudes keys = widen_keys(a, item, v, tile, tile_end, s.row, s.kv64);
        const double k_norm = norm_bound(keys, dim);
        const int k_unit = keys.unit();
        by_rows(v.rows, [&](int64_t r, int n) {
            double sums[ROWS][KEY_TILE];
            const int64_t low = v.row_from(r) > tile ? v.row_from(r) : tile;
            const int64_t high = v.row_to(r + n - 1) < tile_end ? v.row_to(r + n - 1) : tile_end;
            if (low >= high) return;
            const double* q = s.q64 + r * dim;
            if (n == 3) tile_scores<3>(q, dim, s.kv64, low - tile, high - tile, sums);
            else if (n == 2) tile_scores<2>(q, dim, s.kv64, low - tile, high - tile, sums);
            else tile_scores<1>(q, dim, s.kv64, low - tile, high - tile, sums);
            for (int i = 0; i < n; ++i) {
                const int64_t begin = v.row_from(r + i) > tile ? v.row_from(r + i) : tile;
                const int64_t end = v.row_to(r + i) < tile_end ? v.row_to(r + i) : tile_end;
                if (begin < end)
                    settle_scores(a, item, v, s, r + i, begin, end - begin, &sums[i][begin - tile], k_norm, k_unit);
            }
        });
    }

    softmax_rows(v, s, 1.0);

    for (int64_t i = 0; i < v.rows * dim; ++i) s.sums[i] = 0.0;
    Magnitudes values = Magnitudes::none();
    for (int64_t tile = v.from; tile < v.to; tile += KEY_TILE) {
        const int64_t tile_end = v.to - tile < KEY_TILE ? v.to : tile + KEY_TILE;
        values.join(widen_values(a, item, v, tile, tile_end, s.row, s.kv64));
        auto add = [&](int64_t r, int n, int64_t begin, int64_t end) {
            if (begin >= end) return;
            const double* w = s.weights + r * v.span + begin - v.from;
            const double* x = s.kv64 + (begin - tile) * dim;
            double* sums = s.sums + r * dim;
            if (n == 3) tile_values<3>(w, v.span, x, end - begin, dim, sums);
            else if (n == 2) tile_values<2>(w, v.span, x, end - begin, dim, sums);
            else tile_values<1>(w, v.span, x, end - begin, dim, sums);
        };
        by_rows(v.rows, [&](int64_t r, int n) {
            // what all n rows see, then what only some of them see: a hidden value may be NaN
            const int64_t all_from = v.row_from(r + n - 1) > tile ? v.row_from(r + n - 1) : tile;
            const int64_t all_to = v.row_to(r) < tile_end ? v.row_to(r) : tile_end;
            if (all_from < all_to) add(r, n, all_from, all_to);
            for (int i = 0; i < n; ++i) {
                const int64_t begin = v.row_from(r + i) > tile ? v.row_from(r + i) : tile;
                const int64_t end = v.row_to(r + i) < tile_end ? v.row_to(r + i) : tile_end;
                if (all_from >= all_to) {
                    add(r + i, 1, begin, end);
                    continue;
                }
                add(r + i, 1, begin, end < all_from ? end : all_from);
                add(r + i, 1, begin > all_to ? begin : all_to, end);
            }
        });
    }
    settle_values(a, item, v, s, values);
}
