// The parts of linear.cu that say what is where and fill the ring; what is where in blackwell.cu too. After async.cu.

const int CHUNK = 64, SEGMENT_CHUNKS = 16, RECORD = 2304, CODES = 2048;
const int WARPGROUPS = ROW_TILES * PARTS;
const int X_BYTES = TOKENS * 128;                   // of a chunk
const int X_STAGE = PARTS * STEP * X_BYTES;
const int W_STAGE = WARPGROUPS * STEP * RECORD;
const int PITCH = CHUNK + 4;                        // floats of a token's row of sums: no two lanes meet in a bank
const int OWN = TOKENS / CLUSTER;                   // tokens that a block finishes
const bool SPLIT = PARTS * CLUSTER > 1;

static_assert(STEP % SETS == 0, "a set of registers is one chunk");

extern __shared__ __align__(1024) uint8 shared[];

INLINE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
INLINE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

INLINE uint64 read_once() {
    uint64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

INLINE void load_weight(uint32 to, const uint8 *from, uint32 bytes, uint32 barrier, uint64 policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
        "l"(from), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
}

// What all threads are told.
struct Problem {
    const TensorMap *x;
    const uint8 *weight;
    const int *groups;  // of each group of row tiles: first tile, tiles, index of the quantized activation; or null
    const int *rows;    // of each tile: first row, rows; or null
    int m, n, chunks, tiles, token_tiles, items, segments_each;
};

// One group of row tiles and one tile of tokens.
struct Item {
    int tile, count, q, token;
};

INLINE Item item_at(const Problem &p, int i) {
    Item it;
    int group = i / p.token_tiles;
    it.token = (i - group * p.token_tiles) * TOKENS;
    if (p.groups) {
        it.tile = p.groups[3 * group], it.count = p.groups[3 * group + 1], it.q = p.groups[3 * group + 2];
    } else {
        it.tile = group * ROW_TILES, it.count = min(ROW_TILES, p.tiles - it.tile), it.q = 0;
    }
    return it;
}

INLINE int first_segment(const Problem &p, int rank, int part) { return (rank * PARTS + part) * p.segments_each; }

// Chunks of a part of K.
INLINE int chunks_of(const Problem &p, int rank, int part) {
    return max(0, min(p.segments_each * SEGMENT_CHUNKS, p.chunks - first_segment(p, rank, part) * SEGMENT_CHUNKS));
}

struct Ring {
    uint32 x, w, full, empty;
    INLINE uint32 x_at(int slot, int part, int c) const { return x + slot * X_STAGE + (part * STEP + c) * X_BYTES; }
    INLINE uint32 w_at(int slot, int group) const { return w + slot * W_STAGE + group * STEP * RECORD; }
};

// Lane p · ROW_TILES + r copies the records of row tile r and part p. The weight depends on no kernel before this one.
INLINE void copy_weight(const Problem &p, const Ring &ring, int work, int stride, int rank, int lane) {
    if (lane >= WARPGROUPS) return;
    const uint64 policy = read_once();
    const int part = lane / ROW_TILES, r = lane - part * ROW_TILES, chunks = chunks_of(p, rank, part);
    const int steps = (chunks_of(p, rank, 0) + STEP - 1) / STEP;
    uint32 full = ring.full, empty = ring.empty, to = ring.w_at(0, lane), phase = 1;
#pragma unroll 1
    for (; work < p.items; work += stride) {
        const Item item = item_at(p, work);
        const uint8 *from =
            p.weight + (static_cast<long long>(item.tile + r) * p.chunks + first_segment(p, rank, part) * SEGMENT_CHUNKS) * RECORD;
        int left = r < item.count ? chunks : 0;
#pragma unroll 1
        for (int i = 0; i < steps; i++) {
            barrier_wait(empty, phase);
            barrier_expect(full, left > 0 ? STEP * RECORD : 0);
            if (left >= STEP) {
                load_weight(to, from, STEP * RECORD, full, policy);
            } else if (left > 0) {
                // past the end x is zero, so any record does
                load_weight(to, from, left * RECORD, full, policy);
                for (int c = left; c < STEP; c++) load_weight(to + c * RECORD, from, RECORD, full, policy);
            }
            from += STEP * RECORD, left -= STEP, full += 8, empty += 8, to += W_STAGE;
            if (full == ring.full + 8 * STAGES) full = ring.full, empty = ring.empty, to = ring.w_at(0, lane), phase ^= 1;
        }
    }
}

// Lane p · STEP + c copies the boxes of part p for chunks that are c-th of a stage.
INLINE void copy_x(const Problem &p, const Ring &ring, int work, int stride, int rank, int lane) {
    dependency_wait();
    if (lane >= PARTS * STEP) return;
    const int part = lane / STEP, c = lane - part * STEP, chunks = chunks_of(p, rank, part);
    const int steps = (chunks_of(p, rank, 0) + STEP - 1) / STEP, mine = (chunks + STEP - 1) / STEP;
    uint32 full = ring.full, empty = ring.empty, to = ring.x_at(0, part, c), phase = 1;
#pragma unroll 1
    for (; work < p.items; work += stride) {
        const Item item = item_at(p, work);
        int column = (first_segment(p, rank, part) * SEGMENT_CHUNKS + c) * CHUNK, row = item.q * p.m + item.token;
#pragma unroll 1
        for (int i = 0; i < steps; i++) {
            barrier_wait(empty, phase);
            barrier_expect(full, i < mine ? X_BYTES : 0);
            if (i < mine) load_box(to, p.x, column, row, full);
            column += STEP * CHUNK, full += 8, empty += 8, to += X_STAGE;
            if (full == ring.full + 8 * STAGES) full = ring.full, empty = ring.empty, to = ring.x_at(0, part, c), phase ^= 1;
        }
    }
}
