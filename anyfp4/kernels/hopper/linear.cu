// y = x · Wᵀ for up to a few hundred tokens, W as layout.py has it. After async.cu, unpack.cu,
// unpack_half.cu, unpack_chunk.cu, multiply.cu, linear_copy.cu and linear_finish.cu.
//
// The weight is the left operand: 64 of its rows are the M side of the matrix instruction, TOKENS tokens the N side. A
// block has ROW_TILES × PARTS warpgroups: warpgroup p · ROW_TILES + r takes row tile r and the p-th part of the block's
// segments of K; a cluster of CLUSTER blocks shares the segments of one group of row tiles. Two more warps copy records
// of W and boxes of x into a ring of STAGES stages of STEP chunks, all parts side by side, so that the warpgroups of a
// part share x.
//
// With few tokens (SYNC) a warp multiplies by mma.sync, whose results come sooner; with more a warpgroup does by wgmma,
// and unpacks a chunk while the matrix unit works at the one before it (SETS = 2), or leaves that to the other
// warpgroups (SETS = 1). Both give the same bits.
//
// Sums: a segment is one chain of wgmma. Part 0 adds its segments' sums in registers; every other segment's sum goes
// through shared memory to the block of the cluster that finishes those tokens, which adds them in order.

INLINE void free_slot(const Ring &ring, int slot, int thread) {
    if ((thread & 31) < ARRIVING) barrier_arrive(ring.empty + 8 * slot);
}

INLINE void load_records(const Ring &ring, int slot, int group, int thread, uint4 (&codes)[STEP], uint2 (&scales)[STEP]) {
    uint32 at = ring.w_at(slot, group);
#pragma unroll
    for (int c = 0; c < STEP; c++) {
        codes[c] = load_shared_16(at + c * RECORD + thread * 16);
        scales[c] = load_shared_8(at + c * RECORD + CODES + (thread >> 2) * 8);
    }
}

#if SYNC
// The stage in `slot`, by a warp: frees it as soon as it is read.
INLINE void consume(const Ring &ring, float (&acc)[TOKENS / 2], int slot, int group, int part, int thread, uint32 exponent) {
    uint4 codes[STEP];
    uint2 scales[STEP];
    load_records(ring, slot, group, thread, codes, scales);
    // lane 8·i + r: row r of matrix i, which is columns 8i … 8i + 7, in the 128-byte swizzle
    const uint32 row = thread & 7, lane_at = row * 128 + ((((thread >> 3) & 3) ^ row) << 4);
#pragma unroll
    for (int c = 0; c < STEP; c++) {
        uint32 right[TOKENS / 8][8], a[16];
        const uint32 at = ring.x_at(slot, part, c) + lane_at;
#pragma unroll
        for (int i = 0; i < TOKENS / 8; i++) {
            load_matrices(at + i * 1024, right[i]);
            load_matrices((at ^ 64) + i * 1024, right[i] + 4);
        }
        if (c == STEP - 1) {
            __syncwarp();
            free_slot(ring, slot, thread);
        }
        unpack_chunk(codes[c], scales[c], exponent, a);
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int i = 0; i < TOKENS / 8; i++) multiply(acc + 4 * i, a + 4 * j, right[i] + 2 * j);
    }
}
#else
// The stage in `slot`, by a warpgroup. Frees `before`, the stage before it, once the matrix unit has read it.
INLINE void consume(const Ring &ring, float (&acc)[TOKENS / 2], uint32 (&a)[SETS][16], int slot, int group, int part, int thread,
                    bool fresh, int before, uint32 exponent) {
    uint4 codes[STEP];
    uint2 scales[STEP];
    load_records(ring, slot, group, thread, codes, scales);
#pragma unroll
    for (int c = 0; c < STEP; c++) {
        uint32(&left)[16] = a[c % SETS];
        if (SETS == 1) {
            wgmma_wait<0>();
            if (c == 0 && before >= 0) free_slot(ring, before, thread);
        }
        unpack_chunk(codes[c], scales[c], exponent, left);
        uint64 right = matrix_descriptor(ring.x_at(slot, part, c));
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < 4; j++) multiply(acc, left + 4 * j, right + 2 * j, j > 0 || c > 0 || !fresh);
        wgmma_commit();
        if (SETS == 2) {
            wgmma_wait<1>();
            if (c == 0 && before >= 0) free_slot(ring, before, thread);
        }
    }
}
#endif

