// Coarse scores: products of 8-bit whole numbers, with a bound on how far they lie from the scores.
//
// A row x of numbers is unit times whole numbers in -127 .. 127, but for a rest. With q = a + e and
// k = b + f, where a and b are multiples of whole numbers, |q.k - a.b| <= |e| |k| + |a| |f|. One
// instruction adds 64 products of bytes, where it multiplies 16 floats: which keys may carry a weight
// is found in a quarter of the products' time, and the few that may are scored again in floats.
#pragma once
#include "tiles.h"

#if VECTOR_BYTES == 64 && !defined(ONLY_SCORES)
#define HAS_COARSE 1
#else
#define HAS_COARSE 0
#endif

namespace {

// What the bound needs of a row, or the largest of a tile of rows. A unit of 0 means: no coarse scores.
struct Rest {
    float unit, norm, error;
};

#if HAS_COARSE
// Calls f(where, numbers) for each 16 numbers of x in units of `unit`, rounded. Adds up the squares of x
// and of its rounding errors.
template <class F> INLINE void in_units(const float* x, int64_t wide, float unit, vfloat& squares, vfloat& rests, F f) {
    for (int64_t d = 0; d < wide; d += 16) {
        const vfloat y = load(x + d);
        const __m512i whole = _mm512_cvtps_epi32((__m512)(y * (1 / unit)));
        const vfloat rest = y - (vfloat)_mm512_cvtepi32_ps(whole) * unit;
        squares += y * y;
        rests += rest * rest;
        f(d, whole);
    }
}
INLINE float unit_of(const float* x, int64_t n) {
    vfloat most{}, zero{};
    for (int64_t i = 0; i < n; i += 16) {
        most = larger(most, absolute(load(x + i)));
        zero += load(x + i) * 0;
    }
    const float unit = largest<float>(most) / 127;
    return !is_nan(zero) && unit > 1e-30f && unit < 1e15f ? unit : 0;
}
// n rows of a query each -> bytes; the sum of a row's whole numbers in `sums`.
void coarse_queries(const float* x, int n, int64_t wide, int8_t* out, int32_t* sums, Rest* of) {
    for (int r = 0; r < n; r++) {
        const float unit = unit_of(x + r * wide, wide);
        vfloat squares{}, rests{};
        __m512i total = _mm512_setzero_si512();
        if (unit == 0) memset(out + r * wide, 0, wide);
        else in_units(x + r * wide, wide, unit, squares, rests, [&](int64_t d, __m512i whole) {
            total = _mm512_add_epi32(total, whole);
            _mm_storeu_si128((__m128i*)(out + r * wide + d), _mm512_cvtepi32_epi8(whole));
        });
        sums[r] = _mm512_reduce_add_epi32(total);
        of[r] = {unit, sqrtf(sum<float>(squares)), sqrtf(sum<float>(rests))};
    }
}
// A whole tile of keys -> bytes above 0 (128 more than the number): [wide / 4][64][4].
void coarse_tile(const float* x, int64_t wide, uint8_t* out, Rest& of) {
    of = {unit_of(x, TILE * wide), 0, 0};
    if (of.unit == 0) return;
    vfloat norm{}, error{};
    for (int64_t j = 0; j < TILE; j += 16) {
        vfloat squares[16], rests[16];
        for (int l = 0; l < 16; l++) squares[l] = rests[l] = vfloat{};
        for (int64_t d0 = 0; d0 < wide; d0 += 64) {
            const int64_t n = wide - d0 < 64 ? wide - d0 : 64;
            alignas(64) uint8_t rows[16][64];  // sixteen keys; then four bytes at a time change places
            for (int l = 0; l < 16; l++)
                in_units(x + (j + l) * wide + d0, n, of.unit, squares[l], rests[l], [&](int64_t d, __m512i whole) {
                    _mm_store_si128((__m128i*)(rows[l] + d), _mm512_cvtepi32_epi8(_mm512_add_epi32(whole, _mm512_set1_epi32(128))));
                });
            vfloat a[16];
            for (int l = 0; l < 16; l++) a[l] = (vfloat)_mm512_load_si512(rows[l]);
            transpose<float>(a);
            for (int64_t e = 0; e < n / 4; e++) _mm512_storeu_si512(out + ((d0 / 4 + e) * TILE + j) * 4, (__m512i)a[e]);
        }
        norm = larger(norm, across<float, false>(squares));
        error = larger(error, across<float, false>(rests));
    }
    of.norm = sqrtf(largest<float>(norm));
    of.error = sqrtf(largest<float>(error));
}

// Each lane of c gets the products of four bytes of b (above 0) with four of a. Written as an instruction
// of its own: compilers keep the sums of the intrinsic function in memory.
INLINE void add_products(vint32& c, vint32 b, vint32 a) { __asm__("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(b), "v"(a)); }

// Lower bounds of the scores of BLOCK_ROWS rows (`step` bytes each) against a tile: unit times the
// products, less `doubt`, less `steep` times the distance from `place`. The largest of the columns go
// to `top` of the rows that `rows` names.
void coarse_block(int64_t wide, const int8_t* q, const int32_t* sums, const uint8_t* keys, const float* unit, const float* doubt, float steep, const float* place, float* S, int64_t ld, float* top, const bool* rows) {
    vint32 c[BLOCK_ROWS][4];
#pragma GCC unroll 6
    for (int i = 0; i < BLOCK_ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) c[i][j] = vint32{} - 128 * sums[i];
    for (int64_t d = 0; d < wide; d += 4, keys += 4 * TILE) {
        vint32 b[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) b[j] = *(const vint32_any*)(keys + j * 64);
#pragma GCC unroll 6
        for (int i = 0; i < BLOCK_ROWS; i++) {
            int32_t four;
            memcpy(&four, q + i * wide + d, 4);
            const vint32 a = vint32{} + four;
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) add_products(c[i][j], b[j], a);
        }
    }
    vfloat lane;
    for (int l = 0; l < 16; l++) lane[l] = l;
#pragma GCC unroll 6
    for (int i = 0; i < BLOCK_ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            vfloat z = __builtin_convertvector(c[i][j], vfloat) * unit[i] - doubt[i];
            if (steep) z -= absolute(lane + (j * 16 - place[i])) * steep;
            store(S + i * ld + j * 16, z);
            if (rows[i]) store(top + i * TILE + j * 16, larger(load(top + i * TILE + j * 16), z));
        }
}
#endif

}  // namespace
