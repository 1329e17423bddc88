// One token over a bfloat16 cache: the rows are the query heads of a group, all see the same keys, and keys and values
// become float64 in registers, by moving (see dense.inl). Queries and weights are held times 2^800, keys and values
// appear times 2^-896.

constexpr double UNMOVE = 0x1p96;

// Four vectors of 4 VD neighbours: elements 3, 1, 2, 0 of every four.
static inline void moved(const uint16_t* p, vd* out) {
    const vu mask = 0x8FFFE00000000000 - vu{};
    const vi v = *reinterpret_cast<const vi_unaligned*>(p);
    const vu odd = (vu)(v >> 3), even = (vu)((v << 16) >> 3);
    out[0] = (vd)(odd & mask);
    out[1] = (vd)((odd << 32) & mask);
    out[2] = (vd)(even & mask);
    out[3] = (vd)((even << 32) & mask);
}

typedef int16_t vs __attribute__((vector_size(8 * VD)));
typedef uint16_t vsu __attribute__((vector_size(8 * VD)));
typedef int16_t vs_unaligned __attribute__((vector_size(8 * VD), aligned(2), may_alias));

// Magnitudes of bfloat16 numbers, in 16-bit lanes.
struct Bf16Magnitudes {
    vs top, bottom, bits;

    static Bf16Magnitudes none() { return {vs{}, 0x7FFF - vs{}, vs{}}; }
    void add(const uint16_t* p, int64_t n) {
        const vs mask = 0x7FFF - vs{};
        int64_t i = 0;
        for (; i + 4 * VD <= n; i += 4 * VD) add(*reinterpret_cast<const vs_unaligned*>(p + i) & mask);
        for (; i < n; ++i) {
            vs one{};
            one[0] = int16_t(p[i] & 0x7FFF);
            add(one);
        }
    }
    void add(vs m) {
        const vs less = (vs)((vsu)m + 0x7FFF);  // m - 1, ordered as if unsigned: zero comes last
        top = m > top ? m : top;
        bottom = less < bottom ? less : bottom;
        bits |= m;
    }
    Magnitudes all() const {
        Magnitudes r = Magnitudes::none();
        for (int i = 0; i < 4 * VD; ++i) {
            const uint32_t t = uint32_t(uint16_t(top[i])) << 16, b = uint32_t(uint16_t(bottom[i] - 0x7FFF)) << 16;
            r.join({t, b - 1, (uint32_t(uint16_t(bits[i])) << 16) & 0x7FFFFF});
        }
        return r;
    }
};

// sums[r][0 .. 1] of R rows of q [R, dim] with two keys.
template <int R>
static inline void two_scores(const double* q, int64_t dim, const uint16_t* k0, const uint16_t* k1,
                              double (*sums)[2]) {
    vd acc[R][2];
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = splat(0);
    int64_t d = 0;
    for (; d + 4 * VD <= dim; d += 4 * VD) {
        vd a[4], b[4];
        moved(k0 + d, a);
        moved(k1 + d, b);
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < 4; ++j) {
                const vd x = load(q + r * dim + d + j * VD);
                acc[r][0] = madd(x, a[j], acc[r][0]);
                acc[r][1] = madd(x, b[j], acc[r][1]);
            }
    }
    for (int r = 0; r < R; ++r) {
        sums[r][0] = total(acc[r][0]) * UNMOVE;
        sums[r][1] = total(acc[r][1]) * UNMOVE;
        for (int64_t i = d; i < dim; ++i) {
            sums[r][0] += q[r * dim + i] * bf16_to_float(k0[i]);
            sums[r][1] += q[r * dim + i] * bf16_to_float(k1[i]);
        }
    }
}