// The warpgroup `group`: its segments of its row tile, for each item of the block.
INLINE void compute(const Problem &p, const Output &out, const Ring &ring, const Factors &f, float *sums, float *factors, int slabs,
                    int rank, int group, int thread, int first_item, int stride, uint32 exponent) {
    const int part = group / ROW_TILES, r = group - part * ROW_TILES;
    const int own_segment = first_segment(p, rank, part);
    const bool holder = rank == 0 && part == 0;
    const uint32 sums_address = shared_address(sums) + r * OWN * PITCH * 4;
    bool met = CLUSTER == 1;
    const int steps = (chunks_of(p, rank, 0) + STEP - 1) / STEP, own_steps = (chunks_of(p, rank, part) + STEP - 1) / STEP;
    int slot = 0, phase = 0;
#if !SYNC
    int before = -1;
    uint32 a[SETS][16];
#endif
    float acc[TOKENS / 2], total[TOKENS / 2];
    for (int work = first_item; work < p.items; work += stride) {
        const Item item = item_at(p, work);
        const int tokens = p.m - item.token;
        if (work != first_item) named_sync(1 + r, 128);
        if (part == 0 && r < item.count) {
            int tile = item.tile + r, i = thread & 63;
            int first = p.rows ? p.rows[2 * tile] : tile * 64, live = p.rows ? p.rows[2 * tile + 1] : min(64, p.n - first);
            const float *from = thread < 64 ? f.alpha : f.bias;
            if (i < live && from) factors[r * 128 + thread] = from[first + i];
        }
        int left = steps;
        for (int round = 0; round < p.segments_each && left > 0; round++) {
            const int segment = own_segment + round, count = min(left, SEGMENT_CHUNKS / STEP);
            const int mine = r < item.count ? min(count, own_steps - round * (SEGMENT_CHUNKS / STEP)) : 0;
            left -= count;
#if SYNC
#pragma unroll
            for (int i = 0; i < TOKENS / 2; i++) acc[i] = 0.0f;
#endif
            for (int step = 0; step < count; step++) {
                barrier_wait(ring.full + 8 * slot, phase);
#if SYNC
                if (step < mine)
                    consume(ring, acc, slot, group, part, thread, exponent);
                else
                    free_slot(ring, slot, thread);
#else
                if (step < mine)
                    consume(ring, acc, a, slot, group, part, thread, step == 0, before, exponent);
                else if (before >= 0)
                    free_slot(ring, before, thread);
                before = slot;
#endif
                if (++slot == STAGES) slot = 0, phase ^= 1;
            }
#if !SYNC
            wgmma_wait<0>();
#endif
            if (mine <= 0) continue;
            if (!SPLIT || holder) {
#pragma unroll
                for (int i = 0; i < TOKENS / 2; i++) total[i] = round == 0 ? acc[i] : total[i] + acc[i];
            } else {
                if (!met) cluster_wait(), met = true;
                hand_over(acc, sums_address + (segment - p.segments_each + 1) * ROW_TILES * OWN * PITCH * 4, tokens, thread);
            }
        }
        if (r < item.count && (!SPLIT || holder)) {
            if (!met) cluster_wait(), met = true;
            hand_over(total, sums_address, tokens, thread);
        }
        if (!met) cluster_wait(), met = true;
        dependency_wait();
        if (!SPLIT) {
            named_sync(1 + r, 128);
            if (r < item.count) finish(p, item, out, sums, factors, slabs, rank, r, thread, 128);
        } else {
            if (CLUSTER > 1)
                cluster_arrive(), cluster_wait();
            else
                named_sync(1, WARPGROUPS * 128);
#pragma unroll 1
            for (int i = 0; i < item.count; i++) finish(p, item, out, sums, factors, slabs, rank, i, group * 128 + thread, WARPGROUPS * 128);
        }
    }
}

extern "C" __global__ void __launch_bounds__(WARPGROUPS * 128 + (REGISTERS ? 128 : 64), BLOCKS)
    linear(const __grid_constant__ TensorMap x_map, const uint8 *weight, void *y, const float *alpha, const float *bias,
           const float *row, const int *groups, const int *rows, int m, int n, int chunks, int tiles, int token_tiles, int items,
           int segments_each, int segments, int kind, uint32 exponent) {
    const Problem p = {&x_map, weight, groups, rows, m, n, chunks, tiles, token_tiles, items, segments_each};
    const int slabs = SPLIT ? 1 + max(0, segments - segments_each) : 1;
    float *sums = reinterpret_cast<float *>(shared + STAGES * (X_STAGE + W_STAGE));
    float *factors = sums + slabs * ROW_TILES * OWN * PITCH;
    Ring ring;
    ring.x = shared_address(shared), ring.w = ring.x + STAGES * X_STAGE;
    ring.full = shared_address(factors + ROW_TILES * 128), ring.empty = ring.full + 8 * STAGES;
    const int rank = CLUSTER > 1 ? cluster_rank() : 0;
    const int group = __shfl_sync(0xFFFFFFFFu, threadIdx.x >> 7, 0), thread = threadIdx.x & 127;
    const int first_item = blockIdx.x / CLUSTER, stride = gridDim.x / CLUSTER;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) barrier_init(ring.full + 8 * i, WARPGROUPS + PARTS * STEP), barrier_init(ring.empty + 8 * i, 4 * WARPGROUPS * ARRIVING);
        barrier_init_fence();
    }
    __syncthreads();
    if (CLUSTER > 1) cluster_arrive();
    if (group == WARPGROUPS) {
#if REGISTERS
        fewer_registers<40>();
#endif
        dependency_release();
        if (thread < 32)
            copy_weight(p, ring, first_item, stride, rank, thread);
        else if (thread < 64)
            copy_x(p, ring, first_item, stride, rank, thread - 32);
        __syncwarp();
        if (CLUSTER > 1) cluster_wait(), cluster_arrive(), cluster_wait();
    } else {
#if REGISTERS
        more_registers<REGISTERS>();
#endif
        compute(p, {y, row, kind, bias != nullptr}, ring, {alpha, bias}, sums, factors, slabs, rank, group, thread, first_item,
                stride, exponent);
    }
}
