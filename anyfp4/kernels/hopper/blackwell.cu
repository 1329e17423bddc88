// y = x · Wᵀ in blackwell numerics, the bits of numerics/blackwell.py; W as layout.py has it. After async.cu, unpack.cu,
// unpack_half.cu, unpack_chunk.cu, multiply.cu, linear_copy.cu, linear_finish.cu, blackwell_limits.cu and blackwell_step.cu.
//
// An output is a chain over K of chunks of 64 columns. Where blackwell_limits.cu allows it a chunk is one exact sum from the
// matrix units and one addition that rounds toward zero; elsewhere blackwell_step.cu adds it.
//
// The weight is the left operand, as in linear.cu. A block has ROW_TILES × PARTS warpgroups: warpgroup p · ROW_TILES + r takes
// row tile r, and of each stage of PARTS × STEP chunks the p-th STEP. Sums of chunks need not wait for each other; the chain goes
// through them part by part and stage by stage, and from warp to warp of two parts through shared memory. Two more warps fill the
// ring of STAGES stages. SYNC: by mma.sync, else wgmma.

const int STAGE_CHUNKS = PARTS * STEP;
const int SUMS_BYTES = TOKENS * PITCH * 4;  // of a warpgroup: its accumulators on their way, at the end tokens × rows

INLINE void copy_weights(const Problem &p, const Ring &ring, const Item &item, int r) {
    if (r >= ROW_TILES) return;
    const uint64 policy = read_once();
    const uint8 *from = p.weight + static_cast<long long>(item.tile + r) * p.chunks * RECORD;
    uint32 slot = 0, phase = 1;
#pragma unroll 1
    for (int base = 0; base < p.chunks; base += STAGE_CHUNKS, from += STAGE_CHUNKS * RECORD) {
        const uint32 full = ring.full + 8 * slot, bytes = r < item.count ? min(STAGE_CHUNKS, p.chunks - base) * RECORD : 0;
        barrier_wait(ring.empty + 8 * slot, phase);
        barrier_expect(full, bytes);
        if (bytes) load_weight(ring.w_at(slot, r * PARTS), from, bytes, full, policy);
        if (++slot == STAGES) slot = 0, phase ^= 1;
    }
}

INLINE void copy_tokens(const Problem &p, const Ring &ring, const Item &item, int c) {
    dependency_wait();
    if (c >= STAGE_CHUNKS) return;
    uint32 slot = 0, phase = 1;
#pragma unroll 1
    for (int chunk = c; chunk - c < p.chunks; chunk += STAGE_CHUNKS) {
        const uint32 full = ring.full + 8 * slot;
        const bool there = chunk < p.chunks;
        barrier_wait(ring.empty + 8 * slot, phase);
        barrier_expect(full, there ? X_BYTES : 0);
        if (there) load_box(ring.x_at(slot, 0, c), p.x, chunk * CHUNK, item.q * p.m + item.token, full);
        if (++slot == STAGES) slot = 0, phase ^= 1;
    }
}

INLINE void add(float (&acc)[TOKENS / 2], const float (&t)[TOKENS / 2]) {
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) acc[i] = __fadd_rz(acc[i], t[i]);
}

INLINE void put(const float (&v)[TOKENS / 2], uint32 sums, int thread) {
#pragma unroll
    for (int i = 0; i < TOKENS / 8; i++)
        store_shared_16(sums + (i * 128 + thread) * 16, v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
}

INLINE void get(float (&v)[TOKENS / 2], uint32 sums, int thread) {
#pragma unroll
    for (int i = 0; i < TOKENS / 8; i++) {
        const uint4 bits = load_shared_16(sums + (i * 128 + thread) * 16);
        v[4 * i] = __uint_as_float(bits.x), v[4 * i + 1] = __uint_as_float(bits.y);
        v[4 * i + 2] = __uint_as_float(bits.z), v[4 * i + 3] = __uint_as_float(bits.w);
    }
}

// The sums of a chunk, each from zero on; in two halves, for an instruction waits for the one whose sums it continues.
#if SYNC
INLINE void multiply_chunk(float (&t)[TOKENS / 2], uint32 (&a)[16], uint32 x, int thread) {
    const uint32 row = thread & 7, lane_at = row * 128 + ((((thread >> 3) & 3) ^ row) << 4);
    float d[2][TOKENS / 2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32 right[TOKENS / 8][4];
#pragma unroll
        for (int i = 0; i < TOKENS / 8; i++) load_matrices(x + (lane_at ^ (64 * half)) + i * 1024, right[i]);
#pragma unroll
        for (int i = 0; i < TOKENS / 2; i++) d[half][i] = 0.0f;
#pragma unroll
        for (int i = 0; i < TOKENS / 8; i++) multiply(d[half] + 4 * i, a + 8 * half, right[i]);
#pragma unroll
        for (int i = 0; i < TOKENS / 8; i++) multiply(d[half] + 4 * i, a + 8 * half + 4, right[i] + 2);
    }
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) t[i] = d[0][i] + d[1][i];
}
#else
INLINE void multiply_chunk(float (&t)[TOKENS / 2], uint32 (&a)[16], uint32 x, int) {
    const uint64 right = matrix_descriptor(x);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; j++) multiply(t, a + 4 * j, right + 2 * j, j > 0);
    wgmma_commit();
}
#endif

