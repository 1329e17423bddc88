// y[M, N] = x[M, K] · w[N, K]ᵀ for many tokens. After async.cu, wgmma.cu, unpack.cu, gemm_copy.cu
// and gemm_store.cu.
//
// A block takes tiles of y in turn: 128 rows of the left operand × COLUMNS rows of the right one. The left one is w and
// the right one x, or, if SWAP, the other way round. One thread copies stages of 64 columns into a ring in shared memory;
// two warpgroups multiply, each 64 rows × COLUMNS. A packed w (always left) comes as records (layout.py) and is unpacked
// into registers, from where wgmma takes it, while the instructions before are under way.
//
// The two warpgroups share the tensor cores: while one unpacks, or ends a segment or a tile, the other multiplies. With
// LAG the second one starts so many stages later.
//
// Macros: COLUMNS, BLOCKS (COLUMNS / 16), STAGES, CLUSTER (blocks that share the right operand), LAG, BATCH (16-column
// steps unpacked at a time), SETS (of registers for a stage of them; 2 wants BATCH 4), KEPT (sums of segments that a
// thread has in registers), HEIGHT (tiles of tokens side by side), SEGMENT_STEPS, PACKED, SWAP, BFLOAT (operands, else
// float16), OUT (0 float32, 1 float16, 2 bfloat16), ROW, BIAS.

// a thread's part of a stage of records: a word for each sixteen columns, four scales each of rows g and g + 8
struct Words {
    uint32 word[4];
    uint2 scales;
};

INLINE Words words_of(const Work &work, const Ring &ring, int warpgroup) {
    const int thread = threadIdx.x % 128;
    const uint32 at = work.base + LEFT_OFFSET + ring.stage * LEFT_BYTES + warpgroup * RECORD;
    const uint4 v = load_shared_16(at + 16 * thread);
    return {{v.x, v.y, v.z, v.w}, load_shared_8(at + 2048 + thread / 4 * 8)};
}

#if BFLOAT
#define UNPACK unpack
#define UNPACK_SCALES(w, exponent, s) unpack_scales(w, exponent, s)
#else
#define UNPACK unpack_half
#define UNPACK_SCALES(w, exponent, s) unpack_half_scales(w, s)
#endif

INLINE void unpack_word(int j, uint32 word, const uint32 (&upper)[2], const uint32 (&lower)[2], uint32 (&a)[4]) {
    if (j == 0) UNPACK<0>(word, upper, lower, a);
    else if (j == 1) UNPACK<1>(word, upper, lower, a);
    else if (j == 2) UNPACK<2>(word, upper, lower, a);
    else UNPACK<3>(word, upper, lower, a);
}

// Adds the segment's sums in `acc` to those of the segments before. The first KEPT of a thread stay in `total`; the
// others lie in shared memory, where later the tile's results lie, and after the last segment in acc.
INLINE void add_segment(float (&acc)[8 * BLOCKS], float (&total)[8 * BLOCKS], const Work &work, int warpgroup, bool is_first,
                        bool is_last) {
    const int thread = threadIdx.x % 128;
    const uint32 at = work.base + Y_OFFSET + warpgroup * Y_BYTES + 16 * thread;
#pragma unroll
    for (int j = 0; j < KEPT; j++) total[j] = __fadd_rn(total[j], acc[j]);
    if (KEPT == 8 * BLOCKS) return;
    if (is_first) {
        // the last tile's results have left
        if (OUT != 0 && thread == 0) store_wait_read();
        if (OUT != 0) named_sync(2 + warpgroup, 128);
    } else {
#pragma unroll
        for (int j = KEPT; j < 8 * BLOCKS; j += 4) {
            const uint4 v = load_shared_16(at + (j - KEPT) * 512);
            acc[j] = __fadd_rn(__uint_as_float(v.x), acc[j]);
            acc[j + 1] = __fadd_rn(__uint_as_float(v.y), acc[j + 1]);
            acc[j + 2] = __fadd_rn(__uint_as_float(v.z), acc[j + 2]);
            acc[j + 3] = __fadd_rn(__uint_as_float(v.w), acc[j + 3]);
        }
    }
    if (is_last) return;
#pragma unroll
    for (int j = KEPT; j < 8 * BLOCKS; j += 4)
        store_shared_16(at + (j - KEPT) * 512, acc[j], acc[j + 1], acc[j + 2], acc[j + 3]);
}

// One stage: 64 columns, the one after `done` others of the segment. Registers of A are written only behind a wait for
// the instructions that last read them, and without a branch in between: the compiler sees that it need not wait more.
template <int SET>
INLINE void multiply(float (&acc)[8 * BLOCKS], uint32 (&a)[SETS][4][4], const Work &work, Ring &ring, int warpgroup,
                     int done) {
    const uint64 b = matrix_descriptor(work.base + ring.stage * RIGHT_BYTES);
    const int stage = ring.stage;
#if PACKED
    barrier_wait(work.full + 8 * ring.stage, ring.phase);
    const Words words = words_of(work, ring, warpgroup);
    ring.next();
    uint32 upper[2], lower[2];
    UNPACK_SCALES(words.scales.x, work.exponent, upper);
    UNPACK_SCALES(words.scales.y, work.exponent, lower);
#pragma unroll
    for (int j = 0; j < 4; j += BATCH) {
        wgmma_wait<SETS * 4 / BATCH - 1>();
#pragma unroll
        for (int i = j; i < j + BATCH; i++) unpack_word(i, words.word[i], upper, lower, a[SET][i]);
        wgmma_fence();
#pragma unroll
        for (int i = j; i < j + BATCH; i++) wgmma(acc, a[SET][i], b + 2 * i, i > 0 || done > 0);
        wgmma_commit();
    }
    if (done >= SETS) release(work, stage, SETS);
#else
    const uint64 w = matrix_descriptor(work.base + LEFT_OFFSET + ring.stage * LEFT_BYTES + warpgroup * (LEFT_BYTES / 2));
    barrier_wait(work.full + 8 * ring.stage, ring.phase);
    ring.next();
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; j++) wgmma(acc, w + 2 * j, b + 2 * j, j > 0 || done > 0);
    wgmma_commit();
    wgmma_wait<1>();
    if (done > 0) release(work, stage, 1);
