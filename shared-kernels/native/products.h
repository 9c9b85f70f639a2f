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
// numbers that each step over k fetches: 24 rows against 64 columns fetch as many as B has
constexpr int FETCHED = BLOCK_VECTORS * L / 4;

struct AsIs {
    vreal operator()(int, int64_t, vreal x) const { return x; }
};
// finish(i, n, x) is what is stored in row i from column n on. FETCH: what stands at `next` is on its way
// when the block is done.
template <int M, int NV, bool ADD, bool FETCH = false, class Finish = AsIs>
INLINE void register_block(int64_t K, const real* A, int64_t a_row, int64_t a_k, const real* B, int64_t b_row, real* C, int64_t c_row, int64_t n, const real* next, const Finish& finish) {
    vreal c[M][NV];
    B += n;
    C += n;
#pragma GCC unroll 12
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) c[i][j] = ADD ? load(C + i * c_row + j * L) : vreal{};
    for (int64_t k = 0; k < K; k++) {
        vreal b[NV];
        if (FETCH) __builtin_prefetch(next + k * FETCHED);
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
        for (int j = 0; j < NV; j++) store(C + i * c_row + j * L, finish(i, n + j * L, c[i][j]));
}
// Returns where the rows that follow go on to fetch.
template <int M, bool ADD, bool FETCH = false, class Finish = AsIs>
const real* rows_of(int64_t K, const real* A, int64_t a_row, int64_t a_k, const real* B, int64_t b_row, real* C, int64_t c_row, int64_t columns, const real* next = nullptr, const Finish& finish = {}) {
    int64_t n = 0;
    auto blocks = [&](auto vectors) {
        constexpr int NV = decltype(vectors)::value;
        for (; n + NV * L <= columns; n += NV * L, next += FETCH ? K * FETCHED : 0)
            register_block<M, NV, ADD, FETCH>(K, A, a_row, a_k, B, b_row, C, c_row, n, next, finish);
    };
    blocks(std::integral_constant<int, BLOCK_VECTORS>());
    if constexpr (BLOCK_VECTORS == 4) blocks(std::integral_constant<int, 2>());
    blocks(std::integral_constant<int, 1>());
    return next;
}

}  // namespace products

// C (M rows) = or += A (M x K, by strides) B (K rows); `columns` of B and C, a multiple of the lanes. FETCH:
// what will be needed next, about as many numbers as B has, is on its way when it is done.
template <bool ADD, bool FETCH = false>
void multiply(int64_t M, int64_t K, const real* A, int64_t a_row, int64_t a_k, const real* B, int64_t b_row, real* C, int64_t c_row, int64_t columns, const real* next = nullptr) {
    using namespace products;
    int64_t i = 0;
    if (columns == 2 * L && BLOCK_VECTORS == 4)  // twice the rows where half of the columns are there
        for (; i + 2 * BLOCK_ROWS <= M; i += 2 * BLOCK_ROWS)
            register_block<2 * BLOCK_ROWS, 2, ADD>(K, A + i * a_row, a_row, a_k, B, b_row, C + i * c_row, c_row, 0, nullptr, AsIs());
    for (; i + BLOCK_ROWS <= M; i += BLOCK_ROWS) next = rows_of<BLOCK_ROWS, ADD, FETCH>(K, A + i * a_row, a_row, a_k, B, b_row, C + i * c_row, c_row, columns, next);
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
