// Blocks of 24 queries against tiles of 64 keys: products, and rows as these take them.
//
// An entry of a product is the sum over k in rising order, whatever block it falls into: its bits do
// not depend on how many rows or columns are computed with it.
#pragma once
#include "simd.h"

namespace {

constexpr int L = Lanes<float>::count;
constexpr int ROWS = 24, TILE = 64, TV = TILE / L;  // TV: vectors of a tile's row
constexpr int BLOCK_ROWS = 6, BLOCK_VECTORS = VECTOR_BYTES == 64 ? 4 : 2;
const float HIDDEN = -1e30f;
typedef Vec<float> vf;

// Where the maxima of the lanes go, TILE per row, and of which rows.
struct Maxima {
    float* lanes;
    const bool* rows;
};
// C (M rows) = or += A (M x K, by strides) B (K rows of `columns`, a multiple of L).
template <int M, int NV, bool ADD, bool MAX>
INLINE void register_block(int64_t K, const float* A, int64_t a_row, int64_t a_k, const float* B, int64_t b_row, float* C, int64_t c_row, Maxima maxima) {
    vf c[M][NV];
#pragma GCC unroll 6
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) c[i][j] = ADD ? load(C + i * c_row + j * L) : vf{};
    for (int64_t k = 0; k < K; k++) {
        vf b[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) b[j] = load(B + k * b_row + j * L);
#pragma GCC unroll 6
        for (int i = 0; i < M; i++) {
            const float a = A[i * a_row + k * a_k];
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) c[i][j] += b[j] * a;
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) store(C + i * c_row + j * L, c[i][j]);
    if constexpr (MAX)
#pragma GCC unroll 6
        for (int i = 0; i < M; i++) {
            float* top = maxima.lanes + i * TILE;
            if (maxima.rows[i])
#pragma GCC unroll 4
                for (int j = 0; j < NV; j++) store(top + j * L, larger(load(top + j * L), c[i][j]));
        }
}
template <int M, bool ADD, bool MAX = false>
void columns_of(int64_t K, const float* A, int64_t a_row, int64_t a_k, const float* B, int64_t b_row, float* C, int64_t c_row, int64_t columns, Maxima maxima = {}) {
    int64_t n = 0;
    for (; n + BLOCK_VECTORS * L <= columns; n += BLOCK_VECTORS * L)
        register_block<M, BLOCK_VECTORS, ADD, MAX>(K, A, a_row, a_k, B + n, b_row, C + n, c_row, {maxima.lanes + n, maxima.rows});
    for (; n < columns; n += L) register_block<M, 1, ADD, MAX>(K, A, a_row, a_k, B + n, b_row, C + n, c_row, {maxima.lanes + n, maxima.rows});
}
template <bool ADD>
void product(int64_t M, int64_t K, const float* A, int64_t a_row, int64_t a_k, const float* B, int64_t b_row, float* C, int64_t c_row, int64_t columns) {
    int64_t i = 0;
    for (; i + BLOCK_ROWS <= M; i += BLOCK_ROWS) columns_of<BLOCK_ROWS, ADD>(K, A + i * a_row, a_row, a_k, B, b_row, C + i * c_row, c_row, columns);
    for (; i < M; i++) columns_of<1, ADD>(K, A + i * a_row, a_row, a_k, B, b_row, C + i * c_row, c_row, columns);
}

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows of D numbers, filled up with zeros to `wide`, `by` times.
void pad_rows(const float* x, int64_t n, int64_t D, int64_t wide, float by, float* out) {
    for (int64_t r = 0; r < n; r++) {
        int64_t d = 0;
        for (; d + L <= D; d += L) store(out + r * wide + d, load(x + r * D + d) * by);
        for (; d < D; d++) out[r * wide + d] = x[r * D + d] * by;
        for (d = D; d < wide; d++) out[r * wide + d] = 0;
    }
}
// Padded rows -> tiles of 64 rows, zeros behind the last, transposed: [tile][wide][64].
void transpose_tiles(const float* x, int64_t n, int64_t wide, float* out) {
    for (int64_t j = 0; j < up(n, TILE); j += L)
        for (int64_t d = 0; d < wide; d += L) {
            vf a[L];
            for (int l = 0; l < L; l++) a[l] = j + l < n ? load(x + (j + l) * wide + d) : vf{};
            transpose<float>(a);
            float* to = out + j / TILE * wide * TILE + d * TILE + j % TILE;
            for (int l = 0; l < L; l++) store(to + l * TILE, a[l]);
        }
}

float sum_of_squares(const float* x, int64_t n) {
    vf a{}, b{};
    for (int64_t i = 0; i < n; i += 2 * L) {
        vf y = load(x + i), z = i + L < n ? load(x + i + L) : vf{};
        a += y * y;
        b += z * z;
    }
    return sum<float>(a + b);
}

}  // namespace
