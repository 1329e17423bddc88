// What one instruction set provides: a table of functions, filled by one translation unit per instruction set
// (isa_*.cpp) and chosen at run time by dispatch.cpp. All tables give the same bits.
#pragma once

#include <stdint.h>

namespace anyfp4 {

// ---- NVFP4: the prepared weight ------------------------------------------------------------------------------------
// Rows are taken 16 at a time (a tile), K 64 at a time (a chunk, padded with zeros). A chunk of a tile is 576 bytes:
//
//   codes   8 groups of 64 bytes. Group g has K 8g..8g+7; row r's four bytes are 4r..4r+3, with K 8g..8g+3 in the low
//           nibbles and 8g+4..8g+7 in the high ones. So a 32-bit lane is a row, and four codes of it meet four bytes
//           of activations in one multiply-add.
//   scales  4 blocks of 16 bytes, one for each row, in the plain or the normal code of nvfp4_scale.h. Which of them is
//           the tile's; kernels are told by `plain`.
//
// It is the size of the checkpoint's own form: 4.5 bits a weight.
constexpr int TILE = 16;
constexpr int CHUNK = 64;
constexpr int BLOCK = 16;
constexpr int CHUNK_CODES = TILE * CHUNK / 2;
constexpr int CHUNK_BYTES = CHUNK_CODES + TILE * CHUNK / BLOCK;
constexpr int PREFETCH_CHUNKS = 8;  // how far ahead a tile is fetched

// ---- NVFP4: the quantized activation -------------------------------------------------------------------------------
// Doubled codes are integers in -12..12. Multiply-adds take an unsigned and a signed byte, so one side has 12 added:
// with w' = 2w + 12 and x' = 2x, sum(w' x') is exact in integers and is 4 dot + 12 sum(x'), and the bias
// DOT_OFFSET - 12 sum(x') makes it D = 4 dot + DOT_OFFSET > 0. (Likewise with 12 on the side of x.) D becomes a float64
// by standing in the low half of MAGIC = 2^52. Then two fused multiply-adds finish the block, both exact:
//
//   t = (MAGIC + D) s + c,  s = s_a 2^FACTOR_EXPONENT, c = -(MAGIC + DOT_OFFSET) s
//   acc += t s_w            s_w times 2^-1016 (plain) or 2^-1013 (normal)
//
// so accumulators hold (sum over blocks of dot s_a s_w) x 2^acc_exponent(plain).
struct BlockFactor {
    double s, c;
};
constexpr int CODE_OFFSET = 12;
constexpr int DOT_OFFSET = 4096;
constexpr int FACTOR_EXPONENT = 960;
constexpr int acc_exponent(bool plain) { return FACTOR_EXPONENT + 2 - (plain ? 1016 : 1013); }

struct TokenInfo {
    int e_min, e_max;  // exponents of the non-zero block scales; e_min > e_max if there are none
    bool nan;          // a block scale is NaN
    double l1;         // sum of |code x block_scale|
};

// One chunk of one token. Tokens are stored piece by piece, [K / 256][M][4 chunks], so that what a piece of the weight
// meets lies in one run: at a stride of K bytes it would fall into a few sets of the L1 cache.
struct alignas(64) TokenChunk {
    int8_t codes[CHUNK];
    BlockFactor factor[CHUNK / BLOCK];
};

// A piece of a tile unpacked for many tokens.
constexpr int PIECE_CHUNKS = 4;
constexpr int PIECE_BLOCKS = 4 * PIECE_CHUNKS;
struct alignas(64) UnpackedTile {
    uint8_t codes[PIECE_BLOCKS][TILE * BLOCK];  // doubled codes, signed: four groups of [16 rows][4]
    int32_t bias[PIECE_BLOCKS][TILE];           // DOT_OFFSET - 12 x sum of the codes
    double scale[PIECE_BLOCKS][TILE];           // in the order row_order
};

// ---- products with unquantized rows --------------------------------------------------------------------------------
// A row of floats: at least its norm (infinite or NaN if an element is), and a power of two that divides its elements.
struct RowBound {
    float norm;
    int unit;
};

struct DenseArgs {
    const void* w;  // [n, k] of w_dtype; NVFP4: packed codes [n, k / 2]
    int w_dtype;
    const uint8_t* block_scale;  // NVFP4: E4M3 [n, k / 16]
    const RowBound* w_bound;     // [n]
    int64_t n, k, m;
    const float* x32;          // [m, k]
    const double* x64;         // [m, k], from dense_prepare_x
    const RowBound* x_bound;   // [m], likewise
    const float* token_scale;  // [m] or null
    const float* row_scale;    // [n] or null
    const float* bias;         // [n] or null
    void* out;                 // [m, n] of out_dtype
    int out_dtype;
    uint16_t bf16_nan;
    bool in_place;  // read bfloat16 or E4M3 rows without widening them first; x64 was prepared for it
    float* w32;          // scratch [k]
    double* w64;         // scratch [4, k]
};

// ---- products with block-wise FP8 rows -----------------------------------------------------------------------------
constexpr int64_t FP8_BLOCK = 128;        // rows and columns of the weight, and columns of a token, that share a scale
constexpr int64_t FP8_BLOCK_TOKENS = 64;  // that meet a widened piece of the weight at a time

struct Fp8BlockArgs {
    const uint8_t* w;      // E4M3 [n, k]
    const float* w_scale;  // [ceil(n / 128), ceil(k / 128)]
    const uint8_t* w_nan;  // [n], whether a NaN is in the row
    int64_t n, k, m;
    const float* x32;         // [m, k], the codes of quantized activations
    const double* x64;        // [ceil(k / 128), m, 128], from dense_prepare_x for F8, 0 from k on
    const RowBound* x_bound;  // [ceil(k / 128), m], likewise
    const float* x_scale;     // [ceil(k / 128), m], or null where activations stay as they are
    const float* bias;        // [n] or null
    void* out;                // [m, n] of out_dtype
    int out_dtype;
    uint16_t bf16_nan;
    bool in_place;  // read the rows without widening them first
};

// ---- attention -----------------------------------------------------------------------------------------------------
struct AttentionArgs {
    const void* q;  // [tokens, heads, dim], q_stride elements from token to token
    int64_t q_stride;
    void* out;  // [tokens, heads, dim]
    const void *k_cache, *v_cache;
    int dtype, cache_dtype;
    int64_t heads, kv_heads, dim, block_size;
    const int32_t *query_start, *context_len, *block_table;
    int64_t table_stride;
    float scale, v_scale;
    int64_t window;  // 0: none
    uint16_t bf16_nan;
};

// Query rows of one sequence and one KV head: tokens begin <= t < end (of the step), heads h0 <= h < h1.
struct AttentionItem {
    int64_t sequence, begin, end, h0, h1;
};

struct Kernels {
    const char* name;

