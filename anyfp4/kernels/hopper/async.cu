// What a kernel needs of sm_90a's asynchronous machinery: barriers in shared memory, bulk copies, matrix instructions.

typedef unsigned char uint8;
typedef unsigned short uint16;
typedef unsigned int uint32;
typedef unsigned long long uint64;

struct alignas(64) TensorMap {
    uint64 opaque[16];
};

#define INLINE __device__ __forceinline__

// volatile, so that it is computed once and kept
INLINE uint32 shared_address(const void *p) {
    uint32 v;
    asm volatile("mov.b32 %0, %1;" : "=r"(v) : "r"(static_cast<uint32>(__cvta_generic_to_shared(p))));
    return v;
}

INLINE uint32 cluster_rank() {
    uint32 r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}

INLINE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
}

// What the kernel before this one on the stream wrote is there, and it reads no more; and: the kernel after this one may
// start, and wait likewise.
INLINE void dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
INLINE void dependency_release() { asm volatile("griddepcontrol.launch_dependents;"); }

// `threads` threads of the block meet at barrier `id` (1 to 15)
INLINE void named_sync(uint32 id, uint32 threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
INLINE void named_arrive(uint32 id, uint32 threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

INLINE void barrier_init(uint32 barrier, uint32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// makes initialised barriers visible to the copy engine and to the cluster
INLINE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

INLINE void barrier_expect(uint32 barrier, uint32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

INLINE void barrier_arrive(uint32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Lanes of a warp that arrive for it where all of them have met before. One will do; NVIDIA's racecheck follows barriers
// but not the meeting of a warp, so it is shown kernels in which every lane arrives (tests/kernels_hopper/sanitized.py).
#ifndef ARRIVING
#define ARRIVING 1
#endif

INLINE void warp_arrive(uint32 barrier, int thread) {
    __syncwarp();
    if ((thread & 31) < ARRIVING) barrier_arrive(barrier);
}

// at the same barrier of block `rank` of the cluster
INLINE void barrier_arrive_at(uint32 barrier, uint32 rank) {
    asm volatile(
        "{\n\t.reg .b32 there;\n\t"
        "mapa.shared::cluster.u32 there, %0, %1;\n\t"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n\t}" ::"r"(barrier), "r"(rank) : "memory");
}

INLINE void barrier_wait(uint32 barrier, uint32 phase) {
    asm volatile(
        "{\n\t.reg .pred done;\n\t"
        "again:\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
        "@done bra finished;\n\t"
        "bra again;\n\t"
        "finished:\n\t}" ::"r"(barrier), "r"(phase) : "memory");
}

// Whether barrier_wait would not wait; to ask again and again where that shall end at once.
INLINE bool barrier_passed(uint32 barrier, uint32 phase) {
    uint32 passed;
    asm volatile(
        "{\n\t.reg .pred done;\n\t"
        "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n\t"
        "selp.b32 %0, 1, 0, done;\n\t}" : "=r"(passed) : "r"(barrier), "r"(phase) : "memory");
    return passed;
}

INLINE void prefetch_map(const TensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// a box of a matrix into shared memory; the barrier counts its bytes
INLINE void load_box(uint32 to, const TensorMap *map, int column, int row, uint32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
}

// the same into every block of the cluster that `mask` names, at the same place, each block's barrier counting
INLINE void load_box_shared(uint32 to, const TensorMap *map, int column, int row, uint32 barrier, uint16 mask) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(mask) : "memory");
}

// `bytes` bytes in a row, a multiple of 16
INLINE void load_bytes(uint32 to, const void *from, uint32 bytes, uint32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

INLINE void store_box(const TensorMap *map, int column, int row, uint32 from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(column),
                 "r"(row), "r"(from) : "memory");
}

INLINE void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// stores have read what they store
INLINE void store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
INLINE void store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// ordinary stores to shared memory before this are seen by the copy engine and the matrix units after it
INLINE void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int N> INLINE void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> INLINE void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

INLINE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
INLINE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// at most N groups are still under way
template <int N> INLINE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// rows of 128 bytes with the 128-byte swizzle, eight of them 1024 bytes apart from the next eight; sixteen columns on
// is 2 more
INLINE uint64 matrix_descriptor(uint32 address) {
    return static_cast<uint64>((address & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

// four 8×8 matrices of 16-bit numbers, transposed: lane 8·i + r gives the address of row r of matrix i
INLINE void store_matrices_transposed(uint32 address, uint32 a, uint32 b, uint32 c, uint32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
                 "r"(c), "r"(d) : "memory");
}

INLINE void store_matrices(uint32 address, uint32 a, uint32 b, uint32 c, uint32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c),
                 "r"(d) : "memory");
}

INLINE uint4 load_shared_16(uint32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
    return v;
}

INLINE void store_shared_16(uint32 address, float a, float b, float c, float d) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

INLINE uint2 load_shared_8(uint32 address) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
    return v;
}
