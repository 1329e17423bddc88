// Preparation and the loops over tiles and tokens. One token: every tile is unpacked in registers and read once, at the
// speed of memory. Several: a piece of a tile (16 rows, PIECE_CHUNKS chunks) is unpacked into the L1 cache and meets up to
// TOKENS tokens. Which is taken changes nothing in the result: the order over K is the definition's.
#include "nvfp4_linear.h"

#include <algorithm>
#include <atomic>

#include "nvfp4_scale.h"
#include "threads.h"

namespace anyfp4 {
namespace {

constexpr int64_t TOKENS = 64;  // at a time: their accumulators take 8 KiB

std::atomic<int64_t> slow_count{0};
std::atomic<uint16_t> bf16_nan_bits{0x7FC0};

// Nibbles 0..3 of the low half to the low nibbles of the four bytes.
inline uint32_t spread(uint32_t v) {
    v = (v | v << 8) & 0x00FF00FF;
    return (v | v << 4) & 0x0F0F0F0F;
}
inline uint32_t gather(uint32_t v) {
    v = (v | v >> 4) & 0x00FF00FF;
    return (v | v >> 8) & 0xFFFF;
}

}  // namespace

void set_bf16_nan(uint16_t bits) { bf16_nan_bits = bits; }
uint16_t bf16_nan() { return bf16_nan_bits.load(std::memory_order_relaxed); }

// The tokens of a call as one group of shards sees them, in one buffer that the thread keeps.
struct QuantizedTokens {
    int64_t blocks, stride;
    int offset;  // added to the codes
    TokenChunk* chunks;
    TokenInfo* info;
    int32_t* bias;
    uint8_t* scale;

    QuantizedTokens(Buffer& buffer, int64_t m, int64_t chunk_count)
        : blocks(4 * chunk_count), stride(m * PIECE_CHUNKS), offset(m == 1 ? 0 : CODE_OFFSET) {
        const int64_t pieces = (chunk_count + PIECE_CHUNKS - 1) / PIECE_CHUNKS;
        buffer.reserve(size_t(pieces * stride) * sizeof(TokenChunk) +
                       size_t(m) * (sizeof(TokenInfo) + size_t(blocks) * (sizeof *bias + sizeof *scale)));
        chunks = buffer.as<TokenChunk>();
        info = reinterpret_cast<TokenInfo*>(chunks + pieces * stride);
        bias = reinterpret_cast<int32_t*>(info + m);
        scale = reinterpret_cast<uint8_t*>(bias + m * blocks);
    }
    // from chunk c, a multiple of PIECE_CHUNKS
    TokenChunk* token(int64_t i, int64_t c = 0) const { return chunks + c / PIECE_CHUNKS * stride + i * PIECE_CHUNKS; }
};

NvFP4Linear::NvFP4Linear(const uint8_t* packed, const uint8_t* scale, int64_t n, int64_t k, const float* alpha,
                         const float* bias, const float* pre, const std::vector<int64_t>& segment_rows,
                         const std::vector<float>& segment_g)
    : n_(n), k_(k), chunks_((k + CHUNK - 1) / CHUNK), has_bias_(bias != nullptr) {
    int64_t row = 0, tile = 0;
    for (size_t i = 0; i < segment_rows.size(); ++i) {
        auto known = std::find(group_g_.begin(), group_g_.end(), segment_g[i]);
        const int group = int(known - group_g_.begin());
        if (known == group_g_.end()) group_g_.push_back(segment_g[i]);
        const int64_t tiles = (segment_rows[i] + TILE - 1) / TILE;
        segments_.push_back({row, segment_rows[i], tile, tiles, group});
        row += segment_rows[i];
        tile += tiles;
    }
    if (pre) pre_.assign(pre, pre + k);
    rows_.resize(size_t(tile * TILE));
    tiles_.resize(size_t(tile));
    weights_.reserve(size_t(tile * chunks_ * CHUNK_BYTES));
    for (const Segment& s : segments_) {
        for (int64_t i = 0; i < s.rows; ++i) {
            RowInfo& info = rows_[size_t(s.tile0 * TILE + i)];
            info.alpha = alpha[s.row0 + i];
            info.bias = bias ? bias[s.row0 + i] : 0.0f;
        }
        parallel_for(s.tiles, 4, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) prepare_tile(i, s, packed, scale);
        });
    }
}

