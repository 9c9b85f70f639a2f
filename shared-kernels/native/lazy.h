// What the functions of lazy attention are told; the door fills it in with ctypes, field by field.
#pragma once
#include <stdint.h>

struct LazyCall {
    // fp32, contiguous: q (B, H, N, D), k (B, H_kv, N, D), v (B, H_kv, N, D_v), o (B, H, N, D_v)
    const float *q, *k, *v;
    float *o, *lse;          // lse (B, H, N): log2 of the sum of the softmax, NaN for a row that is no number
    const float *bias, *tau; // (H, window + 1), (H)
    const uint8_t* mask;     // by mask_step, or null: nonzero where a key is seen
    const int64_t* lengths;  // (B)
    // backward only; d_bias (B, H, window + 1) and d_tau (B, H, N) may be null
    const float* d_out;
    float *dq, *dk, *dv;
    double* d_bias;
    float* d_tau;
    int64_t H, H_kv, N, D, D_v, window;
    int64_t mask_step[4];
    float scale;
};
