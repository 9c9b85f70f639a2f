// Rows of sparse weights, p_i = [s x_i - tau]_+^(1/s) with sum 1, and their derivatives from p alone.
//
// A block has as many rows as a vector has lanes: what happens between two passes happens for all of
// them at once, while a row's own sums never depend on the rows beside it. Short rows are transposed: a
// vector then has one entry of each row, and a lane's sum is its row's. In long rows with s >= 1/3, the
// maxima of the lanes, a part of the row, bound the threshold from below; what lies above the bound is
// put side by side and solved, transposed in rows of medium length. Elsewhere whole rows are solved.
// Which way a row goes is up to its length and s alone.
#include "threshold.h"

namespace {

constexpr int GROUPS = 4;  // vectors of lane maxima
constexpr int SHORT = 128;  // the longest row that is transposed
constexpr int64_t PIECE = 256;  // vectors that are added up one after the other
constexpr int MEDIUM = 1024;  // the longest one whose kept entries are

template <class T> struct Block {
    const T* x;
    T* out;
    int64_t N, width;  // entries of a row, and of a row's buffer
    int64_t ahead;     // how far behind x the scores of the next block lie; 0 where no whole block follows
    int64_t steps;     // Newton's, at most
    int R, divide;
    bool transposed;   // v and w are [entries, lanes]
    int64_t entries;
    Power<T> P;
    T *v, *w;          // [R, width]
    uint16_t* hit;     // [R, width / lanes]: which entries were kept
    T m[Lanes<T>::count];
    int64_t kept[Lanes<T>::count], vectors[Lanes<T>::count];
    unsigned live;     // rows whose maximum is finite
    Vec<T> is_live;    // and as ones and zeros
};

// The row maxima, NaN if one entry is, and the maxima of every (GROUPS * lanes)-th entry.
template <class T> void find_maxima(Block<T>& b, Vec<T> (*M)[GROUPS]) {
    constexpr int L = Lanes<T>::count;
    Vec<T> top[L];
    for (int r = 0; r < L; r++) top[r] = Vec<T>{};
    for (int r = 0; r < b.R; r++) {
        const T* x = b.x + r * b.N;
        const int64_t full = b.N / L;
        const int rest = b.N % L;
        Vec<T> a[GROUPS], wrong{};
        for (int g = 0; g < GROUPS; g++) a[g] = splat((T)-INFINITY);
        int64_t k = 0;
        for (; k + GROUPS <= full; k += GROUPS)
#pragma GCC unroll 4
            for (int g = 0; g < GROUPS; g++) { Vec<T> y = load(x + (k + g) * L); wrong += y * 0; a[g] = larger(a[g], y); }
        for (int g = 0; k < full; k++, g++) { Vec<T> y = load(x + k * L); wrong += y * 0; a[g] = larger(a[g], y); }
        if (rest) { Vec<T> y = load_part(x + full * L, rest, (T)-INFINITY); wrong += y * 0; a[GROUPS - 1] = larger(a[GROUPS - 1], y); }
        Mask bad = 0;
        if (is_nan(wrong))  // a NaN, or infinities: look again
            for (int64_t i = 0; i < b.N && !bad; i++) bad = x[i] != x[i];
        for (int g = 0; g < GROUPS; g++) M[r][g] = a[g];
        top[r] = bad ? splat((T)NAN) : larger(larger(a[0], a[1]), larger(a[2], a[3]));
    }
    Vec<T> t = across<T, true>(top);
    b.live = 0;
    for (int r = 0; r < b.R; r++) {
        b.m[r] = top[r][0] != top[r][0] ? (T)NAN : t[r];
        if (b.m[r] - b.m[r] == 0) b.live |= 1u << r;
    }
    for (int r = 0; r < L; r++) b.is_live[r] = b.live >> r & 1;
}

template <class T> INLINE Vec<T> row_sums(Vec<T>* a, unsigned live) {
    for (int r = 0; r < Lanes<T>::count; r++) if (!(live >> r & 1)) a[r] = splat((T)1 / Lanes<T>::count);
    return across<T, false>(a);
}

// u of the lane maxima for a whole power >= p: not above the row's own u.
template <class T> Vec<T> bound(Block<T>& b, Vec<T> (*M)[GROUPS], int groups) {
    constexpr int L = Lanes<T>::count;
    const int n = b.P.n < 2 ? 2 : b.P.n;
    const WholeSums<T, T> sums = sums_for<T>(n);
    Vec<T> F[L], G[L], u{};
    alignas(64) T t[GROUPS * L];
    for (int r = 0; r < b.R; r++)
        for (int g = 0; g < groups; g++) M[r][g] = (M[r][g] - b.m[r]) * b.P.s;
    for (int i = 0; i < 3; i++) {
        for (int r = 0; r < b.R; r++) {
            if (!(b.live >> r & 1)) continue;
            if (n == 2) {
                Vec<T> f{}, g{};
                for (int k = 0; k < groups; k++) { Vec<T> a = larger(M[r][k] + (1 - u[r]), Vec<T>{}); f += a * a; g += a; }
                F[r] = f; G[r] = g;
                continue;
            }
            for (int k = 0; k < groups; k++) store(t + k * L, M[r][k]);
            Sums<T> s = sums(t, groups, u[r], nullptr);
            F[r] = s.F; G[r] = s.G;
        }
        u += whole_step<T>(row_sums<T>(F, b.live), row_sums<T>(G, b.live), n);
    }
    return u - 8 * Lanes<T>::epsilon;
}

// Writes row r's v = s (x - max) that may carry a weight side by side, and marks where they were.
template <class T> void keep_above(Block<T>& b, int r, T u) {
    constexpr int L = Lanes<T>::count;
    const T* x = b.x + r * b.N;
    T* v = b.v + r * b.width;
    uint16_t* hit = b.hit + r * (b.width / L);
    const int64_t full = b.N / L;
    const int rest = b.N % L;
    const T m = b.m[r], s = b.P.s;
    const Vec<T> least = splat(u - 1);
    int64_t n = 0;
    for (int64_t k = 0; k < full; k++) {
        __builtin_prefetch(x + k * L + b.ahead, 0, 2);  // the next block is on its way while this one is solved
        Vec<T> y = (load(x + k * L) - m) * s;
        Mask h = above(y, least);
        compress(v + n, h, y);
        hit[k] = h;
        n += bits(h);
    }
    if (rest) {
        Vec<T> y = (load_part(x + full * L, rest, (T)-INFINITY) - m) * s;
        Mask h = above(y, least);
        compress(v + n, h, y);
        hit[full] = h;
        n += bits(h);
    }
    store(v + n, splat((T)-4));
    b.kept[r] = n;
    b.vectors[r] = (n + L - 1) / L;
}
template <class T> void keep_all(Block<T>& b, int r) {
    constexpr int L = Lanes<T>::count;
    const T* x = b.x + r * b.N;
    T* v = b.v + r * b.width;
    const int64_t full = b.N / L;
    const int rest = b.N % L;
    const T m = b.m[r], s = b.P.s;
    for (int64_t k = 0; k < full; k++) store(v + k * L, (load(x + k * L) - m) * s);
    if (rest) store(v + full * L, (load_part(x + full * L, rest, (T)-INFINITY) - m) * s);
    b.vectors[r] = full + (rest > 0);
}
// Writes row r's weights of(v, w) times `by` to their places.
template <class T, class Weight> void write_row(const Block<T>& b, int r, T by, bool kept, Weight of) {
    constexpr int L = Lanes<T>::count;
    const T *v = b.v + r * b.width, *w = b.w + r * b.width;
    const uint16_t* hit = b.hit + r * (b.width / L);
    T* out = b.out + r * b.N;
    const int64_t full = b.N / L;
    const int rest = b.N % L;
    if (!kept) {
        for (int64_t k = 0; k < full; k++) store(out + k * L, of(load(v + k * L), load(w + k * L)) * by);
        if (rest) store_part(out + full * L, rest, of(load(v + full * L), load(w + full * L)) * by);
        return;
    }
    for (int64_t k = 0; k < full; k++) {
        store(out + k * L, expand(w, hit[k]) * by);
        w += bits(hit[k]);
    }
    if (rest) store_part(out + full * L, rest, expand(w, hit[full]) * by);
}

// each(v, w, vectors, of) gives the sums of one row; of(a) is that row's part of a, a vector of one value
// per row. Transposed rows are all summed at once. H costs a reduction: only where it is wanted.
template <bool WITH_H, class T, class Each> INLINE Sums<T> over_rows(const Block<T>& b, unsigned which, Each each) {
    if (b.transposed) return each(b.v, b.w, b.entries, [](Vec<T> a) { return a; });
    constexpr int L = Lanes<T>::count;
    Vec<T> F[L], G[L], H[L];
    for (int r = 0; r < b.R; r++) {
        if (!(which >> r & 1)) continue;
        F[r] = G[r] = H[r] = Vec<T>{};
        // sums of sums: one sum over a long row would lose digits
        for (int64_t k = 0; k < b.vectors[r]; k += PIECE) {
            const int64_t at = r * b.width + k * L, n = b.vectors[r] - k < PIECE ? b.vectors[r] - k : PIECE;
            Sums<T> s = each(b.v + at, b.w + at, n, [r](Vec<T> a) { return a[r]; });
            F[r] += s.F; G[r] += s.G;
            if (WITH_H) H[r] += s.H;
        }
    }
    return {row_sums<T>(F, which), row_sums<T>(G, which), WITH_H ? row_sums<T>(H, which) : Vec<T>{}};
}
// Writes the weights of(v, w), divided by their sums F, to their places.
template <class T, class Weight> void write_transposed(const Block<T>& b, Vec<T> F, Weight of) {
    constexpr int L = Lanes<T>::count;
    Vec<T> m = load(b.m), dead = m == (T)-INFINITY ? Vec<T>{} : splat((T)NAN);
    const Vec<T> scale = b.is_live > 0 ? (b.divide ? 1 / F : splat((T)1)) : dead;
    for (int64_t k = 0; k < b.N; k += L) {
        const int n = b.N - k < L ? b.N - k : L;
        Vec<T> a[L];
        for (int i = 0; i < L; i++) a[i] = i < n ? of(load(b.v + (k + i) * L), load(b.w + (k + i) * L)) * scale : Vec<T>{};
        transpose<T>(a);
        for (int r = 0; r < b.R; r++) {
            if (n == L) store(b.out + r * b.N + k, a[r]);
            else store_part(b.out + r * b.N + k, n, a[r]);
        }
    }
}
// Transposes the kept entries of all rows as in short rows, filled up to the longest list; and back.
template <class T> void transpose_kept(Block<T>& b) {
    constexpr int L = Lanes<T>::count;
    int64_t longest = 0;
    for (int r = 0; r < b.R; r++) if (b.live >> r & 1 && b.kept[r] > longest) longest = b.kept[r];
    for (int64_t k = 0; k * L < longest; k++) {
        Vec<T> a[L];
        for (int r = 0; r < L; r++) a[r] = r < b.R && b.live >> r & 1 && k < b.vectors[r] ? load(b.v + r * b.width + k * L) : splat((T)-4);
        transpose<T>(a);
        for (int i = 0; i < L; i++) store(b.w + (k * L + i) * L, a[i]);
    }
    std::swap(b.v, b.w);
    b.entries = longest;
    b.transposed = true;
}
template <class T> void transpose_back(Block<T>& b) {
    constexpr int L = Lanes<T>::count;
    for (int64_t k = 0; k * L < b.entries; k++) {
        Vec<T> a[L];
        for (int i = 0; i < L; i++) a[i] = load(b.w + (k * L + i) * L);
        transpose<T>(a);
        for (int r = 0; r < b.R; r++) store(b.v + r * b.width + k * L, a[r]);
    }
    std::swap(b.v, b.w);
    b.transposed = false;
}
// weights(part) gives the function of (v, w) for a row, where part(a) is its part of a as in over_rows.
template <class T, class Weights> void write(Block<T>& b, Vec<T> F, bool kept, Weights weights) {
    if (b.transposed && !kept) return write_transposed(b, F, weights([](Vec<T> a) { return a; }));
    if (b.transposed) transpose_back(b);
    const Vec<T> scale = b.divide ? 1 / F : splat((T)1);
    for (int r = 0; r < b.R; r++)
        if (b.live >> r & 1) write_row(b, r, scale[r], kept, weights([r](Vec<T> a) { return a[r]; }));
}
template <class T> void write(Block<T>& b, Vec<T> F, bool kept) {
    write(b, F, kept, [](auto) { return [](Vec<T>, Vec<T> w) { return w; }; });
}

// From u towards the root, on either side of it, by the whole powers n, n - 1 and n - 2 around p: log F
// is nearly a parabola in the power, a line from 1 to 2. No weight is more than 1, so that the root lies below 1 - N^(-s).
template <class T> Vec<T> approach(const Block<T>& b, Vec<T> u) {
    const Power<T>& P = b.P;
    const T t = P.p - (P.n - 1);
    for (int i = 0; i < 2; i++) {
        Sums<T> s = over_rows<true>(b, b.live, [&](const T* v, T*, int64_t nv, auto of) { return sums_for<T, decltype(of(u))>(P.n)(v, nv, of(u), nullptr); });
        const Vec<T> f = log2_of(s.F), g = log2_of(s.G), h = P.n > 2 ? log2_of(s.H) : 2 * g - f, slope = (f - h) * (T)0.5, bend = (f - 2 * g + h) * (T)0.5;
        const Vec<T> log_f = g + t * (slope + t * bend), ratio = exp2_of(slope + bend * (2 * t - 1)), next_ratio = exp2_of(slope + bend * (2 * t - 3));
        const Vec<T> step = -ratio * exp2_less_one(-P.s * log_f);
        u += step + step * step * (1 / next_ratio - 1 / ratio) * ((P.p - 1) / 2);
    }
    return smaller(u, -exp2_less_one(-P.s * log2_of(splat((T)b.N))));
}
// From u not above the root, up to it.
template <class T> void solve_kept(Block<T>& b, Vec<T> u, bool kept) {
    const T enough = tolerance(b.P);
    Vec<T> is_late = b.is_live;
    unsigned late = b.live;
    for (int64_t round = 0; round < b.steps && late; round++) {
        Sums<T> s = over_rows<false>(b, late, [&](const T* v, T*, int64_t nv, auto of) { return sums_of(v, nv, of(u), (T*)nullptr, b.P); });
        const Vec<T> step = larger(newton_step<T>(s.F, s.G, b.P), Vec<T>{}), next = u + (is_late > 0 ? step : Vec<T>{});
        is_late = s.F - 1 > enough ? is_late : Vec<T>{};
        is_late = next == u ? Vec<T>{} : is_late;
        u = next;
        late = above(is_late, Vec<T>{});
    }
    write(b, over_rows<false>(b, b.live, [&](const T* v, T* w, int64_t nv, auto of) { return sums_of(v, nv, of(u), w, b.P); }).F, kept);
}
// The same for real powers, of which a pass costs much: from near the root to just below it, where no
// entry has a weight still to come, and the last step in the weights themselves.
template <class T> void solve_kept_real(Block<T>& b, Vec<T> u, bool kept) {
    const Power<T>& P = b.P;
    const T enough = tolerance(P), above_root = -4 * Lanes<T>::epsilon;
    Vec<T> is_late = b.is_live, step{};
    unsigned late = b.live;
    u = approach(b, u);
    for (int64_t round = 0; round < b.steps && late; round++) {
        Sums<T> s = over_rows<false>(b, late, [&](const T* v, T* w, int64_t nv, auto of) { return real_sums(v, nv, of(u), w, P); });
        const Vec<T> now = newton_step<T>(s.F, s.G, P), next = u + now;
        step = b.transposed || is_late > 0 ? now : step;
        is_late = s.F - 1 > enough || s.F - 1 < above_root ? is_late : Vec<T>{};
        is_late = next == u ? Vec<T>{} : is_late;
        if (round + 1 < b.steps) u = is_late > 0 ? next : u;
        late = above(is_late, Vec<T>{});
    }
    const Vec<T> shifts = P.p * step;
    Sums<T> s = over_rows<false>(b, b.live, [&](const T* v, T* w, int64_t nv, auto of) {
        const auto u1 = of(u), shift = of(shifts);
        Vec<T> total{};
        for (int64_t k = 0; k < nv; k++) {
            const Vec<T> base = larger(load(v + k * Lanes<T>::count) - u1, splat(P.lowest)) + 1, a = load(w + k * Lanes<T>::count);
            const Vec<T> moved = larger(a - a * (shift * reciprocal(base)), Vec<T>{});
            total += moved;
            store(w + k * Lanes<T>::count, moved);
        }
        return Sums<T>{total, total, total};
    });
    write(b, s.F, kept);
}

// Whole rows: from near the root one or two passes lead to where a step of third order is exact. It is
// made while the weights w are written: with base b = 1 + v - u and q = p step / b a weight becomes
// w (1 - q + k2 q^2 - k3 q^3), and their sum F - shift G + k2 shift^2 H less a little.
template <class T> void solve_whole(Block<T>& b) {
    const Power<T>& P = b.P;
    const T enough = sizeof(T) == 4 ? (T)5e-3 : (T)1e-5;
    const Vec<T> one = splat((T)1);
    Vec<T> u = P.is_bounded() ? approach(b, Vec<T>{}) : Vec<T>{}, f = one, g = one, h = one, step{}, is_late = b.is_live;
    unsigned late = b.live;
    for (int64_t round = 0; round < b.steps && late; round++) {
        Sums<T> s = over_rows<true>(b, late, [&](const T* v, T* w, int64_t nv, auto of) { return sums_of(v, nv, of(u), w, P); });
        const Vec<T> now = newton_step<T>(s.F, s.G, P), next = u + now, before = is_late;
        f = before > 0 ? s.F : f; g = before > 0 ? s.G : g; h = before > 0 ? s.H : h; step = before > 0 ? now : step;
        is_late = absolute(s.F - 1) < enough ? Vec<T>{} : is_late;
        is_late = next == u ? Vec<T>{} : is_late;
        if (round + 1 < b.steps) u = is_late > 0 ? next : u;
        late = above(is_late, Vec<T>{});
    }
    // F^s is nearly a line in u; its curvature makes the last step exact to third order
    step += step * step * (h / g - g / f) * ((P.p - 1) / 2);
    const T k2 = (1 - P.s) / 2, k3 = (1 - P.s) * (1 - 2 * P.s) / 6;
    const Vec<T> shifts = is_late > 0 ? Vec<T>{} : P.p * step;  // far from the root the sum is not known
    const T lowest = P.lowest;
    write(b, f - shifts * (g - shifts * (h * k2 - shifts * (h * h / g * k3))), false, [=](auto of) {
        const auto u1 = of(u), shift = of(shifts);
        return [=](Vec<T> v, Vec<T> w) {
            const Vec<T> base = larger(v - u1, splat(lowest)) + 1;
            const Vec<T> q = smaller(larger(shift * reciprocal(base), splat((T)-1)), splat((T)1));
            return w - w * (q * (1 - q * (k2 - q * k3)));
        };
    });
}

template <class T> void softmax(Block<T>& b) {
    constexpr int L = Lanes<T>::count;
    const T least = sizeof(T) == 4 ? -126 : -1022, log2e = (T)1.4426950408889634;
    Sums<T> s = over_rows<false>(b, b.live, [&](const T* v, T* w, int64_t nv, auto) {
        Vec<T> total{};
        for (int64_t k = 0; k < nv; k++) {
            Vec<T> y = load(v + k * L) * log2e, a = exp2_of(larger(y, splat(least)));
            a = y > least ? a : Vec<T>{};
            total += a;
            store(w + k * L, a);
        }
        return Sums<T>{total, total, total};
    });
    b.divide = 1;
    write(b, s.F, false);
}

// The block's rows with one entry of each in a vector: v = s (x - max), and the maxima.
template <class T> void load_transposed(Block<T>& b) {
    constexpr int L = Lanes<T>::count;
    Vec<T> top = splat((T)-INFINITY), nan{};
    for (int64_t k = 0; k < b.N; k += L) {
        const int n = b.N - k < L ? b.N - k : L;
        Vec<T> a[L];
        for (int r = 0; r < L; r++) {
            const T* x = b.x + r * b.N + k;
            a[r] = r >= b.R ? Vec<T>{} : n == L ? load(x) : load_part(x, n, (T)0);
        }
        transpose<T>(a);
        for (int i = 0; i < n; i++) {
            top = larger(top, a[i]);
            nan = a[i] == a[i] ? nan : a[i];
            store(b.v + (k + i) * L, a[i]);
        }
    }
    top = nan == nan ? top : nan;
    b.is_live = top - top == 0 ? splat((T)1) : Vec<T>{};
    b.live = above(b.is_live, Vec<T>{});
    store(b.m, top);
    const T s = b.P.s;
    for (int64_t k = 0; k < b.N; k++) store(b.v + k * L, b.is_live > 0 ? (load(b.v + k * L) - top) * s : Vec<T>{});
}

// Few entries of a row have a weight: powers of all of them would cost too much. In long rows that is so
// of more s; short ones are quicker as a whole then.
template <class T> INLINE bool is_steep(const Power<T>& P, int64_t N) { return P.kind != SOFTMAX && P.s > (N > SHORT ? (T)0.19 : (T)0.3334); }

template <class T> void forward_block(Block<T>& b) {
    constexpr int L = Lanes<T>::count;
    Vec<T> M[L][GROUPS];
    const bool is_softmax = b.P.kind == SOFTMAX, is_sparse = is_steep(b.P, b.N);
    if (is_softmax) b.P.s = 1;
    if (b.transposed) load_transposed(b);
    else {
        find_maxima<T>(b, M);
        for (int r = 0; r < b.R; r++)
            if (!(b.live >> r & 1))
                for (int64_t i = 0; i < b.N; i++) b.out[r * b.N + i] = b.m[r] == -INFINITY ? (T)0 : (T)NAN;
        if (!b.live) return;
    }
    if (is_sparse && b.transposed) {
        solve_kept(b, Vec<T>{}, false);
        return;
    }
    if (is_sparse) {
        const int groups = b.N >= 4 * GROUPS * L ? GROUPS : 1;
        if (groups == 1)
            for (int r = 0; r < b.R; r++) M[r][0] = larger(larger(M[r][0], M[r][1]), larger(M[r][2], M[r][3]));
        Vec<T> u = bound<T>(b, M, groups);
        for (int r = 0; r < b.R; r++) if (b.live >> r & 1) keep_above(b, r, u[r]);
        if (b.N <= MEDIUM) transpose_kept(b);
        if (b.P.kind == REAL) solve_kept_real(b, u, true);
        else solve_kept(b, u, true);
        return;
    }
    for (int r = 0; !b.transposed && r < b.R; r++) if (b.live >> r & 1) keep_all(b, r);
    if (is_softmax) softmax(b);
    else solve_whole(b);
}

// A function of rows in fp16 (2) or bf16 (3) through fp32; 0 is fp32, 1 fp64.
INLINE float from_half(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff, wide;
    if (rest >= 0x7c00) wide = 0x7f800000 | (rest & 0x3ff) << 13;
    else if (rest >= 0x400) wide = (rest << 13) + (112u << 23);
    else { float f = (float)rest * 5.9604644775390625e-8f; memcpy(&wide, &f, 4); }
    wide |= sign;
    float f;
    memcpy(&f, &wide, 4);
    return f;
}
INLINE uint16_t to_half(float f) {
    uint32_t x;
    memcpy(&x, &f, 4);
    uint32_t sign = x >> 16 & 0x8000, rest = x & 0x7fffffff;
    if (rest > 0x7f800000) return sign | 0x7e00;
    if (rest >= 0x477ff000) return sign | 0x7c00;
    if (rest < 0x38800000) {  // adding 1/2 rounds to multiples of 2^-24
        float a;
        memcpy(&a, &rest, 4);
        a += 0.5f;
        memcpy(&x, &a, 4);
        return sign | (uint16_t)(x - 0x3f000000);
    }
    return sign | (uint16_t)((rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13);
}
INLINE float from_brain(uint16_t h) {
    uint32_t wide = (uint32_t)h << 16;
    float f;
    memcpy(&f, &wide, 4);
    return f;
}
INLINE uint16_t to_brain(float f) {
    uint32_t x;
    memcpy(&x, &f, 4);
    if ((x & 0x7fffffff) > 0x7f800000) return x >> 16 | 0x40;
    return (x + 0x7fff + (x >> 16 & 1)) >> 16;
}
void widen(const uint16_t* x, float* to, int64_t n, int dtype) {
    int64_t i = 0;
#if defined(__F16C__)
    if (dtype == 2) for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(x + i))));