// A warpgroup's chain. Gives whether this one holds its end.
INLINE bool chain(const Problem &p, const Item &item, const Ring &ring, const float *limits, uint32 sums, uint32 hops,
                  int part, int r, int thread, uint32 exponent, float (&acc)[TOKENS / 2]) {
    const bool live = r < item.count;
    const uint32 own = sums + ((PARTS - 1 - part) * ROW_TILES + r) * SUMS_BYTES;
    const uint32 before = sums + ((PARTS - 1 - (part + PARTS - 1) % PARTS) * ROW_TILES + r) * SUMS_BYTES;
    // barriers of a warp for each part
    const uint32 own_hop = hops + ((r * PARTS + part) * 4 + (thread >> 5)) * 8;
    const uint32 hop_before = hops + ((r * PARTS + (part + PARTS - 1) % PARTS) * 4 + (thread >> 5)) * 8;
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) acc[i] = 0.0f;
    uint32 slot = 0, phase = 0, arrival = part > 0 ? 0 : 1;
#pragma unroll 1
    for (int base = 0; base < p.chunks; base += STAGE_CHUNKS) {
        barrier_wait(ring.full + 8 * slot, phase);
        if (live) {
            const int first = base + part * STEP;
            float t[STEP][TOKENS / 2];
            const uint32 record = ring.w_at(slot, r * PARTS + part), x = ring.x_at(slot, part, 0);
#if SYNC
            Part parts[STEP];
#pragma unroll
            for (int c = 0; c < STEP; c++) parts[c] = part_of(record + c * RECORD, thread);
#pragma unroll
            for (int c = 0; c < STEP; c++) {
                uint32 a[16];
                unpack_chunk(parts[c].codes, parts[c].scales, exponent, a);
                multiply_chunk(t[c], a, x + c * X_BYTES, thread);
            }
#else
            uint32 a[STEP][16];
#pragma unroll
            for (int c = 0; c < STEP; c++) {
                const Part w = part_of(record + c * RECORD, thread);
                unpack_chunk(w.codes, w.scales, exponent, a[c]);
                multiply_chunk(t[c], a[c], x + c * X_BYTES, thread);
            }
#endif
            const int count = min(STEP, p.chunks - first);
            bool plain = true;
#pragma unroll
            for (int c = 0; c < STEP; c++) plain = plain && (c >= count || __float_as_uint(limits[first + c]) == ANY_BITS);
            if (PARTS > 1 && (part > 0 || base > 0)) {
                while (!barrier_passed(hop_before, arrival)) {
                }
                get(acc, before, thread);
            }
            if (PARTS > 1) arrival ^= 1;
            if (plain) {
#pragma unroll
                for (int c = 0; c < STEP; c++) {
#if !SYNC
                    if (STEP == 2 && c == 0)
                        wgmma_wait<1>();
                    else
                        wgmma_wait<0>();
#endif
                    if (c < count) add(acc, t[c]);  // what lies past the end was multiplied, and is left
                }
            } else {
#if !SYNC
                wgmma_wait<0>();
#endif
                put(acc, own, thread);
                add_chunks(own, record, x, limits + first, first, count, exponent, thread);
                get(acc, own, thread);
            }
            if (PARTS > 1 && !(part == PARTS - 1 && base + STAGE_CHUNKS >= p.chunks)) {
                put(acc, own, thread);
                warp_arrive(own_hop, thread);
            }
        }
        warp_arrive(ring.empty + 8 * slot, thread);
        if (++slot == STAGES) slot = 0, phase ^= 1;
    }
    return live && part == PARTS - 1;
}

