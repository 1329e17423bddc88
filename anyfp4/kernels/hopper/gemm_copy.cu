// gemm.cu's work: where a block's memory lies, which tiles it takes, and the thread that copies for it. After async.cu.

#ifndef HEIGHT
#define HEIGHT 8
#endif
#define RECORD 2304
#define RIGHT_BYTES (COLUMNS * 128)
#define LEFT_BYTES (PACKED ? 2 * RECORD : 16384)
// what is swizzled lies at multiples of 1024
#define LEFT_OFFSET (STAGES * RIGHT_BYTES)
#define Y_OFFSET (LEFT_OFFSET + (STAGES * LEFT_BYTES + 1023) / 1024 * 1024)
#define RESULT_BYTES (OUT == 0 ? 0 : COLUMNS * 128)
#define TOTAL_BYTES ((8 * BLOCKS - KEPT) * 512)
#define Y_BYTES (RESULT_BYTES > TOTAL_BYTES ? RESULT_BYTES : TOTAL_BYTES)
#define BARRIERS (Y_OFFSET + 2 * Y_BYTES)
// of a tile, all blocks of a cluster together
#define X_ROWS (SWAP ? 128 * CLUSTER : COLUMNS)
#define W_ROWS (SWAP ? COLUMNS : 128 * CLUSTER)
#define MOST_RUNS 128

struct Work {
    const int4 *runs;
    int tiles, m, steps, rank, x_tiles;
    uint32 base, full, empty, exponent;
};

// Rows of w from `row` to `end`, which begin with record tile `record`; tokens from `token` on; quantization `index` of
// the activation.
struct Tile {
    int row, end, index, record, token;
};

// volatile, so that it stays where it is written: far ahead of its use
INLINE float load_float(const float *p, bool live) {
    float v;
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %2, 0;\n\tmov.f32 %0, 0f00000000;\n\t@p ld.global.nc.f32 %0, [%1];\n\t}"
                 : "=f"(v) : "l"(p), "r"(static_cast<int>(live)));
    return v;
}

// Tile `i` of this block. Blocks at work at the same time take HEIGHT tiles of tokens, so that they share what they read.
INLINE Tile tile_at(const Work &work, int i) {
    const int column = i / (HEIGHT * work.tiles), inside = i - column * HEIGHT * work.tiles;
    const int height = min(work.x_tiles - column * HEIGHT, HEIGHT), w_tile = inside / height;
    const int token = (column * HEIGHT + inside - w_tile * height) * X_ROWS + (SWAP ? 128 * work.rank : 0);
    int left = w_tile;
    const int4 *run = work.runs;
    for (;; run++) {
        const int tiles = (run->y - run->x + W_ROWS - 1) / W_ROWS;
        if (left < tiles) break;
        left -= tiles;
    }
    const int offset = left * W_ROWS + (SWAP ? 0 : 128 * work.rank);
    return {run->x + offset, run->y, run->z, run->w + offset / 64, token};
}

struct Ring {
    int stage = 0;
    uint32 phase = 0;

    INLINE void next() {
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// row tiles of 64 that a tile of records has
INLINE int present_of(const Tile &tile) { return min(max((tile.end - tile.row + 63) / 64, 0), 2); }

INLINE void load_records(const Work &work, const Tile &tile, const uint8 *records, int k, int stage, uint32 full) {
    const uint8 *from = records + static_cast<uint64>(tile.record) * work.steps * RECORD;
    const uint32 to = work.base + LEFT_OFFSET + stage * LEFT_BYTES;
    for (int half = 0; half < present_of(tile); half++)
        load_bytes(to + half * RECORD, from + (half * work.steps + k) * RECORD, RECORD, full);
}

INLINE void copy(const Work &work, const TensorMap *left, const TensorMap *right, const uint8 *records,
                 int first, int count, int stride) {
    Ring ring;
    // records depend on no kernel before this one: as many as the ring holds come ahead
    int ahead = 0;
    if (PACKED && first < count) {
        const Tile tile = tile_at(work, first);
        for (const int most = min(STAGES, work.steps); ahead < most; ahead++) {
            const uint32 full = work.full + 8 * ahead;
            barrier_expect(full, RIGHT_BYTES + present_of(tile) * RECORD);
            load_records(work, tile, records, ahead, ahead, full);
        }
    }
    dependency_wait();
    for (int i = first; i < count; i += stride) {
        const Tile tile = tile_at(work, i);
        const int x_row = tile.index * work.m + tile.token;
        const int left_row = SWAP ? x_row : tile.row, right_row = (SWAP ? tile.row : x_row) + work.rank * (COLUMNS / CLUSTER);
        for (int k = 0; k < work.steps; k++) {
            const uint32 full = work.full + 8 * ring.stage, left_to = work.base + LEFT_OFFSET + ring.stage * LEFT_BYTES;
            const uint32 right_to = work.base + ring.stage * RIGHT_BYTES + work.rank * (RIGHT_BYTES / CLUSTER);
            if (ahead == 0) {
                barrier_wait(work.empty + 8 * ring.stage, ring.phase ^ 1);
                barrier_expect(full, RIGHT_BYTES + (PACKED ? present_of(tile) * RECORD : LEFT_BYTES));
            }
            if (CLUSTER > 1) load_box_shared(right_to, right, 64 * k, right_row, full, (1 << CLUSTER) - 1);
            else load_box(right_to, right, 64 * k, right_row, full);
            if (!PACKED) load_box(left_to, left, 64 * k, left_row, full);
            else if (ahead == 0) load_records(work, tile, records, k, ring.stage, full);
            if (ahead > 0) ahead--;
            ring.next();
        }
    }
}

// the stage `back` before `stage` may be filled again
INLINE void release(const Work &work, int stage, int back) {
    if (ARRIVING > 1 || threadIdx.x % 32 < CLUSTER) {
        const uint32 barrier = work.empty + 8 * (stage - back + (stage < back ? STAGES : 0));
        if (ARRIVING > 1)
            for (int rank = 0; rank < CLUSTER; rank++) barrier_arrive_at(barrier, rank);
        else if (CLUSTER > 1)
            barrier_arrive_at(barrier, threadIdx.x % 32);
        else
            barrier_arrive(barrier);
    }
}
