// The arguments of decoding over pages; pages.py fills them in with ctypes, field by field.
#pragma once
#include <stdint.h>

struct PagesCall {
    // fp32, contiguous: q (B, H, n, D), keys (H_kv, pages, size, D), values (H_kv, pages, size, D_v),
    // bounds (H_kv, pages, 2 D): the keys' maximum and then their minimum, both rounded outwards
    const float *q, *keys, *values, *bounds;
    float* out;            // (B, H, n, D_v), zeros
    int64_t* read;         // (B, H_kv): pages read; -1 where bounds do not separate and nothing is said
    const int64_t* table;  // (B, most): the pages of each sequence in order
    const int64_t* lengths;  // (B)
    const double* s;       // (H)
    const float *slopes, *s_aux;  // (H), or null
    int64_t B, H, H_kv, n, D, D_v, pages, size, most, window;  // window < 0: none
    float scale, softcap;  // softcap 0: none
};
