// Aligned memory. Large buffers ask for huge pages: a weight is read from end to end for every token.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace anyfp4 {

class Buffer {
public:
    Buffer() = default;
    explicit Buffer(size_t bytes) { reserve(bytes); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { free(data_); }

    // At least `bytes` of memory; what was there is lost if it grows.
    void reserve(size_t bytes) {
        if (bytes <= size_) return;
        free(data_);
        data_ = nullptr;
        size_ = 0;
        constexpr size_t HUGE_PAGE = size_t(2) << 20;
        const size_t alignment = bytes >= 2 * HUGE_PAGE ? HUGE_PAGE : 64;
        void* p = nullptr;
        if (posix_memalign(&p, alignment, (bytes + 63) & ~size_t(63))) throw std::bad_alloc();
#if defined(__linux__)
        if (alignment == HUGE_PAGE) madvise(p, bytes, MADV_HUGEPAGE);  // a wish; refusal costs nothing but speed
#endif
        data_ = static_cast<uint8_t*>(p);
        size_ = bytes;
    }

    uint8_t* data() const { return data_; }
    size_t size() const { return size_; }
    template <typename T>
    T* as(size_t byte_offset = 0) const {
        return reinterpret_cast<T*>(data_ + byte_offset);
    }

private:
    uint8_t* data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace anyfp4
