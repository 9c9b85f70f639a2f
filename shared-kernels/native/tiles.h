// Blocks of 24 queries against tiles of 64 keys, and rows as their products take them.
#pragma once
#include "products.h"

namespace {

using products::BLOCK_ROWS;
using products::L;
constexpr int ROWS = 24, TILE = 64, TV = TILE / L;  // TV: vectors of a tile's row
// a score that is hidden, and the smallest one that is seen; sums of squares below TAME make no score that is not finite
const real HIDDEN = (real)(sizeof(real) == 4 ? -1e30 : -1e300), LEAST = (real)0.9 * HIDDEN;
const real TAME = (real)(sizeof(real) == 4 ? 1e29 : 1e290);
typedef vreal vf;

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows of D numbers, filled up with zeros to `wide`, `by` times.
void pad_rows(const real* x, int64_t n, int64_t D, int64_t wide, real by, real* out) {
    for (int64_t r = 0; r < n; r++) {
        int64_t d = 0;
        for (; d + L <= D; d += L) store(out + r * wide + d, load(x + r * D + d) * by);
        for (; d < D; d++) out[r * wide + d] = x[r * D + d] * by;
        for (d = D; d < wide; d++) out[r * wide + d] = 0;
    }
}
// Padded rows -> tiles of 64 rows, zeros behind the last, transposed: [tile][wide][64].
void transpose_tiles(const real* x, int64_t n, int64_t wide, real* out) {
    for (int64_t j = 0; j < up(n, TILE); j += L)
        for (int64_t d = 0; d < wide; d += L) {
            vf a[L];
            for (int l = 0; l < L; l++) a[l] = j + l < n ? load(x + (j + l) * wide + d) : vf{};
            transpose<real>(a);
            real* to = out + j / TILE * wide * TILE + d * TILE + j % TILE;
            for (int l = 0; l < L; l++) store(to + l * TILE, a[l]);
        }
}

real sum_of_squares(const real* x, int64_t n) {
    vf a{}, b{};
    for (int64_t i = 0; i < n; i += 2 * L) {
        vf y = load(x + i), z = i + L < n ? load(x + i + L) : vf{};
        a += y * y;
        b += z * z;
    }
    return sum<real>(a + b);
}

}  // namespace
