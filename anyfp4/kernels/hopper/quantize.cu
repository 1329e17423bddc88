// Activation quantization: x [M, K] to code · block_scale in bfloat16 (exact), bit for bit as formats/nvfp4.py; once for
// each of the global scales. After async.cu. KIND: 0 bfloat16, 1 float16, 2 float32. SHARE: threads that share a block of
// 16: four where there are few blocks, one where there are many, which works out the block's scale once.

const int OWN = 16 / SHARE;  // numbers of a thread

#if KIND == 2
typedef float element;
#else
typedef uint16 element;
#endif

// what a thread reads; by 16 bytes at most
struct alignas(OWN * sizeof(element) < 16 ? OWN * sizeof(element) : 16) Numbers {
    element v[OWN];
};

struct alignas(OWN * 2 < 16 ? OWN * 2 : 16) Values {
    uint32 pairs[OWN / 2];
};

INLINE float wide(element v) {
#if KIND == 0
    return __uint_as_float(static_cast<uint32>(v) << 16);
#elif KIND == 1
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
    return f;
#else
    return v;
#endif
}

// To the type of x and back. A NaN stays one.
INLINE float narrowed(float f) {
#if KIND == 0
    uint16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(f));
    return wide(bits);
#elif KIND == 1
    uint16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
    return wide(bits);
#else
    return f;
#endif
}

// E4M3 of 0 … 448, to nearest even, and back; a NaN stays one.
INLINE float as_scale(float f) {
    uint16 code;
    uint32 half;
    float out;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(code) : "f"(0.0f), "f"(f));
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(half) : "h"(code));
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(static_cast<uint16>(half)));
    return out;
}

// E4M3 bits of such a number, not NaN.
INLINE uint32 scale_bits(float f) {
    uint16 code;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(code) : "f"(0.0f), "f"(f));
    return code & 0x7F;
}

// The E2M1 number nearest to f: ties to the even code, saturating, a NaN is 0.
INLINE float as_value(float f) {
    float a = fabsf(f), r;
    if (a < 2.0f)
        r = rintf(2.0f * a) * 0.5f;
    else if (a < 4.0f)
        r = rintf(a);
    else
        r = fminf(2.0f * rintf(0.5f * a), 6.0f);
    return f == f ? copysignf(r, f) : 0.0f;
}

INLINE uint32 bfloat_pair(float low, float high) {
    uint32 out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

extern "C" __global__ void __launch_bounds__(128)
    quantize(const element *x, const element *pre, const float *inverse_scales, Values *values, uint16 *blocks, int parts, int k, int stride) {
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    int i = blockIdx.x * 128 + threadIdx.x;
    if (i >= parts) return;  // whole blocks of 16: K is a multiple of it
    int per_row = k / OWN, row = i / per_row, column = (i - row * per_row) * OWN;
    Numbers in = *reinterpret_cast<const Numbers *>(x + static_cast<long long>(row) * stride + column);
    float v[OWN];
#pragma unroll
    for (int j = 0; j < OWN; j++) v[j] = wide(in.v[j]);
    if (pre) {
        Numbers factor = *reinterpret_cast<const Numbers *>(pre + column);
#pragma unroll
        for (int j = 0; j < OWN; j++) v[j] = narrowed(v[j] * wide(factor.v[j]));
    }
    // as integers, magnitudes are in order and NaN is the largest
    uint32 largest = 0;
#pragma unroll
    for (int j = 0; j < OWN; j++) largest = max(largest, __float_as_uint(v[j]) & 0x7FFFFFFFu);
    if (SHARE == 4) {
        uint32 mask = __activemask();
        largest = max(largest, __shfl_xor_sync(mask, largest, 1));
        largest = max(largest, __shfl_xor_sync(mask, largest, 2));
    }
    float g = inverse_scales[blockIdx.y];
    float raw = g * (__uint_as_float(largest) * 0.16666667163372040f);
    float s = as_scale(raw > 448.0f ? 448.0f : raw);
    float factor = __fdiv_rn(g, s);
    // where s is zero the quotient is infinite, and every code zero
    float squares = 0.0f;  // of codes: a multiple of a quarter, at most 576
#pragma unroll
    for (int j = 0; j < OWN; j++) {
        float code = s == 0.0f ? 0.0f : as_value(v[j] * factor);
        squares += code * code;
        v[j] = code * s;
    }
    if (blocks) {
        if (SHARE == 4) {
            uint32 mask = __activemask();
            squares += __shfl_xor_sync(mask, squares, 1);
            squares += __shfl_xor_sync(mask, squares, 2);
        }
        uint32 bits = s == s ? scale_bits(s) : 0x7F;
        if (SHARE == 1 || (i & 3) == 0)
            blocks[(static_cast<long long>(blockIdx.y) * parts + i) / SHARE] = static_cast<uint16>(bits | static_cast<uint32>(ceilf(squares * 0.25f)) << 8);
    }
    Values out;
#pragma unroll
    for (int j = 0; j < OWN / 2; j++) out.pairs[j] = bfloat_pair(v[2 * j], v[2 * j + 1]);
    values[static_cast<long long>(blockIdx.y) * parts + i] = out;
}
