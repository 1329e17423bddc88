// Chooses the instruction set at run time.
#include <string.h>

#include <atomic>

#include "kernels.h"

namespace anyfp4 {
namespace {

#if defined(__x86_64__)
#include <cpuid.h>
bool has_avxvnni() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}
#endif

struct Available {
    const Kernels* tables[8] = {};
    const char* names[8] = {};
    int count = 0;

    void add(const Kernels& table) {
        tables[count] = &table;
        names[count++] = table.name;
    }

    Available() {
#if defined(__x86_64__)
        __builtin_cpu_init();
        const bool avx2 = has_avx2() && has_f16c();
        (void)avx2;
#ifdef ANYFP4_HAVE_AVX512
        if (avx2 && has_avx512()) add(kernels_avx512);
#endif
#ifdef ANYFP4_HAVE_AVXVNNI
        if (avx2 && has_avxvnni()) add(kernels_avxvnni);
#endif
#ifdef ANYFP4_HAVE_AVX2
        if (avx2) add(kernels_avx2);
#endif
#endif
        add(kernels_portable);
    }
};

const Available& available() {
    static const Available a;
    return a;
}

std::atomic<const Kernels*> selected{nullptr};

}  // namespace

const Kernels& kernels() {
    const Kernels* k = selected.load(std::memory_order_acquire);
    if (!k) {
        k = available().tables[0];
        selected.store(k, std::memory_order_release);
    }
    return *k;
}

bool select_kernels(const char* name) {
    const Available& a = available();
    if (strcmp(name, "auto") == 0) {
        selected = a.tables[0];
        return true;
    }
    for (int i = 0; i < a.count; ++i)
        if (strcmp(a.names[i], name) == 0) {
            selected = a.tables[i];
            return true;
        }
    return false;
}

const char* const* available_kernels() { return available().names; }

}  // namespace anyfp4
