// A small persistent pool. The caller works too, and never waits for a worker that has not started: with all cores
// busy elsewhere a job costs what it costs on one thread. Workers spin briefly after a job, so that the next small op
// of a decode step finds them awake, and then sleep.
#pragma once

#include <stdint.h>

#include <type_traits>

namespace anyfp4 {

using RangeFunction = void (*)(void* context, int64_t begin, int64_t end);

// Threads used by later calls, the caller included. n >= 1.
void set_threads(int n);
int get_threads();

// Runs f over 0 <= i < count in pieces of at most `grain`, in any order on any thread.
void parallel_run(int64_t count, int64_t grain, RangeFunction f, void* context);

template <typename F>
void parallel_for(int64_t count, int64_t grain, F&& f) {
    using Body = std::remove_reference_t<F>;
    parallel_run(
        count, grain, [](void* c, int64_t begin, int64_t end) { (*static_cast<Body*>(c))(begin, end); }, &f);
}

}  // namespace anyfp4
