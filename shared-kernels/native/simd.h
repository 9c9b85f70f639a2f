// Vectors of float and double for every instruction set this library is compiled for.
//
// Each source is compiled once per set (hatch_build.py); the macros of the compiler say which one it
// is. The arithmetic is written once with the vector types of GCC and clang; only what they have no
// operator for (maxima, roots, compaction) is written per set.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

// in two steps, so that a name that is a macro itself is replaced first
#define JOINED(name, suffix) name##suffix
#define WITH_SUFFIX(name, suffix) JOINED(name, suffix)
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define OF_SET(name) WITH_SUFFIX(name, _avx512)
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#define OF_SET(name) WITH_SUFFIX(name, _avx2)
#else
#define VECTOR_BYTES 16
#define OF_SET(name) WITH_SUFFIX(name, _base)
#endif
#define INLINE static inline __attribute__((always_inline))

namespace {

typedef float vfloat __attribute__((vector_size(VECTOR_BYTES)));
typedef double vdouble __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t vint32 __attribute__((vector_size(VECTOR_BYTES)));
typedef int64_t vint64 __attribute__((vector_size(VECTOR_BYTES)));
typedef vfloat vfloat_any __attribute__((aligned(4), may_alias));
typedef vint32 vint32_any __attribute__((aligned(4), may_alias));
typedef vdouble vdouble_any __attribute__((aligned(8), may_alias));

template <class T> struct Lanes;
template <> struct Lanes<float> {
    typedef vfloat V;
    typedef vfloat_any Any;
    typedef vint32 I;
    static constexpr int count = VECTOR_BYTES / 4;
    static constexpr float epsilon = 1.1920929e-7f;
};
template <> struct Lanes<double> {
    typedef vdouble V;
    typedef vdouble_any Any;
    typedef vint64 I;
    static constexpr int count = VECTOR_BYTES / 8;
    static constexpr double epsilon = 2.220446049250313e-16;
};
template <class T> using Vec = typename Lanes<T>::V;

template <class T> INLINE Vec<T> load(const T* p) { return *(const typename Lanes<T>::Any*)p; }
template <class T> INLINE void store(T* p, Vec<T> x) { *(typename Lanes<T>::Any*)p = x; }
template <class T> INLINE Vec<T> splat(T x) { return x - Vec<T>{}; }

typedef uint32_t Mask;  // one bit per lane
INLINE int bits(Mask m) { return __builtin_popcount(m); }

#if VECTOR_BYTES == 64
INLINE vfloat larger(vfloat a, vfloat b) { return (vfloat)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vdouble larger(vdouble a, vdouble b) { return (vdouble)_mm512_max_pd((__m512d)a, (__m512d)b); }
INLINE vfloat smaller(vfloat a, vfloat b) { return (vfloat)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE vdouble smaller(vdouble a, vdouble b) { return (vdouble)_mm512_min_pd((__m512d)a, (__m512d)b); }
INLINE vfloat root(vfloat a) { return (vfloat)_mm512_sqrt_ps((__m512)a); }
INLINE vdouble root(vdouble a) { return (vdouble)_mm512_sqrt_pd((__m512d)a); }
INLINE Mask above(vfloat a, vfloat b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ); }
INLINE Mask above(vdouble a, vdouble b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ); }
INLINE Mask is_nan(vfloat a) { return _mm512_cmp_ps_mask((__m512)a, (__m512)a, _CMP_UNORD_Q); }
INLINE Mask is_nan(vdouble a) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)a, _CMP_UNORD_Q); }
// The lanes of `m` side by side at p; a whole vector is written.
INLINE void compress(float* p, Mask m, vfloat x) { _mm512_storeu_ps(p, _mm512_maskz_compress_ps((__mmask16)m, (__m512)x)); }
INLINE void compress(double* p, Mask m, vdouble x) { _mm512_storeu_pd(p, _mm512_maskz_compress_pd((__mmask8)m, (__m512d)x)); }
INLINE void compress(int32_t* p, Mask m, vint32 x) { _mm512_storeu_si512(p, _mm512_maskz_compress_epi32((__mmask16)m, (__m512i)x)); }
// The inverse: entries at p go to the lanes of `m`, zeros to the others.
INLINE vfloat expand(const float* p, Mask m) { return (vfloat)_mm512_maskz_expand_ps((__mmask16)m, _mm512_loadu_ps(p)); }
INLINE vdouble expand(const double* p, Mask m) { return (vdouble)_mm512_maskz_expand_pd((__mmask8)m, _mm512_loadu_pd(p)); }
INLINE vfloat load_part(const float* p, int n, float other) {
    return (vfloat)_mm512_mask_loadu_ps((__m512)splat(other), (__mmask16)((1u << n) - 1), p);
}
INLINE vdouble load_part(const double* p, int n, double other) {
    return (vdouble)_mm512_mask_loadu_pd((__m512d)splat(other), (__mmask8)((1u << n) - 1), p);
}
#else
#if VECTOR_BYTES == 32
INLINE vfloat larger(vfloat a, vfloat b) { return (vfloat)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vdouble larger(vdouble a, vdouble b) { return (vdouble)_mm256_max_pd((__m256d)a, (__m256d)b); }
INLINE vfloat smaller(vfloat a, vfloat b) { return (vfloat)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE vdouble smaller(vdouble a, vdouble b) { return (vdouble)_mm256_min_pd((__m256d)a, (__m256d)b); }
INLINE vfloat root(vfloat a) { return (vfloat)_mm256_sqrt_ps((__m256)a); }
INLINE vdouble root(vdouble a) { return (vdouble)_mm256_sqrt_pd((__m256d)a); }
INLINE Mask above(vfloat a, vfloat b) { return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)); }
INLINE Mask above(vdouble a, vdouble b) { return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_GT_OQ)); }
INLINE Mask is_nan(vfloat a) { return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)a, _CMP_UNORD_Q)); }
INLINE Mask is_nan(vdouble a) { return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)a, _CMP_UNORD_Q)); }
// For each set of lanes: which lane comes at each place after compaction, and before it.
struct Orders {
    int32_t packed[256][8], spread[256][8], on[256][8];
};
constexpr Orders all_orders() {
    Orders o{};
    for (int m = 0; m < 256; m++)
        for (int lane = 0, n = 0; lane < 8; lane++) {
            o.spread[m][lane] = n;
            o.on[m][lane] = m >> lane & 1 ? -1 : 0;
            if (m >> lane & 1) o.packed[m][n++] = lane;
        }
    return o;
}
constexpr Orders orders = all_orders();
INLINE __m256i order(const int32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
INLINE void compress(float* p, Mask m, vfloat x) { _mm256_storeu_ps(p, _mm256_permutevar8x32_ps((__m256)x, order(orders.packed[m]))); }
INLINE void compress(int32_t* p, Mask m, vint32 x) { _mm256_storeu_si256((__m256i*)p, _mm256_permutevar8x32_epi32((__m256i)x, order(orders.packed[m]))); }
INLINE vfloat expand(const float* p, Mask m) {
    __m256 x = _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), order(orders.spread[m]));
    return (vfloat)_mm256_and_ps(x, _mm256_castsi256_ps(order(orders.on[m])));
}
#else
INLINE vfloat larger(vfloat a, vfloat b) { return a > b ? a : b; }
INLINE vdouble larger(vdouble a, vdouble b) { return a > b ? a : b; }
INLINE vfloat smaller(vfloat a, vfloat b) { return a < b ? a : b; }
INLINE vdouble smaller(vdouble a, vdouble b) { return a < b ? a : b; }
INLINE vfloat root(vfloat a) { for (int i = 0; i < 4; i++) a[i] = sqrtf(a[i]); return a; }
INLINE vdouble root(vdouble a) { for (int i = 0; i < 2; i++) a[i] = sqrt(a[i]); return a; }
INLINE Mask set_bits(vint32 m) { return (m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8); }
INLINE Mask set_bits(vint64 m) { return (m[0] & 1) | (m[1] & 2); }
INLINE Mask above(vfloat a, vfloat b) { return set_bits((vint32)(a > b)); }
INLINE Mask above(vdouble a, vdouble b) { return set_bits((vint64)(a > b)); }
INLINE Mask is_nan(vfloat a) { return set_bits((vint32)(a != a)); }
INLINE Mask is_nan(vdouble a) { return set_bits((vint64)(a != a)); }
INLINE void compress(float* p, Mask m, vfloat x) { for (int i = 0, n = 0; i < 4; i++) { p[n] = x[i]; n += m >> i & 1; } }
INLINE void compress(int32_t* p, Mask m, vint32 x) { for (int i = 0, n = 0; i < 4; i++) { p[n] = x[i]; n += m >> i & 1; } }
INLINE vfloat expand(const float* p, Mask m) { vfloat x{}; for (int i = 0; i < 4; i++) if (m >> i & 1) x[i] = *p++; return x; }
#endif
INLINE void compress(double* p, Mask m, vdouble x) {
    for (int i = 0, n = 0; i < Lanes<double>::count; i++) { p[n] = x[i]; n += m >> i & 1; }
}
INLINE vdouble expand(const double* p, Mask m) {
    vdouble x{};
    for (int i = 0; i < Lanes<double>::count; i++) if (m >> i & 1) x[i] = *p++;
    return x;
}
template <class T> INLINE Vec<T> load_part(const T* p, int n, T other) {
    T t[Lanes<T>::count];
    for (int i = 0; i < Lanes<T>::count; i++) t[i] = i < n ? p[i] : other;
    return load(t);
}
#endif
template <class T> INLINE void store_part(T* p, int n, Vec<T> x) {
    T t[Lanes<T>::count];
    store(t, x);
    memcpy(p, t, n * sizeof(T));
}

