#include "dense_linear.h"

#include <math.h>

#include <algorithm>

#include "common.h"
#include "fp8_quantize.h"
#include "nvfp4_linear.h"
#include "threads.h"

namespace anyfp4 {
namespace {

constexpr int64_t TOKENS = 64;        // that meet four widened rows of the weight at a time
constexpr int64_t IN_PLACE_TOKENS = 2;  // up to this many, bfloat16 and E4M3 are widened on the way

struct RowScratch {
    Buffer buffer;
    void give(DenseArgs* args) {
        buffer.reserve(size_t(args->k) * (4 * sizeof(double) + sizeof(float)));
        args->w64 = buffer.as<double>();
        args->w32 = buffer.as<float>(size_t(args->k) * 4 * sizeof(double));
    }
};
thread_local RowScratch row_scratch;

// Groups of four rows that make about 128 KiB of work, or a fair share for each thread.
int64_t grain(const DenseArgs& args) {
    const int64_t groups = (args.n + 3) / 4;
    const int64_t least = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, args.k * args.m));
    return std::max(least, groups / (16 * get_threads()));
}

template <typename F>
void for_rows(const DenseArgs& args, F&& f) {
    parallel_for((args.n + 3) / 4, grain(args), [&](int64_t begin, int64_t end) {
        DenseArgs mine = args;
        row_scratch.give(&mine);
        f(mine, 4 * begin, std::min(4 * end, args.n));
    });
}

}  // namespace

DenseLinear::DenseLinear(const void* w, int w_dtype, const uint8_t* block_scale, int64_t n, int64_t k,
                         const float* row_scale, const float* bias, const float* pre, Input input, float input_scale)
    : bounds_(size_t(n)), input_(input), input_scale_(input_scale) {
    if (row_scale) row_scale_.assign(row_scale, row_scale + n);
    if (bias) bias_.assign(bias, bias + n);
    if (pre) pre_.assign(pre, pre + k);
    args_.w = w;
    args_.w_dtype = w_dtype;
    args_.block_scale = block_scale;
    args_.n = n;
    args_.k = k;
    args_.m = 1;
    for_rows(args_, [&](const DenseArgs& args, int64_t begin, int64_t end) {
        kernels().dense_bounds(args, begin, end, bounds_.data());
    });
    args_.w_bound = bounds_.data();
    args_.row_scale = row_scale_.empty() ? nullptr : row_scale_.data();
    args_.bias = bias_.empty() ? nullptr : bias_.data();
}

void DenseLinear::prepare_token(const void* x, int x_dtype, bool in_place, float* x32, double* x64, RowBound* bound,
                                float* scale) const {
    const Kernels& kernel = kernels();
    const int64_t k = args_.k;
    kernel.load_row(x, 0, k, x_dtype, x32);
    if (!pre_.empty()) {
        std::vector<float> factors(pre_);
        kernel.round_row(factors.data(), k, x_dtype);
        for (int64_t i = 0; i < k; ++i) x32[i] *= factors[size_t(i)];
        kernel.round_row(x32, k, x_dtype);
    }
    if (input_ == Input::FP8_STATIC) fp8_round(x32, k, *scale = input_scale_);
    if (input_ == Input::FP8_DYNAMIC) *scale = fp8_quantize(x32, k);
    kernel.dense_prepare_x(x32, k, in_place ? args_.w_dtype : F32, x64, bound);
}

void DenseLinear::run(const void* x, int64_t m, int x_dtype, void* out, int out_dtype) const {
    if (m == 0) return;
    thread_local Buffer scratch;
    const int64_t k = args_.k, most = std::min(m, TOKENS);
    scratch.reserve(size_t(most) * (size_t(k) * 12 + 16));
    double* x64 = scratch.as<double>();
    RowBound* bound = reinterpret_cast<RowBound*>(x64 + most * k);
    float* x32 = reinterpret_cast<float*>(bound + most);
    float* scale = x32 + most * k;
    DenseArgs args = args_;
    args.x32 = x32;
    args.x64 = x64;
    args.x_bound = bound;
    args.token_scale = input_ == Input::AS_IT_IS ? nullptr : scale;
    args.out_dtype = out_dtype;
    args.bf16_nan = bf16_nan();
    args.in_place = (args.w_dtype == BF16 || args.w_dtype == F8) && m <= IN_PLACE_TOKENS;
    for (int64_t t0 = 0; t0 < m; t0 += TOKENS) {
        args.m = std::min(TOKENS, m - t0);
        parallel_for(args.m, std::max<int64_t>(1, 16384 / k), [&](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; ++t)
                prepare_token(element(x, (t0 + t) * k, x_dtype), x_dtype, args.in_place, x32 + t * k, x64 + t * k,
                              bound + t, scale + t);
        });
        args.out = element(out, t0 * args.n, out_dtype);
        for_rows(args, [](const DenseArgs& mine, int64_t begin, int64_t end) { kernels().dense_rows(mine, begin, end); });
    }
}

int64_t DenseLinear::nbytes() const {
    return int64_t(bounds_.size() * sizeof(RowBound) +
                   (row_scale_.size() + bias_.size() + pre_.size()) * sizeof(float));
}

}  // namespace anyfp4
