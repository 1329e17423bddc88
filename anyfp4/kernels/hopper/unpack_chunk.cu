// A thread's part of a record: four words of codes, two of scales, as the left operands of four matrix instructions.
// In float16 if FLOAT16, else in bfloat16. After unpack.cu and unpack_half.cu.

#if FLOAT16
#define UNPACK unpack_half
#define UNPACK_SCALES(w, s) unpack_half_scales(w, s)
#else
#define UNPACK unpack
#define UNPACK_SCALES(w, s) unpack_scales(w, exponent, s)
#endif

INLINE void unpack_chunk(const uint4 &codes, const uint2 &scales, uint32 exponent, uint32 (&a)[16]) {
    uint32 upper[2], lower[2];
    UNPACK_SCALES(scales.x, upper);
    UNPACK_SCALES(scales.y, lower);
    UNPACK<0>(codes.x, upper, lower, a);
    UNPACK<1>(codes.y, upper, lower, a + 4);
    UNPACK<2>(codes.z, upper, lower, a + 8);
    UNPACK<3>(codes.w, upper, lower, a + 12);
}
