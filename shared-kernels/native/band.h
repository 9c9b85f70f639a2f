// The arguments of attention over a band and landmarks; band.py fills them in with ctypes, field by field.
#pragma once
#include "products.h"

struct BandCall {
    // q (B, H, N_q, D), k and v (B, H_kv, N_k, D) by steps of batch, head and token
    const real *q, *k, *v;
    real *o;                   // (B, H, N_q, D)
    real *top, *lse;           // (B, H, N_q), the largest score, and to the base 2 of scores less it
    const real* windows;       // (B, H, N_q), in tokens
    const int32_t* landmarks;   // (B, H, lists, K); negative: empty
    const real* bias;          // as landmarks, log of a landmark's factor, or null
    const int64_t *starts, *lists;  // (N_q): first visible key and list of landmarks of each query
    // backward only: d_out (B, H, N_q, D), dq like it; dk and dv (B, H_kv, N_k, D rounded up to 16),
    // added to; d_windows and d_bias (added to) may be null
    const real* d_out;
    real *dq, *dk, *dv, *d_windows, *d_bias;
    int64_t H, H_kv, N_q, N_k, D, n_lists, K;
    int64_t q_step[3], k_step[3], v_step[3];
    double scale, ramp;
};
