// What the decoder asks of any linear layer.
#pragma once

#include <stdint.h>

namespace anyfp4 {

class Linear {
public:
    virtual ~Linear() = default;
    // x: [m, k] of x_dtype, out: [m, n] of out_dtype, both contiguous.
    virtual void run(const void* x, int64_t m, int x_dtype, void* out, int out_dtype) const = 0;
    virtual int64_t n() const = 0;
    virtual int64_t k() const = 0;
};

}  // namespace anyfp4
