// The arguments of the attention functions; attention.py fills them in with ctypes, field by field.
#pragma once
#include "products.h"

struct AttentionCall {
    // contiguous: q (B, H, N_q, D), k (B, H_kv, N_k, D), v (B, H_kv, N_k, D_v), o (B, H, N_q, D_v)
    const real *q, *k, *v;
    real *o;
    // (B, H, N_q): the largest score; how far above it, in units of s x, the score lies whose weight is 1
    // before division (infinity where no key is seen); and one over the sum that weights are divided by
    real *top, *unit, *inverse;
    // the kept weights: room * N_q per head of queries, and how many per query (-1: not kept); may be null
    int32_t* keys;
    real* p;
    int32_t* counts;
    const double* s;       // (H)
    const real* slopes;   // (H), or null
    const uint8_t* mask;   // by mask_step, or null: nonzero where a key is seen
    const real* bias;     // by bias_step, or null
    const int64_t* segments;  // (n, 5): batch, first query, queries, first key, keys
    // backward only; d_s, d_slope, d_aux and dbias may be null. dbias (by dbias_step) is added to
    const real* d_out;
    real *dq, *dk, *dv, *d_s, *d_slope, *dbias;
    // (H), the score of one more key per head, whose value is 0, or null; and its gradient by query
    const real* s_aux;
    real* d_aux;
    int64_t H, H_kv, N_q, N_k, D, D_v, room, window;  // window < 0: none
    int64_t mask_step[4], bias_step[4], dbias_step[4];
    double scale, softcap;  // softcap: scale q.k becomes softcap tanh(scale q.k / softcap); 0: none
    int causal, skip, steps;  // steps: the most that the solver of a threshold takes
    int coarse;  // whether the processor multiplies bytes (AVX-512 VNNI): keys are then found by coarse scores
};