// sums [R, dim] = sum over keys of weights[r][key] v[key].
template <int R>
static inline void all_values(const double* weights, int64_t stride, const uint16_t* const* v, int64_t keys, int64_t dim,
                              double* sums) {
    static const int neighbour[4] = {3, 1, 2, 0};
    int64_t d = 0;
    for (; d + 4 * VD <= dim; d += 4 * VD) {
        vd acc[R][4];
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < 4; ++j) acc[r][j] = splat(0);
        for (int64_t key = 0; key < keys; ++key) {
            vd x[4];
            moved(v[key] + d, x);
            for (int r = 0; r < R; ++r) {
                const vd w = splat(weights[r * stride + key]);
                for (int j = 0; j < 4; ++j) acc[r][j] = madd(w, x[j], acc[r][j]);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < 4; ++j)
                for (int l = 0; l < VD; ++l) sums[r * dim + d + 4 * l + neighbour[j]] = acc[r][j][l] * UNMOVE;
    }
    for (; d < dim; ++d)
        for (int r = 0; r < R; ++r) {
            double sum = 0;
            for (int64_t key = 0; key < keys; ++key) sum += weights[r * stride + key] * bf16_to_float(v[key][d]);
            sums[r * dim + d] = sum * 0x1p-800;
        }
}

static void attention_one(const AttentionArgs& a, const AttentionItem& item, const AttentionView& v,
                          const AttentionScratch& s) {
    const int64_t dim = a.dim;
    const uint16_t* k_cache = static_cast<const uint16_t*>(a.k_cache);
    const uint16_t* v_cache = static_cast<const uint16_t*>(a.v_cache);
    for (int64_t r = 0; r < v.rows; ++r) {
        load_row(a.q, item.begin * a.q_stride + (item.h0 + r) * dim, dim, a.dtype, s.row);
        dense_prepare_x(s.row, dim, BF16, s.q64 + r * dim, &s.q_bound[r]);
    }
    for (int64_t tile = v.from; tile < v.to; tile += KEY_TILE) {
        const int64_t keys = v.to - tile < KEY_TILE ? v.to - tile : KEY_TILE;
        const uint16_t* k[KEY_TILE + 1];
        Bf16Magnitudes magnitudes = Bf16Magnitudes::none();
        for (int64_t i = 0; i < keys; ++i) {
            k[i] = k_cache + cache_offset(a, item.sequence, tile + i, v.kv_head);
            magnitudes.add(k[i], dim);
        }
        k[keys] = k[keys - 1];
        const Magnitudes all = magnitudes.all();
        const double k_norm = norm_bound(all, dim);
        const int k_unit = all.unit();
        by_rows(v.rows, [&](int64_t r, int n) {
            double sums[ROWS][KEY_TILE];
            const double* q = s.q64 + r * dim;
            for (int64_t i = 0; i < keys; i += 2) {
                double two[ROWS][2];
                if (n == 3) two_scores<3>(q, dim, k[i], k[i + 1], two);
                else if (n == 2) two_scores<2>(q, dim, k[i], k[i + 1], two);
                else two_scores<1>(q, dim, k[i], k[i + 1], two);
                for (int j = 0; j < n; ++j) sums[j][i] = two[j][0], sums[j][i + 1] = two[j][1];
            }
            for (int j = 0; j < n; ++j) settle_scores(a, item, v, s, r + j, tile, keys, sums[j], k_norm, k_unit);
        });
    }

    softmax_rows(v, s, 0x1p800);

    Bf16Magnitudes magnitudes = Bf16Magnitudes::none();
    for (int64_t key = v.from; key < v.to; ++key) {
        s.pointers[key - v.from] = v_cache + cache_offset(a, item.sequence, key, v.kv_head);
        magnitudes.add(s.pointers[key - v.from], dim);
    }
    by_rows(v.rows, [&](int64_t r, int n) {
        const double* w = s.weights + r * v.span;
        double* sums = s.sums + r * dim;
        if (n == 3) all_values<3>(w, v.span, s.pointers, v.span, dim, sums);
        else if (n == 2) all_values<2>(w, v.span, s.pointers, v.span, dim, sums);
        else all_values<1>(w, v.span, s.pointers, v.span, dim, sums);
    });
    settle_values(a, item, v, s, magnitudes.all());
}

static void attention(const AttentionArgs& a, const AttentionItem& item, void* memory) {
    const AttentionView v = attention_view(a, item);
    int64_t bytes;
    const AttentionScratch s = attention_layout(a, v, memory, &bytes);
    if (a.cache_dtype == BF16 && item.end - item.begin == 1) attention_one(a, item, v, s);
    else attention_tiles(a, item, v, s);
}
