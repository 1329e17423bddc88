// A bulk copy, its barrier and a read of what came, as small as can be. After async.cu.

extern "C" __global__ void control(const uint8 *from, uint32 *to) {
    __shared__ __align__(128) uint8 memory[1024];
    __shared__ uint64 barrier;
    const uint32 at = shared_address(memory), full = shared_address(&barrier);
    if (threadIdx.x == 0) {
        barrier_init(full, 1);
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        barrier_expect(full, 1024);
        load_bytes(at, from, 1024, full);
    }
    barrier_wait(full, 0);
    to[threadIdx.x] = load_shared_16(at + 16 * threadIdx.x).x;
}
