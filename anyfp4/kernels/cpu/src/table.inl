// The table of the instruction set whose namespace is in use.
const Kernels TABLE = {
    TABLE_NAME,     nvfp4_quantize,  nvfp4_gemv,   nvfp4_unpack, nvfp4_gemm, ROW_ORDER,   load_row,
    round_row,      dense_prepare_x, dense_bounds, dense_rows,   fp8_block_rows, rms_norm, silu_mul,
    rope,           log_softmax,     store_row,    attention_scratch, attention,
};
