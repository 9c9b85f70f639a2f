// The threshold of sparse weights: p_i = [1 + v_i - u]_+^(1/s) with sum 1, where v = s x, less
// anything: u is the v whose weight would be 1.
//
// With p = 1/s, b = [1 + v - u]_+, F = sum b^p and G = sum b^(p-1), Newton's method on the p-norm
//     u <- u + (F - F^(1-s)) / G
// rises to the root from anywhere below it, and one step leads from above it to below. The root of a
// part of the entries, or of a larger power (b <= 1), lies below the root.
#pragma once
#include "simd.h"

namespace {

// p = 1, p = 2, a whole p from 3 to 20, and any other; SOFTMAX is s = 0.
enum Kind { LINEAR, SQUARE, WHOLE, REAL, SOFTMAX };
constexpr int LARGEST_WHOLE = 20;

template <class T> struct Power {
    T s, p;
    int n;     // the least whole number >= p
    Kind kind;
    T lowest;  // f = b - 1 below which a weight is nothing
    explicit Power(double s_) : s((T)s_), p((T)(s_ > 0 ? 1 / s_ : INFINITY)), n(0), kind(SOFTMAX), lowest(0) {
        if (s_ <= 0) return;
        double exact = 1 / s_;
        n = exact < 1e6 ? (int)ceil(exact - 1e-9) : 1000000;
        bool whole = n <= LARGEST_WHOLE && fabs(exact - n) < 1e-9;
        kind = !whole ? REAL : n == 1 ? LINEAR : n == 2 ? SQUARE : WHOLE;
        const double least = sizeof(T) == 4 ? -115 : -900;
        lowest = (T)expm1(s_ * least * 0.6931471805599453);
        const T bottom = sizeof(T) == 4 ? (T)-0.9999999 : (T)-0.9999999999999999;
        if (lowest < bottom) lowest = bottom;
    }
    bool is_bounded() const { return kind != SOFTMAX && n <= LARGEST_WHOLE; }
};

template <int N, class V> INLINE V whole_power(V b) {
    if constexpr (N == 0) return b - b + 1;
    else if constexpr (N == 1) return b;
    else if constexpr (N % 2) return whole_power<N - 1>(b) * b;
    else { V h = whole_power<N / 2>(b); return h * h; }
}

// Sums of b^N, b^(N-1) and, for N > 2, b^(N-2) over nv vectors, lane by lane; b^N is kept in w if there is a w.
// U is T where the vectors are entries of one row, Vec<T> where each lane is a row of its own.
template <class T> struct Sums { Vec<T> F, G, H; };
template <class T, int N, class U> Sums<T> whole_sums(const T* v, int64_t nv, U u, T* w) {
    constexpr int L = Lanes<T>::count;
    Vec<T> f{}, g{}, h{}, f2{}, g2{}, h2{};
    const U c = 1 - u;
    int64_t k = 0;
    if (!w) {
        for (; k + 1 < nv; k += 2) {
            Vec<T> a = larger(load(v + k * L) + c, Vec<T>{}), b = larger(load(v + (k + 1) * L) + c, Vec<T>{});
            Vec<T> x = whole_power<N - 2>(a), y = whole_power<N - 2>(b);
            if constexpr (N > 2) { h += x; h2 += y; x *= a; y *= b; }
            else { x = a; y = b; }
            g += x; f += x * a; g2 += y; f2 += y * b;
        }
    }
    for (; k < nv; k++) {
        Vec<T> b = larger(load(v + k * L) + c, Vec<T>{}), z = whole_power<N - 2>(b), y = z * b, x = y * b;
        h += z; g += y; f += x;
        if (w) store(w + k * L, x);
    }
    return {f + f2, g + g2, h + h2};
}
template <class T, class U> using WholeSums = Sums<T> (*)(const T*, int64_t, U, T*);
template <class T, class U, size_t... I> constexpr WholeSums<T, U> pick(int n, std::index_sequence<I...>) {
    constexpr WholeSums<T, U> all[] = {whole_sums<T, (int)I + 2, U>...};
    return all[n - 2];
}
// The function for powers n and n - 1, 2 <= n <= LARGEST_WHOLE.
template <class T, class U = T> INLINE WholeSums<T, U> sums_for(int n) { return pick<T, U>(n < 2 ? 2 : n, std::make_index_sequence<LARGEST_WHOLE - 1>()); }

// Of b = 1 + f it makes b^(p-2), from which two products lead to b^p, without a division; two vectors at
// once (`exp2_of_each`).
template <class T, class U> Sums<T> real_sums(const T* v, int64_t nv, U u, T* w, const Power<T>& P) {
    constexpr int L = Lanes<T>::count;
    const T lowest = P.lowest, exponent = P.p - 2;
    Vec<T> F{}, G{}, H{};
    auto add = [&](int64_t k, auto vectors) {
        constexpr int M = decltype(vectors)::value;
        Vec<T> x[M], f[M], h[M], n[M];
        for (int j = 0; j < M; j++) {
            x[j] = load(v + (k + j) * L) - u;
            f[j] = larger(x[j], splat(lowest));
        }
        for (int j = 0; j < M; j++) {
            n[j] = exponent_of(f[j] + 1, h[j]);
            h[j] = n[j] == 0 ? f[j] : h[j];  // exact near 1
        }
        log2_near_one_of_each<M>(h);
        for (int j = 0; j < M; j++) h[j] = (h[j] + n[j]) * exponent;
        exp2_of_each<M>(h);
        for (int j = 0; j < M; j++) {
            const Vec<T> y = x[j] > lowest ? h[j] : Vec<T>{}, g = y * (f[j] + 1), a = g * (f[j] + 1);
            H += y; G += g; F += a;
            if (w) store(w + (k + j) * L, a);
        }
    };
    int64_t k = 0;
    for (; k + 4 <= nv; k += 4) add(k, std::integral_constant<int, 4>());
    for (; k < nv; k++) add(k, std::integral_constant<int, 1>());
    return {F, G, H};
}
template <class T, class U> Sums<T> linear_sums(const T* v, int64_t nv, U u, T* w) {
    constexpr int L = Lanes<T>::count;
    Vec<T> F{}, G{};
    const U c = 1 - u;
    for (int64_t k = 0; k < nv; k++) {
        Vec<T> b = larger(load(v + k * L) + c, Vec<T>{});
        F += b; G += b > 0 ? splat((T)1) : Vec<T>{};
        if (w) store(w + k * L, b);
    }
    return {F, G, Vec<T>{}};
}
template <class T, class U> INLINE Sums<T> sums_of(const T* v, int64_t nv, U u, T* w, const Power<T>& P) {
    switch (P.kind) {
        case LINEAR: return linear_sums(v, nv, u, w);
        case SQUARE: return whole_sums<T, 2, U>(v, nv, u, w);
        case WHOLE: return sums_for<T, U>(P.n)(v, nv, u, w);
        default: return real_sums(v, nv, u, w, P);
    }
}
template <class T> INLINE Vec<T> newton_step(Vec<T> F, Vec<T> G, const Power<T>& P) {
    if (P.kind == SQUARE) return (F - root(F)) / G;
    if (P.kind == LINEAR) return (F - 1) / G;
    return -F * exp2_less_one(-P.s * log2_of(F)) / G;
}
// The same of numbers: of one row, what a vector would be waited for.
template <class T> INLINE T newton_step(T F, T G, const Power<T>& P) {
    if (P.kind == SQUARE) return (F - sqrt(F)) / G;
    return newton_step<T>(splat(F), splat(G), P)[0];
}
// With power n on nv vectors of v: a step that leads to, and never above, the root of power n.
template <class T> INLINE Vec<T> whole_step(Vec<T> F, Vec<T> G, int n) {
    return larger(n == 2 ? (F - root(F)) / G : -F * exp2_less_one(log2_of(F) * (T)(-1.0 / n)) / G, Vec<T>{});
}
// The |F - 1| from which one more step is exact to rounding.
template <class T> INLINE T tolerance(const Power<T>& P) {
    if (sizeof(T) == 8) return P.s > (T)0.55 ? 1e-13 : 1e-9;
    return P.s > (T)0.55 ? 2e-6f : P.kind == SQUARE ? 1e-3f : 2e-4f;
}

}  // namespace
