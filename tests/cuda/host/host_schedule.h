// How the threads of the emulated device run: under ThreadSanitizer a std::thread for each, otherwise fibers of one
// thread, of which another one runs where one waits. Fibers need no system call for a barrier, so a kernel runs many
// times faster; the order in which they run is always the same.
#pragma once

#include <atomic>
#include <barrier>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreSyncBegin(const char*, int);
void AnnotateIgnoreSyncEnd(const char*, int);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
extern const char __executable_start;  // by the linker
}
#else
#include <setjmp.h>
#include <ucontext.h>
#endif

namespace camkd::cuda::host {

struct Thread;
inline thread_local Thread* self = nullptr;  // the device's thread that runs

#ifdef __SANITIZE_THREAD__

// Hides the synchronisation inside a scope from ThreadSanitizer. The waiters of a std::barrier share atomics with those
// of other barriers, which orders more memory accesses than a barrier of the device and would hide a missing one.
struct Unseen {
    Unseen() {
        AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
        AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
        AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    }
    ~Unseen() {
        AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
        AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
        AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
    }
};

// A std::barrier that orders only the accesses of its own threads.
class Barrier {
  public:
    explicit Barrier(int threads) : barrier_(threads, Advance{this}) {}
    void arrive_and_wait() {
        // Two addresses are enough: before anybody arrives two phases later, all threads have left this one.
        void* const edge = edges_ + phase_.load(std::memory_order_relaxed) % 2;
        __tsan_release(edge);
        {
            const Unseen unseen;
            barrier_.arrive_and_wait();
        }
        __tsan_acquire(edge);
    }

  private:
    struct Advance {
        Barrier* barrier;
        void operator()() noexcept { barrier->phase_.fetch_add(1, std::memory_order_relaxed); }
    };
    std::barrier<Advance> barrier_;
    std::atomic<int> phase_{0};
    char edges_[2];
};

// Lets others run, in a loop that waits for them.
inline void yield() {
    std::this_thread::yield();
}

// Threads that run at once.
class Crew {
  public:
    void add(std::function<void()> work, bool) { running_.emplace_back(std::move(work)); }
    void finish() {
        for (auto& one : running_) one.join();
        running_.clear();
    }

  private:
    std::vector<std::thread> running_;
};

#else

// Fibers, of which one runs at a time.
class Crew {
  public:
    // One that `lags` goes on in one round of many.
    void add(std::function<void()> work, bool lags) {
        fibers_.push_back(std::make_unique<Fiber>(std::move(work), lags));
    }
    // Runs all of them to their end.
    void finish() {
        constexpr int kLag = 100;  // rounds; a row takes about 20
        int round = 0;
        for (size_t left = fibers_.size(); left > 0; ++round)
            for (auto& fiber : fibers_) {
                if (fiber->finished || (fiber->lags && round % kLag != 0)) continue;
                current_ = fiber.get();
                self = fiber->self;
                fiber->resume();
                left -= fiber->finished;
            }
        self = nullptr;
        fibers_.clear();
    }
    // From a fiber: lets the others run.
    static void pass() {
        Fiber* const fiber = current_;
        fiber->self = self;
        if (_setjmp(fiber->inside) == 0) _longjmp(fiber->outside, 1);
    }

  private:
    struct Fiber {
        static constexpr size_t kStack = 256 * 1024;
        Fiber(std::function<void()> f, bool lags_behind)
            : work(std::move(f)), lags(lags_behind), stack(new char[kStack]) {}

        // The first switch makes the stack; later ones are jumps, which need no system call.
        void resume() {
            if (_setjmp(outside) != 0) return;
            if (started) _longjmp(inside, 1);
            started = true;
            getcontext(&context);
            context.uc_stack.ss_sp = stack.get();
            context.uc_stack.ss_size = kStack;
            makecontext(&context, &Fiber::begin, 0);
            setcontext(&context);
        }
        static void begin() {
            Fiber* const fiber = current_;
            fiber->work();
            fiber->finished = true;
            _longjmp(fiber->outside, 1);
        }

        std::function<void()> work;
        const bool lags;
        std::unique_ptr<char[]> stack;
        ucontext_t context;
        jmp_buf inside, outside;
        Thread* self = nullptr;
        bool started = false, finished = false;
    };

    inline static thread_local Fiber* current_ = nullptr;
    std::vector<std::unique_ptr<Fiber> > fibers_;
};

inline void yield() {
    Crew::pass();
}

class Barrier {
  public:
    explicit Barrier(int threads) : threads_(threads) {}
    void arrive_and_wait() {
        const int phase = phase_;
        if (++arrived_ == threads_) {
            arrived_ = 0;
            ++phase_;
        }
        while (phase_ == phase) yield();
    }

  private:
    const int threads_;
    int arrived_ = 0, phase_ = 0;
};

#endif

}  // namespace camkd::cuda::host
