# Addresses are those of contiguous memory unless a stride is passed; the callers in backends/cpu.py check everything.
# dtype codes: 0 float32, 1 bfloat16, 2 float16, 3 float8_e4m3fn, 4 packed NVFP4 codes.

def isa() -> str: ...
def available_isas() -> list[str]: ...
def select_isa(name: str) -> bool: ...
def set_threads(n: int) -> None: ...
def threads() -> int: ...
def set_bf16_nan(bits: int) -> None: ...
def slow_outputs() -> int: ...
def plain_read(address: int, nbytes: int, /) -> int: ...

class Linear: ...

class NvFP4Linear(Linear):
    def __init__(
        self,
        packed: int,
        scale: int,
        n: int,
        k: int,
        alpha: int,
        bias: int,
        pre: int,
        segment_rows: list[int],
        segment_g: list[float],
        /,
    ) -> None: ...
    def run(self, x: int, rows: int, x_dtype: int, out: int, out_dtype: int, /) -> None: ...
    @property
    def weights(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

class DenseLinear(Linear):
    def __init__(
        self,
        w: int,
        w_dtype: int,
        block_scale: int,
        n: int,
        k: int,
        row_scale: int,
        bias: int,
        pre: int,
        input: int,
        input_scale: float,
        /,
    ) -> None: ...
    def run(self, x: int, rows: int, x_dtype: int, out: int, out_dtype: int, /) -> None: ...
    @property
    def nbytes(self) -> int: ...

class Fp8BlockLinear(Linear):
    def __init__(self, w: int, n: int, k: int, scale: int, bias: int, weight_only: bool, /) -> None: ...
    def run(self, x: int, rows: int, x_dtype: int, out: int, out_dtype: int, /) -> None: ...
    @property
    def nbytes(self) -> int: ...

class DecoderStack:
    def __init__(
        self,
        dtype: int,
        hidden: int,
        heads: int,
        kv_heads: int,
        dim: int,
        eps: float,
        norm: int,
        cos_sin: int,
        positions: int,
        /,
    ) -> None: ...
    def add_layer(
        self,
        norms: list[int],  # input, after attention, of q, of k
        projections: list[list[Linear]],  # qkv, o, gate_up, down
        scales: list[float],  # of scores, of values, into the cache of keys, of values
        window: int,
        /,
    ) -> bool: ...
    def run(
        self,
        residual: int,  # overwritten
        out: int,
        tokens: int,
        positions: int,
        slots: int,
        query_start: int,
        context_len: int,
        block_table: int,
        table_stride: int,
        sequences: int,
        columns: int,
        caches: list[int],  # k and v of each layer
        cache_dtype: int,
        blocks: int,
        block_size: int,
        /,
    ) -> None: ...

def rms_norm(
    x: int,
    residual: int,
    residual_out: int,
    w: int,
    w_dtype: int,
    y: int,
    rows: int,
    k: int,
    dtype: int,
    eps: float,
    /,
) -> None: ...
def silu_mul(gate_up: int, y: int, rows: int, width: int, dtype: int, /) -> None: ...
def rope(
    x: int,
    x_stride: int,
    y: int,
    positions: int,
    limit: int,
    cos_sin: int,
    tokens: int,
    heads: int,
    half: int,
    dtype: int,
    /,
) -> bool: ...
def write_cache(
    k: int,
    k_stride: int,
    dtype: int,
    cache: int,
    cache_dtype: int,
    slots: int,
    slot_count: int,
    tokens: int,
    width: int,
    inverse_scale: float,
    /,
) -> bool: ...
def log_softmax(x: int, y: int, rows: int, n: int, /) -> None: ...
def attention(
    q: int,
    q_stride: int,
    out: int,
    k_cache: int,
    v_cache: int,
    dtype: int,
    cache_dtype: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    blocks: int,
    block_size: int,
    query_start: int,
    context_len: int,
    block_table: int,
    table_stride: int,
    sequences: int,
    columns: int,
    scale: float,
    v_scale: float,
    window: int,
    /,
) -> None: ...