INLINE void compute(const Problem &p, const Item &item, const Output &out, const Ring &ring, const Factors &f, const Bound *bounds, const Table &table, float *sums, float *factors, uint32 hops, int group, int thread,
                    uint32 exponent) {
    const int part = group / ROW_TILES, r = group - part * ROW_TILES, all = group * 128 + thread;
    if (part == 0 && r < item.count) {
        int tile = item.tile + r, i = thread & 63;
        int first = p.rows ? p.rows[2 * tile] : tile * 64, live = p.rows ? p.rows[2 * tile + 1] : min(64, p.n - first);
        const float *from = thread < 64 ? f.alpha : f.bias;
        if (i < live && from) factors[r * 128 + thread] = from[first + i];
    }
    dependency_wait();
    gather(table, token_scales, p.chunks, all >> 5, thread & 31);
    named_sync(1, WARPGROUPS * 128);
    set_limits(table, bounds + static_cast<long long>(item.tile) * p.chunks, p.chunks, item.count, all);
    named_sync(1, WARPGROUPS * 128);
    float acc[TOKENS / 2];
    if (chain(p, item, ring, table.limit + r * p.chunks, shared_address(sums), hops, part, r, thread, exponent, acc)) {
        named_sync(2 + r, 128);  // no warp reads accumulators on their way any more
        hand_over(acc, shared_address(sums) + r * SUMS_BYTES, p.m - item.token, thread);
    }
    named_sync(1, WARPGROUPS * 128);
#pragma unroll 1
    for (int i = 0; i < item.count; i++) finish(p, item, out, sums, factors, 1, 0, i, all, WARPGROUPS * 128);
}

extern "C" __global__ void __launch_bounds__(WARPGROUPS * 128 + (REGISTERS ? 128 : 64), BLOCKS)
    blackwell(const __grid_constant__ TensorMap x_map, const uint16 *info, const uint8 *weight, const Bound *bounds, void *y,
              const float *alpha, const float *bias, const int *groups, const int *rows, int m, int n, int blocks, int chunks, int tiles,
              int token_tiles, int items, int kind, uint32 exponent) {
    const Problem p = {&x_map, weight, groups, rows, m, n, chunks, tiles, token_tiles, items, 0};
    const Item item = item_at(p, blockIdx.x);
    float *sums = reinterpret_cast<float *>(shared + STAGES * (X_STAGE + W_STAGE));
    float *factors = sums + WARPGROUPS * SUMS_BYTES / 4;
    Ring ring;
    ring.x = shared_address(shared), ring.w = ring.x + STAGES * X_STAGE;
    ring.full = shared_address(factors + ROW_TILES * 128), ring.empty = ring.full + 8 * STAGES;
    const uint32 hops = ring.empty + 8 * STAGES;
    uint32 *words = reinterpret_cast<uint32 *>(factors + ROW_TILES * 128 + 4 * STAGES + 8 * WARPGROUPS);
    const Table table = {words, words + chunks, words + 2 * chunks, words + 3 * chunks, words + 3 * chunks + 1, reinterpret_cast<float *>(words + 3 * chunks + 2)};
    const int group = __shfl_sync(0xFFFFFFFFu, threadIdx.x >> 7, 0), thread = threadIdx.x & 127;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) barrier_init(ring.full + 8 * i, ROW_TILES + STAGE_CHUNKS), barrier_init(ring.empty + 8 * i, 4 * WARPGROUPS * ARRIVING);
        for (int i = 0; i < 4 * WARPGROUPS; i++) barrier_init(hops + 8 * i, ARRIVING);
        barrier_init_fence();
        token_scales = {info + (static_cast<long long>(item.q) * m + item.token) * blocks, blocks, min(TOKENS, m - item.token)};
    }
    clear(table, chunks, threadIdx.x, blockDim.x);
    __syncthreads();
    if (group == WARPGROUPS) {
#if REGISTERS
        fewer_registers<40>();
#endif
        dependency_release();
        if (thread < 32)
            copy_weights(p, ring, item, thread);
        else if (thread < 64)
            copy_tokens(p, ring, item, thread - 32);
    } else {
#if REGISTERS
        more_registers<REGISTERS>();
#endif
        compute(p, item, {y, nullptr, kind, bias != nullptr}, ring, {alpha, bias}, bounds, table, sums, factors, hops, group, thread,
                exponent);
    }
}
