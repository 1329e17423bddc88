// Baseline: whatever the compiler targets by default.
#include "common.h"
#include "kernels.h"
#include "nvfp4_scale.h"

namespace anyfp4 {
namespace portable {
#include "exact_sum.inl"
#include "vector.inl"
#include "nvfp4_quantize.inl"
#include "nvfp4_portable.inl"
#include "elementwise.inl"
#include "dense.inl"
#include "fp8_block.inl"
#include "attention.inl"
#include "attention_tiles.inl"
#include "attention_one.inl"
}  // namespace portable

using namespace portable;
#define TABLE kernels_portable
#define TABLE_NAME "portable"
#include "table.inl"
}  // namespace anyfp4