// 2^x for -126 <= x < 128 (double: -1022, 1024). A polynomial of least largest error on [-1/2, 1/2].
// M vectors at once, in place: the operations of one vector wait for each other, those of others do not.
#define EACH _Pragma("GCC unroll 4") for (int j = 0; j < M; j++)
template <int M> INLINE void exp2_of_each(vfloat* x) {
    const float big = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers
    vfloat t[M], y[M];
    EACH t[j] = x[j] + big;
    EACH x[j] -= t[j] - big;
    EACH y[j] = splat(0.00015353362f);
    for (float c : {0.00133988745f, 0.00961843736f, 0.0555033247f, 0.240226479f, 0.693147203f, 1.0f}) EACH y[j] = y[j] * x[j] + c;
    EACH x[j] = (vfloat)((vint32)y[j] + ((vint32)t[j] << 23));
}
INLINE vfloat exp2_of(vfloat x) {
    exp2_of_each<1>(&x);
    return x;
}
INLINE vdouble exp2_of(vdouble x) {
    const double big = 6755399441055744.0;  // 1.5 * 2^52
    vdouble t = x + big, r = (x - (t - big)) * 0.6931471805599453, y = splat(1 / 6227020800.0);
    const double factorial[] = {479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0, 720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0};
    for (double f : factorial) y = y * r + 1 / f;
    return (vdouble)((vint64)y + ((vint64)t << 52));
}
// log2(1 + f) for 1 + f in [1/sqrt 2, sqrt 2], exact to rounding near 0.
template <int M> INLINE void log2_near_one_of_each(vfloat* f) {
    vfloat y[M];
    EACH y[j] = splat(0.125837044f);
    for (float c : {-0.207269794f, 0.215715618f, -0.238944816f, 0.287916246f, -0.360703683f, 0.480910643f, -0.721347347f, 1.442695f}) EACH y[j] = y[j] * f[j] + c;
    EACH f[j] *= y[j];
}
INLINE vfloat log2_near_one(vfloat f) {
    log2_near_one_of_each<1>(&f);
    return f;
}
INLINE vdouble log2_near_one(vdouble f) {  // 2 atanh(f / (2 + f))
    vdouble u = f / (f + 2.0), u2 = u * u, y = splat(1 / 25.0);
    for (int k = 23; k >= 1; k -= 2) y = y * u2 + 1.0 / k;
    return u * y * 2.8853900817779268;
}
template <int M> INLINE void exp2_of_each(vdouble* x) { EACH x[j] = exp2_of(x[j]); }
template <int M> INLINE void log2_near_one_of_each(vdouble* f) { EACH f[j] = log2_near_one(f[j]); }
#undef EACH
// x = 2^n (1 + f) with 1 + f near one; x positive and normal.
INLINE vfloat exponent_of(vfloat x, vfloat& f) {
    vint32 n = ((vint32)x - 0x3f3504f3) >> 23;
    f = (vfloat)((vint32)x - (n << 23)) - 1.0f;
    return __builtin_convertvector(n, vfloat);
}
INLINE vdouble exponent_of(vdouble x, vdouble& f) {
    vint64 n = ((vint64)x - 0x3fe6a09e667f3bcd) >> 52;
    f = (vdouble)((vint64)x - (n << 52)) - 1.0;
    return __builtin_convertvector(n, vdouble);
}
template <class V> INLINE V log2_of(V x) {
    V f, n = exponent_of(x, f);
    return n + log2_near_one(f);
}
// log2(1 + f), exact to rounding near 0; 1 + f positive and normal.
template <class V> INLINE V log2_of_one_and(V f) {
    V g, n = exponent_of(1 + f, g);
    return n + log2_near_one(n == 0 ? f : g);
}
// 1 / x to about rounding; quick where a division is slow.
INLINE vfloat reciprocal(vfloat x) {
#if VECTOR_BYTES == 64
    const vfloat r = (vfloat)_mm512_rcp14_ps((__m512)x);
    return r * (2.0f - x * r);
#elif VECTOR_BYTES == 32
    const vfloat r = (vfloat)_mm256_rcp_ps((__m256)x);
    return r * (2.0f - x * r);
#else
    return 1.0f / x;
#endif
}
INLINE vdouble reciprocal(vdouble x) { return 1.0 / x; }
template <class V> INLINE V absolute(V x) { return larger(x, -x); }
// 2^x - 1, exact to rounding near 0.
INLINE vfloat exp2_less_one(vfloat x) {
    vfloat y = x * (0.693147203f + x * (0.240226479f + x * (0.0555033247f + x * (0.00961843736f + x * (0.00133988745f + x * 0.00015353362f)))));
    return absolute(x) < 0.5f ? y : exp2_of(x) - 1.0f;
}
INLINE vdouble exp2_less_one(vdouble x) {
    vdouble r = x * 0.6931471805599453, y = splat(1.0);
    for (int k = 16; k >= 2; k--) y = y * r * (1.0 / k) + 1.0;
    return absolute(x) < 0.5 ? y * r : exp2_of(x) - 1.0;
}

