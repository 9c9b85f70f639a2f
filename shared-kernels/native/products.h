// Products of small matrices, register block by register block.
//
// An entry of the result is the sum over k in rising order, whatever block it falls into: its bits do
// not depend on how many rows or columns are computed with it.
#pragma once
#include "simd.h"

// The numbers that are multiplied. A source that is compiled for both types says which before this.
#ifndef NUMBER
#define NUMBER float
#endif

namespace {

typedef NUMBER real;
typedef Vec<real> vreal;

namespace products {

constexpr int L = Lanes<real>::count;
constexpr int BLOCK_ROWS = 6, BLOCK_VECTORS = VECTOR_BYTES == 64 ? 4 : 2;

// MAX: the largest entries of the columns go to `top`, row by row, of the rows that `rows` names. These
// are plain arguments, as a structure would be read from the stack in one piece right after it was
// written there in two: the processor then waits until all stores before it have reached the cache.
template <int M, int NV, bool ADD, bool MAX>
INLINE void register_block(int64_t K, const real* A, int64_t a_row, int64_t a_k, const real* B, int64_t b_row, real* C, int64_t c_row, real* top, int64_t top_row, const bool* rows) {
    vreal c[M][NV];
#pragma GCC unroll 12
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) c[i][j] = ADD ? load(C + i * c_row + j * L) : vreal{};
    for (int64_t k = 0; k < K; k++) {
        vreal b[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) b[j] = load(B + k * b_row + j * L);
#pragma GCC unroll 12
        for (int i = 0; i < M; i++) {
            const real a = A[i * a_row + k * a_k];
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) c[i][j] += b[j] * a;
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) store(C + i * c_row + j * L, c[i][j]);
    if constexpr (MAX)
#pragma GCC unroll 12
        for (int i = 0; i < M; i++) {
            real* to = top + i * top_row;
            if (rows[i])
#pragma GCC unroll 4
                for (int j = 0; j < NV; j++) store(to + j * L, larger(load(to + j * L), c[i][j]));
        }
}
template <int M, bool ADD, bool MAX = false>
void rows_of(int64_t K, const real* A, int64_t a_row, int64_t a_k, const real* B, int64_t b_row, real* C, int64_t c_row, int64_t columns, real* top = nullptr, int64_t top_row = 0, const bool* rows = nullptr) {
    int64_t n = 0;
    for (; n + BLOCK_VECTORS * L <= columns; n += BLOCK_VECTORS * L)
        register_block<M, BLOCK_VECTORS, ADD, MAX>(K, A, a_row, a_k, B + n, b_row, C + n, c_row, top + n, top_row, rows);
    if constexpr (BLOCK_VECTORS == 4)
        for (; n + 2 * L <= columns; n += 2 * L) register_block<M, 2, ADD, MAX>(K, A, a_row, a_k, B + n, b_row, C + n, c_row, top + n, top_row, rows);
    for (; n < columns; n += L) register_block<M, 1, ADD, MAX>(K, A, a_row, a_k, B + n, b_row, C + n, c_row, top + n, top_row, rows);
}

}  // namespace products

// C (M rows) = or += A (M x K, by strides) B (K rows); `columns` of B and C, a multiple of the lanes.
template <bool ADD>
void multiply(int64_t M, int64_t K, const real* A, int64_t a_row, int64_t a_k, const real* B, int64_t b_row, real* C, int64_t c_row, int64_t columns) {
    using namespace products;
    int64_t i = 0;
    if (columns == 2 * L && BLOCK_VECTORS == 4)  // twice the rows where half of the columns are there
        for (; i + 2 * BLOCK_ROWS <= M; i += 2 * BLOCK_ROWS)
            register_block<2 * BLOCK_ROWS, 2, ADD, false>(K, A + i * a_row, a_row, a_k, B, b_row, C + i * c_row, c_row, nullptr, 0, nullptr);
    for (; i + BLOCK_ROWS <= M; i += BLOCK_ROWS) rows_of<BLOCK_ROWS, ADD>(K, A + i * a_row, a_row, a_k, B, b_row, C + i * c_row, c_row, columns);
    for (; i + 4 <= M; i += 4) rows_of<4, ADD>(K, A + i * a_row, a_row, a_k, B, b_row, C + i * c_row, c_row, columns);
    for (; i + 2 <= M; i += 2) rows_of<2, ADD>(K, A + i * a_row, a_row, a_k, B, b_row, C + i * c_row, c_row, columns);
    if (i < M) rows_of<1, ADD>(K, A + i * a_row, a_row, a_k, B, b_row, C + i * c_row, c_row, columns);
}

// n rows of `wide` numbers (a multiple of the lanes), zeros behind the last one -> [wide][to], by columns.
INLINE void turn(const real* x, int64_t step, int64_t n, int64_t wide, int64_t to, real* out) {
    constexpr int L = Lanes<real>::count;
    for (int64_t j = 0; j < to; j += L)
        for (int64_t d = 0; d < wide; d += L) {
            vreal a[L];
            for (int l = 0; l < L; l++) a[l] = j + l < n ? load(x + (j + l) * step + d) : vreal{};
            transpose<real>(a);
            for (int l = 0; l < L; l++) store(out + (d + l) * to + j, a[l]);
        }
}

}  // namespace
