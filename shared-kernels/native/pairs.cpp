// out_i = sum_j 2^(e_ij) v_j for exponents e_ij of two points, from their coordinates: the matrix is
// never stored. Exponents are sums over coordinates of (x - y)^2, |x - y| or x y, so that near points
// lose no digits however far they lie from the origin.
//
// A strip of DEPTH rows by TILE columns of the matrix is built in the first-level cache and then used
// for all columns of v, and in a symmetric matrix for its transpose too. Sums of at most MOST_TERMS
// terms are taken in the working type, by lane, and all others in double.
//
// Points are dealt to blocks of tiles; task i of round k takes the pair of blocks (i, i + k). Within a
// round no two tasks write to the same place of `rows` or of `columns`, and the rounds come one after
// another, so the number of threads changes no bit.
#include "simd.h"
#if VECTOR_BYTES == 16 && defined(__SSE2__)
#include <xmmintrin.h>
#endif

// The same fields in the same order as in pairs.py.
struct PairsCall {
    const void *x, *x_low, *x_scale, *y, *y_low, *y_scale;  // (d, n), (d, n), (n,), (d, m), (d, m), (m,)
    const void* v;                                           // (r, m)
    double *rows, *columns;                                  // (n, r), (r, m): are added to
    // Boxes around every STRIP rows of x and every tile of y, (d, strips) and (d, tiles), with the least
    // of the scales within, (strips,) and (tiles,): null where nothing is left out.
    const void *strip_low, *strip_high, *strip_scale, *tile_low, *tile_high, *tile_scale;
    int64_t n, m, d, r, tile, block, blocks, round;          // n, m: whole multiples of 16; block: tiles
    double rate;   // what exponents without scales are multiplied by
    double least;  // exponents below it are left out where a whole strip has no others
    int score, symmetric, dtype;
};

