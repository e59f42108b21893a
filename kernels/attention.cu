// Attention where each query sees the keys [0, prefix) and [begin, end): forward, backward, and a forward that
// splits the keys over blocks. README.md explains it with pictures; gpu.h has the instructions and their layouts.
//
// A block of 4 warps owns a tile of 64 queries (64 keys in the second backward pass) and walks over the tiles of
// the other side that the mask lets it see; each warp owns 16 of the 64 rows. While a tile is computed the next one
// is copied to the other half of shared memory. Nothing is summed by atomics, so every run gives the same bits.

#include "tiles.h"

// Start copying the k and v of a visited tile to its half of the stages.
template <class E, int D>
__device__ void copy_keys(const Call &call, E *stages, const E *k, const E *v, int visit, int key0) {
    E *stage = stages + visit % 2 * (2 * TILE * D);
    copy_tile<E, D>(stage, k, call.k.token, key0, call.keys);
    copy_tile<E, D>(stage + TILE * D, v, call.v.token, key0, call.keys);
}

// ---------------------------------------------------------------- forward

// One tile of queries of one head. SPLIT: only a share of its key tiles, into part_o and part_lse.
template <class E, int D, bool SPLIT>
__global__ void __launch_bounds__(THREADS, D <= 64 ? 3 : 2) forward(Call call) {
    const int query0 = (gridDim.x - 1 - blockIdx.x) * TILE;  // late queries see most: start them first
    const int head = blockIdx.y, batch = blockIdx.z / call.splits, split = blockIdx.z % call.splits;
    const int kv_head = head / (call.heads / call.kv_heads);
    const E *k = head_of<E>(call.k, batch, kv_head), *v = head_of<E>(call.v, batch, kv_head);
    E *q_tile = (E *)shared_memory(), *stages = q_tile + TILE * D;  // two stages, each a tile of k and one of v

    const Visits visits(tile_bounds(call, batch, query0));
    const int first = visits.n * split / call.splits, last = visits.n * (split + 1) / call.splits;
    const int row = query0 + group_row();
    const Ranges ranges[2] = {read_ranges(call, batch, row), read_ranges(call, batch, row + 8)};

    auto copy_visit = [&](int visit) { copy_keys<E, D>(call, stages, k, v, visit, visits.key0(visit)); };
    copy_tile<E, D>(q_tile, head_of<E>(call.q, batch, head), call.q.token, query0, call.queries);
    if (first < last) copy_visit(first);
    copy_wait();
    __syncthreads();
    const Rows<E, D> q(q_tile);

    // Online softmax: sums are relative to the greatest score so far, and shrink when a greater one comes.
    float out[D / 8][4] = {}, most[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
    const float scale = call.scale * LOG2_E;  // exp(x) = exp2(x log2 e), and exp2 is one instruction
    for (int visit = first; visit < last; visit++) {
        if (visit + 1 < last) copy_visit(visit + 1);
        const E *k_tile = stages + visit % 2 * (2 * TILE * D), *v_tile = k_tile + TILE * D;
        const int key0 = visits.key0(visit);
        const bool masked = !__all_sync(ALL, ranges[0].whole_tile(key0) && ranges[1].whole_tile(key0));
        float score[TILE / GROUP][2][4], best[2] = {most[0], most[1]};
#pragma unroll
        for (int j = 0; j < TILE / GROUP; j++) {
            dot<E, D>(score[j], q, k_tile, j * GROUP);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float &s = score[j][i / 4][i % 4];
                const int key = key0 + j * GROUP + i / 4 * 8 + pair_column() + i % 2, half = i % 4 / 2;
                if (masked && !ranges[half](key)) s = -INFINITY;
                best[half] = fmaxf(best[half], s);
            }
        }
        float base[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            best[half] = row_max(best[half]);
            base[half] = best[half] == -INFINITY ? 0 : best[half] * scale;  // nothing seen yet: not inf - inf
            const float shrink = exp2_fast(most[half] * scale - base[half]);
            most[half] = best[half];
            total[half] *= shrink;
#pragma unroll
            for (int n = 0; n < D / 8; n++) out[n][2 * half] *= shrink, out[n][2 * half + 1] *= shrink;
        }
#pragma unroll
        for (int j = 0; j < TILE / GROUP; j++) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float &s = score[j][i / 4][i % 4];
                s = exp2_fast(s * scale - base[i % 4 / 2]);
                total[i % 4 / 2] += s;
            }
            add_product<E, D>(out, score[j], v_tile, j * GROUP);
        }
        copy_wait();
        __syncthreads();  // the next tile is here, and no warp reads this one any more
    }

    float factor[2];
    const long long row0 = ((long long)batch * call.heads + head) * call.queries;
    const long long part = (long long)split * call.batches * call.heads * call.queries + row0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float sum = row_sum(total[half]), lse = most[half] * call.scale + logf(sum);
        const int row = query0 + group_row() + 8 * half;
        factor[half] = sum > 0 ? 1 / sum : 0;
        if (threadIdx.x % 4 || row >= call.queries) continue;
        if constexpr (SPLIT)
            call.part_lse[part + row] = sum > 0 ? lse : -INFINITY;  // a part without keys weighs nothing
        else
            call.lse[row0 + row] = sum > 0 ? lse : INFINITY;  // so that exp(score - lse) is 0 in the backward pass
    }
    if constexpr (SPLIT)
        write_rows<float, D>(call.part_o + part * D, D, out, query0, call.queries, factor);
    else
        write_rows<E, D>(head_of<E>(call.o, batch, head), call.o.token, out, query0, call.queries, factor);
}

