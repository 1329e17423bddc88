// Records to rows: code · scale, exact in any type. After async.cu and unpack.cu. KIND: 0 bfloat16, 1 float16, 2 float32.

#if KIND == 2
typedef float2 pair_type;
#else
typedef uint32 pair_type;
#endif

INLINE pair_type converted(uint32 pair) {
    float low = __uint_as_float(pair << 16) * 128.0f, high = __uint_as_float(pair & 0xFFFF0000u) * 128.0f;
#if KIND == 2
    return make_float2(low, high);
#else
    uint32 out;
#if KIND == 0
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
#endif
    return out;
#endif
}

// Block (tile, chunk) writes its 64 rows and columns of [N, K]. rows: of each tile the first row and their number, or null
extern "C" __global__ void __launch_bounds__(128)
    dequantize(const uint8 *records, const int *rows, pair_type *out, int n, int k, uint32 exponent) {
    int tile = blockIdx.x, chunk = blockIdx.y, thread = threadIdx.x;
    const uint8 *record = records + (static_cast<long long>(tile) * gridDim.y + chunk) * 2304;
    uint4 codes = *reinterpret_cast<const uint4 *>(record + thread * 16);
    uint2 scales = *reinterpret_cast<const uint2 *>(record + 2048 + (thread >> 2) * 8);
    uint32 upper[2], lower[2], a[16];
    unpack_scales(scales.x, exponent, upper);
    unpack_scales(scales.y, exponent, lower);
    unpack<0>(codes.x, upper, lower, a);
    unpack<1>(codes.y, upper, lower, a + 4);
    unpack<2>(codes.z, upper, lower, a + 8);
    unpack<3>(codes.w, upper, lower, a + 12);
    int first = rows ? rows[2 * tile] : tile * 64, live = rows ? rows[2 * tile + 1] : min(64, n - first);
    int row = (thread >> 5) * 16 + ((thread >> 2) & 7), column = chunk * 64 + (thread & 3) * 2;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        int r = row + (i & 1) * 8, c = column + (i >> 2) * 16 + (i & 2) * 4;
        if (r < live && c < k) out[(static_cast<long long>(first + r) * k + c) / 2] = converted(a[i]);
    }
}
