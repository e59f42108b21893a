// gpu.h for the CPU: runs the same kernels, compiled by g++, as unkindly as the CUDA rules allow.
//
// Each thread of a block is a fiber. The 32 lanes of a warp meet in collective instructions (mma, shuffles, ...); in
// between they run one after the other, and of the warps one rushes ahead or lags behind. Shared memory starts as
// NaN. An asynchronous copy happens at once or, by chance, as late as at its wait. So a missing barrier or wait shows
// as a wrong result, and the schedule is a function of a seed. Misaligned or stray accesses of shared memory, warps
// that part ways at a collective and barriers that not all threads reach become the error codes of CUDA.
//
// What it does not see: speed, bank conflicts, registers, reads outside of global memory.

#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)

using std::max;
using std::min;

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};
struct dim3 {
    unsigned x, y, z;
    dim3(long long x = 1, long long y = 1, long long z = 1) : x(x), y(y), z(z) {}
};

// ---------------------------------------------------------------- 16-bit numbers

template <class To, class From>
To bit_cast(From from) {
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

inline float to_float(bf16 x) { return bit_cast<float>((uint32_t)x.bits << 16); }

inline float to_float(fp16 x) {
    const uint32_t rest = x.bits & 0x7fff, sign = (uint32_t)(x.bits & 0x8000) << 16;
    if (rest >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    const float size = bit_cast<float>(rest << 13) * 0x1p112f;  // moves the exponent's bias, subnormals included
    return sign ? -size : size;
}

// Round to nearest, ties to even.
template <class E>
uint16_t round_to(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x), size = bits & 0x7fffffff;
    if constexpr (std::is_same_v<E, bf16>) return size > 0x7f800000 ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const uint16_t sign = bits >> 16 & 0x8000;
    if (size > 0x7f800000) return 0x7fff;
    if (size >= 0x477ff000) return sign | 0x7c00;  // 65520 and more round to infinity
    if (size < 0x38800000)                         // subnormal: let the adder of float32 round
        return sign | (uint16_t)(bit_cast<uint32_t>(fabsf(x) + 0.5f) - 0x3f000000);
    return sign | (uint16_t)((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13);
}

template <class E>
uint32_t pack(float first, float second) {
    return round_to<E>(first) | (uint32_t)round_to<E>(second) << 16;
}

template <class E>
float unpack(uint32_t both, int which) {
    return to_float(E{(uint16_t)(which ? both >> 16 : both & 0xffff)});
}

inline float exp2_fast(float x) { return exp2f(x); }

// ---------------------------------------------------------------- fibers

struct Copy {
    void *to;
    const void *from;
    int bytes;
};

// Lanes deposit a pointer to their arguments and results; the last one to come carries the instruction out for all.
using Collective = void (*)(void **lanes);

struct Fiber {
    ucontext_t start;
    jmp_buf at;
    bool started = false, done = false;
    Collective waits_for = nullptr;  // null: it can run
    void *arguments = nullptr;
    std::vector<Copy> copies;
    std::unique_ptr<char[]> stack;
};

inline void barrier(void **) {}  // as a Collective: waits for all threads of the block

struct Emulator {
    enum { OK = 0, ILLEGAL_ADDRESS = 700, MISALIGNED = 716, LAUNCH_FAILURE = 719 };
    uint64_t state = 1;  // of the random numbers
    int error = OK;
    dim3 grid, block_index;
    unsigned current = 0;
    std::vector<Fiber> fibers;
    std::vector<unsigned char> shared;
    std::function<void()> kernel;
    jmp_buf scheduler;
    unsigned late = 0;  // of 4 copies, how many are late

    unsigned random(unsigned n) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        return (state * 0x2545f4914f6cdd1dull >> 33) % n;
    }

    void run_block() {
        std::fill(shared.begin(), shared.end(), 0xff);  // NaN in all types
        late = random(3) * 2;
        for (Fiber &fiber : fibers) fiber.started = fiber.done = false, fiber.waits_for = nullptr, fiber.copies.clear();
        // The favourite warp runs whenever it can (rushes) or only if no other can (lags); or there is none.
        const unsigned warps = fibers.size() / 32, favourite = random(warps), mood = random(3);
        std::vector<unsigned> ready;
        while (!error) {
            ready.clear();
            unsigned done = 0, waiting = 0;
            for (unsigned warp = 0; warp < warps; warp++) {
                const Fiber &fiber = fibers[warp * 32];
                done += fiber.done;
                waiting += fiber.waits_for == barrier;
                if (!fiber.done && fiber.waits_for != barrier) ready.push_back(warp);
            }
            if (done == warps) return;
            if (ready.empty()) {  // all that are left stand at the barrier
                if (waiting != warps) error = LAUNCH_FAILURE;
                for (Fiber &fiber : fibers) fiber.waits_for = nullptr;
                continue;
            }
            unsigned pick = ready[random(ready.size())];
            for (unsigned warp : ready)
                if (mood == 0 ? warp == favourite : mood == 1 && pick == favourite) pick = warp;
            run_warp(pick);
        }
    }

    // Run the lanes of a warp up to their next collective and carry it out.
    void run_warp(unsigned warp) {
        Fiber *lanes = &fibers[warp * 32];
        void *arguments[32];
        for (unsigned lane = 0; lane < 32; lane++) {
            resume(warp * 32 + lane);
            arguments[lane] = lanes[lane].arguments;
        }
        for (unsigned lane = 1; lane < 32; lane++)
            if (lanes[lane].done != lanes[0].done || lanes[lane].waits_for != lanes[0].waits_for)
                error = LAUNCH_FAILURE;
        if (error || lanes[0].done || lanes[0].waits_for == barrier) return;
        lanes[0].waits_for(arguments);
        for (unsigned lane = 0; lane < 32; lane++) lanes[lane].waits_for = nullptr;
    }

    static void body();

    void resume(unsigned thread) {
        Fiber &fiber = fibers[thread];
        current = thread;
        if (_setjmp(scheduler)) return;
        if (fiber.started) _longjmp(fiber.at, 1);
        fiber.started = true;
        constexpr size_t STACK = 1 << 16;
        if (!fiber.stack) fiber.stack.reset(new char[STACK]);
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = STACK;
        makecontext(&fiber.start, body, 0);
        setcontext(&fiber.start);
    }

    // Called by a fiber: wait for the others.
    void meet(Collective what, void *arguments) {
        Fiber &fiber = fibers[current];
        fiber.waits_for = what;
        fiber.arguments = arguments;
        if (!_setjmp(fiber.at)) _longjmp(scheduler, 1);
    }

    bool check(const void *address, int bytes) {
        const unsigned char *first = (const unsigned char *)address;
        if (first < shared.data() || first + bytes > shared.data() + shared.size()) error = ILLEGAL_ADDRESS;
        if ((uintptr_t)address % bytes) error = MISALIGNED;
        return !error;
    }
};

inline Emulator emulator;

inline void Emulator::body() {
    emulator.kernel();
    emulator.fibers[emulator.current].done = true;
    _longjmp(emulator.scheduler, 1);
}

extern "C" inline __attribute__((used)) void emulate_seed(unsigned seed) { emulator.state = seed * 2654435761ull + 1; }

struct ThreadIndex {
    struct {
        operator unsigned() const { return emulator.current; }
    } x;
};
inline ThreadIndex threadIdx;
#define blockIdx (emulator.block_index)
#define gridDim (emulator.grid)

// ---------------------------------------------------------------- instructions

inline void __syncthreads() { emulator.meet(barrier, nullptr); }
inline void *shared_memory() { return emulator.shared.data(); }

template <int BYTES>
void copy_async(void *shared, const void *global, bool inside) {
    static const uint32_t zeros[4] = {};
    if ((uintptr_t)global % BYTES) emulator.error = Emulator::MISALIGNED;
    if (!emulator.check(shared, BYTES)) return;
    const Copy copy = {shared, inside ? global : zeros, BYTES};
    if (emulator.random(4) < emulator.late)
        emulator.fibers[emulator.current].copies.push_back(copy);
    else
        memcpy(copy.to, copy.from, copy.bytes);
}

inline void copy_wait() {
    std::vector<Copy> &copies = emulator.fibers[emulator.current].copies;
    for (const Copy &copy : copies) memcpy(copy.to, copy.from, copy.bytes);
    copies.clear();
}

// A value of each lane, and what becomes of it.
template <class T>
struct Exchange {
    T value;
    int which;
};

template <class T, void (*OPERATION)(Exchange<T> **)>
T exchange(T value, int which = 0) {
    Exchange<T> mine = {value, which};
    emulator.meet([](void **lanes) { OPERATION((Exchange<T> **)lanes); }, &mine);
    return mine.value;
}

inline void shuffle_xor(Exchange<float> **lanes) {
    float value[32];
    for (int i = 0; i < 32; i++) value[i] = lanes[i]->value;
    for (int i = 0; i < 32; i++) lanes[i]->value = value[i ^ lanes[i]->which];
}
inline void ballot(Exchange<unsigned> **lanes) {
    unsigned bits = 0;
    for (int i = 0; i < 32; i++) bits |= (lanes[i]->value != 0) << i;
    for (int i = 0; i < 32; i++) lanes[i]->value = bits;
}
template <bool GREATEST>
void reduce(Exchange<int> **lanes) {
    int value = lanes[0]->value;
    for (int i = 1; i < 32; i++) value = GREATEST ? max(value, lanes[i]->value) : min(value, lanes[i]->value);
    for (int i = 0; i < 32; i++) lanes[i]->value = value;
}
inline float __shfl_xor_sync(unsigned, float value, int which) { return exchange<float, shuffle_xor>(value, which); }
inline unsigned __ballot_sync(unsigned, bool value) { return exchange<unsigned, ballot>(value); }
inline bool __all_sync(unsigned lanes, bool value) { return __ballot_sync(lanes, value) == ~0u; }
inline int __reduce_min_sync(unsigned, int value) { return exchange<int, reduce<false>>(value); }
inline int __reduce_max_sync(unsigned, int value) { return exchange<int, reduce<true>>(value); }
inline int __ffs(unsigned x) { return __builtin_ffs(x); }

struct Load {
    const void *row;
    uint32_t *m;
};

template <bool TRANSPOSED>
void load_blocks(void **lanes) {
    for (int i = 0; i < 32; i++)
        if (!emulator.check(((Load *)lanes[i])->row, 16)) return;
    for (int lane = 0; lane < 32; lane++)
        for (int block = 0; block < 4; block++) {
            uint32_t both = 0;
            for (int i = 0; i < 2; i++) {
                int row = lane / 4, column = lane % 4 * 2 + i;
                if (TRANSPOSED) std::swap(row, column);
                const uint16_t *from = (const uint16_t *)((Load *)lanes[block * 8 + row])->row;
                both |= (uint32_t)from[column] << 16 * i;
            }
            ((Load *)lanes[lane])->m[block] = both;
        }
}
inline void ldmatrix(uint32_t (&m)[4], const void *row) {
    Load mine = {row, m};
    emulator.meet(load_blocks<false>, &mine);
}
inline void ldmatrix_transposed(uint32_t (&m)[4], const void *row) {
    Load mine = {row, m};
    emulator.meet(load_blocks<true>, &mine);
}

struct Product {
    float *c;
    const uint32_t *a;
    uint32_t b[2];
};

template <class E>
void multiply(void **lanes) {
    float a[16][16], b[16][8], c[16][8];
    auto each = [&](auto &&element) {  // of the result: its row, column, and place in its lane's fragment
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++)
                element(lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2, ((Product *)lanes[lane])->c[i]);
    };
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 2; i++) {
            const Product *mine = (Product *)lanes[lane];
            const int group = lane / 4, pair = lane % 4 * 2 + i;
            for (int n = 0; n < 4; n++) a[group + n % 2 * 8][pair + n / 2 * 8] = unpack<E>(mine->a[n], i);
            for (int n = 0; n < 2; n++) b[pair + n * 8][group] = unpack<E>(mine->b[n], i);
        }
    each([&](int row, int column, float &x) { c[row][column] = x; });
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++)
            for (int column = 0; column < 8; column++) c[row][column] += a[row][k] * b[k][column];
    each([&](int row, int column, float &x) { x = c[row][column]; });
}

template <class E>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Product mine = {c, a, {b0, b1}};
    emulator.meet(multiply<E>, &mine);
}

// ---------------------------------------------------------------- launching

template <class Kernel, class Call>
int launch(Kernel kernel, dim3 grid, int threads, int shared_bytes, void *, const Call &call) {
    emulator.error = Emulator::OK;
    emulator.grid = grid;
    emulator.fibers.resize(threads);
    emulator.shared.resize(shared_bytes);
    emulator.kernel = [&] { kernel(call); };
    std::vector<unsigned> blocks(grid.x * grid.y * grid.z);  // run in any order
    for (unsigned i = 0; i < blocks.size(); i++) blocks[i] = i;
    for (unsigned i = blocks.size(); i > 1; i--) std::swap(blocks[i - 1], blocks[emulator.random(i)]);
    for (unsigned i : blocks) {
        emulator.block_index = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
        emulator.run_block();
    }
    return emulator.error;
}