void NvFP4Linear::prepare_tile(int64_t i, const Segment& s, const uint8_t* packed, const uint8_t* scale) {
    const int64_t tile = s.tile0 + i;
    uint8_t* out = weights_.data() + tile * chunks_ * CHUNK_BYTES;
    memset(out, 0, size_t(chunks_ * CHUNK_BYTES));
    TileInfo& tile_info = tiles_[size_t(tile)];
    tile_info = {0.0, 9, -7, true};
    for (int r = 0; r < TILE && i * TILE + r < s.rows; ++r) {
        const uint8_t* scales = scale + (s.row0 + i * TILE + r) * (k_ / BLOCK);
        tile_info.plain &= std::none_of(scales, scales + k_ / BLOCK, [](uint8_t x) { return (x & 0x7F) - 1u < 7u; });
    }
    for (int r = 0; r < TILE; ++r) {
        RowInfo& info = rows_[size_t(tile * TILE + r)];
        info.e_min = 9, info.e_max = -7, info.nan = 0;
        if (i * TILE + r >= s.rows) continue;
        const int64_t row = s.row0 + i * TILE + r;
        const uint8_t* codes = packed + row * (k_ / 2);
        const uint8_t* scales = scale + row * (k_ / BLOCK);
        for (int64_t g = 0; g < k_ / 8; ++g) {
            uint32_t word;
            memcpy(&word, codes + 4 * g, 4);  // nibble j is code j: little endian
            word = spread(word & 0xFFFF) | spread(word >> 16) << 4;
            memcpy(out + g / 8 * CHUNK_BYTES + g % 8 * 64 + 4 * r, &word, 4);
        }
        for (int64_t b = 0; b < k_ / BLOCK; ++b) {
            const uint8_t magnitude = scales[b] & 0x7F;
            if (magnitude == 0x7F) {
                info.nan = 1;
                continue;
            }
            out[b / 4 * CHUNK_BYTES + CHUNK_CODES + b % 4 * TILE + r] =
                tile_info.plain ? plain_scale(magnitude) : normal_scale(magnitude);
            int significand, e;
            split_scale(normal_scale(magnitude), &significand, &e);
            if (significand == 0) continue;
            info.e_min = int8_t(std::min<int>(info.e_min, e));
            info.e_max = int8_t(std::max<int>(info.e_max, e));
            tile_info.sw_max = std::max(tile_info.sw_max, double(e4m3_to_float(magnitude)));
        }
        tile_info.e_min = std::min<int>(tile_info.e_min, info.e_min);
        tile_info.e_max = std::max<int>(tile_info.e_max, info.e_max);
    }
}

bool NvFP4Linear::unpack(uint8_t* packed, uint8_t* scale) const {
    for (const Segment& s : segments_)
        for (int64_t i = 0; i < s.rows; ++i) {
            const int64_t tile = s.tile0 + i / TILE, r = i % TILE;
            if (rows_[size_t(tile * TILE + r)].nan) return false;
            const uint8_t* in = tile_data(tile);
            for (int64_t g = 0; g < k_ / 8; ++g) {
                uint32_t word;
                memcpy(&word, in + g / 8 * CHUNK_BYTES + g % 8 * 64 + 4 * r, 4);
                word = gather(word & 0x0F0F0F0F) | gather(word >> 4 & 0x0F0F0F0F) << 16;
                memcpy(packed + (s.row0 + i) * (k_ / 2) + 4 * g, &word, 4);
            }
            for (int64_t b = 0; b < k_ / BLOCK; ++b) {
                const uint8_t stored = in[b / 4 * CHUNK_BYTES + CHUNK_CODES + b % 4 * TILE + r];
                scale[(s.row0 + i) * (k_ / BLOCK) + b] =
                    tiles_[size_t(tile)].plain ? plain_to_e4m3(stored) : normal_to_e4m3(stored);
            }
        }
    return true;
}

// Truncation of single terms shows only if the largest exponent E, of a term or of an accumulator, exceeds
// e_min + 27, e_min the smallest exponent of a term: all terms are multiples of 2^(e_min - 8), and are truncated to
// multiples of 2^(E - 35). If a bound on the accumulators rules that out for a whole tile, none is watched.
bool NvFP4Linear::needs_peak(int64_t tile, const TokenInfo& t) const {
    const TileInfo& w = tiles_[size_t(tile)];
    if (t.e_min > t.e_max || w.e_min > w.e_max) return false;
    const int e_min = t.e_min + w.e_min;
    return t.e_max + w.e_max > e_min + 27 || 6.0 * w.sw_max * t.l1 >= pow2(e_min + 28);
}

