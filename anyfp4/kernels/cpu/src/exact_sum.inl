// An exact sum of float64 numbers, rounded once to float32 (nearest, ties to even): the definition in ops/exact.py, for
// the few sums that the fast float64 path cannot decide.
//
// A fixed-point number of 24 limbs of 32 bits holds every product of two float32 numbers (2^-298 to 2^256) and any
// number of them; limbs are wider than 32 bits and carry only at the end.
struct ExactSum {
    static constexpr int LIMBS = 24, LOWEST = 360;  // limb i has the weight 2^(32 i - LOWEST)
    int64_t limb[LIMBS];
    int pending;

    void clear() {
        memset(limb, 0, sizeof limb);
        pending = 0;
    }

    // x: finite, zero or 2^-300 <= |x| < 2^257
    void add(double x) {
        const uint64_t u = bits_of(x);
        const int field = int(u >> 52 & 0x7FF);
        if (field == 0) return;
        const int64_t magnitude = int64_t((u & ((uint64_t(1) << 52) - 1)) | uint64_t(1) << 52);
        const int position = field - 1075 + LOWEST;
        const int at = position / 32, shift = position % 32;
        const unsigned __int128 v = static_cast<unsigned __int128>(magnitude) << shift;
        const int64_t sign = u >> 63 ? -1 : 1;
        limb[at] += sign * int64_t(uint32_t(v));
        limb[at + 1] += sign * int64_t(uint32_t(v >> 32));
        limb[at + 2] += sign * int64_t(uint64_t(v >> 64));
        if (++pending == 1 << 30) carry();
    }

    float round() {
        carry();
        const bool negative = limb[LIMBS - 1] < 0;
        if (negative) {
            for (auto& l : limb) l = -l;
            carry();
        }
        int top = LIMBS - 1;
        while (top >= 0 && limb[top] == 0) --top;
        if (top < 0) return 0.0f;
        // 64 to 96 leading bits, and whether anything lies below: enough for an odd last bit to stand for the rest
        unsigned __int128 lead = 0;
        for (int i = 0; i < 3; ++i) lead = lead << 32 | (top - i >= 0 ? uint64_t(limb[top - i]) : 0);
        bool rest = false;
        for (int i = top - 3; i >= 0; --i) rest |= limb[i] != 0;
        int exponent = 32 * (top - 2) - LOWEST;
        while (lead >> 53) {
            rest |= lead & 1;
            lead >>= 1;
            ++exponent;
        }
        const double magnitude = double(int64_t(uint64_t(lead) | (rest ? 1 : 0)));
        const double scaled = magnitude * pow2(exponent);
        return float(negative ? -scaled : scaled);
    }

private:
    // Every limb but the last to 0 .. 2^32 - 1.
    void carry() {
        for (int i = 0; i + 1 < LIMBS; ++i) {
            const int64_t c = limb[i] >> 32;  // rounds down
            limb[i] -= c * (int64_t(1) << 32);
            limb[i + 1] += c;
        }
        pending = 0;
    }
};

// The float32 nearest to a sum that lies within `bound` of `approximate`, if that is decided; -0 becomes +0.
static inline bool decided(double approximate, double bound, float* result) {
    const float low = float(approximate - bound), high = float(approximate + bound);
    *result = low + 0.0f;
    return low == high;
}

// What a sum with an infinity or a NaN among its terms is: the infinity, or the one canonical NaN.
static inline float special_sum(double sum) { return sum != sum ? float_of(0x7FC00000) : float(sum); }

// sum over i < n of a(i) b(i), floats, any values.
template <typename A, typename B>
static float exact_dot(int64_t n, A a, B b) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) sum += double(a(i)) * double(b(i));
    if (!(fabs(sum) <= 0x1p1000)) return special_sum(sum);
    ExactSum exact;
    exact.clear();
    for (int64_t i = 0; i < n; ++i) exact.add(double(a(i)) * double(b(i)));
    return exact.round();
}
