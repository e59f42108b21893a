// The instructions of the GPU that attention.cu uses, each a function. emulate.h has the same functions for the CPU.
//
// A matrix of 16-bit numbers is spread over the 32 lanes of a warp in "fragments" (PTX manual, section mma.m16n8k16).
// With group = lane / 4 and pair = 2 * (lane % 4), a lane holds
//
//     A (16 x 16)  a[0]: row group,     columns pair, pair + 1          a[2]: the same row, columns + 8
//                  a[1]: row group + 8, the same columns                a[3]: row group + 8, columns + 8
//     B (16 x 8)   b0: rows pair, pair + 1 of column group              b1: rows + 8
//     C (16 x 8)   c[0], c[1]: row group, columns pair, pair + 1        c[2], c[3]: row group + 8, float32

#pragma once

#include <math.h>
#include <stdint.h>

#include <type_traits>

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

// c += a b on the tensor cores.
template <class E>
__device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<E, bf16>)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 blocks from shared memory: lane i names row i % 8 (16 bytes) of block i / 8, and gets of each block
// the elements pair, pair + 1 of row group.
__device__ inline void ldmatrix(uint32_t (&m)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row))
                 : "memory");
}

// The same, each block transposed.
__device__ inline void ldmatrix_transposed(uint32_t (&m)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row))
                 : "memory");
}

// Start copying BYTES (4 or 16, aligned) from global to shared memory, or zeros if not `inside`.
template <int BYTES>
__device__ void copy_async(void *shared, const void *global, bool inside) {
    const uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
    const int size = inside ? BYTES : 0;
    if constexpr (BYTES == 16)  // past the L1 cache: a tile is read once a block
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(size) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(global), "r"(size) : "memory");
}

// Wait for the copies that this thread has started. Those of other threads take a barrier too.
__device__ inline void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two numbers rounded to 16 bits, the first in the lower half.
template <class E>
__device__ uint32_t pack(float first, float second) {
    uint32_t both;
    if constexpr (std::is_same_v<E, bf16>)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}

template <class E>
__device__ float unpack(uint32_t both, int which) {
    const uint16_t bits = which ? both >> 16 : both & 0xffff;
    if constexpr (std::is_same_v<E, bf16>) return __uint_as_float((uint32_t)bits << 16);
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

__device__ inline void *shared_memory() {
    extern __shared__ __align__(16) unsigned char shared[];
    return shared;
}

template <class Kernel, class Call>
int launch(Kernel kernel, dim3 grid, int threads, int shared_bytes, void *stream, const Call &call) {
    // More than 48 KB a block has to be asked for.
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
    kernel<<<grid, threads, shared_bytes, (cudaStream_t)stream>>>(call);
    return cudaGetLastError();
}