void NvFP4Linear::finish(const Segment& s, int64_t tile, const QuantizedTokens& q, int64_t token, const double* acc,
                         const double* peak, void* out, int out_dtype) const {
    const uint8_t* order = kernels().row_order;
    const RowInfo* info = &rows_[size_t(tile * TILE)];
    const TokenInfo& t = q.info[token];
    const int64_t first = (tile - s.tile0) * TILE;
    const int count = int(std::min<int64_t>(TILE, s.rows - first));
    const bool plain = tiles_[size_t(tile)].plain;
    const double unit = pow2(-acc_exponent(plain));
    float y[TILE];
    for (int i = 0; i < TILE; ++i) y[order[i]] = float(acc[i] * unit);
    if (peak) {
        for (int i = 0; i < TILE; ++i) {
            const int r = order[i];
            const int e_min = t.e_min + info[r].e_min;
            if (r >= count || info[r].e_min > info[r].e_max || t.e_min > t.e_max) continue;
            if (t.e_max + info[r].e_max > e_min + 27 || peak[i] >= pow2(e_min + 28 + acc_exponent(plain))) {
                y[r] = float(nvfp4_exact_output(tile_data(tile), plain, r, chunks_, q.token(token), q.stride,
                                                q.offset, q.scale + token * q.blocks));
                slow_count.fetch_add(1, std::memory_order_relaxed);
            }
        }
    }
    for (int r = 0; r < TILE; ++r) {
        y[r] = t.nan || info[r].nan ? float_of(0x7FFFFFFF) : y[r];
        y[r] *= info[r].alpha;
    }
    if (has_bias_)
        for (int r = 0; r < TILE; ++r) y[r] += info[r].bias;
    const int64_t at = token * n_ + s.row0 + first;
    const uint16_t nan = bf16_nan();
    if (out_dtype == BF16) {
        uint16_t* p = static_cast<uint16_t*>(out) + at;
        for (int r = 0; r < count; ++r) p[r] = float_to_bf16(y[r], nan);
    } else {
        for (int r = 0; r < count; ++r) store_float(out, at + r, out_dtype, y[r], nan);
    }
}

void NvFP4Linear::run_tiles(const Segment& s, int64_t begin, int64_t end, const QuantizedTokens& q, int64_t m, void* out,
                            int out_dtype) const {
    const Kernels& kernel = kernels();
    alignas(64) double acc[TOKENS][TILE], peak[TOKENS][TILE];
    if (m == 1) {
        for (int64_t tile = s.tile0 + begin; tile < s.tile0 + end; ++tile) {
            double* watched = needs_peak(tile, q.info[0]) ? peak[0] : nullptr;
            kernel.nvfp4_gemv(tile_data(tile), tiles_[size_t(tile)].plain, chunks_, q.token(0), q.bias, acc[0], watched);
            finish(s, tile, q, 0, acc[0], watched, out, out_dtype);
        }
        return;
    }
    UnpackedTile w;
    for (int64_t tile = s.tile0 + begin; tile < s.tile0 + end; ++tile)
        for (int64_t t0 = 0; t0 < m; t0 += TOKENS) {
            const int64_t tokens = std::min(TOKENS, m - t0);
            bool watch[TOKENS];
            for (int64_t t = 0; t < tokens; ++t) watch[t] = needs_peak(tile, q.info[t0 + t]);
            memset(acc, 0, size_t(tokens) * sizeof acc[0]);
            memset(peak, 0, size_t(tokens) * sizeof peak[0]);
            for (int64_t c = 0; c < chunks_; c += PIECE_CHUNKS) {
                const int64_t piece = std::min<int64_t>(PIECE_CHUNKS, chunks_ - c);
                kernel.nvfp4_unpack(tile_data(tile) + c * CHUNK_BYTES, tiles_[size_t(tile)].plain, piece, &w);
                for (int64_t t = 0; t < tokens; ++t)
                    kernel.nvfp4_gemm(&w, piece, q.token(t0 + t, c), acc[t], watch[t] ? peak[t] : nullptr);
            }
            for (int64_t t = 0; t < tokens; ++t)
                finish(s, tile, q, t0 + t, acc[t], watch[t] ? peak[t] : nullptr, out, out_dtype);
        }
}

void NvFP4Linear::run(const void* x, int64_t m, int x_dtype, void* out, int out_dtype) const {
    if (m == 0) return;
    thread_local Buffer scratch;
    const QuantizedTokens q(scratch, m, chunks_);
    const Kernels& kernel = kernels();
    for (int group = 0; group < int(group_g_.size()); ++group) {
        parallel_for(m, std::max<int64_t>(1, 16384 / k_), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i)
                kernel.nvfp4_quantize(element(x, i * k_, x_dtype), x_dtype, k_, pre_.empty() ? nullptr : pre_.data(),
                                      group_g_[size_t(group)], q.offset, q.token(i), q.stride, q.bias + i * q.blocks,
                                      q.scale + i * q.blocks, q.info + i);
        });
        for (const Segment& s : segments_) {
            if (s.group != group) continue;
            // pieces of at least about 16 KiB of codes times tokens (a microsecond), and enough of them that no thread waits
            // long for another
            const int64_t least = std::max<int64_t>(1, 16384 / (chunks_ * CHUNK_BYTES * m));
            const int64_t grain = std::max(least, s.tiles / (get_threads() * (m == 1 ? 8 : 16)));
            parallel_for(s.tiles, grain, [&](int64_t begin, int64_t end) {
                run_tiles(s, begin, end, q, m, out, out_dtype);
            });
        }
    }
}

int64_t NvFP4Linear::nbytes() const {
    return int64_t(weights_.size() + rows_.size() * sizeof(RowInfo) + tiles_.size() * sizeof(TileInfo) +
                   pre_.size() * sizeof(float));
}

int64_t NvFP4Linear::slow_outputs() { return slow_count.load(); }

}  // namespace anyfp4