    // ---- nvfp4 ----
    // Quantizes one row of an activation: x [k] of `dtype`, times `pre` [k] (in x's type) unless null, g the reciprocal
    // of the input global scale. Chunk c (all ceil(k / 64) of them are written) goes to
    // out[c / PIECE_CHUNKS * stride + c % PIECE_CHUNKS], its codes doubled, plus `offset`. For every block, `bias` is
    // for a weight with the offset, and `scale` the block scale in the normal code.
    void (*nvfp4_quantize)(const void* x, int dtype, int64_t k, const float* pre, float g, int offset, TokenChunk* out,
                           int64_t stride, int32_t* bias, uint8_t* scale, TokenInfo* info);
    // acc[16] of one token and one tile from zero, codes unpacked in registers; peak[16], unless null, receives the
    // largest |acc|. Position i of both belongs to row row_order[i] of the tile.
    void (*nvfp4_gemv)(const uint8_t* tile, bool plain, int64_t chunks, const TokenChunk* x, const int32_t* bias,
                       double* acc, double* peak);
    // Unpacks at most PIECE_CHUNKS chunks of a tile.
    void (*nvfp4_unpack)(const uint8_t* tile, bool plain, int64_t chunks, UnpackedTile* out);
    // As nvfp4_gemv from unpacked chunks, added to acc; the codes of x have CODE_OFFSET added.
    void (*nvfp4_gemm)(const UnpackedTile* w, int64_t chunks, const TokenChunk* x, double* acc, double* peak);
    const uint8_t* row_order;

    // ---- dense ----
    void (*load_row)(const void* x, int64_t begin, int64_t n, int dtype, float* out);
    void (*round_row)(float* x, int64_t n, int dtype);
    // `in_place`: the dtype of rows that will be read as they are (BF16 or F8), or F32 for widened ones
    void (*dense_prepare_x)(const float* x, int64_t k, int in_place, double* out, RowBound* bound);
    void (*dense_bounds)(const DenseArgs& args, int64_t begin, int64_t end, RowBound* bounds);
    void (*dense_rows)(const DenseArgs& args, int64_t begin, int64_t end);
    void (*fp8_block_rows)(const Fp8BlockArgs& args, int64_t begin, int64_t end);

    // ---- rows and heads ----
    void (*rms_norm)(const void* x, const void* residual, void* residual_out, const void* w, int w_dtype, void* y,
                     int64_t k, int dtype, float eps, float* scratch, uint16_t nan);
    void (*silu_mul)(const void* gate_up, void* y, int64_t width, int dtype, uint16_t nan);
    void (*rope)(const void* x, void* y, const float* cos_sin, int64_t half, int dtype, uint16_t nan);
    void (*log_softmax)(const float* x, float* y, int64_t n, float* scratch);
    void (*store_row)(void* out, int64_t n, int dtype, const float* x, uint16_t nan);

    // ---- attention ----
    // bytes of scratch for one item
    int64_t (*attention_scratch)(const AttentionArgs& args, const AttentionItem& item);
    void (*attention)(const AttentionArgs& args, const AttentionItem& item, void* scratch);
};

extern const Kernels kernels_portable;
#ifdef ANYFP4_HAVE_AVX2
extern const Kernels kernels_avx2;
#endif
#ifdef ANYFP4_HAVE_AVXVNNI
extern const Kernels kernels_avxvnni;
#endif
#ifdef ANYFP4_HAVE_AVX512
extern const Kernels kernels_avx512;
#endif

// The table in use. It is chosen once, by select_kernels or else the best that this processor runs.
const Kernels& kernels();
// "auto", or the name of a table. False if there is none of that name that this processor can run.
bool select_kernels(const char* name);
// Names of the tables that this processor can run, best first; null at the end.
const char* const* available_kernels();

}  // namespace anyfp4