// Joins the parts of a row, each weighed by its share of the row's total. A warp a row.
template <class E, int D>
__global__ void __launch_bounds__(THREADS) combine(Call call) {
    const long long rows = (long long)call.batches * call.heads * call.queries;
    const long long row = (long long)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    float most = -INFINITY, total = 0, out[D / 32] = {};
    for (int split = 0; split < call.splits; split++) most = fmaxf(most, call.part_lse[split * rows + row]);
    for (int split = 0; split < call.splits && most > -INFINITY; split++) {
        const float weight = exp2_fast((call.part_lse[split * rows + row] - most) * LOG2_E);
        total += weight;
#pragma unroll
        for (int n = 0; n < D / 32; n++)
            out[n] += weight * call.part_o[(split * rows + row) * D + n * 32 + threadIdx.x % 32];
    }
    const int query = row % call.queries, head = row / call.queries % call.heads;
    E *to = head_of<E>(call.o, row / call.queries / call.heads, head) + query * call.o.token + threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < D / 32; n++) to[n * 32] = {(uint16_t)pack<E>(total > 0 ? out[n] / total : 0, 0)};
    if (threadIdx.x % 32 == 0) call.lse[row] = total > 0 ? most + logf(total) : INFINITY;
}

// ---------------------------------------------------------------- backward
//
// With p = exp(scale * q k - lse) and delta = sum(o * grad_o) of a query, the gradient of a score before its scale is
// grad_s = p * (grad_o v - delta). Both passes compute p and grad_s anew; each sums over the side that it walks.

