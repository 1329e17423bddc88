// All layers of a decoder in one call: what models/decoder.py does op by op, with the same row kernels and so the same
// bits, without Python between the ops.
#pragma once

#include <stdint.h>

#include <memory>
#include <vector>

#include "kernels.h"
#include "linear.h"

namespace anyfp4 {

// One linear layer, or several whose outputs stand side by side.
struct Projection {
    std::vector<const Linear*> parts;

    int64_t n() const;
    // x: [m, k], out: [m, n], both of `dtype`; scratch: as large as out, used if there are several parts.
    void run(const void* x, int64_t m, int dtype, void* out, void* scratch) const;
};

struct StackLayer {
    const void *input_norm, *post_norm;  // [hidden]
    const void *q_norm, *k_norm;         // [dim], both or neither
    Projection qkv, o, gate_up, down;
    float score_scale, v_scale, k_inverse, v_inverse;  // k_inverse, v_inverse: what an FP8 cache multiplies by
    int64_t window;                                    // 0: none
};

struct StackShape {
    int dtype;  // of activations and norms
    int64_t hidden, heads, kv_heads, dim;
    float eps;
    const void* norm;      // [hidden], after the last layer
    const float* cos_sin;  // [positions, 2, dim / 2]
    int64_t positions;
};

// T tokens of S sequences; caches: k and v of every layer, [blocks, block_size, kv_heads, dim].
struct StackBatch {
    int64_t tokens, sequences, columns, table_stride, blocks, block_size;
    int cache_dtype;
    const int64_t *positions, *slots;                       // [T]
    const int32_t *query_start, *context_len, *block_table;  // [S + 1], [S], [S, columns]
    const uintptr_t* caches;
};

class DecoderStack {
public:
    explicit DecoderStack(const StackShape& shape) : shape_(shape) {}

    // The linear layers must outlive this object. False if a shape does not fit.
    bool add_layer(StackLayer layer);

    // residual: [T, hidden], overwritten; out: [T, hidden]. What is wrong with the batch, or null; nothing is written
    // to a cache then.
    const char* run(const StackBatch& batch, void* residual, void* out) const;

    size_t layers() const { return layers_.size(); }
    // multiplications for one token, for whoever weighs a call
    double work() const { return work_; }

private:
    void attend(const StackLayer& layer, const StackBatch& batch, size_t index, void* qkv, void* out) const;

    StackShape shape_;
    std::vector<StackLayer> layers_;
    int64_t widest_qkv_ = 0, widest_mlp_ = 0;
    double work_ = 0;
};

}  // namespace anyfp4
