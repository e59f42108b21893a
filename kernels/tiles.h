// What the kernels of attention.cu are made of: their arguments, the mask, tiles in shared memory, products of tiles.

#pragma once

#ifdef __CUDACC__
#include "gpu.h"
#else
#include "emulate.h"
#endif

constexpr int TILE = 64, THREADS = 128, GROUP = 16;  // GROUP: rows a warp owns, and keys (queries) of one mma step
constexpr int NEVER = 0x7fffffff;
constexpr unsigned ALL = 0xffffffff;  // lanes of a warp
constexpr float LOG2_E = 1.4426950408889634f;

struct Tensor {
    void *data;
    long long batch, head, token;  // strides in elements; the last dimension is contiguous
};

struct Call {
    Tensor q, k, v, o, grad_o, grad_q, grad_k, grad_v;  // (batch, heads, tokens, head size)
    const int *ranges;                                     // (batch, queries, 3): prefix, begin, end
    float *lse, *delta;                                 // (batch, heads, queries)
    float *part_o, *part_lse;                           // (splits, batch, heads, queries[, head size])
    int *bounds;                                        // (batch, tiles of queries, 3): a Bounds each
    int batches, heads, kv_heads, queries, keys, splits;
    float scale;
};

template <class E>
__device__ E *head_of(const Tensor &x, int batch, int head) {
    return (E *)x.data + batch * x.batch + head * x.head;
}

// ---------------------------------------------------------------- the mask

struct Ranges {
    int prefix, begin, end;
    __device__ bool operator()(int key) const { return key < prefix || (key >= begin && key < end); }
    __device__ bool whole_tile(int key0) const {
        return key0 + TILE <= prefix || (begin <= key0 && key0 + TILE <= end);
    }
};

// What a query sees, cut off at the last key. An empty interval never begins.
__device__ inline Ranges read_ranges(const Call &call, int batch, int query) {
    query = min(query, call.queries - 1);  // rows past the end do as the last one: they change no bounds
    const int *x = call.ranges + ((long long)batch * call.queries + query) * 3;
    Ranges ranges = {min(x[0], call.keys), max(x[1], 0), min(x[2], call.keys)};
    if (ranges.begin >= ranges.end) ranges.begin = NEVER, ranges.end = 0;
    return ranges;
}

// What the queries of a tile see, taken together.
struct Bounds {
    int max_prefix, min_begin, max_end;

    __device__ bool reaches(int key0) const { return key0 < max_prefix || (min_begin < key0 + TILE && key0 < max_end); }
};

// Every warp computes the bounds of the whole tile by itself, which takes no shared memory and no barrier.
__device__ inline Bounds tile_bounds(const Call &call, int batch, int query0) {
    const int lane = threadIdx.x % 32;
    const Ranges a = read_ranges(call, batch, query0 + lane), b = read_ranges(call, batch, query0 + lane + 32);
    return {__reduce_max_sync(ALL, max(a.prefix, b.prefix)), __reduce_min_sync(ALL, min(a.begin, b.begin)),
            __reduce_max_sync(ALL, max(a.end, b.end))};
}

// The key tiles that a tile of queries visits, numbered 0 to n - 1: those of the prefixes, then those of the spans.
struct Visits {
    int in_prefix, first_in_span, n;

    // The tiles that begin below max_prefix; then, without those, the tiles from min_begin to max_end.
    __device__ explicit Visits(const Bounds &bounds) {
        in_prefix = (bounds.max_prefix + TILE - 1) / TILE;
        first_in_span = max(in_prefix, bounds.min_begin / TILE);
        n = in_prefix + max(0, (bounds.max_end + TILE - 1) / TILE - first_in_span);
    }
    __device__ int key0(int visit) const {
        return (visit < in_prefix ? visit : visit - in_prefix + first_in_span) * TILE;
    }
};

// ---------------------------------------------------------------- tiles in shared memory

// Where 16-byte chunk `chunk` of a row is. The XOR spreads the 8 rows that ldmatrix reads at once over all banks.
template <int D>
__device__ int place(int row, int chunk) {
    constexpr int CHUNKS = D / 8;
    const int turn = CHUNKS >= 8 ? row % 8 : row / 2 % 4;  // with D = 32 two rows share a line of 128 bytes
    return (row * CHUNKS + (chunk ^ turn)) * 8;
}