#endif
    if (dtype == 2) for (; i < n; i++) to[i] = from_half(x[i]);
    else for (; i < n; i++) to[i] = from_brain(x[i]);
}
void narrow(const float* x, uint16_t* to, int64_t n, int dtype) {
    int64_t i = 0;
#if defined(__F16C__)
    if (dtype == 2) for (; i + 8 <= n; i += 8) _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    if (dtype == 2) for (; i < n; i++) to[i] = to_half(x[i]);
    else for (; i < n; i++) to[i] = to_brain(x[i]);
}

template <class T> int forward(const void* x, const double* s, int64_t s_step, void* out, int64_t R, int64_t N, int64_t steps, int divide, int dtype) {
    constexpr int L = Lanes<T>::count;
    const int64_t width = (N / L + 2) * L;
    // as many rows at once as stay in a second-level cache, at most one per lane
    int64_t at_once = (int64_t)(400000 / sizeof(T)) / width;
    at_once = at_once < 1 ? 1 : at_once > L ? L : at_once;
    const bool half = dtype > 1;
    Buffer<T> v(at_once * width), w(at_once * width), wide(half ? at_once * N : 1);
    Buffer<uint16_t> hit(at_once * width / L);
    if (!v.p || !w.p || !wide.p || !hit.p) return 1;
    for (int64_t r = 0; r < R;) {
        int64_t n = 1;  // rows that share their s
        while (n < at_once && r + n < R && s[(r + n) * s_step] == s[r * s_step]) n++;
        const T* from = half ? wide.p : (const T*)x + r * N;
        if (half) widen((const uint16_t*)x + r * N, (float*)wide.p, n * N, dtype);
        const Power<T> P(s[r * s_step]);
        const bool transposed = N <= SHORT && !(P.kind == REAL && is_steep(P, N));
        Block<T> b{from, half ? wide.p : (T*)out + r * N, N, width, half || r + 2 * n > R ? 0 : n * N, steps, (int)n, divide, transposed, N, P, v.p, w.p, hit.p, {}, {}, {}, 0, {}};
        forward_block(b);
        if (half) narrow((const float*)wide.p, (uint16_t*)out + r * N, n * N, dtype);
        r += n;
    }
    return 0;
}

