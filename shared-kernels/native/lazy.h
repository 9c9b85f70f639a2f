// The arguments of the functions of lazy attention; lazy.py fills them in with ctypes, field by field.
#pragma once
#include "products.h"

struct LazyCall {
    // contiguous: q (B, H, N, D), k (B, H_kv, N, D), v (B, H_kv, N, D_v), o (B, H, N, D_v)
    const real *q, *k, *v;
    real *o, *lse;          // lse (B, H, N): log2 of the sum of e^(score - largest), NaN for a row that is no number
    const real *bias, *tau; // (H, window + 1), (H)
    const uint8_t* mask;     // by mask_step, or null: nonzero where a key is seen
    const int64_t* lengths;  // (B)
    // backward only; d_bias (B, H, window + 1) and d_tau (B, H, N) may be null
    const real* d_out;
    real *dq, *dk, *dv;
    double* d_bias;
    real* d_tau;
    int64_t H, H_kv, N, D, D_v, window;
    int64_t mask_step[4];
    double scale;
};
