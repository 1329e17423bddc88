// Codes and scales of layout.py to the left operand of wgmma m64k16; see there for the places of bits.
typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ u32 rotate_left(u32 w, int k) { return __funnelshift_l(w, w, k); }

// Four pairs of bfloat16, code * 2^-126: 4 rotations and 5 masks.
__device__ __forceinline__ void unpack_codes(u32 w, u32 (&pair)[4]) {
  const u32 all = 0x81C081C0u;
  pair[0] = w & all;
  pair[1] = (w << 4) & all;
  pair[2] = rotate_left(w, 10) & all;
  pair[3] = (rotate_left(w, 14) & 0x81808180u) | ((w << 6) & 0x00400040u);
}

// 0x70007000 in a register the compiler knows nothing of, so that mask and exponent are one LOP3 below.
__device__ __forceinline__ u32 scale_exponent() {
  u32 exponent;
  asm volatile("mov.u32 %0, 0x70007000;" : "=r"(exponent));
  return exponent;
}

// Scales of a row's four blocks, scale * 2^119 in bfloat16: blocks 0 and 2 in the halves of s[0], 1 and 3 in those of s[1].
__device__ __forceinline__ void unpack_scales(u32 w, u32 exponent, u32 (&s)[2]) {
  s[0] = (w & 0x0FF00FF0u) | exponent;
  s[1] = (rotate_left(w, 24) & 0x0FF00FF0u) | exponent;
}

// The pair times the lower (HALF = 0) or upper half of s.
template <int HALF>
__device__ __forceinline__ u32 scale_pair(u32 pair, u32 s) {
  u32 out;
  if (HALF == 0)
    asm("{.reg .b16 l, h; .reg .b32 d; mov.b32 {l, h}, %2; mov.b32 d, {l, l}; mul.rn.bf16x2 %0, %1, d;}" : "=r"(out) : "r"(pair), "r"(s));
  else
    asm("{.reg .b16 l, h; .reg .b32 d; mov.b32 {l, h}, %2; mov.b32 d, {h, h}; mul.rn.bf16x2 %0, %1, d;}" : "=r"(out) : "r"(pair), "r"(s));
  return out;
}

// Word J of a thread (columns 16J to 16J + 15): code * scale * 2^-7. upper and lower: unpack_scales of rows r and r + 8.
template <int J>
__device__ __forceinline__ void unpack(u32 w, const u32 (&upper)[2], const u32 (&lower)[2], u32 (&a)[4]) {
  unpack_codes(w, a);
#pragma unroll
  for (int i = 0; i < 4; i++) a[i] = scale_pair<(J >> 1)>(a[i], (i & 1) ? lower[J & 1] : upper[J & 1]);
}