namespace {

enum { SQUARES, SUMS, PRODUCTS };
enum { NOTHING, RATE, SCALES };  // what exponents are multiplied by
constexpr int TILE = 256, STRIP = 16;
constexpr int64_t MOST_TERMS = 2048;  // that are summed in the working type
template <class T> constexpr int DEPTH = sizeof(T) == 4 ? 16 : 8;

// 2^x for x <= 0 that may be far below; what is below the normal numbers is 0.
#if VECTOR_BYTES == 64
INLINE vfloat power(vfloat x) {
    vfloat r = (vfloat)_mm512_reduce_ps((__m512)x, 0);
    vfloat y = 1.0f + r * (0.693146978f + r * (0.240222421f + r * (0.0555073374f + r * (0.00967151276f + r * 0.0013264727f))));
    return (vfloat)_mm512_scalef_ps((__m512)y, (__m512)(x - r));
}
#else
INLINE vfloat power(vfloat x) { return exp2_of(smaller(splat(128.0f), larger(splat(-127.0f), x))); }
#endif
INLINE vdouble power(vdouble x) { return exp2_of(smaller(splat(1024.0), larger(splat(-1023.0), x))); }

template <class T> struct Sides {
    const T *x, *xl, *gx, *y, *yl, *gy;
    int64_t n, m, d;
    T rate;
};

// Exponents of rows i .. i + 3 with one vector of columns at j. D is the number of coordinates, 0 any.
template <class T, int SCORE, int D, bool LOW, int FACTOR>
INLINE void exponents(const Sides<T>& p, int64_t i, int64_t j, Vec<T> (&e)[4]) {
    const int64_t d = D ? D : p.d;
    for (int b = 0; b < 4; b++) e[b] = Vec<T>{};
    for (int64_t k = 0; k < d; k++) {
        const Vec<T> y = load(p.y + k * p.m + j), low = LOW ? load(p.yl + k * p.m + j) : Vec<T>{};
        const T* x = p.x + k * p.n + i;
#pragma GCC unroll 4
        for (int b = 0; b < 4; b++) {
            if (SCORE == PRODUCTS) { e[b] += y * x[b]; continue; }
            Vec<T> t = y - x[b];
            if (LOW) t += low - p.xl[k * p.n + i + b];
            e[b] -= SCORE == SUMS ? absolute(t) : t * t;
        }
    }
    if (FACTOR == RATE)
        for (int b = 0; b < 4; b++) e[b] *= p.rate;
    if (FACTOR == SCALES) {
        const Vec<T> g = load(p.gy + j);
        for (int b = 0; b < 4; b++) e[b] *= g * p.gx[i + b];
    }
}

template <class T, int SCORE, int D, bool LOW, int FACTOR>
void build(const Sides<T>& p, int64_t i, int64_t j0, int64_t width, T* k) {
    for (int a = 0; a < DEPTH<T>; a += 4)
        for (int64_t j = 0; j < width; j += Lanes<T>::count) {
            Vec<T> e[4];
            exponents<T, SCORE, D, LOW, FACTOR>(p, i + a, j0 + j, e);
#pragma GCC unroll 4
            for (int b = 0; b < 4; b++) store(k + (a + b) * TILE + j, power(e[b]));
        }
}

// Whether all exponents between strip s of x and tile t of y are below the least that counts.
template <class T> INLINE bool is_negligible(const PairsCall& c, int64_t s, int64_t t, int64_t tiles) {
    const T *low = (const T*)c.strip_low, *high = (const T*)c.strip_high, *from = (const T*)c.tile_low, *to = (const T*)c.tile_high;
    double square = 0;
    for (int64_t k = 0; k < c.d; k++) {
        const double gap = (double)from[k * tiles + t] - high[k * c.n / STRIP + s], other = (double)low[k * c.n / STRIP + s] - to[k * tiles + t];
        const double nearest = gap > other ? gap : other;
        if (nearest > 0) square += nearest * nearest;
    }
    const double factor = c.strip_scale ? (double)((const T*)c.strip_scale)[s] * ((const T*)c.tile_scale)[t] : c.rate;
    return -square * factor * (1 - 1e-3) < c.least;  // the 1e-3 covers what coordinates have lost by rounding
}

// The strip times R columns of v, added to the lanes' own sums: (DEPTH, r, lanes).
template <class T, int R> void times(const T* k, const T* v, int64_t m, int64_t j0, int64_t width, T* lanes, int64_t r) {
    constexpr int L = Lanes<T>::count, A = VECTOR_BYTES == 64 ? 16 / R : R < 8 ? 8 / R : 1;  // rows at a time
    constexpr int STEP = A < DEPTH<T> ? A : DEPTH<T>;
    for (int a = 0; a < DEPTH<T>; a += STEP) {
        Vec<T> sums[STEP * R];
#pragma GCC unroll 16
        for (int b = 0; b < STEP; b++)
#pragma GCC unroll 8
            for (int c = 0; c < R; c++) sums[b * R + c] = load(lanes + ((a + b) * r + c) * L);
        for (int64_t j = 0; j < width; j += L) {
            Vec<T> vj[R];
#pragma GCC unroll 8
            for (int c = 0; c < R; c++) vj[c] = load(v + c * m + j0 + j);
#pragma GCC unroll 16
            for (int b = 0; b < STEP; b++) {
                const Vec<T> kj = load(k + (a + b) * TILE + j);
#pragma GCC unroll 8
                for (int c = 0; c < R; c++) sums[b * R + c] += kj * vj[c];
            }
        }
#pragma GCC unroll 16
        for (int b = 0; b < STEP; b++)
#pragma GCC unroll 8
            for (int c = 0; c < R; c++) store(lanes + ((a + b) * r + c) * L, sums[b * R + c]);
    }
}

// Adds the lanes' sums (n, lanes) to out (n,) and clears them; n is a multiple of the lanes.
template <class T> void flush(T* lanes, int64_t n, double* out) {
    constexpr int L = Lanes<T>::count;
    for (int64_t s = 0; s < n; s += L) {
        Vec<T> part[L];
        for (int l = 0; l < L; l++) part[l] = load(lanes + (s + l) * L);
        T total[L];
        store(total, across<T, false>(part));
        for (int l = 0; l < L; l++) out[s + l] += total[l];
    }
    memset(lanes, 0, n * L * sizeof(T));
}

// The strip's transpose times the same R columns: added to the sums (R, TILE) of this tile.
template <class T, int R> void times_transposed(const T* k, const T* v, int64_t n, int64_t i, int64_t width, T* sums) {
    constexpr int L = Lanes<T>::count, W = VECTOR_BYTES == 64 || R < 8 ? 2 : 1;  // vectors at a time
    for (int64_t j = 0; j < width; j += W * L) {
        const int64_t far = W == 2 && j + L < width ? L : 0;  // a last single vector is taken twice
        Vec<T> s[W][R];
#pragma GCC unroll 2
        for (int w = 0; w < W; w++)
#pragma GCC unroll 8
            for (int c = 0; c < R; c++) s[w][c] = Vec<T>{};
        for (int a = 0; a < DEPTH<T>; a++) {
            const Vec<T> k0 = load(k + a * TILE + j), k1 = load(k + a * TILE + j + far);
#pragma GCC unroll 8
            for (int c = 0; c < R; c++) {
                const T vi = v[c * n + i + a];
                s[0][c] += k0 * vi;
                if (W == 2) s[W - 1][c] += k1 * vi;
            }
        }
#pragma GCC unroll 8
        for (int c = 0; c < R; c++) {
            T* at = sums + c * TILE + j;
            store(at, load(at) + s[0][c]);
            if (far) store(at + far, load(at + far) + s[W - 1][c]);
        }
    }
}

template <class T> struct Strip {
    const PairsCall& c;
    T* k;
    T* sums;   // (r, TILE), of the columns of a tile
    T* lanes;  // (rows of a tile, r, lanes)
    template <int R> void use(int64_t at, int64_t i, int64_t row, int64_t j0, int64_t width, bool both) {
        const T* v = (const T*)c.v + at * c.m;
        times<T, R>(k, v, c.m, j0, width, lanes + (row * c.r + at) * Lanes<T>::count, c.r);
        if (both) times_transposed<T, R>(k, v, c.n, i, width, sums + at * TILE);
    }
};

template <class T, int SCORE, int D, bool LOW, int FACTOR> int sweep(const PairsCall& c, int64_t first, int64_t last) {
    const Sides<T> p = {(const T*)c.x, (const T*)c.x_low, (const T*)c.x_scale, (const T*)c.y, (const T*)c.y_low, (const T*)c.y_scale, c.n, c.m, c.d, (T)c.rate};
    const int64_t n_lanes = c.tile * c.r * Lanes<T>::count;
    Buffer<T> buffer(DEPTH<T> * TILE + c.r * TILE + n_lanes);
    if (!buffer.p) return 1;
    Strip<T> strip = {c, buffer.p, buffer.p + DEPTH<T> * TILE, buffer.p + (DEPTH<T> + c.r) * TILE};
    memset(strip.lanes, 0, n_lanes * sizeof(T));
    const int64_t tiles = (c.n + c.tile - 1) / c.tile, others = (c.m + c.tile - 1) / c.tile;
    for (int64_t task = first; task < last; task++) {
        const int64_t other = c.symmetric ? (task + c.round) % c.blocks : 0;
        const int64_t to = (task + 1) * c.block < tiles ? (task + 1) * c.block : tiles;
        for (int64_t I = task * c.block; I < to; I++) {
            const int64_t begin = !c.symmetric ? 0 : other == task ? I : other * c.block;
            const int64_t end = !c.symmetric || (other + 1) * c.block > others ? others : (other + 1) * c.block;
            const int64_t i1 = (I + 1) * c.tile < c.n ? (I + 1) * c.tile : c.n;
            int64_t terms = 0;
            for (int64_t J = begin; J < end; J++) {
                const int64_t j0 = J * c.tile, j1 = j0 + c.tile < c.m ? j0 + c.tile : c.m, width = j1 - j0;
                const bool both = c.symmetric && I != J;
                bool used = false;
                for (int64_t i = I * c.tile; i < i1; i += DEPTH<T>) {
                    if (c.strip_low && is_negligible<T>(c, i / STRIP, J, others)) continue;
                    if (both && !used) memset(strip.sums, 0, c.r * TILE * sizeof(T));
                    used = true;
                    build<T, SCORE, D, LOW, FACTOR>(p, i, j0, width, strip.k);
                    int64_t at = 0;
                    for (; at + 8 <= c.r; at += 8) strip.template use<8>(at, i, i - I * c.tile, j0, width, both);
                    if (at + 4 <= c.r) { strip.template use<4>(at, i, i - I * c.tile, j0, width, both); at += 4; }
                    if (at + 2 <= c.r) { strip.template use<2>(at, i, i - I * c.tile, j0, width, both); at += 2; }
                    if (at < c.r) strip.template use<1>(at, i, i - I * c.tile, j0, width, both);
                }
                if (both && used)
                    for (int64_t s = 0; s < c.r; s++)
                        for (int64_t j = 0; j < width; j++) c.columns[s * c.m + j0 + j] += strip.sums[s * TILE + j];
                terms += used ? width : 0;
                if (terms >= MOST_TERMS || (terms && J + 1 == end)) {
                    flush(strip.lanes, (i1 - I * c.tile) * c.r, c.rows + I * c.tile * c.r);
                    terms = 0;
                }
            }
        }
    }
    return 0;
}

template <class T, bool LOW, int FACTOR> int of_factor(const PairsCall& c, int64_t first, int64_t last) {
    switch (c.d) {
        case 1: return sweep<T, SQUARES, 1, LOW, FACTOR>(c, first, last);
        case 2: return sweep<T, SQUARES, 2, LOW, FACTOR>(c, first, last);
        case 3: return sweep<T, SQUARES, 3, LOW, FACTOR>(c, first, last);
        case 4: return sweep<T, SQUARES, 4, LOW, FACTOR>(c, first, last);
        default: return sweep<T, SQUARES, 0, LOW, FACTOR>(c, first, last);
    }
}
template <class T> int of_type(const PairsCall& c, int64_t first, int64_t last) {
    if (c.score == PRODUCTS) return sweep<T, PRODUCTS, 0, false, RATE>(c, first, last);
    if (c.score == SUMS) return sweep<T, SUMS, 0, false, RATE>(c, first, last);
    if constexpr (sizeof(T) == 4) {  // double has no low parts, and its rate is never left out
        if (c.x_low) return c.x_scale ? sweep<T, SQUARES, 0, true, SCALES>(c, first, last) : of_factor<T, true, RATE>(c, first, last);
        if (!c.x_scale && c.rate == 1) return of_factor<T, false, NOTHING>(c, first, last);
    }
    return c.x_scale ? sweep<T, SQUARES, 0, false, SCALES>(c, first, last) : of_factor<T, false, RATE>(c, first, last);
}

}  // namespace

extern "C" int OF_SET(pairs_product)(int, const PairsCall* c, int64_t first, int64_t last) {
#if defined(__SSE2__)
    // numbers below the normal ones count as 0 in this thread until the end: they take 100 times longer
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
#endif
    const int failed = c->dtype == 1 ? of_type<double>(*c, first, last) : of_type<float>(*c, first, last);
#if defined(__SSE2__)
    _mm_setcsr(before);
#endif
    return failed;
}
