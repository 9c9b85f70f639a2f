// out_i = sum_j 2^(e_ij) v_j for exponents e_ij of two points, from their coordinates: the matrix is
// never stored. Exponents are sums over coordinates of (x - y)^2, |x - y| or x y, so that near points
// lose no digits however far they lie from the origin.
//
// The matrix consists of squares of SIDE by SIDE entries. Of DEPTH rows, those squares that matter are
// built in the first-level cache, at most GROUP of them at once, and then used for all columns of v, and
// in a symmetric matrix for its transpose too. Sums over at most HIGH rows or WIDE columns are taken in
// the working type, by lane, and all others in double.
//
// Points are dealt to blocks of squares; task i of round k takes the pair of blocks (i, i + k). Within a
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
    // Boxes around every SIDE points of x and of y, (d, n / SIDE) and (d, m / SIDE), with the least of the
    // scales within, and a vector of anything behind: null where nothing is left out.
    const void *x_from, *x_to, *x_least, *y_from, *y_to, *y_least;
    int64_t n, m, d, r, block, blocks, round;  // n, m: whole multiples of SIDE; block: squares
    double rate;   // what exponents without scales are multiplied by
    double least;  // exponents below it are left out where a whole square has no others
    int score, symmetric, dtype;
};

namespace {

enum { SQUARES, SUMS, PRODUCTS };
enum { NOTHING, RATE, SCALES };  // what exponents are multiplied by
constexpr int SIDE = 16, GROUP = 8, HIGH = 512, WIDE = 1024;
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

// DEPTH rows from i on of the square of columns from j on: (DEPTH, SIDE).
template <class T, int SCORE, int D, bool LOW, int FACTOR>
INLINE void build(const Sides<T>& p, int64_t i, int64_t j, T* k) {
    for (int a = 0; a < DEPTH<T>; a += 4)
        for (int w = 0; w < SIDE; w += Lanes<T>::count) {
            Vec<T> e[4];
            exponents<T, SCORE, D, LOW, FACTOR>(p, i + a, j + w, e);
#pragma GCC unroll 4
            for (int b = 0; b < 4; b++) store(k + (a + b) * SIDE + w, power(e[b]));
        }
}

// Writes the numbers of those squares from `begin` to `end` of row s whose exponents are not all below
// the least that counts, less `start`; how many there are.
template <class T> int64_t find(const PairsCall& c, int64_t s, int64_t begin, int64_t end, int64_t start, int32_t* found) {
    constexpr int L = Lanes<T>::count;
    int64_t n = 0;
    if (!c.x_from) {
        for (int64_t t = begin; t < end; t++) found[n++] = (int32_t)(t - start);
        return n;
    }
    const T *from = (const T*)c.x_from + s, *to = (const T*)c.x_to + s;
    for (int64_t t = begin; t < end; t += L) {
        Vec<T> square{};
        for (int64_t k = 0; k < c.d; k++) {
            const Vec<T> low = load((const T*)c.y_from + k * (c.m / SIDE) + t), high = load((const T*)c.y_to + k * (c.m / SIDE) + t);
            const Vec<T> gap = larger(larger(low - to[k * (c.n / SIDE)], from[k * (c.n / SIDE)] - high), Vec<T>{});
            square += gap * gap;
        }
        if (c.x_least) square *= load((const T*)c.y_least + t) * ((const T*)c.x_least)[s];
        else square *= (T)c.rate;
        // the 1e-3 covers what coordinates have lost by rounding; a NaN is not left out
        Mask m = ~above(square * (T)(1 - 1e-3), splat((T)-c.least));
        m &= end - t < L ? (1u << (end - t)) - 1 : (1u << L) - 1;
        for (; m; m &= m - 1) found[n++] = (int32_t)(t - start + __builtin_ctz(m));
    }
    return n;
}

constexpr int most_sums(int R) { return VECTOR_BYTES == 64 ? 24 / R : 12 / R; }

// The squares times R columns of v, (squares, r, SIDE), added to the lanes' own sums: (DEPTH, r, lanes).
template <class T, int R> void times(const T* k, const int32_t* at, int64_t n, const T* v, T* lanes, int64_t r) {
    constexpr int L = Lanes<T>::count, MOST = most_sums(R);
    constexpr int A = MOST >= 16 ? 16 : MOST >= 8 ? 8 : MOST >= 4 ? 4 : MOST >= 2 ? 2 : 1;  // rows at a time
    constexpr int STEP = A < DEPTH<T> ? A : DEPTH<T>;
    for (int a = 0; a < DEPTH<T>; a += STEP) {
        Vec<T> sums[STEP * R];
#pragma GCC unroll 16
        for (int b = 0; b < STEP; b++)
#pragma GCC unroll 12
            for (int c = 0; c < R; c++) sums[b * R + c] = load(lanes + ((a + b) * r + c) * L);
        for (int64_t u = 0; u < n; u++)
            for (int w = 0; w < SIDE; w += L) {
                const T *ku = k + (u * DEPTH<T> + a) * SIDE + w, *vu = v + at[u] * r * SIDE + w;
                Vec<T> kj[STEP];
#pragma GCC unroll 16
                for (int b = 0; b < STEP; b++) kj[b] = load(ku + b * SIDE);
#pragma GCC unroll 12
                for (int c = 0; c < R; c++) {
                    const Vec<T> vj = load(vu + c * SIDE);
#pragma GCC unroll 16
                    for (int b = 0; b < STEP; b++) sums[b * R + c] += kj[b] * vj;
                }
            }
#pragma GCC unroll 16
        for (int b = 0; b < STEP; b++)
#pragma GCC unroll 12
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

// W vectors of columns of squares, transposed, times R columns of v, (DEPTH, r): added to the sums there.
template <class T, int R, int W> INLINE void times_transposed_part(const T* const (&k)[W], const T* v, T* const (&sums)[W], int64_t r) {
    Vec<T> s[W][R];
#pragma GCC unroll 2
    for (int w = 0; w < W; w++)
#pragma GCC unroll 12
        for (int c = 0; c < R; c++) s[w][c] = load(sums[w] + c * SIDE);
    for (int a = 0; a < DEPTH<T>; a++) {
        Vec<T> ka[W];
#pragma GCC unroll 2
        for (int w = 0; w < W; w++) ka[w] = load(k[w] + a * SIDE);
#pragma GCC unroll 12
        for (int c = 0; c < R; c++) {
            const T va = v[a * r + c];
#pragma GCC unroll 2
            for (int w = 0; w < W; w++) s[w][c] += ka[w] * va;
        }
    }
#pragma GCC unroll 2
    for (int w = 0; w < W; w++)
#pragma GCC unroll 12
        for (int c = 0; c < R; c++) store(sums[w] + c * SIDE, s[w][c]);
}
// The squares' transposes times the same R columns: added to the sums (squares, r, SIDE).
template <class T, int R> void times_transposed(const T* k, const int32_t* at, int64_t n, const T* v, T* sums, int64_t r) {
    constexpr int L = Lanes<T>::count, V = SIDE / L;
    auto from = [&](int64_t q) { return k + q / V * DEPTH<T> * SIDE + q % V * L; };
    auto to = [&](int64_t q) { return sums + at[q / V] * r * SIDE + q % V * L; };
    int64_t q = 0;
    if (most_sums(R) >= 2)
        for (; q + 2 <= n * V; q += 2) times_transposed_part<T, R, 2>({from(q), from(q + 1)}, v, {to(q), to(q + 1)}, r);
    for (; q < n * V; q++) times_transposed_part<T, R, 1>({from(q)}, v, {to(q)}, r);
}

// What one task works in. `rows` are of the strip, all else of the columns at hand.
template <class T> struct Scratch {
    static constexpr int64_t SQUARES_AT_HAND = WIDE / SIDE;
    const int64_t r;
    Buffer<T> k, v, sums, row_v, lanes;  // (GROUP, DEPTH, SIDE), twice (squares, r, SIDE), (DEPTH, r), (DEPTH, r, lanes)
    int32_t found[SQUARES_AT_HAND];
    explicit Scratch(int64_t r_) : r(r_), k(GROUP * DEPTH<T> * SIDE), v(WIDE * r), sums(WIDE * r), row_v(DEPTH<T> * r), lanes(DEPTH<T> * r * Lanes<T>::count) {}
    bool ok() const { return k.p && v.p && sums.p && row_v.p && lanes.p; }

    template <int R> void use(const int32_t* at, int64_t n, int64_t c, bool both) {
        times<T, R>(k.p, at, n, v.p + c * SIDE, lanes.p + c * Lanes<T>::count, r);
        if (both) times_transposed<T, R>(k.p, at, n, row_v.p + c, sums.p + c * SIDE, r);
    }
    void use_all(const int32_t* at, int64_t n, bool both) {
        int64_t c = 0;
        for (; c + 12 <= r; c += 12) use<12>(at, n, c, both);
        if (c + 8 <= r) { use<8>(at, n, c, both); c += 8; }
        if (c + 4 <= r) { use<4>(at, n, c, both); c += 4; }
        if (c + 2 <= r) { use<2>(at, n, c, both); c += 2; }
        if (c < r) use<1>(at, n, c, both);
    }
};

// Rows from i0 to i1 times columns from j0 to j1, of a pair of blocks; in the pair of a block with itself
// what lies below the diagonal is left to the transpose.
template <class T, int SCORE, int D, bool LOW, int FACTOR>
void multiply(const PairsCall& c, const Sides<T>& p, Scratch<T>& at_hand, int64_t i0, int64_t i1, int64_t j0, int64_t j1, bool itself) {
    const int64_t r = c.r, first = j0 / SIDE, last = j1 / SIDE;
    const T* v = (const T*)c.v;
    for (int64_t t = first; t < last; t++)
        for (int64_t s = 0; s < r; s++) memcpy(at_hand.v.p + ((t - first) * r + s) * SIDE, v + s * c.m + t * SIDE, SIDE * sizeof(T));
    if (c.symmetric) memset(at_hand.sums.p, 0, (j1 - j0) * r * sizeof(T));
    bool used = false;
    for (int64_t s = i0 / SIDE; s < i1 / SIDE; s++) {
        const int64_t begin = itself && s > first ? s : first;
        if (begin >= last) break;
        const int64_t n = find<T>(c, s, begin, last, first, at_hand.found);
        if (!n) continue;
        // the square on the diagonal, which is its own transpose, comes first and alone
        const bool alone = itself && first + at_hand.found[0] == s;
        const int64_t others = n - alone, groups = (others + GROUP - 1) / GROUP;
        used = used || others;
        for (int64_t i = s * SIDE; i < (s + 1) * SIDE; i += DEPTH<T>) {
            for (int a = 0; c.symmetric && a < DEPTH<T>; a++)
                for (int64_t e = 0; e < r; e++) at_hand.row_v.p[a * r + e] = v[e * c.n + i + a];
            for (int64_t g = alone ? -1 : 0, u = 0; g < groups; g++) {
                const int64_t to = g < 0 ? 1 : alone + others * (g + 1) / groups;
                for (int64_t q = u; q < to; q++)
                    build<T, SCORE, D, LOW, FACTOR>(p, i, j0 + at_hand.found[q] * SIDE, at_hand.k.p + (q - u) * DEPTH<T> * SIDE);
                at_hand.use_all(at_hand.found + u, to - u, c.symmetric && g >= 0);
                u = to;
            }
            flush(at_hand.lanes.p, DEPTH<T> * r, c.rows + i * r);
        }
    }
    if (used && c.symmetric)
        for (int64_t t = first; t < last; t++)
            for (int64_t s = 0; s < r; s++)
                for (int64_t j = 0; j < SIDE; j++) c.columns[s * c.m + t * SIDE + j] += at_hand.sums.p[((t - first) * r + s) * SIDE + j];
}

template <class T, int SCORE, int D, bool LOW, int FACTOR> int sweep(const PairsCall& c, int64_t first, int64_t last) {
    const Sides<T> p = {(const T*)c.x, (const T*)c.x_low, (const T*)c.x_scale, (const T*)c.y, (const T*)c.y_low, (const T*)c.y_scale, c.n, c.m, c.d, (T)c.rate};
    Scratch<T> at_hand(c.r);
    if (!at_hand.ok()) return 1;
    memset(at_hand.lanes.p, 0, DEPTH<T> * c.r * Lanes<T>::count * sizeof(T));
    const int64_t size = c.block * SIDE;
    auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
    for (int64_t task = first; task < last; task++) {
        const int64_t other = c.symmetric ? (task + c.round) % c.blocks : 0;
        const int64_t i1 = least((task + 1) * size, c.n), j1 = c.symmetric ? least((other + 1) * size, c.m) : c.m;
        for (int64_t i = task * size; i < i1; i += HIGH)
            for (int64_t j = other * size; j < j1; j += WIDE)
                multiply<T, SCORE, D, LOW, FACTOR>(c, p, at_hand, i, least(i + HIGH, i1), j, least(j + WIDE, j1), c.symmetric && other == task);
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
