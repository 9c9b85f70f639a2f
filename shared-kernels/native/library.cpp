// What library.py calls: which instruction sets this processor has, and each function for the set asked for.
#include <stdint.h>
#if defined(__x86_64__) || defined(_M_X64)
#define IS_X86 1
#include <cpuid.h>
#else
#define IS_X86 0
#endif
#if defined(_WIN32)
#define PUBLIC extern "C" __declspec(dllexport)
#else
#define PUBLIC extern "C" __attribute__((visibility("default")))
#endif

// The widest set: 0 is the compiler's own (SSE2, NEON), 1 AVX2 with FMA, 2 AVX-512 (F, DQ, VL, BW).
// cpuid and xgetbv themselves: __builtin_cpu_supports answers no in libraries that some linkers make.
PUBLIC int widest_set() {
#if IS_X86
    unsigned a, b, c, d, enabled, high;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    const unsigned fma = 1u << 12, osxsave = 1u << 27, f16c = 1u << 29;
    if ((c & (fma | osxsave | f16c)) != (fma | osxsave | f16c)) return 0;
    __asm__ volatile("xgetbv" : "=a"(enabled), "=d"(high) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    const unsigned avx2 = 1u << 5 | 1u << 8, avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    if ((enabled & 0x6) != 0x6 || (b & avx2) != avx2) return 0;
    return (enabled & 0xe6) == 0xe6 && (b & avx512) == avx512 ? 2 : 1;
#else
    return 0;
#endif
}
// Whether the processor has the products of bytes that the AVX-512 functions can do with or without.
PUBLIC int has_byte_products() {
#if IS_X86
    unsigned a, b, c, d;
    return widest_set() == 2 && __get_cpuid_count(7, 0, &a, &b, &c, &d) && c & 1u << 11;
#else
    return 0;
#endif
}
// Raised whenever a signature changes: library.py refuses a library of another version.
PUBLIC int interface_version() { return 10; }

#if IS_X86
#define FUNCTION(name, parameters, arguments)                                                        \
    extern "C" int name##_avx512 parameters;                                                         \
    extern "C" int name##_avx2 parameters;                                                           \
    extern "C" int name##_base parameters;                                                           \
    PUBLIC int name parameters {                                                                     \
        return set == 2 ? name##_avx512 arguments : set == 1 ? name##_avx2 arguments : name##_base arguments; \
    }
#else
#define FUNCTION(name, parameters, arguments) \
    extern "C" int name##_base parameters;    \
    PUBLIC int name parameters { return name##_base arguments; }
#endif
FUNCTION(rows_forward,
         (int set, const void* x, const double* s, int64_t s_step, void* out, int64_t R, int64_t N, int64_t steps, int divide, int dtype),
         (set, x, s, s_step, out, R, N, steps, divide, dtype))
FUNCTION(rows_backward,
         (int set, const void* dy, const void* p, const double* s, int64_t s_step, void* dx, double* ds, int64_t R, int64_t N, int dtype),
         (set, dy, p, s, s_step, dx, ds, R, N, dtype))
struct AttentionCall;
FUNCTION(attention_forward, (int set, const AttentionCall* c, int64_t first, int64_t last), (set, c, first, last))
FUNCTION(attention_backward, (int set, const AttentionCall* c, int64_t first, int64_t last), (set, c, first, last))
FUNCTION(attention_double_forward, (int set, const AttentionCall* c, int64_t first, int64_t last), (set, c, first, last))
FUNCTION(attention_double_backward, (int set, const AttentionCall* c, int64_t first, int64_t last), (set, c, first, last))
struct PagesCall;
FUNCTION(pages_decode, (int set, const PagesCall* c, int64_t first, int64_t last), (set, c, first, last))
struct PairsCall;
FUNCTION(pairs_product, (int set, const PairsCall* c, int64_t first, int64_t last), (set, c, first, last))
struct LazyCall;
FUNCTION(lazy_forward, (int set, const LazyCall* c, int64_t first, int64_t last), (set, c, first, last))
FUNCTION(lazy_backward, (int set, const LazyCall* c, int64_t first, int64_t last), (set, c, first, last))
FUNCTION(lazy_double_forward, (int set, const LazyCall* c, int64_t first, int64_t last), (set, c, first, last))
FUNCTION(lazy_double_backward, (int set, const LazyCall* c, int64_t first, int64_t last), (set, c, first, last))
struct BandCall;
FUNCTION(band_forward, (int set, const BandCall* c, int64_t first, int64_t last), (set, c, first, last))
FUNCTION(band_backward, (int set, const BandCall* c, int64_t first, int64_t last), (set, c, first, last))
FUNCTION(band_double_forward, (int set, const BandCall* c, int64_t first, int64_t last), (set, c, first, last))
FUNCTION(band_double_backward, (int set, const BandCall* c, int64_t first, int64_t last), (set, c, first, last))
struct NeighboursCall;
FUNCTION(neighbours_search, (int set, const NeighboursCall* c, int64_t first, int64_t last), (set, c, first, last))
struct AssociationCall;
FUNCTION(association_forward, (int set, const AssociationCall* c, int64_t first, int64_t last), (set, c, first, last))
FUNCTION(association_backward, (int set, const AssociationCall* c, int64_t first, int64_t last), (set, c, first, last))