// Pass 1: grad_q of a tile of queries. It also leaves delta and the bounds of the tile for pass 2.
template <class E, int D>
__global__ void __launch_bounds__(THREADS, D <= 64 ? 3 : 2) backward_q(Call call) {
    const int tile = gridDim.x - 1 - blockIdx.x, query0 = tile * TILE, head = blockIdx.y, batch = blockIdx.z;
    const int kv_head = head / (call.heads / call.kv_heads);
    const E *k = head_of<E>(call.k, batch, kv_head), *v = head_of<E>(call.v, batch, kv_head);
    E *q_tile = (E *)shared_memory(), *grad_o_tile = q_tile + TILE * D, *stages = grad_o_tile + TILE * D;

    const Bounds bounds = tile_bounds(call, batch, query0);
    const Visits visits(bounds);
    if (head == 0 && threadIdx.x == 0) ((Bounds *)call.bounds)[batch * gridDim.x + tile] = bounds;
    const int row = query0 + group_row();
    const Ranges ranges[2] = {read_ranges(call, batch, row), read_ranges(call, batch, row + 8)};

    auto copy_visit = [&](int visit) { copy_keys<E, D>(call, stages, k, v, visit, visits.key0(visit)); };
    copy_tile<E, D>(q_tile, head_of<E>(call.q, batch, head), call.q.token, query0, call.queries);
    copy_tile<E, D>(grad_o_tile, head_of<E>(call.grad_o, batch, head), call.grad_o.token, query0, call.queries);
    if (visits.n) copy_visit(0);

    float delta[2] = {0, 0}, lse[2] = {0, 0};
    const E *o = head_of<E>(call.o, batch, head), *grad_o = head_of<E>(call.grad_o, batch, head);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = query0 + group_row() + 8 * half;
        const long long number = ((long long)batch * call.heads + head) * call.queries + row;
        for (int column = pair_column(); column < D && row < call.queries; column += 8) {
            const uint32_t a = *(const uint32_t *)(o + row * call.o.token + column);
            const uint32_t b = *(const uint32_t *)(grad_o + row * call.grad_o.token + column);
            delta[half] += unpack<E>(a, 0) * unpack<E>(b, 0) + unpack<E>(a, 1) * unpack<E>(b, 1);
        }
        delta[half] = row_sum(delta[half]);
        if (row >= call.queries) continue;
        lse[half] = call.lse[number] * LOG2_E;
        if (threadIdx.x % 4 == 0) call.delta[number] = delta[half];
    }
    copy_wait();
    __syncthreads();
    const Rows<E, D> q_rows(q_tile), grad_o_rows(grad_o_tile);

    float grad_q[D / 8][4] = {};
    const float scale = call.scale * LOG2_E;
    for (int visit = 0; visit < visits.n; visit++) {
        if (visit + 1 < visits.n) copy_visit(visit + 1);
        const E *k_tile = stages + visit % 2 * (2 * TILE * D), *v_tile = k_tile + TILE * D;
        const int key0 = visits.key0(visit);
        const bool masked = !__all_sync(ALL, ranges[0].whole_tile(key0) && ranges[1].whole_tile(key0));
        for (int j = 0; j < TILE / GROUP; j++) {
            float score[2][4], grad_p[2][4];
            dot<E, D>(score, q_rows, k_tile, j * GROUP);
            dot<E, D>(grad_p, grad_o_rows, v_tile, j * GROUP);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float &s = score[i / 4][i % 4];
                const int key = key0 + j * GROUP + i / 4 * 8 + pair_column() + i % 2, half = i % 4 / 2;
                const float p = masked && !ranges[half](key) ? 0 : exp2_fast(s * scale - lse[half]);
                s = p * (grad_p[i / 4][i % 4] - delta[half]);
            }
            add_product<E, D>(grad_q, score, k_tile, j * GROUP);
        }
        copy_wait();
        __syncthreads();
    }
    const float factor[2] = {call.scale, call.scale};
    write_rows<E, D>(head_of<E>(call.grad_q, batch, head), call.grad_q.token, grad_q, query0, call.queries, factor);
}

// The first tile of queries from `tile` on that sees some key of key0's tile; the lanes test 32 at once.
__device__ inline int next_tile(const Bounds *bounds, int tile, int tiles, int key0) {
    for (; tile < tiles; tile += 32) {
        const int mine = tile + threadIdx.x % 32;
        const unsigned seeing = __ballot_sync(ALL, mine < tiles && bounds[mine].reaches(key0));
        if (seeing) return tile + __ffs(seeing) - 1;
    }
    return tiles;
}

