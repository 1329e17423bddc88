// gemm.cu's results: scales, bias, one rounding, and the way from registers to y. After gemm_copy.cu.

struct Finish {
    const float *alpha, *bias, *row;
    void *y;
    int m, n, boxes;
    float unit;
};

// of the two left rows of a thread
struct LeftScales {
    float alpha[2], bias[2];
};

INLINE LeftScales left_scales(const Finish &f, const Tile &tile, int warpgroup) {
    LeftScales s = {};
    const int thread = threadIdx.x % 128, row = tile.row + 64 * warpgroup + thread / 32 * 16 + thread % 32 / 4;
    for (int h = 0; h < 2 && !SWAP; h++) {
        const bool live = row + 8 * h < tile.end;
        // a power of two: where it is multiplied changes no bit
        if (PACKED) s.alpha[h] = __fmul_rn(load_float(f.alpha + row + 8 * h, live), f.unit);
        if (BIAS) s.bias[h] = load_float(f.bias + row + 8 * h, live);
    }
    return s;
}

// Volatile: otherwise the compiler rounds for all ways to y ahead, and runs out of registers.
// Two numbers in 16 bits, to nearest even, `low` in the lower half. A NaN is 0x7FFF, and in bfloat16, if EXACT, 0x7FC0.
template <bool EXACT> INLINE uint32 round_pair(float low, float high) {
    uint32 v;
#if OUT == 1
    asm volatile("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
#else
    asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    if (EXACT && low != low) v = (v & 0xFFFF0000) | 0x7FC0;
    if (EXACT && high != high) v = (v & 0xFFFF) | 0x7FC00000;
#endif
    return v;
}

// Where a thread's part of a tile lies: two rows of the left operand, 8 apart, and of each eight rows of the right one,
// two. Number 4·e + 2·h + c of its sums is left row h, right row c of eight e.
struct Part {
    int left, right, left_end, right_end;
};

// Sums to results in float32, in place: on every way to y the same registers.
INLINE void finish(float (&sums)[8 * BLOCKS], const LeftScales &scales, const Finish &f, const Part &part) {
#pragma unroll
    for (int e = 0; e < 2 * BLOCKS; e++) {
        float of_right[2] = {};  // biases or factors of tokens
        for (int c = 0; c < 2 && (SWAP ? BIAS : ROW); c++) {
            const int r = part.right + 8 * e + c;
            of_right[c] = load_float((SWAP ? f.bias : f.row) + r, r < part.right_end);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int h = i / 2, c = i % 2;
            float v = sums[4 * e + i];
            if (PACKED) v = __fmul_rn(v, ROW ? __fmul_rn(of_right[c], scales.alpha[h]) : scales.alpha[h]);
            if (BIAS) v = __fadd_rn(v, SWAP ? of_right[c] : scales.bias[h]);
            sums[4 * e + i] = v;
        }
    }
}

// Into shared memory, with the swizzle of box copies; the largest of all pairs, so that a NaN shows.
template <bool EXACT> INLINE uint32 stage_results(const float (&results)[8 * BLOCKS], uint32 to) {
    const int thread = threadIdx.x % 128, warp = thread / 32, matrix = thread % 32 / 8, low = thread % 8;
    uint32 largest = 0;
#pragma unroll
    for (int j = 0; j < BLOCKS; j++) {
        uint32 v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            v[i] = round_pair<EXACT>(results[8 * j + 2 * i], results[8 * j + 2 * i + 1]);
            asm("max.s16x2 %0, %0, %1;" : "+r"(largest) : "r"(v[i]));
        }
        if (SWAP) {
            const int r = 16 * warp + matrix % 2 * 8 + low, chunk = 2 * j + matrix / 2;
            store_matrices(to + chunk / 8 * 8192 + r * 128 + ((chunk % 8 ^ low) << 4), v[0], v[1], v[2], v[3]);
        } else {
            const int r = 16 * j + matrix / 2 * 8 + low, chunk = 2 * warp + matrix % 2;
            store_matrices_transposed(to + r * 128 + ((chunk ^ low) << 4), v[0], v[1], v[2], v[3]);
        }
    }
    return largest;
}

INLINE void store(float (&sums)[8 * BLOCKS], const LeftScales &scales, const TensorMap *y_map, const Finish &f,
                  const Work &work, const Tile &tile, int warpgroup) {
    const int thread = threadIdx.x % 128, lane = thread % 32;
    const Part part = {(SWAP ? tile.token : tile.row) + 64 * warpgroup + thread / 32 * 16 + lane / 4,
                       (SWAP ? tile.row : tile.token) + lane % 4 * 2, SWAP ? f.m : tile.end, SWAP ? tile.end : f.m};
    finish(sums, scales, f, part);
    // a box store begins at a multiple of 16 bytes, and leaves out what lies outside y, but not the next run's rows
    const int n_0 = tile.row + (SWAP ? 0 : 64 * warpgroup), rows = SWAP ? COLUMNS : 64;
    if (OUT != 0 && f.boxes && n_0 % 8 == 0 && (n_0 + rows <= tile.end || tile.end == f.n)) {
        const uint32 from = work.base + Y_OFFSET + warpgroup * Y_BYTES;
        if (thread == 0) store_wait_read();
        named_sync(2 + warpgroup, 128);
        const uint32 largest = stage_results<false>(sums, from);
        const bool nan = OUT == 2 && ((largest & 0xFFFF) == 0x7FFF || largest >> 16 == 0x7FFF);
        if (__any_sync(0xFFFFFFFF, nan)) stage_results<true>(sums, from);
        proxy_fence();
        named_sync(2 + warpgroup, 128);
        if (thread == 0) {
            for (int i = 0; i < (SWAP ? COLUMNS / 64 : 1); i++)
                store_box(y_map, n_0 + 64 * i, tile.token + (SWAP ? 64 * warpgroup : 0), from + 8192 * i);
            store_commit();
        }
        return;
    }
#pragma unroll
    for (int j = 0; j < 8 * BLOCKS; j++) {
        const int l = part.left + 8 * (j / 2 % 2), r = part.right + 8 * (j / 4) + j % 2;
        if (l >= part.left_end || r >= part.right_end) continue;
        const uint64 to = static_cast<uint64>(SWAP ? l : r) * f.n + (SWAP ? r : l);
        if (OUT == 0) static_cast<float *>(f.y)[to] = sums[j];
        else static_cast<uint16 *>(f.y)[to] = static_cast<uint16>(round_pair<true>(sums[j], 0.0f));
    }
}
