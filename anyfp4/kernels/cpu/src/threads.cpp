#include "threads.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace anyfp4 {
namespace {

// long enough for the Python between two ops of a decode step, short enough not to be noticed as load
constexpr auto SPIN = std::chrono::microseconds(60);

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct Job {
    RangeFunction f;
    void* context;
    int64_t count, grain;
    std::atomic<int64_t> next{0};

    void work() {
        for (;;) {
            int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
            if (begin >= count) return;
            f(context, begin, begin + grain < count ? begin + grain : count);
        }
    }
};

class Pool {
public:
    explicit Pool(int workers) {
        for (int i = 0; i < workers; ++i) threads_.emplace_back([this] { loop(); });
    }

    ~Pool() {
        stop_.store(true);
        generation_.fetch_add(1);
        { std::lock_guard<std::mutex> lock(mutex_); }
        wake_.notify_all();
        for (auto& t : threads_) t.join();
    }

    void run(Job& job) {
        job_.store(&job);
        generation_.fetch_add(1);
        if (sleepers_.load() > 0) {
            { std::lock_guard<std::mutex> lock(mutex_); }
            wake_.notify_all();
        }
        job.work();
        job_.store(nullptr);  // who has not entered by now finds nothing
        while (active_.load() > 0) relax();
    }

    size_t workers() const { return threads_.size(); }

private:
    void loop() {
        uint64_t seen = 0;
        for (;;) {
            wait(seen);
            if (stop_.load()) return;
            seen = generation_.load();
            active_.fetch_add(1);  // before the look: the caller clears job_, then waits for active_ == 0
            if (Job* job = job_.load()) job->work();
            active_.fetch_sub(1);
        }
    }

    void wait(uint64_t seen) {
        auto until = std::chrono::steady_clock::now() + SPIN;
        do {
            for (int i = 0; i < 64; ++i) {
                if (generation_.load(std::memory_order_relaxed) != seen) return;
                relax();
            }
        } while (std::chrono::steady_clock::now() < until);
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return generation_.load() != seen; });
        sleepers_.fetch_sub(1);
    }

    alignas(64) std::atomic<uint64_t> generation_{0};
    alignas(64) std::atomic<Job*> job_{nullptr};
    alignas(64) std::atomic<int> active_{0};
    std::atomic<int> sleepers_{0};
    std::atomic<bool> stop_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> threads_;
};

struct State {
    std::mutex mutex;  // held by whoever uses the pool
    Pool* pool = nullptr;
    int threads = 1;
};

// never destroyed: workers may outlive static destructors, and a forked child has no workers to join
State* state = new State;

#if defined(__unix__) || defined(__APPLE__)
void before_fork() { state->mutex.lock(); }
void after_fork_parent() { state->mutex.unlock(); }
void after_fork_child() {
    int threads = state->threads;
    state = new State;  // the parent's threads do not exist here; the next job starts new ones
    state->threads = threads;
}
const int registered = pthread_atfork(before_fork, after_fork_parent, after_fork_child);
#endif

}  // namespace

void set_threads(int n) {
    std::lock_guard<std::mutex> lock(state->mutex);
    if (n != state->threads) {
        delete state->pool;
        state->pool = nullptr;
        state->threads = n;
    }
}

int get_threads() { return state->threads; }

void parallel_run(int64_t count, int64_t grain, RangeFunction f, void* context) {
    if (count <= 0) return;
    if (grain < 1) grain = 1;
    State* s = state;
    if (s->threads > 1 && count > grain) {
        // a second caller at the same time works alone rather than waits
        std::unique_lock<std::mutex> lock(s->mutex, std::try_to_lock);
        if (lock.owns_lock()) {
            if (!s->pool) s->pool = new Pool(s->threads - 1);
            Job job{f, context, count, grain, {0}};
            s->pool->run(job);
            return;
        }
    }
    f(context, 0, count);
}

}  // namespace anyfp4