// Start copying rows row0 to row0 + 63 of a head; rows past the end become zeros.
template <class E, int D>
__device__ void copy_tile(E *tile, const E *source, long long stride, int row0, int rows) {
#pragma unroll 1  // the addresses of unrolled copies would take registers that the sums need
    for (int i = threadIdx.x; i < TILE * D / 8; i += THREADS) {
        const int row = i / (D / 8), chunk = i % (D / 8);
        const bool inside = row0 + row < rows;
        copy_async<16>(tile + place<D>(row, chunk), source + (inside ? row0 + row : 0) * stride + chunk * 8, inside);
    }
}

// Where this lane points ldmatrix to read the 16 x 16 block at (row, column).
template <class E, int D>
__device__ const E *lane_row(const E *tile, int row, int column) {
    const int lane = threadIdx.x % 32;
    return tile + place<D>(row + lane % 16, column / 8 + lane / 16);
}

// The 16 rows of a tile that a warp owns, as the left side of products.
template <class E, int D>
struct Rows {
    static constexpr bool KEEP = D <= 64;  // in registers, where they fit beside the sums
    const E *tile;
    uint32_t kept[D / 16][4];

    __device__ explicit Rows(const E *tile) : tile(tile) {
#pragma unroll
        for (int i = 0; i < D / 16 && KEEP; i++) load(kept[i], i);
    }
    __device__ void load(uint32_t (&a)[4], int i) const {
        ldmatrix(a, lane_row<E, D>(tile, threadIdx.x / 32 * GROUP, i * 16));
    }
    __device__ void read(uint32_t (&a)[4], int i) const {
        if (!KEEP) load(a, i);
        for (int n = 0; n < 4 && KEEP; n++) a[n] = kept[i][n];
    }
};

// c (16 x 16) = rows (16 x D) times the transpose of 16 rows of a tile.
template <class E, int D>
__device__ void dot(float (&c)[2][4], const Rows<E, D> &rows, const E *tile, int row) {
#pragma unroll
    for (int n = 0; n < 8; n++) c[n / 4][n % 4] = 0;
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        uint32_t a[4], b[4];
        rows.read(a, i);
        ldmatrix(b, lane_row<E, D>(tile, row, i * 16));
        mma<E>(c[0], a, b[0], b[2]);
        mma<E>(c[1], a, b[1], b[3]);
    }
}

// sum (16 x D) += x (16 x 16, rounded to 16 bits) times 16 rows of a tile.
template <class E, int D>
__device__ void add_product(float (&sum)[D / 8][4], const float (&x)[2][4], const E *tile, int row) {
    // The layout of a result is the layout of a left side: registers only change their type.
    const uint32_t a[4] = {pack<E>(x[0][0], x[0][1]), pack<E>(x[0][2], x[0][3]),
                           pack<E>(x[1][0], x[1][1]), pack<E>(x[1][2], x[1][3])};
#pragma unroll
    for (int n = 0; n < D / 16; n++) {
        uint32_t b[4];
        ldmatrix_transposed(b, lane_row<E, D>(tile, row, n * 16));
        mma<E>(sum[2 * n], a, b[0], b[1]);
        mma<E>(sum[2 * n + 1], a, b[2], b[3]);
    }
}

// Element i of a lane's results: its row is group + 8 * (i / 2), its column pair + i % 2 (gpu.h).
__device__ inline int group_row() { return threadIdx.x / 32 * GROUP + threadIdx.x % 32 / 4; }
__device__ inline int pair_column() { return threadIdx.x % 4 * 2; }

// Write a warp's 16 rows of a result, times a factor for each of the lane's two rows.
template <class E, int D>
__device__ void write_rows(E *out, long long stride, const float (&sum)[D / 8][4], int row0, int rows,
                           const float (&factor)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = row0 + group_row() + 8 * half;
        if (row >= rows) continue;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            const float x = sum[n][2 * half] * factor[half], y = sum[n][2 * half + 1] * factor[half];
            E *to = out + row * stride + n * 8 + pair_column();
            if constexpr (sizeof(E) == 4)
                to[0] = x, to[1] = y;
            else
                *(uint32_t *)to = pack<E>(x, y);
        }
    }
}

// Sum (or maximum) over the 4 lanes that hold a row.
__device__ inline float row_sum(float x) {
    x += __shfl_xor_sync(ALL, x, 1);
    return x + __shfl_xor_sync(ALL, x, 2);
}
__device__ inline float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL, x, 2));
}