template <class V, int STEP, size_t... I> INLINE V moved(V a, std::index_sequence<I...>) { return __builtin_shufflevector(a, a, ((I + STEP) % sizeof...(I))...); }
// Halves are added to halves, down to one lane.
template <class T, int STEP = Lanes<T>::count / 2> INLINE T sum(Vec<T> a) {
    if constexpr (STEP == 0) return a[0];
    else return sum<T, STEP / 2>(a + moved<Vec<T>, STEP>(a, std::make_index_sequence<Lanes<T>::count>()));
}
// The largest number. Where a lane is NaN the result may be NaN or not.
template <class T, int STEP = Lanes<T>::count / 2> INLINE T largest(Vec<T> a) {
    if constexpr (STEP == 0) return a[0];
    else return largest<T, STEP / 2>(larger(a, moved<Vec<T>, STEP>(a, std::make_index_sequence<Lanes<T>::count>())));
}
// The largest number, lane after lane. A NaN in the first lane stays, others are passed over.
template <class T> INLINE T maximum(Vec<T> a) {
    T m = a[0];
    for (int i = 1; i < Lanes<T>::count; i++) m = a[i] > m ? a[i] : m;
    return m;
}

// Lane i of the result is the sum (or the maximum) of the lanes of a[i]; every row in the same order.
// Every second piece of STEP lanes comes from b. OWN: each from its own place; else from the place beside it.
constexpr int taken_from(int i, int step, int lanes, bool own) {
    return i / step % 2 ? lanes + i - (own ? 0 : step) : i + (own ? 0 : step);
}
template <class V, int STEP, bool OWN, size_t... I>
INLINE V halves(V a, V b, std::index_sequence<I...>) { return __builtin_shufflevector(a, b, taken_from(I, STEP, sizeof...(I), OWN)...); }
template <class T, bool MAX, int STEP> INLINE void combine(Vec<T>* a) {
    constexpr int L = Lanes<T>::count;
    if constexpr (STEP < L) {
        typedef std::make_index_sequence<L> All;
#pragma GCC unroll 16
        for (int i = 0; i < L / (2 * STEP); i++) {
            Vec<T> x = halves<Vec<T>, STEP, true>(a[2 * i], a[2 * i + 1], All()), y = halves<Vec<T>, STEP, false>(a[2 * i], a[2 * i + 1], All());
            a[i] = MAX ? larger(x, y) : x + y;
        }
        combine<T, MAX, 2 * STEP>(a);
    }
}
template <class T, bool MAX> INLINE Vec<T> across(const Vec<T>* a) {
    Vec<T> t[Lanes<T>::count];
    for (int i = 0; i < Lanes<T>::count; i++) t[i] = a[i];
    combine<T, MAX, 1>(t);
    return t[0];
}

