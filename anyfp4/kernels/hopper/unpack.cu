// Codes and scales of layout.py to the left operand of wgmma m64k16; see there for the places of bits. After async.cu.

INLINE uint32 rotate_left(uint32 w, int k) { return __funnelshift_l(w, w, k); }

// Four pairs of bfloat16, code · 2⁻¹²⁶: 4 rotations and 5 masks.
INLINE void unpack_codes(uint32 w, uint32 (&pair)[4]) {
    const uint32 all = 0x81C081C0u;
    pair[0] = w & all;
    pair[1] = (w << 4) & all;
    pair[2] = rotate_left(w, 10) & all;
    pair[3] = (rotate_left(w, 14) & 0x81808180u) | ((w << 6) & 0x00400040u);
}

// Scales of a row's four blocks, scale · 2¹¹⁹ in bfloat16: blocks 0 and 2 in the halves of s[0], 1 and 3 in those of s[1].
// `exponent` is 0x70007000, from a kernel's parameter: two constants that the compiler knows do not fit into one LOP3.
INLINE void unpack_scales(uint32 w, uint32 exponent, uint32 (&s)[2]) {
    s[0] = (w & 0x0FF00FF0u) | exponent;
    s[1] = (rotate_left(w, 24) & 0x0FF00FF0u) | exponent;
}

// The pair times the lower (HALF = 0) or upper half of s; the copy of a half costs nothing.
template <int HALF> INLINE uint32 scale_pair(uint32 pair, uint32 s) {
    uint32 out;
    if (HALF == 0)
        asm("{\n\t.reg .b16 l, h;\n\t.reg .b32 d;\n\tmov.b32 {l, h}, %2;\n\tmov.b32 d, {l, l};\n\tmul.rn.bf16x2 %0, %1, d;\n\t}"
            : "=r"(out) : "r"(pair), "r"(s));
    else
        asm("{\n\t.reg .b16 l, h;\n\t.reg .b32 d;\n\tmov.b32 {l, h}, %2;\n\tmov.b32 d, {h, h};\n\tmul.rn.bf16x2 %0, %1, d;\n\t}"
            : "=r"(out) : "r"(pair), "r"(s));
    return out;
}

// Word J of a thread (columns 16J to 16J + 15): code · scale · 2⁻⁷. upper, lower: unpack_scales of rows r and r + 8.
template <int J> INLINE void unpack(uint32 w, const uint32 (&upper)[2], const uint32 (&lower)[2], uint32 *a) {
    uint32 pair[4];
    unpack_codes(w, pair);
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = scale_pair<(J >> 1)>(pair[i], (i & 1) ? lower[J & 1] : upper[J & 1]);
}
