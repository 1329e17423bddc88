// Block-wise FP8: weights in blocks of 128 x 128 with a scale each; activations as they are, or quantized dynamically
// for each token and block of K. The weight stays in the checkpoint's memory: the owner of the object keeps it alive.
#pragma once

#include <stdint.h>

#include <vector>

#include "kernels.h"
#include "linear.h"

namespace anyfp4 {

class Fp8BlockLinear : public Linear {
public:
    // w: E4M3 [n, k], scale: [ceil(n / 128), ceil(k / 128)], bias: [n] or null.
    Fp8BlockLinear(const uint8_t* w, int64_t n, int64_t k, const float* scale, const float* bias, bool weight_only);

    void run(const void* x, int64_t m, int x_dtype, void* out, int out_dtype) const override;

    int64_t n() const override { return args_.n; }
    int64_t k() const override { return args_.k; }
    // memory held beside the weight
    int64_t nbytes() const;

private:
    void prepare_token(const void* x, int x_dtype, const Fp8BlockArgs& args, int64_t t, float* x32, double* x64,
                       RowBound* bound, float* scale) const;

    Fp8BlockArgs args_{};
    std::vector<float> scale_, bias_;
    std::vector<uint8_t> nan_;
    bool weight_only_;
};

}  // namespace anyfp4
