#include "decoder_ops.h"

#include <algorithm>
#include <vector>

#include "buffer.h"
#include "common.h"
#include "nvfp4_linear.h"
#include "threads.h"

namespace anyfp4 {
namespace {

// elements below which a second thread costs more than it brings
constexpr int64_t SMALL = 8192;

thread_local Buffer scratch;

int64_t rows_per_piece(int64_t elements_per_row) { return std::max<int64_t>(1, SMALL / std::max<int64_t>(1, elements_per_row)); }

}  // namespace

void rms_norm(const void* x, const void* residual, void* residual_out, const void* w, int w_dtype, void* y,
              int64_t rows, int64_t k, int dtype, float eps) {
    const uint16_t nan = bf16_nan();
    parallel_for(rows, rows_per_piece(k), [&](int64_t begin, int64_t end) {
        scratch.reserve(size_t(k) * sizeof(float));
        for (int64_t i = begin; i < end; ++i)
            kernels().rms_norm(element(x, i * k, dtype), residual ? element(residual, i * k, dtype) : nullptr,
                               residual ? element(residual_out, i * k, dtype) : nullptr, w, w_dtype,
                               element(y, i * k, dtype), k, dtype, eps, scratch.as<float>(), nan);
    });
}

void silu_mul(const void* gate_up, void* y, int64_t rows, int64_t width, int dtype) {
    const uint16_t nan = bf16_nan();
    parallel_for(rows, rows_per_piece(4 * width), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            kernels().silu_mul(element(gate_up, 2 * i * width, dtype), element(y, i * width, dtype), width, dtype, nan);
    });
}

bool rope(const void* x, int64_t x_stride, void* y, const int64_t* positions, int64_t limit, const float* cos_sin,
          int64_t tokens, int64_t heads, int64_t half, int dtype) {
    for (int64_t t = 0; t < tokens; ++t)
        if (positions[t] < 0 || positions[t] >= limit) return false;
    const uint16_t nan = bf16_nan();
    parallel_for(tokens, rows_per_piece(2 * heads * half), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
            for (int64_t h = 0; h < heads; ++h)
                kernels().rope(element(x, t * x_stride + 2 * h * half, dtype),
                               element(y, 2 * (t * heads + h) * half, dtype), cos_sin + 2 * positions[t] * half, half,
                               dtype, nan);
    });
    return true;
}

bool write_cache(const void* k, int64_t k_stride, int dtype, void* cache, int cache_dtype, const int64_t* slots,
                 int64_t slot_count, int64_t tokens, int64_t width, float inverse_scale) {
    for (int64_t t = 0; t < tokens; ++t)
        if (slots[t] < 0 || slots[t] >= slot_count) return false;
    scratch.reserve(size_t(width) * sizeof(float));
    const uint16_t nan = bf16_nan();
    for (int64_t t = 0; t < tokens; ++t)
        write_cache_row(element(k, t * k_stride, dtype), dtype, cache, cache_dtype, slots[t], width, inverse_scale,
                        scratch.as<float>(), nan);
    return true;
}

void write_cache_row(const void* from, int dtype, void* cache, int cache_dtype, int64_t slot, int64_t width,
                     float inverse_scale, float* row, uint16_t nan) {
    void* to = element(cache, slot * width, cache_dtype);
    if (dtype == cache_dtype) {
        memcpy(to, from, size_t(width * dtype_size(dtype)));
        return;
    }
    kernels().load_row(from, 0, width, dtype, row);
    if (cache_dtype == F8)
        for (int64_t i = 0; i < width; ++i) row[i] *= inverse_scale;
    kernels().store_row(to, width, cache_dtype, row, nan);
}

void log_softmax(const float* x, float* y, int64_t rows, int64_t n) {
    parallel_for(rows, rows_per_piece(n), [&](int64_t begin, int64_t end) {
        scratch.reserve(size_t(n) * sizeof(float));
        for (int64_t i = begin; i < end; ++i) kernels().log_softmax(x + i * n, y + i * n, n, scratch.as<float>());
    });
}

const char* check_batch(const AttentionArgs& a, int64_t sequences, int64_t tokens, int64_t blocks, int64_t columns) {
    if (a.query_start[0] != 0 || a.query_start[sequences] != tokens) return "query_start must run from 0 to T";
    for (int64_t s = 0; s < sequences; ++s) {
        const int64_t fresh = a.query_start[s + 1] - a.query_start[s], length = a.context_len[s];
        if (fresh < 0) return "query_start must not decrease";
        if (length < fresh) return "context_len must count the new tokens";
        const int64_t used = (length + a.block_size - 1) / a.block_size;
        if (used > columns) return "block_table has too few columns for context_len";
        for (int64_t b = 0; b < used; ++b) {
            const int64_t block = a.block_table[s * a.table_stride + b];
            if (block < 0 || block >= blocks) return "block_table names a block outside the cache";
        }
    }
    return nullptr;
}

void attention(const AttentionArgs& args, int64_t sequences) {
    const int64_t group = args.heads / args.kv_heads;
    int64_t longest = 1;
    for (int64_t s = 0; s < sequences; ++s) longest = std::max<int64_t>(longest, args.context_len[s]);
    // query tokens of one item: enough rows to share the widened keys, little enough scratch for the cache
    const int64_t rows = std::clamp<int64_t>((1 << 17) / longest, 1, 96);
    const int64_t tokens = std::max<int64_t>(1, rows / group);
    // What cannot be dealt out evenly, one KV head of a sequence to a thread, goes by single query heads.
    std::vector<AttentionItem> items;
    for (int64_t s = 0; s < sequences; ++s)
        for (int64_t t = args.query_start[s]; t < args.query_start[s + 1]; t += tokens)
            for (int64_t h = 0; h < args.heads; h += group)
                items.push_back({s, t, std::min<int64_t>(t + tokens, args.query_start[s + 1]), h, h + group});
    const int64_t even = int64_t(items.size()) / get_threads() * get_threads();
    if (even < 8 * get_threads()) {
        const std::vector<AttentionItem> rest(items.begin() + even, items.end());
        items.resize(size_t(even));
        for (AttentionItem item : rest)
            for (int64_t h = item.h0, end = item.h1; h < end; ++h) {
                item.h0 = h, item.h1 = h + 1;
                items.push_back(item);
            }
    }
    const int64_t work_per_item = std::max<int64_t>(1, longest * args.dim * group);
    parallel_for(int64_t(items.size()), std::max<int64_t>(1, SMALL / work_per_item), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            scratch.reserve(size_t(kernels().attention_scratch(args, items[size_t(i)])));
            kernels().attention(args, items[size_t(i)], scratch.data());
        }
    });
}

}  // namespace anyfp4