// As many vectors as lanes: lane j of a[i] and lane i of a[j] change places.
template <class V, int STEP, bool UPPER, size_t... I> INLINE V exchanged(V a, V b, std::index_sequence<I...>) {
    constexpr int L = sizeof...(I);
    if constexpr (UPPER) return __builtin_shufflevector(a, b, (int(I) & STEP ? L + int(I) : int(I) + STEP)...);
    else return __builtin_shufflevector(a, b, (int(I) & STEP ? L + int(I) - STEP : int(I))...);
}
template <class T, int STEP = 1> INLINE void transpose(Vec<T>* a) {
    constexpr int L = Lanes<T>::count;
    if constexpr (STEP < L) {
        typedef std::make_index_sequence<L> All;
#pragma GCC unroll 16
        for (int i = 0; i < L; i++) {
            if (i & STEP) continue;
            const Vec<T> x = a[i], y = a[i + STEP];
            a[i] = exchanged<Vec<T>, STEP, false>(x, y, All());
            a[i + STEP] = exchanged<Vec<T>, STEP, true>(x, y, All());
        }
        transpose<T, 2 * STEP>(a);
    }
}

// Scratch memory at a multiple of 64 bytes; `p` is null if there was none.
template <class T> struct Buffer {
    T* p;
    explicit Buffer(int64_t n) : start(malloc((size_t)n * sizeof(T) + 256)) {
        p = start ? (T*)(((uintptr_t)start + 63) & ~(uintptr_t)63) : nullptr;
    }
    ~Buffer() { free(start); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

private:
    void* start;
};

}  // namespace
