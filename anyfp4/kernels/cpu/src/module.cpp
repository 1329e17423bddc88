// Python's view. Functions take raw addresses and sizes: the Python side (backends/cpu.py) has checked shapes, dtypes
// and contiguity before it takes an address. The GIL is released for calls that last.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>

#include "decoder_ops.h"
#include "decoder_stack.h"
#include "dense_linear.h"
#include "fp8_block_linear.h"
#include "kernels.h"
#include "nvfp4_linear.h"
#include "threads.h"

namespace nb = nanobind;
using namespace anyfp4;

namespace {

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Lets other Python threads run while `f` does, if it is worth the handing over: `work` in multiplications.
template <typename F>
void unlocked(double work, F&& f) {
    if (work < 1e8) return f();
    nb::gil_scoped_release release;
    f();
}

// Reads n bytes (a multiple of 1 KiB is read fully) with all threads and does next to nothing with them: what a
// benchmark compares with.
uint64_t plain_read(const uint8_t* p, int64_t n) {
    typedef uint64_t vec __attribute__((vector_size(16), aligned(1), may_alias));
    std::atomic<uint64_t> sum{0};
    const int64_t piece = 1024;
    parallel_for(n / piece, std::max<int64_t>(1, n / piece / (4 * get_threads())), [&](int64_t begin, int64_t end) {
        vec a{}, b{}, c{}, d{};
        for (const uint8_t* q = p + begin * piece; q < p + end * piece; q += 64) {
            a ^= *reinterpret_cast<const vec*>(q);
            b ^= *reinterpret_cast<const vec*>(q + 16);
            c ^= *reinterpret_cast<const vec*>(q + 32);
            d ^= *reinterpret_cast<const vec*>(q + 48);
        }
        a ^= b ^ c ^ d;
        sum.fetch_xor(a[0] ^ a[1]);
    });
    return sum.load();
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "compiled CPU kernels of anyfp4";

    m.def("isa", [] { return std::string(kernels().name); });
    m.def("available_isas", [] {
        std::vector<std::string> names;
        for (const char* const* p = available_kernels(); *p; ++p) names.emplace_back(*p);
        return names;
    });
    m.def("select_isa", [](const std::string& name) { return select_kernels(name.c_str()); });
    m.def("set_threads", [](int n) { set_threads(n < 1 ? 1 : n); });
    m.def("threads", [] { return get_threads(); });
    m.def("set_bf16_nan", [](int bits) { set_bf16_nan(uint16_t(bits)); });
    m.def("plain_read", [](uintptr_t p, int64_t n) { return plain_read(at<uint8_t>(p), n); });
    m.def("slow_outputs", [] { return NvFP4Linear::slow_outputs(); });

    nb::class_<Linear>(m, "Linear");

    nb::class_<NvFP4Linear, Linear>(m, "NvFP4Linear")
        .def("__init__",
             [](NvFP4Linear* self, uintptr_t packed, uintptr_t scale, int64_t n, int64_t k, uintptr_t alpha,
                uintptr_t bias, uintptr_t pre, const std::vector<int64_t>& segment_rows,
                const std::vector<float>& segment_g) {
                 new (self) NvFP4Linear(at<uint8_t>(packed), at<uint8_t>(scale), n, k, at<float>(alpha),
                                        at<float>(bias), at<float>(pre), segment_rows, segment_g);
             })
        .def("run",
             [](const NvFP4Linear& self, uintptr_t x, int64_t rows, int x_dtype, uintptr_t out, int out_dtype) {
                 unlocked(double(rows) * double(self.n()) * double(self.k()), [&] {
                     self.run(at<void>(x), rows, x_dtype, at<void>(out), out_dtype);
                 });
             })
        .def("unpack",
             [](const NvFP4Linear& self, uintptr_t packed, uintptr_t scale) {
                 return self.unpack(at<uint8_t>(packed), at<uint8_t>(scale));
             })
        .def_prop_ro("weights", &NvFP4Linear::weights)
        .def_prop_ro("weight_bytes", &NvFP4Linear::weight_bytes)
        .def_prop_ro("nbytes", &NvFP4Linear::nbytes);

    nb::class_<DenseLinear, Linear>(m, "DenseLinear")
        .def("__init__",
             [](DenseLinear* self, uintptr_t w, int w_dtype, uintptr_t block_scale, int64_t n, int64_t k,
                uintptr_t row_scale, uintptr_t bias, uintptr_t pre, int input, float input_scale) {
                 new (self) DenseLinear(at<void>(w), w_dtype, at<uint8_t>(block_scale), n, k, at<float>(row_scale),
                                        at<float>(bias), at<float>(pre), Input(input), input_scale);
             })
        .def("run",
             [](const DenseLinear& self, uintptr_t x, int64_t rows, int x_dtype, uintptr_t out, int out_dtype) {
                 unlocked(double(rows) * double(self.n()) * double(self.k()), [&] {
                     self.run(at<void>(x), rows, x_dtype, at<void>(out), out_dtype);
                 });
             })
        .def_prop_ro("nbytes", &DenseLinear::nbytes);

    nb::class_<Fp8BlockLinear, Linear>(m, "Fp8BlockLinear")
        .def("__init__",
             [](Fp8BlockLinear* self, uintptr_t w, int64_t n, int64_t k, uintptr_t scale, uintptr_t bias,
                bool weight_only) {
                 new (self) Fp8BlockLinear(at<uint8_t>(w), n, k, at<float>(scale), at<float>(bias), weight_only);
             })
        .def("run",
             [](const Fp8BlockLinear& self, uintptr_t x, int64_t rows, int x_dtype, uintptr_t out, int out_dtype) {
                 unlocked(double(rows) * double(self.n()) * double(self.k()), [&] {
                     self.run(at<void>(x), rows, x_dtype, at<void>(out), out_dtype);
                 });
             })
        .def_prop_ro("nbytes", &Fp8BlockLinear::nbytes);

    nb::class_<DecoderStack>(m, "DecoderStack")
        .def("__init__",
             [](DecoderStack* self, int dtype, int64_t hidden, int64_t heads, int64_t kv_heads, int64_t dim, float eps,
                uintptr_t norm, uintptr_t cos_sin, int64_t positions) {
                 new (self) DecoderStack(StackShape{dtype, hidden, heads, kv_heads, dim, eps, at<void>(norm),
                                                    at<float>(cos_sin), positions});
             })
        .def("add_layer",
             [](DecoderStack& self, const std::vector<uintptr_t>& norms,
                const std::vector<std::vector<const Linear*>>& projections, const std::vector<float>& scales,
                int64_t window) {
                 if (norms.size() != 4 || projections.size() != 4 || scales.size() != 4)
                     throw nb::value_error("a layer has four norms, projections and scales");
                 return self.add_layer(StackLayer{at<void>(norms[0]), at<void>(norms[1]), at<void>(norms[2]),
                                                  at<void>(norms[3]), {projections[0]}, {projections[1]},
                                                  {projections[2]}, {projections[3]}, scales[0], scales[1], scales[2],
                                                  scales[3], window});
             })
        .def("run",
             [](const DecoderStack& self, uintptr_t residual, uintptr_t out, int64_t tokens, uintptr_t positions,
                uintptr_t slots, uintptr_t query_start, uintptr_t context_len, uintptr_t block_table,
                int64_t table_stride, int64_t sequences, int64_t columns, const std::vector<uintptr_t>& caches,
                int cache_dtype, int64_t blocks, int64_t block_size) {
                 if (caches.size() != 2 * self.layers()) throw nb::value_error("one pair of caches for each layer");
                 const StackBatch batch{tokens, sequences, columns, table_stride, blocks, block_size, cache_dtype,
                                        at<int64_t>(positions), at<int64_t>(slots), at<int32_t>(query_start),
                                        at<int32_t>(context_len), at<int32_t>(block_table), caches.data()};
                 const char* wrong = nullptr;
                 unlocked(double(tokens) * self.work(),
                          [&] { wrong = self.run(batch, at<void>(residual), at<void>(out)); });
                 if (wrong) throw nb::value_error(wrong);
             });

    m.def("rms_norm", [](uintptr_t x, uintptr_t residual, uintptr_t residual_out, uintptr_t w, int w_dtype, uintptr_t y,
                         int64_t rows, int64_t k, int dtype, float eps) {
        rms_norm(at<void>(x), at<void>(residual), at<void>(residual_out), at<void>(w), w_dtype, at<void>(y), rows, k,
                 dtype, eps);
    });
    m.def("silu_mul", [](uintptr_t gate_up, uintptr_t y, int64_t rows, int64_t width, int dtype) {
        silu_mul(at<void>(gate_up), at<void>(y), rows, width, dtype);
    });
    m.def("rope", [](uintptr_t x, int64_t x_stride, uintptr_t y, uintptr_t positions, int64_t limit, uintptr_t cos_sin,
                     int64_t tokens, int64_t heads, int64_t half, int dtype) {
        return rope(at<void>(x), x_stride, at<void>(y), at<int64_t>(positions), limit, at<float>(cos_sin), tokens,
                    heads, half, dtype);
    });
    m.def("write_cache", [](uintptr_t k, int64_t k_stride, int dtype, uintptr_t cache, int cache_dtype, uintptr_t slots,
                            int64_t slot_count, int64_t tokens, int64_t width, float inverse_scale) {
        return write_cache(at<void>(k), k_stride, dtype, at<void>(cache), cache_dtype, at<int64_t>(slots), slot_count,
                           tokens, width, inverse_scale);
    });
    m.def("log_softmax", [](uintptr_t x, uintptr_t y, int64_t rows, int64_t n) {
        log_softmax(at<float>(x), at<float>(y), rows, n);
    });
    m.def("attention", [](uintptr_t q, int64_t q_stride, uintptr_t out, uintptr_t k_cache, uintptr_t v_cache, int dtype,
                          int cache_dtype, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim, int64_t blocks,
                          int64_t block_size, uintptr_t query_start, uintptr_t context_len, uintptr_t block_table,
                          int64_t table_stride, int64_t sequences, int64_t columns, float scale, float v_scale,
                          int64_t window) {
        AttentionArgs args{at<void>(q), q_stride, at<void>(out), at<void>(k_cache), at<void>(v_cache), dtype,
                           cache_dtype, heads, kv_heads, dim, block_size, at<int32_t>(query_start),
                           at<int32_t>(context_len), at<int32_t>(block_table), table_stride, scale, v_scale, window,
                           bf16_nan()};
        if (const char* wrong = check_batch(args, sequences, tokens, blocks, columns)) throw nb::value_error(wrong);
        unlocked(double(tokens) * 1e7, [&] { attention(args, sequences); });
    });
}
