// y = round(dot(x, w) [x scale] + bias): unquantized weights, weight-only NVFP4, FP8. Dot products are exact sums of
// exact products, rounded once to float32. The weight stays where it is, in the checkpoint's own form: the owner of the
// object keeps it alive.
#pragma once

#include <stdint.h>

#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "linear.h"

namespace anyfp4 {

// How activations reach the product.
enum class Input : int {
    AS_IT_IS = 0,
    FP8_STATIC = 1,   // E4M3(x (1 / input_scale)), one scale
    FP8_DYNAMIC = 2,  // likewise, one scale per token
};

class DenseLinear : public Linear {
public:
    // w: [n, k] of w_dtype (NVFP4: packed codes, and block_scale), row_scale, bias: [n] or null, pre: [k] or null.
    DenseLinear(const void* w, int w_dtype, const uint8_t* block_scale, int64_t n, int64_t k, const float* row_scale,
                const float* bias, const float* pre, Input input, float input_scale);

    void run(const void* x, int64_t m, int x_dtype, void* out, int out_dtype) const override;

    int64_t n() const override { return args_.n; }
    int64_t k() const override { return args_.k; }
    // memory held beside the weight
    int64_t nbytes() const;

private:
    void prepare_token(const void* x, int x_dtype, bool in_place, float* x32, double* x64, RowBound* bound,
                       float* scale) const;

    DenseArgs args_{};
    std::vector<RowBound> bounds_;
    std::vector<float> row_scale_, bias_, pre_;
    Input input_;
    float input_scale_;
};

}  // namespace anyfp4