#endif
}

// what a warpgroup has of the tiles of a block
INLINE void multiply_tiles(const Work &work, const Finish &f, const TensorMap *y_map, int first, int tiles, int stride) {
    const int warpgroup = threadIdx.x / 128 - 1, thread = threadIdx.x % 128;
    float acc[8 * BLOCKS], total[8 * BLOCKS];
    uint32 a[SETS][4][4];
    Ring ring;
    if (LAG && warpgroup == 1 && first < tiles) named_sync(1, 256);
    int lag = LAG && warpgroup == 0 ? min(LAG, work.steps) : 0;
    for (int i = first; i < tiles; i += stride) {
        const Tile tile = tile_at(work, i);
        const LeftScales scales = left_scales(f, tile, warpgroup);
#pragma unroll
        for (int j = 0; j < 8 * BLOCKS; j++) {
            acc[j] = 0.0f;  // so that it needs no registers from the end of a tile to here
            if (j < KEPT) total[j] = 0.0f;
        }
        for (int k = 0; k < work.steps;) {
            const bool is_first = k == 0;
            const int count = min(work.steps - k, SEGMENT_STEPS);
            int done = 0;
            while (done + SETS <= count) {
                multiply<0>(acc, a, work, ring, warpgroup, done++);
                if (SETS == 2) multiply<SETS - 1>(acc, a, work, ring, warpgroup, done++);
                if (lag > 0 && (lag -= SETS) <= 0) named_arrive(1, 256);
            }
            if (done < count) {
                multiply<0>(acc, a, work, ring, warpgroup, done++);
                if (lag > 0 && --lag <= 0) named_arrive(1, 256);
            }
            k += count;
            wgmma_wait<0>();
            if (SETS == 2 && count > 1) release(work, ring.stage, 2);
            release(work, ring.stage, 1);
            add_segment(acc, total, work, warpgroup, is_first, k == work.steps);
        }
#pragma unroll
        for (int j = KEPT; j < 8 * BLOCKS; j++) total[j] = acc[j];
        dependency_wait();
        store(total, scales, y_map, f, work, tile, warpgroup);
    }
    if (OUT != 0 && thread == 0) store_wait_read();
}

extern "C" __global__ void __launch_bounds__(384, 1)
    gemm(const __grid_constant__ TensorMap left, const __grid_constant__ TensorMap right,
         const __grid_constant__ TensorMap y_map, const uint8 *records, void *y, const float *alpha, const float *bias,
         const float *row, const int4 *runs, int run_count, int tiles, int boxes, int m, int n, int steps, float unit,
         int exponent) {
    extern __shared__ __align__(1024) uint8 memory[];
    __shared__ int4 shared_runs[MOST_RUNS];
    if (threadIdx.x < run_count) shared_runs[threadIdx.x] = runs[threadIdx.x];
    if (threadIdx.x == 0) {
        const uint32 barriers = shared_address(memory) + BARRIERS;
        for (int i = 0; i < STAGES; i++) {
            barrier_init(barriers + 8 * i, 1);
            barrier_init(barriers + 8 * (STAGES + i), 8 * CLUSTER * ARRIVING);
        }
        barrier_init_fence();
    }
    if (CLUSTER > 1) cluster_sync();
    else __syncthreads();

    // each side works out for itself what it needs: what both share would stay in registers that one side lacks
    const auto work = [&] {
        const uint32 base = shared_address(memory), rank = CLUSTER > 1 ? cluster_rank() : 0;
        return Work{shared_runs, tiles, m, steps, static_cast<int>(rank), (m + X_ROWS - 1) / X_ROWS,
                    base, base + BARRIERS, base + BARRIERS + 8 * STAGES, static_cast<uint32>(exponent)};
    };
    if (threadIdx.x < 128) {
        fewer_registers<40>();
        if (threadIdx.x == 0) {
            dependency_release();
            const Work w = work();
            copy(w, &left, &right, records, blockIdx.x / CLUSTER, w.x_tiles * tiles, gridDim.x / CLUSTER);
        }
    } else {
        more_registers<232>();
        const Work w = work();
        const Finish f = {alpha, bias, row, y, m, n, boxes, unit};
        multiply_tiles(w, f, &y_map, blockIdx.x / CLUSTER, w.x_tiles * tiles, gridDim.x / CLUSTER);
    }
    // no block ends while another of its cluster may still write into it or arrive at its barriers
    if (CLUSTER > 1) cluster_sync();
}
