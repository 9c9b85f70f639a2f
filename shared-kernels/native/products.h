// Products of small matrices, register block by register block.
//
// An entry of the result is the sum over k in rising order, whatever block it falls into: its bits do
// not depend on how many rows or columns are computed with it.
#pragma once
#include "simd.h"

namespace {
namespace products {

constexpr int L = Lanes<float>::count;
constexpr int BLOCK_ROWS = 6, BLOCK_VECTORS = VECTOR_BYTES == 64 ? 4 : 2;

// Where the largest entries of the columns go, `step` numbers per row, and of which rows.
struct Maxima {
    float* columns;
    int64_t step;
    const bool* rows;
};
template <int M, int NV, bool ADD, bool MAX>
INLINE void register_block(int64_t K, const float* A, int64_t a_row, int64_t a_k, const float* B, int64_t b_row, float* C, int64_t c_row, Maxima maxima) {
    vfloat c[M][NV];
#pragma GCC unroll 12
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) c[i][j] = ADD ? load(C + i * c_row + j * L) : vfloat{};
    for (int64_t k = 0; k < K; k++) {
        vfloat b[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) b[j] = load(B + k * b_row + j * L);
#pragma GCC unroll 12
        for (int i = 0; i < M; i++) {
            const float a = A[i * a_row + k * a_k];
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
            float* top = maxima.columns + i * maxima.step;
            if (maxima.rows[i])
#pragma GCC unroll 4
                for (int j = 0; j < NV; j++) store(top + j * L, larger(load(top + j * L), c[i][j]));
        }
}
template <int M, bool ADD, bool MAX = false>
void rows_of(int64_t K, const float* A, int64_t a_row, int64_t a_k, const float* B, int64_t b_row, float* C, int64_t c_row, int64_t columns, Maxima maxima = {}) {
    int64_t n = 0;
    for (; n + BLOCK_VECTORS * L <= columns; n += BLOCK_VECTORS * L)
        register_block<M, BLOCK_VECTORS, ADD, MAX>(K, A, a_row, a_k, B + n, b_row, C + n, c_row, {maxima.columns + n, maxima.step, maxima.rows});
    for (; n < columns; n += L) register_block<M, 1, ADD, MAX>(K, A, a_row, a_k, B + n, b_row, C + n, c_row, {maxima.columns + n, maxima.step, maxima.rows});
}

}  // namespace products

// C (M rows) = or += A (M x K, by strides) B (K rows); `columns` of B and C, a multiple of the lanes.
template <bool ADD>
void multiply(int64_t M, int64_t K, const float* A, int64_t a_row, int64_t a_k, const float* B, int64_t b_row, float* C, int64_t c_row, int64_t columns) {
    using namespace products;
    int64_t i = 0;
    if (columns == 2 * L && BLOCK_VECTORS == 4)  // twice the rows where half of the columns are there
        for (; i + 2 * BLOCK_ROWS <= M; i += 2 * BLOCK_ROWS)
            register_block<2 * BLOCK_ROWS, 2, ADD, false>(K, A + i * a_row, a_row, a_k, B, b_row, C + i * c_row, c_row, {});
    for (; i + BLOCK_ROWS <= M; i += BLOCK_ROWS) rows_of<BLOCK_ROWS, ADD>(K, A + i * a_row, a_row, a_k, B, b_row, C + i * c_row, c_row, columns);
    for (; i + 2 <= M; i += 2) rows_of<2, ADD>(K, A + i * a_row, a_row, a_k, B, b_row, C + i * c_row, c_row, columns);
    if (i < M) rows_of<1, ADD>(K, A + i * a_row, a_row, a_k, B, b_row, C + i * c_row, c_row, columns);
}

// n rows of `wide` numbers (a multiple of the lanes), zeros behind the last one -> [wide][to], by columns.
INLINE void turn(const float* x, int64_t step, int64_t n, int64_t wide, int64_t to, float* out) {
    constexpr int L = Lanes<float>::count;
    for (int64_t j = 0; j < to; j += L)
        for (int64_t d = 0; d < wide; d += L) {
            vfloat a[L];
            for (int l = 0; l < L; l++) a[l] = j + l < n ? load(x + (j + l) * step + d) : vfloat{};
            transpose<float>(a);
            for (int l = 0; l < L; l++) store(out + (d + l) * to + j, a[l]);
        }
}

}  // namespace
