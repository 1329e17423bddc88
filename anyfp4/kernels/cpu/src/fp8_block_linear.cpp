#include "fp8_block_linear.h"

#include <algorithm>

#include "buffer.h"
#include "common.h"
#include "fp8_quantize.h"
#include "nvfp4_linear.h"
#include "threads.h"

namespace anyfp4 {
namespace {

constexpr int64_t IN_PLACE_TOKENS = 2;  // up to this many, weights are widened in registers

int64_t blocks_of(int64_t size) { return (size + FP8_BLOCK - 1) / FP8_BLOCK; }

}  // namespace

Fp8BlockLinear::Fp8BlockLinear(const uint8_t* w, int64_t n, int64_t k, const float* scale, const float* bias,
                               bool weight_only)
    : scale_(scale, scale + blocks_of(n) * blocks_of(k)), nan_(size_t(n)), weight_only_(weight_only) {
    if (bias) bias_.assign(bias, bias + n);
    parallel_for(n, std::max<int64_t>(1, 65536 / k), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            uint8_t nan = 0;
            for (int64_t j = 0; j < k; ++j) nan |= (w[i * k + j] & 0x7F) == 0x7F;
            nan_[size_t(i)] = nan;
        }
    });
    args_.w = w;
    args_.n = n;
    args_.k = k;
    args_.w_scale = scale_.data();
    args_.w_nan = nan_.data();
    args_.bias = bias_.empty() ? nullptr : bias_.data();
}

void Fp8BlockLinear::prepare_token(const void* x, int x_dtype, const Fp8BlockArgs& args, int64_t t, float* x32,
                                   double* x64, RowBound* bound, float* scale) const {
    const Kernels& kernel = kernels();
    kernel.load_row(x, 0, args.k, x_dtype, x32 + t * args.k);
    for (int64_t j = 0; j < blocks_of(args.k); ++j) {
        float* block = x32 + t * args.k + j * FP8_BLOCK;
        const int64_t n = std::min(FP8_BLOCK, args.k - j * FP8_BLOCK), at = j * args.m + t;
        if (!weight_only_) scale[at] = fp8_quantize(block, n);
        double* wide = x64 + at * FP8_BLOCK;
        kernel.dense_prepare_x(block, n, F8, wide, bound + at);
        std::fill(wide + n, wide + FP8_BLOCK, 0.0);
    }
}

void Fp8BlockLinear::run(const void* x, int64_t m, int x_dtype, void* out, int out_dtype) const {
    if (m == 0) return;
    thread_local Buffer scratch;
    const int64_t k = args_.k, blocks = blocks_of(k), most = std::min(m, FP8_BLOCK_TOKENS);
    scratch.reserve(size_t(most) * size_t(blocks * (FP8_BLOCK * 8 + int64_t(sizeof(RowBound)) + 4) + k * 4));
    double* x64 = scratch.as<double>();
    RowBound* bound = reinterpret_cast<RowBound*>(x64 + most * blocks * FP8_BLOCK);
    float* scale = reinterpret_cast<float*>(bound + most * blocks);
    float* x32 = scale + most * blocks;
    Fp8BlockArgs args = args_;
    args.x32 = x32;
    args.x64 = x64;
    args.x_bound = bound;
    args.x_scale = weight_only_ ? nullptr : scale;
    args.out_dtype = out_dtype;
    args.bf16_nan = bf16_nan();
    args.in_place = m <= IN_PLACE_TOKENS;
    for (int64_t t0 = 0; t0 < m; t0 += FP8_BLOCK_TOKENS) {
        args.m = std::min(FP8_BLOCK_TOKENS, m - t0);
        parallel_for(args.m, std::max<int64_t>(1, 16384 / k), [&](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; ++t)
                prepare_token(element(x, (t0 + t) * k, x_dtype), x_dtype, args, t, x32, x64, bound, scale);
        });
        args.out = element(out, t0 * args.n, out_dtype);
        // groups of four rows that make about 16384 multiplications, or a fair share for each thread
        const int64_t groups = (args.n + 3) / 4;
        const int64_t grain = std::max(std::max<int64_t>(1, 16384 / (k * args.m)), groups / (16 * get_threads()));
        parallel_for(groups, grain, [&](int64_t begin, int64_t end) {
            kernels().fp8_block_rows(args, 4 * begin, std::min(4 * end, args.n));
        });
    }
}

int64_t Fp8BlockLinear::nbytes() const {
    return int64_t((scale_.size() + bias_.size()) * sizeof(float) + nan_.size());
}

}  // namespace anyfp4
