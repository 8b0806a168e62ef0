// CUDA's words for C++, so that a kernel's source runs on the CPU: one coroutine per CUDA thread, blocks one after another. A barrier
// gives the turn to the next thread. Threads run in order or, with `backward` set, in reverse: where a barrier is missing, the
// two orders give different results. Shared memory is filled with NaN before each block.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <setjmp.h>
#include <ucontext.h>
#include <vector>

using std::max;
using std::min;

struct Index { int x = 1; };
static Index threadIdx, blockIdx, blockDim, gridDim;
static float* shim_shared;

#define __global__
#define __device__ static
#define SHARED(type, name) type* name = (type*)shim_shared

#define FAST_EXP(x) expf(x)
struct float2 { float x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

struct Any {  // an array of whatever type the kernel declares
    void* place;
    template <class T> operator T*() const { return (T*)place; }
};

static float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
static float __int_as_float(int bits) { return __uint_as_float(bits); }

static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }

static unsigned pack(float low, float high) {
    unsigned halves[2];
    float values[2] = {low, high};
    for (int i = 0; i < 2; i++) {
        std::memcpy(&halves[i], &values[i], 4);
        halves[i] = std::isnan(values[i]) ? 0x7fff : (halves[i] + 0x7fff + (halves[i] >> 16 & 1)) >> 16;
    }
    return halves[0] | halves[1] << 16;
}

enum Wait { RUNNING, BLOCK, LANES, DONE };
struct Thread {
    ucontext_t context;  // to begin with
    jmp_buf place;       // to go on: setjmp leaves the signal mask alone, which swapcontext asks the system for each time
    std::unique_ptr<char[]> stack;
    Wait wait;
    bool begun;
    float given[2];
    int turn;
    unsigned a[4], b[2];  // what it holds of a product of tiles
    const unsigned short* row;
};
static const int STACK = 1 << 16;
static std::vector<Thread> threads;
static int current;
static jmp_buf scheduler;
static std::function<void()>* body;

static void wait_for(Wait what) {
    threads[current].wait = what;
    if (!_setjmp(threads[current].place)) _longjmp(scheduler, 1);
}
#define __syncthreads() wait_for(BLOCK)
#define __syncwarp() wait_for(LANES)

static float __shfl_xor_sync(unsigned, float value, int mask) {
    Thread& own = threads[current];
    int partner = current ^ mask, turn = own.turn ^= 1;  // two places in turn: nobody writes again before all have read
    own.given[turn] = value;
    __syncwarp();
    return threads[partner].given[turn];
}

// Products of tiles, as device.cuh describes them: each lane lays out what it holds, and reads what its results need.
static float half_of(const unsigned* parts, int which, int column) { return __uint_as_float(parts[which] >> 16 * (column % 2) << 16); }

static void multiply_tiles(float* c, const unsigned* a, const unsigned* b) {
    Thread& own = threads[current];
    std::memcpy(own.a, a, sizeof own.a);
    std::memcpy(own.b, b, sizeof own.b);
    __syncwarp();
    Thread* warp = &threads[current / 32 * 32];
    int lane = current % 32;
    for (int part = 0; part < 4; part++) {
        int row = lane / 4, column = lane % 4 * 2 + part % 2;
        for (int k = 0; k < 16; k++)
            c[part] += half_of(warp[row * 4 + k % 8 / 2].a, part / 2 + 2 * (k / 8), k) * half_of(warp[column * 4 + k % 8 / 2].b, k / 8, k);
    }
    __syncwarp();
}

static void load_transposed(unsigned* b, const unsigned short* row) {
    threads[current].row = row;
    __syncwarp();
    Thread* warp = &threads[current / 32 * 32];
    int column = current % 32 / 4, first = current % 4 * 2;
    for (int tile = 0; tile < 2; tile++)
        b[tile] = warp[tile * 8 + first].row[column] | warp[tile * 8 + first + 1].row[column] << 16;
    __syncwarp();
}

static void run_thread() {
    (*body)();
    threads[current].wait = DONE;
    _longjmp(scheduler, 1);
}

// Let go those from `first` to `last` if all that are not done wait for the same; a thread that has ended counts as arrived.
static bool release(int first, int last, Wait what) {
    bool some = false;
    for (int t = first; t < last; t++) {
        if (threads[t].wait == DONE) continue;
        if (threads[t].wait != what) return false;
        some = true;
    }
    for (int t = first; some && t < last; t++)
        if (threads[t].wait == what) threads[t].wait = RUNNING;
    return some;
}

static void resume(Thread& thread) {
    if (_setjmp(scheduler)) return;
    if (thread.begun) _longjmp(thread.place, 1);
    thread.begun = true;
    setcontext(&thread.context);
}

static bool run_block(int count, bool backward) {
    for (int t = 0; t < count; t++) {
        Thread& thread = threads[t];
        getcontext(&thread.context);
        if (!thread.stack) thread.stack.reset(new char[STACK]);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = STACK;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, run_thread, 0);
        thread.wait = RUNNING;
        thread.begun = false;
        thread.turn = 0;
    }
    while (true) {
        for (int turn = 0; turn < count; turn++) {
            current = backward ? count - 1 - turn : turn;
            if (threads[current].wait != RUNNING) continue;
            threadIdx.x = current;
            resume(threads[current]);
        }
        bool moved = release(0, count, BLOCK), done = true;
        for (int t = 0; t < count; t += 32) moved |= release(t, min(t + 32, count), LANES);
        for (int t = 0; t < count; t++) done &= threads[t].wait == DONE;
        if (done) return true;
        if (!moved) return false;  // they wait for each other
    }
}

static const int GUARD = 4096;  // floats behind the shared memory that was asked for: they are to stay NaN

static int shim_launch(int blocks, int count, int bytes, int backward, std::function<void()> call) {
    std::vector<float> shared(bytes / 4 + GUARD);
    shim_shared = shared.data();
    if ((int)threads.size() < count) threads.resize(count);
    body = &call;
    blockDim.x = count;
    gridDim.x = blocks;
    for (int b = 0; b < blocks; b++) {
        blockIdx.x = backward ? blocks - 1 - b : b;
        std::fill(shared.begin(), shared.end(), NAN);
        if (!run_block(count, backward)) return 1;
        if (!std::all_of(shared.end() - GUARD, shared.end(), [](float x) { return std::isnan(x); })) return 1;
    }
    return 0;
}