// Pass 2: grad_k and grad_v of a tile of keys, over the tiles of queries that see it and the query heads that share
// it. All products are transposed: keys are rows, queries are columns.
template <class E, int D>
__global__ void __launch_bounds__(THREADS, D <= 64 ? 3 : 2) backward_kv(Call call) {
    const int key0 = blockIdx.x * TILE, kv_head = blockIdx.y, batch = blockIdx.z, share = call.heads / call.kv_heads;
    const int tiles = (call.queries + TILE - 1) / TILE;
    const Bounds *bounds = (const Bounds *)call.bounds + batch * tiles;
    E *k_tile = (E *)shared_memory(), *v_tile = k_tile + TILE * D, *stages = v_tile + TILE * D;
    float *row_stages = (float *)(stages + 4 * TILE * D);  // of each query: lse, delta, prefix, begin, end

    auto copy_queries = [&](int stage, int tile, int head) {
        E *q_tile = stages + stage * (2 * TILE * D);
        float *lse = row_stages + stage * 5 * TILE;
        const long long number = ((long long)batch * call.heads + head) * call.queries;
        copy_tile<E, D>(q_tile, head_of<E>(call.q, batch, head), call.q.token, tile * TILE, call.queries);
        copy_tile<E, D>(q_tile + TILE * D, head_of<E>(call.grad_o, batch, head), call.grad_o.token, tile * TILE,
                        call.queries);
        for (int i = threadIdx.x; i < 5 * TILE; i += THREADS) {
            // Rows past the end become zeros like their q and grad_o, and add nothing.
            const int row = tile * TILE + (i < 2 * TILE ? i % TILE : (i - 2 * TILE) / 3);
            const bool inside = row < call.queries;
            const long long query = inside ? row : 0;
            const void *source = call.ranges + ((long long)batch * call.queries + query) * 3 + (i - 2 * TILE) % 3;
            if (i < 2 * TILE) source = (i < TILE ? call.lse : call.delta) + number + query;
            copy_async<4>(lse + i, source, inside);
        }
    };
    copy_tile<E, D>(k_tile, head_of<E>(call.k, batch, kv_head), call.k.token, key0, call.keys);
    copy_tile<E, D>(v_tile, head_of<E>(call.v, batch, kv_head), call.v.token, key0, call.keys);
    int tile = next_tile(bounds, 0, tiles, key0);
    if (tile < tiles) copy_queries(0, tile, kv_head * share);
    copy_wait();
    __syncthreads();
    const Rows<E, D> k_rows(k_tile), v_rows(v_tile);

    float grad_k[D / 8][4] = {}, grad_v[D / 8][4] = {};
    const float scale = call.scale * LOG2_E;
    for (int head = 0, stage = 0; tile < tiles; stage ^= 1) {
        head = (head + 1) % share;  // of the next step
        if (head == 0) tile = next_tile(bounds, tile + 1, tiles, key0);
        if (tile < tiles) copy_queries(stage ^ 1, tile, kv_head * share + head);
        const E *q_tile = stages + stage * (2 * TILE * D), *grad_o_tile = q_tile + TILE * D;
        const float *lse = row_stages + stage * 5 * TILE, *delta = lse + TILE;
        const Ranges *ranges = (const Ranges *)(lse + 2 * TILE);
        const int lane = threadIdx.x % 32;
        const bool masked = !__all_sync(ALL, ranges[lane].whole_tile(key0) && ranges[lane + 32].whole_tile(key0));
        for (int j = 0; j < TILE / GROUP; j++) {
            float score[2][4], grad_p[2][4];
            dot<E, D>(score, k_rows, q_tile, j * GROUP);
            dot<E, D>(grad_p, v_rows, grad_o_tile, j * GROUP);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float &p = score[i / 4][i % 4], &grad_s = grad_p[i / 4][i % 4];
                const int query = j * GROUP + i / 4 * 8 + pair_column() + i % 2;
                const int key = key0 + group_row() + i % 4 / 2 * 8;
                p = masked && !ranges[query](key) ? 0 : exp2_fast(p * scale - lse[query] * LOG2_E);
                grad_s = p * (grad_s - delta[query]);
            }
            add_product<E, D>(grad_v, score, grad_o_tile, j * GROUP);
            add_product<E, D>(grad_k, grad_p, q_tile, j * GROUP);
        }
        copy_wait();
        __syncthreads();
    }
    const float factor[2] = {call.scale, call.scale}, one[2] = {1, 1};
    write_rows<E, D>(head_of<E>(call.grad_k, batch, kv_head), call.grad_k.token, grad_k, key0, call.keys, factor);
    write_rows<E, D>(head_of<E>(call.grad_v, batch, kv_head), call.grad_v.token, grad_v, key0, call.keys, one);
}

// ---------------------------------------------------------------- entry points: 0, or the number of a CUDA error
//
// A library is for one type of numbers and one head size: nvcc -DELEMENT=bf16 -DHEAD_SIZE=64.

extern "C" int attention_forward(const Call *call, void *stream) {
    const dim3 grid((call->queries + TILE - 1) / TILE, call->heads, call->batches * call->splits);
    const int shared = 5 * TILE * HEAD_SIZE * sizeof(ELEMENT);
    if (call->splits == 1) return launch(forward<ELEMENT, HEAD_SIZE, false>, grid, THREADS, shared, stream, *call);
    const int error = launch(forward<ELEMENT, HEAD_SIZE, true>, grid, THREADS, shared, stream, *call);
    const long long rows = (long long)call->batches * call->heads * call->queries, warps = THREADS / 32;
    const dim3 row_grid((rows + warps - 1) / warps);
    return error ? error : launch(combine<ELEMENT, HEAD_SIZE>, row_grid, THREADS, 0, stream, *call);
}

extern "C" int attention_backward(const Call *call, void *stream) {
    const dim3 q_grid((call->queries + TILE - 1) / TILE, call->heads, call->batches);
    const dim3 kv_grid((call->keys + TILE - 1) / TILE, call->kv_heads, call->batches);
    const int shared = 6 * TILE * HEAD_SIZE * sizeof(ELEMENT), rows = 2 * 5 * TILE * sizeof(float);
    const int error = launch(backward_q<ELEMENT, HEAD_SIZE>, q_grid, THREADS, shared, stream, *call);
    return error ? error : launch(backward_kv<ELEMENT, HEAD_SIZE>, kv_grid, THREADS, shared + rows, stream, *call);
}
