// AVX2 + FMA + F16C; built twice, the second time as kernels_avxvnni with AVX-VNNI.
#include <immintrin.h>

#include "common.h"
#include "kernels.h"
#include "nvfp4_scale.h"

#ifdef ANYFP4_VNNI
#define ISA_NAMESPACE avxvnni
#else
#define ISA_NAMESPACE avx2
#endif

namespace anyfp4 {
namespace ISA_NAMESPACE {
#include "exact_sum.inl"
#include "vector.inl"
#include "nvfp4_quantize.inl"
#include "nvfp4_avx2.inl"
#include "elementwise.inl"
#include "dense.inl"
#include "fp8_block.inl"
#include "attention.inl"
#include "attention_tiles.inl"
#include "attention_one.inl"
}  // namespace ISA_NAMESPACE

using namespace ISA_NAMESPACE;
#ifdef ANYFP4_VNNI
#define TABLE kernels_avxvnni
#define TABLE_NAME "avxvnni"
#else
#define TABLE kernels_avx2
#define TABLE_NAME "avx2"
#endif
#include "table.inl"
}  // namespace anyfp4
