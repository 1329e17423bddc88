// y = round((sum over K of x w) alpha + bias) for an NVFP4 weight and activations quantized on the way, bit for bit as
// numerics/blackwell.py defines the sum.
#pragma once

#include <stdint.h>

#include <memory>
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "linear.h"

namespace anyfp4 {

// Rows that share the input global scale; g is its reciprocal.
struct Segment {
    int64_t row0, rows, tile0, tiles;
    int group;
};

struct RowInfo {
    float alpha, bias;
    int8_t e_min, e_max;  // exponents of the non-zero block scales; e_min > e_max if there are none
    uint8_t nan;
};

struct TileInfo {
    double sw_max;
    int e_min, e_max;
    bool plain;  // the code of its block scales
};

struct QuantizedTokens;

class NvFP4Linear : public Linear {
public:
    // packed: [n, k/2], scale: E4M3 [n, k/16], alpha: [n], bias: [n] or null, pre: [k] or null.
    // segment_rows and segment_g: rows of each run of equal input scales, and the reciprocal of the scale.
    NvFP4Linear(const uint8_t* packed, const uint8_t* scale, int64_t n, int64_t k, const float* alpha, const float* bias,
                const float* pre, const std::vector<int64_t>& segment_rows, const std::vector<float>& segment_g);

    void run(const void* x, int64_t m, int x_dtype, void* out, int out_dtype) const override;

    // The codes [n, k/2] and scales [n, k/16] that came in, signs of scales left out; false if one of them was NaN.
    bool unpack(uint8_t* packed, uint8_t* scale) const;

    int64_t n() const override { return n_; }
    int64_t k() const override { return k_; }
    int64_t nbytes() const;
    // where the codes and scales lie, for benchmarks that read the same bytes
    uintptr_t weights() const { return reinterpret_cast<uintptr_t>(weights_.data()); }
    int64_t weight_bytes() const { return int64_t(weights_.size()); }
    // outputs so far that went through the exact slow path (for tests and benchmarks)
    static int64_t slow_outputs();

private:
    void prepare_tile(int64_t tile, const Segment& segment, const uint8_t* packed, const uint8_t* scale);
    void run_tiles(const Segment& s, int64_t begin, int64_t end, const QuantizedTokens& q, int64_t m, void* out,
                   int out_dtype) const;
    void finish(const Segment& s, int64_t tile, const QuantizedTokens& q, int64_t token, const double* acc,
                const double* peak, void* out, int out_dtype) const;
    bool needs_peak(int64_t tile, const TokenInfo& t) const;
    const uint8_t* tile_data(int64_t tile) const { return weights_.data() + tile * chunks_ * CHUNK_BYTES; }

    int64_t n_, k_, chunks_;
    bool has_bias_;
    std::vector<Segment> segments_;
    std::vector<float> group_g_;
    std::vector<float> pre_;
    std::vector<RowInfo> rows_;
    std::vector<TileInfo> tiles_;
    Buffer weights_;
};

// The accumulator of one output with every truncation written out: row r of a tile, and one token as nvfp4_quantize
// leaves it, its codes with `offset` added.
double nvfp4_exact_output(const uint8_t* tile, bool plain, int r, int64_t chunks, const TokenChunk* x, int64_t stride,
                          int offset, const uint8_t* scale);

// What a NaN becomes when it is rounded to bfloat16 (set from torch's own conversion, which differs by platform).
void set_bf16_nan(uint16_t bits);
uint16_t bf16_nan();

}  // namespace anyfp4