// g = p^(1-s) on the support, of M vectors in place; NaN stays. SPARSE: vectors of zeros are many, and
// cost nothing.
template <class T, Kind K, bool SPARSE, int M> INLINE void escort(Vec<T>* p, T s) {
    if (K == SOFTMAX) return;
    if (K == REAL) {
        if (SPARSE) {
            Mask some = 0;
            for (int j = 0; j < M; j++) some |= above(p[j], Vec<T>{}) | is_nan(p[j]);
            if (!some) return;
        }
        const T least = sizeof(T) == 4 ? (T)1.2e-38 : (T)2.3e-308;
        Vec<T> f[M], n[M];
        for (int j = 0; j < M; j++) n[j] = exponent_of(p[j], f[j]);
        log2_near_one_of_each<M>(f);
        for (int j = 0; j < M; j++) f[j] = (f[j] + n[j]) * (1 - s);
        exp2_of_each<M>(f);
        for (int j = 0; j < M; j++) p[j] = p[j] > least ? f[j] : p[j];  // below the least normal number it stays
        return;
    }
    for (int j = 0; j < M; j++) p[j] = K == SQUARE ? root(p[j]) : p[j] > 0 ? splat((T)1) : p[j];
}
// -dp/ds at a fixed threshold in x: p L^2 phi(-s L), L = log p, phi(a) = (e^a - 1 - a) / a^2.
template <class T> INLINE Vec<T> curvature(Vec<T> p, Vec<T> g, T s) {
    const T least = sizeof(T) == 4 ? (T)1.2e-38 : (T)2.3e-308;
    Vec<T> log = log2_of(larger(p, splat(least))) * (T)0.6931471805599453, a = log * -s, small = smaller(a, splat((T)1));
    Vec<T> phi = splat((T)1);
    for (int k = sizeof(T) == 4 ? 12 : 20; k >= 3; k--) phi = phi * small * (T)(1.0 / k) + 1;
    Vec<T> series = phi * (T)0.5 * log * log * p;
    Vec<T> plain = (g - p - p * a) / (s * s);
    return p > 0 ? (a < 1 ? series : plain) : p;
}
template <class T, Kind K, bool SPARSE = false> void backward_row(const T* dy, const T* p, T* dx, T* g, int64_t N, T s, double* ds) {
    constexpr int L = Lanes<T>::count;
    const int64_t full = N / L;
    const int rest = N % L;
    Vec<T> mass{}, moment{};
    constexpr int TOGETHER = SPARSE ? 1 : 4;  // the operations of one vector wait for each other
    auto add = [&](int64_t k, auto vectors) {
        constexpr int M = decltype(vectors)::value;
        Vec<T> e[M];
        for (int j = 0; j < M; j++) e[j] = load(p + (k + j) * L);
        escort<T, K, SPARSE, M>(e, s);
        for (int j = 0; j < M; j++) {
            mass += e[j]; moment += e[j] * load(dy + (k + j) * L);
            store(g + (k + j) * L, e[j]);
        }
    };
    int64_t k = 0;
    for (; k + TOGETHER <= full; k += TOGETHER) add(k, std::integral_constant<int, TOGETHER>());
    for (; k < full; k++) add(k, std::integral_constant<int, 1>());
    if (rest) {
        Vec<T> e = load_part(p + full * L, rest, (T)0);
        escort<T, K, SPARSE, 1>(&e, s);
        mass += e; moment += e * load_part(dy + full * L, rest, (T)0);
        store(g + full * L, e);
    }
    const T all = sum<T>(mass), mean = all == 0 ? 0 : sum<T>(moment) / all;
    // the mean is rounded: what the sum of g (dy - mean) is off zero corrects it in ds
    double total = 0, heights = 0, off = 0, weight = 0;
    Vec<T> part_total{}, part_heights{}, part_off{}, part_weight{};
    auto derive = [&](Vec<T> y, Vec<T> e, Vec<T> d) {
        Vec<T> h = curvature<T>(y, e, s);
        part_total -= h * d; part_heights += h; part_off += e * d; part_weight += e;
    };
    auto flush = [&] {  // long sums would lose digits in T
        total += sum<T>(part_total); heights += sum<T>(part_heights); off += sum<T>(part_off); weight += sum<T>(part_weight);
        part_total = part_heights = part_off = part_weight = Vec<T>{};
    };
    for (int64_t k = 0; dx && !ds && k < full; k++) store(dx + k * L, load(g + k * L) * (load(dy + k * L) - mean));
    for (int64_t k = 0; ds && k < full; k++) {
        Vec<T> e = load(g + k * L), d = load(dy + k * L) - mean;
        derive(load(p + k * L), e, d);
        if (k % 16 == 15) flush();
        if (dx) store(dx + k * L, e * d);
    }
    if (rest) {
        Vec<T> e = load(g + full * L), d = load_part(dy + full * L, rest, mean) - mean;
        if (ds) derive(load_part(p + full * L, rest, (T)0), e, d);
        if (dx) store_part(dx + full * L, rest, e * d);
    }
    if (ds) { flush(); *ds = weight == 0 ? 0 : total + heights * off / weight; }
}
template <class T> int backward(const void* dy, const void* p, const double* s, int64_t s_step, void* dx, double* ds, int64_t R, int64_t N, int dtype) {
    constexpr int L = Lanes<T>::count;
    const bool half = dtype > 1;
    const int64_t width = (N / L + 1) * L;
    Buffer<T> g(width), wide(half ? 2 * width : 1);
    if (!g.p || !wide.p) return 1;
    for (int64_t r = 0; r < R; r++) {
        const T *d = (const T*)dy + r * N, *y = (const T*)p + r * N;
        T* to = dx ? (T*)dx + r * N : nullptr;
        if (half) {
            widen((const uint16_t*)dy + r * N, (float*)wide.p, N, dtype);
            widen((const uint16_t*)p + r * N, (float*)wide.p + width, N, dtype);
            d = wide.p; y = wide.p + width; to = dx ? wide.p : nullptr;
        }
        const double s1 = s[r * s_step];
        double* ds1 = ds ? ds + r : nullptr;
        if (s1 == 0) backward_row<T, SOFTMAX>(d, y, to, g.p, N, 0, ds1);
        else if (s1 == 0.5) backward_row<T, SQUARE>(d, y, to, g.p, N, (T)s1, ds1);
        else if (s1 == 1) backward_row<T, LINEAR>(d, y, to, g.p, N, (T)s1, ds1);
        else if (N > SHORT && s1 > 0.3334) backward_row<T, REAL, true>(d, y, to, g.p, N, (T)s1, ds1);
        else backward_row<T, REAL>(d, y, to, g.p, N, (T)s1, ds1);
        if (half && dx) narrow((const float*)wide.p, (uint16_t*)dx + r * N, N, dtype);
    }
    return 0;
}

}  // namespace

extern "C" int OF_SET(rows_forward)(int, const void* x, const double* s, int64_t s_step, void* out, int64_t R, int64_t N, int64_t steps, int divide, int dtype) {
    return dtype == 1 ? forward<double>(x, s, s_step, out, R, N, steps, divide, dtype) : forward<float>(x, s, s_step, out, R, N, steps, divide, dtype);
}
extern "C" int OF_SET(rows_backward)(int, const void* dy, const void* p, const double* s, int64_t s_step, void* dx, double* ds, int64_t R, int64_t N, int dtype) {
    return dtype == 1 ? backward<double>(dy, p, s, s_step, dx, ds, R, N, dtype) : backward<float>(dy, p, s, s_step, dx, ds, R, N, dtype);
}
