// The parts of linear.cu and blackwell.cu after the products: sums to where they are added, epilogue, stores. After linear_copy.cu.

#if FLOAT16
const float UNIT = 1.0f;  // of the products that unpacking gives
#else
const float UNIT = 128.0f;
#endif

INLINE void store_sum(uint32 address, float v) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory"); }
INLINE void store_sum_at(uint32 address, uint32 rank, float v) {
    asm volatile("{\n\t.reg .b32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\tst.shared::cluster.f32 [there], %2;\n\t}" ::"r"(
                     address), "r"(rank), "f"(v) : "memory");
}

// A warpgroup's sums [64, TOKENS] to the blocks that finish them, at sums[token][row]
INLINE void hand_over(const float (&v)[TOKENS / 2], uint32 sums, int tokens, int thread) {
    int row = (thread >> 5) * 16 + ((thread >> 2) & 7), t = thread & 3;
#pragma unroll
    for (int i = 0; i < TOKENS / 8; i++) {
        int token = 8 * i + 2 * t;
        uint32 rank = token / OWN, address = sums + ((token % OWN) * PITCH + row) * 4;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            if (token + (e & 1) >= tokens) continue;
            uint32 there = address + ((e & 1) * PITCH + (e >> 1) * 8) * 4;
            if (CLUSTER > 1)
                store_sum_at(there, rank, v[4 * i + e]);
            else
                store_sum(there, v[4 * i + e]);
        }
    }
}

INLINE uint32 bfloat_bits(float v) {
    uint16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    return v == v ? bits : 0x7FC0;
}
INLINE uint32 half_bits(float v) {
    uint16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    return bits;
}

// Four outputs of a token, `count` of them live. kind: 0 bfloat16, 1 float16, 2 float32
INLINE void store_four(void *y, long long offset, const float (&v)[4], int count, int kind, bool aligned) {
    if (kind == 2) {
        float *to = static_cast<float *>(y) + offset;
        if (aligned && count == 4) {
            *reinterpret_cast<float4 *>(to) = make_float4(v[0], v[1], v[2], v[3]);
        } else {
            for (int i = 0; i < 4; i++)
                if (i < count) to[i] = v[i];
        }
        return;
    }
    uint32 bits[4];
#pragma unroll
    for (int i = 0; i < 4; i++) bits[i] = kind == 0 ? bfloat_bits(v[i]) : half_bits(v[i]);
    uint16 *to = static_cast<uint16 *>(y) + offset;
    if (aligned && count == 4) {
        *reinterpret_cast<uint2 *>(to) = make_uint2(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (i < count) to[i] = static_cast<uint16>(bits[i]);
    }
}

struct Factors {
    const float *alpha, *bias;
};

struct Output {
    void *y;
    const float *row;
    int kind, has_bias;
};

// Adds the sums of tile r in order and writes; by `threads` threads of which this is number `thread`.
INLINE void finish(const Problem &p, const Item &item, const Output &out, const float *sums, const float *alpha, int slabs,
                   int rank, int r, int thread, int threads) {
    int tile = item.tile + r;
    int first = p.rows ? p.rows[2 * tile] : tile * 64;
    int rows = p.rows ? p.rows[2 * tile + 1] : min(64, p.n - first);
    bool aligned = ((p.n | first) & 3) == 0;
#pragma unroll 1
    for (int i = thread; i < OWN * 16; i += threads) {
        int own = i >> 4, row = (i & 15) * 4, token = item.token + rank * OWN + own;
        if (token >= p.m || row >= rows) continue;
        const float *from = sums + (r * OWN + own) * PITCH + row;
        float4 sum = *reinterpret_cast<const float4 *>(from);
#pragma unroll 4
        for (int s = 1; s < slabs; s++) {
            float4 next = *reinterpret_cast<const float4 *>(from + s * ROW_TILES * OWN * PITCH);
            sum = make_float4(sum.x + next.x, sum.y + next.y, sum.z + next.z, sum.w + next.w);
        }
        float v[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float factor = alpha[r * 128 + row + j];
            if (out.row) factor = out.row[token] * factor;
            v[j] = v[j] * UNIT * factor;
            if (out.has_bias) v[j] = v[j] + alpha[r * 128 + 64 + row + j];
        }
        store_four(out.y, static_cast<long long>(token) * p.n + first + row, v, rows - row, out.kind, aligned);
    }
}
