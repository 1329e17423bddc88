// AVX-512 F, BW, DQ, VL and VNNI.
#include <immintrin.h>

#include "common.h"
#include "kernels.h"
#include "nvfp4_scale.h"

namespace anyfp4 {
namespace avx512 {
#include "exact_sum.inl"
#include "vector.inl"
#include "nvfp4_quantize.inl"
#include "nvfp4_avx512.inl"
#include "elementwise.inl"
#include "dense.inl"
#include "fp8_block.inl"
#include "attention.inl"
#include "attention_tiles.inl"
#include "attention_one.inl"
}  // namespace avx512

using namespace avx512;
#define TABLE kernels_avx512
#define TABLE_NAME "avx512"
#include "table.inl"
}  // namespace anyfp4
