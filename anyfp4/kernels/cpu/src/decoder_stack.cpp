#include "decoder_stack.h"

#include <string.h>

#include <algorithm>

#include "buffer.h"
#include "common.h"
#include "decoder_ops.h"
#include "nvfp4_linear.h"
#include "threads.h"

namespace anyfp4 {
namespace {

thread_local Buffer workspace;
thread_local Buffer row_scratch;

// tokens that one thread takes at a time through norm, rotary embedding and cache write
constexpr int64_t HEAD_ELEMENTS = 8192;

double multiplications(const Projection& p) {
    double sum = 0;
    for (const Linear* part : p.parts) sum += double(part->n()) * double(part->k());
    return sum;
}

bool takes(const Projection& p, int64_t k) {
    return !p.parts.empty() && std::all_of(p.parts.begin(), p.parts.end(), [&](const Linear* l) { return l->k() == k; });
}

}  // namespace

int64_t Projection::n() const {
    int64_t sum = 0;
    for (const Linear* part : parts) sum += part->n();
    return sum;
}

void Projection::run(const void* x, int64_t m, int dtype, void* out, void* scratch) const {
    if (parts.size() == 1) return parts[0]->run(x, m, dtype, out, dtype);
    const int64_t width = n();
    int64_t column = 0;
    for (const Linear* part : parts) {
        part->run(x, m, dtype, scratch, dtype);
        const size_t bytes = size_t(part->n() * dtype_size(dtype));
        for (int64_t i = 0; i < m; ++i)
            memcpy(element(out, i * width + column, dtype), element(scratch, i * part->n(), dtype), bytes);
        column += part->n();
    }
}

bool DecoderStack::add_layer(StackLayer layer) {
    const int64_t qkv = (shape_.heads + 2 * shape_.kv_heads) * shape_.dim;
    const int64_t mlp = layer.gate_up.n();
    if (!takes(layer.qkv, shape_.hidden) || layer.qkv.n() != qkv || !takes(layer.o, shape_.heads * shape_.dim) ||
        layer.o.n() != shape_.hidden || !takes(layer.gate_up, shape_.hidden) || mlp % 2 ||
        !takes(layer.down, mlp / 2) || layer.down.n() != shape_.hidden)
        return false;
    widest_qkv_ = std::max(widest_qkv_, qkv);
    widest_mlp_ = std::max(widest_mlp_, mlp);
    for (const Projection* p : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) work_ += multiplications(*p);
    layers_.push_back(std::move(layer));
    return true;
}

// Norm of q and k, rotary embedding in place, cache write, attention. qkv: [T, heads + 2 kv_heads, dim].
void DecoderStack::attend(const StackLayer& layer, const StackBatch& b, size_t index, void* qkv, void* out) const {
    const StackShape& s = shape_;
    const int64_t heads = s.heads + s.kv_heads, stride = (heads + s.kv_heads) * s.dim, width = s.kv_heads * s.dim;
    void* k_cache = reinterpret_cast<void*>(b.caches[2 * index]);
    void* v_cache = reinterpret_cast<void*>(b.caches[2 * index + 1]);
    const uint16_t nan = bf16_nan();
    parallel_for(b.tokens, std::max<int64_t>(1, HEAD_ELEMENTS / stride), [&](int64_t begin, int64_t end) {
        const Kernels& kernel = kernels();
        row_scratch.reserve(size_t(std::max(width, s.dim)) * sizeof(float));
        float* row = row_scratch.as<float>();
        for (int64_t t = begin; t < end; ++t) {
            for (int64_t h = 0; h < heads; ++h) {
                void* x = element(qkv, t * stride + h * s.dim, s.dtype);
                const void* norm = h < s.heads ? layer.q_norm : layer.k_norm;
                if (norm) kernel.rms_norm(x, nullptr, nullptr, norm, s.dtype, x, s.dim, s.dtype, s.eps, row, nan);
                kernel.rope(x, x, s.cos_sin + b.positions[t] * s.dim, s.dim / 2, s.dtype, nan);
            }
            for (int side = 0; side < 2; ++side)
                write_cache_row(element(qkv, t * stride + (s.heads + side * s.kv_heads) * s.dim, s.dtype), s.dtype,
                                side ? v_cache : k_cache, b.cache_dtype, b.slots[t], width,
                                side ? layer.v_inverse : layer.k_inverse, row, nan);
        }
    });
    attention(
        AttentionArgs{qkv, stride, out, k_cache, v_cache, s.dtype, b.cache_dtype, s.heads, s.kv_heads, s.dim,
                      b.block_size, b.query_start, b.context_len, b.block_table, b.table_stride, layer.score_scale,
                      layer.v_scale, layer.window, nan},
        b.sequences);
}

const char* DecoderStack::run(const StackBatch& b, void* residual, void* out) const {
    const StackShape& s = shape_;
    for (int64_t t = 0; t < b.tokens; ++t) {
        if (b.positions[t] < 0 || b.positions[t] >= s.positions) return "positions must lie inside the rotary table";
        if (b.slots[t] < 0 || b.slots[t] >= b.blocks * b.block_size) return "slots must lie inside the cache";
    }
    AttentionArgs args{};
    args.query_start = b.query_start, args.context_len = b.context_len, args.block_table = b.block_table;
    args.table_stride = b.table_stride, args.block_size = b.block_size;
    if (const char* wrong = check_batch(args, b.sequences, b.tokens, b.blocks, b.columns)) return wrong;

    const int64_t m = b.tokens, heads = s.heads * s.dim;
    const int64_t narrow = std::max(s.hidden, heads), wide = std::max(widest_qkv_, widest_mlp_);
    // x (normalised, attended, or the MLP's middle), a projection's output, and the parts of one
    const int64_t x_size = m * std::max(narrow, widest_mlp_ / 2), y_size = m * std::max(wide, s.hidden);
    workspace.reserve(size_t((x_size + 2 * y_size) * dtype_size(s.dtype)));
    void* x = workspace.data();
    void* y = element(x, x_size, s.dtype);
    void* parts = element(y, y_size, s.dtype);

    bool first = true;
    for (size_t i = 0; i < layers_.size(); ++i) {
        const StackLayer& layer = layers_[i];
        rms_norm(first ? residual : y, first ? nullptr : residual, residual, layer.input_norm, s.dtype, x, m, s.hidden,
                 s.dtype, s.eps);
        first = false;
        layer.qkv.run(x, m, s.dtype, y, parts);
        attend(layer, b, i, y, x);
        layer.o.run(x, m, s.dtype, y, parts);
        rms_norm(y, residual, residual, layer.post_norm, s.dtype, x, m, s.hidden, s.dtype, s.eps);
        layer.gate_up.run(x, m, s.dtype, y, parts);
        silu_mul(y, x, m, layer.gate_up.n() / 2, s.dtype);
        layer.down.run(x, m, s.dtype, y, parts);
    }
    rms_norm(first ? residual : y, first ? nullptr : residual, residual, s.norm, s.dtype, out, m, s.hidden, s.dtype,
             s.eps);
    return nullptr;
}

}  // namespace anyfp4
