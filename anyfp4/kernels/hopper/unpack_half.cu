// The same as unpack.cu in float16, for activations in that type: code · scale, exactly. After unpack.cu.

INLINE uint32 multiply_pair(uint32 a, uint32 b) {
    uint32 out;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    return out;
}

// Scales · 2⁷, in the halves as unpack_scales has them.
INLINE void unpack_half_scales(uint32 w, uint32 (&s)[2]) {
    s[0] = (w << 3) & 0x7F807F80u;
    s[1] = (rotate_left(w, 24) << 3) & 0x7F807F80u;
}

template <int J> INLINE void unpack_half(uint32 w, const uint32 (&upper)[2], const uint32 (&lower)[2], uint32 *a) {
    const uint32 seven = 0x58005800u;  // 2⁷: codes read as code · 2⁻¹⁴, and scales are at most 448 · 2⁷
    uint32 pair[4];
    unpack_codes(w, pair);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32 code = (pair[i] & 0x80008000u) | ((pair[i] << 3) & 0x0E000E00u), s = (i & 1) ? lower[J & 1] : upper[J & 1];
        a[i] = multiply_pair(multiply_pair(code, __byte_perm(s, s, J >> 1 ? 0x3232 : 0x1010)), seven);
    }
}
