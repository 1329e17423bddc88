// The decoder's other ops over a batch: threads around the row kernels.
#pragma once

#include <stdint.h>

#include "kernels.h"

namespace anyfp4 {

// [rows, k], contiguous; residual and residual_out null for the plain norm.
void rms_norm(const void* x, const void* residual, void* residual_out, const void* w, int w_dtype, void* y,
              int64_t rows, int64_t k, int dtype, float eps);
// [rows, 2 width] to [rows, width], contiguous.
void silu_mul(const void* gate_up, void* y, int64_t rows, int64_t width, int dtype);
// x: [tokens, heads, 2 half], x_stride elements from token to token; y contiguous; cos_sin: [positions, 2, half].
// False if a position lies outside 0 <= p < limit: nothing is written then.
bool rope(const void* x, int64_t x_stride, void* y, const int64_t* positions, int64_t limit, const float* cos_sin,
          int64_t tokens, int64_t heads, int64_t half, int dtype);
// k: [tokens, width] with k_stride elements from token to token, cache: [slot_count, width]. An FP8 cache holds
// E4M3(k inverse_scale). False if a slot lies outside: nothing is written then.
bool write_cache(const void* k, int64_t k_stride, int dtype, void* cache, int cache_dtype, const int64_t* slots,
                 int64_t slot_count, int64_t tokens, int64_t width, float inverse_scale);
// One slot of it; row: scratch [width].
void write_cache_row(const void* from, int dtype, void* cache, int cache_dtype, int64_t slot, int64_t width,
                     float inverse_scale, float* row, uint16_t bf16_nan);
// float32 [rows, n].
void log_softmax(const float* x, float* y, int64_t rows, int64_t n);

// What is wrong with a batch, or null: tokens = rows of q, blocks = cache blocks, columns = of the block table.
const char* check_batch(const AttentionArgs& args, int64_t sequences, int64_t tokens, int64_t blocks, int64_t columns);
void attention(const AttentionArgs& args, int64_t sequences);

}  // namespace anyfp4
