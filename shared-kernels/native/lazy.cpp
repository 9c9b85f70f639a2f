// Lazy attention: weights [softmax(scale q.k + bias by distance) + tau / i]_+ of the i-th query, times v.
//
// Every key of the past enters the softmax, so that no tile is skipped before its scores. Blocks of 24
// queries are finished one after the other; the backward pass makes their scores again. A score is
// multiplied by log2(e) only beside the largest of its row: a large product has no digits left for what
// tells two of them apart. All sums of a row go in the order of its keys, from tiles that begin at multiples of
// 64: the bits of a row do not depend on later tokens.
// Compiled for float, and by lazy_double.cpp for double.
#include "tiles.h"
#include "lazy.h"
#ifndef FORWARD
#define FORWARD lazy_forward
#define BACKWARD lazy_backward
#endif

namespace {

const real LOG2E = (real)1.4426950408889634;

// Weights 2^x: numbers below the smallest normal one are zero.
INLINE vf power_of_two(vf x) {
    const real least = sizeof(real) == 8 ? -1022 : -126;
    const vf e = exp2_of(larger(x, splat(least)));
    return x > least ? e : vf{};
}

// The keys and values of one sequence and head, padded to vectors and transposed by tiles, and their
// gradients.
struct Past {
    int64_t n, wide, wide_v;
    Buffer<real> k, kt, v, vt, dk, dv;
    Past(int64_t most, int64_t wide_, int64_t wide_v_, bool backward)
        : n(0), wide(wide_), wide_v(wide_v_), k(most * wide), kt(most * wide), v(most * wide_v), vt(backward ? most * wide_v : 0),
          dk(backward ? most * wide : 0), dv(backward ? most * wide_v : 0) {}
    bool ok() const { return k.p && kt.p && v.p && vt.p && dk.p && dv.p; }
    void take(const LazyCall& c, int64_t from, int64_t n_, bool backward) {
        n = n_;
        pad_rows(c.k + from * c.D, n, c.D, wide, 1, k.p);
        pad_rows(c.v + from * c.D_v, n, c.D_v, wide_v, 1, v.p);
        transpose_tiles(k.p, n, wide, kt.p);
        if (!backward) return;
        transpose_tiles(v.p, n, wide_v, vt.p);
        memset(dk.p, 0, sizeof(real) * n * wide);
        memset(dv.p, 0, sizeof(real) * n * wide_v);
    }
};

// A block of queries against the past of one head.
struct Block {
    const LazyCall& c;
    Past& past;
    int64_t b, h, i0, ld, n_tiles;
    int rows;
    bool bad[ROWS];  // a score that is seen is no finite number
    real top[ROWS];  // the largest score, HIDDEN where none is seen
    Buffer<real> S, P, U, q, g, acc, near;  // q: times scale; near: the head's biases, the farthest first
    Buffer<double> d_near;
    Buffer<uint8_t> used;                         // whether a tile has a weight above 0
    Block(const LazyCall& c_, Past& past_, int64_t most, bool backward)
        : c(c_), past(past_), ld(most), S(ROWS * ld), P(backward ? ROWS * ld : 0), U(backward ? ROWS * ld : 0), q(ROWS * past_.wide),
          g(ROWS * past_.wide_v), acc(ROWS * (past_.wide + past_.wide_v)), near(c_.window + 1), d_near(c_.window + 1), used(most / TILE) {}
    bool ok() const { return S.p && P.p && U.p && q.p && g.p && acc.p && near.p && d_near.p && used.p; }

    void begin_head(int64_t b_, int64_t h_) {
        b = b_;
        h = h_;
        const real* bias = c.bias + h * (c.window + 1);
        for (int64_t d = 0; d <= c.window; d++) near.p[c.window - d] = bias[d];
        for (int64_t d = 0; d <= c.window; d++) d_near.p[d] = 0;
    }
    void end_head() {
        double* to = c.d_bias + (b * c.H + h) * (c.window + 1);
        for (int64_t d = 0; d <= c.window; d++) to[d] = d_near.p[c.window - d];
    }
    const real* queries() const { return c.q + ((b * c.H + h) * c.N + i0) * c.D; }
    int64_t first_near(int r) const { return i0 + r > c.window ? i0 + r - c.window : 0; }
    // tau / i, what is added to the softmax of row r.
    real lift(int r) const { return c.tau[h] / (real)(i0 + r + 1); }

    void score(int64_t first) {
        i0 = first;
        rows = past.n - i0 < ROWS ? past.n - i0 : ROWS;
        n_tiles = up(i0 + rows, TILE) / TILE;
        memset(q.p, 0, sizeof(real) * ROWS * past.wide);
        pad_rows(queries(), rows, c.D, past.wide, (real)c.scale, q.p);
        for (int64_t t = 0; t < n_tiles; t++)
            multiply<false>(up(rows, BLOCK_ROWS), past.wide, q.p, past.wide, 1, past.kt.p + t * TILE * past.wide, TILE, S.p + t * TILE, ld, TILE);
        for (int r = 0; r < rows; r++) hide(r);
    }
    // Adds the biases to row r. Keys of the future, those that the mask hides and those with a score of -inf,
    // which a bias of -inf makes, get HIDDEN.
    void hide(int r) {
        real* s = S.p + r * ld;
        const int64_t i = i0 + r, from = first_near(r);
        for (int64_t j = i + 1; j < n_tiles * TILE; j++) s[j] = (real)-INFINITY;
        for (int64_t j = from; j <= i; j++) s[j] += near.p[j - i + c.window];
        if (c.mask) {
            const uint8_t* seen = c.mask + b * c.mask_step[0] + h * c.mask_step[1] + i * c.mask_step[2];
            for (int64_t j = 0; j <= i; j++) if (!seen[j * c.mask_step[3]]) s[j] = (real)-INFINITY;
        }
        vf wrong{}, most = splat(HIDDEN);
        for (int64_t j = 0; j < n_tiles * TILE; j += L) {
            const vf z = load(s + j), least = larger(splat(LEAST), z), seen = z == (real)-INFINITY ? splat(HIDDEN) : least;
            wrong += least * 0;
            most = larger(most, seen);
            store(s + j, seen);
        }
        bad[r] = is_nan(wrong) != 0;
        top[r] = maximum<real>(most);
    }
    // From the scores of row r to its weights; log2 of the sum of its softmax before division. The largest
    // score is not in it: beside a large one, it would have no digits left.
    real weigh(int r) {
        real* s = S.p + r * ld;
        const int64_t width = n_tiles * TILE;
        vf total{};
        const real add = lift(r);
        if (bad[r] || !(top[r] > HIDDEN)) {
            memset(s, 0, sizeof(real) * width);
            return bad[r] ? NAN : 0;
        }
        for (int64_t j = 0; j < width; j += L) {
            const vf z = load(s + j), e = power_of_two((z - top[r]) * LOG2E);
            total += e;
            store(s + j, z > HIDDEN ? e : splat((real)-1));
        }
        const real sum_of_row = sum<real>(total), inverse = 1 / sum_of_row;
        for (int64_t t = 0; t < n_tiles; t++) {
            vf some{};
            for (int64_t j = t * TILE; j < (t + 1) * TILE; j += L) {
                const vf e = load(s + j), w = e < 0 ? vf{} : larger(e * inverse + add, vf{});
                some = larger(some, w);
                store(s + j, w);
            }
            used.p[t] |= maximum<real>(some) > 0;
        }
        return log2(sum_of_row);
    }
    void forward(int64_t first) {
        score(first);
        memset(used.p, 0, n_tiles);
        const int64_t row = (b * c.H + h) * c.N + i0, wide = past.wide_v;
        for (int r = 0; r < rows; r++) c.lse[row + r] = weigh(r);
        memset(acc.p, 0, sizeof(real) * ROWS * wide);
        for (int64_t t = 0; t < n_tiles; t++)
            if (used.p[t]) multiply<true>(rows, past.n - t * TILE < TILE ? past.n - t * TILE : TILE, S.p + t * TILE, ld, 1, past.v.p + t * TILE * wide, wide, acc.p, wide, wide);
        for (int r = 0; r < rows; r++)
            for (int64_t d = 0; d < c.D_v; d++) c.o[(row + r) * c.D_v + d] = bad[r] ? NAN : acc.p[r * wide + d];
    }
    // Replaces the scores of row r by weights in S, and g.v by derivatives in the scores in U.
    void derive(int r, real lse) {
        real *s = S.p + r * ld, *p = P.p + r * ld, *u = U.p + r * ld;
        const int64_t width = n_tiles * TILE, from = first_near(r), i = i0 + r;
        real* d_tau = c.d_tau ? c.d_tau + (b * c.H + h) * c.N + i : nullptr;
        double* d_bias = d_near.p + c.window - i;
        if (bad[r]) {
            memset(s, 0, sizeof(real) * width);
            memset(u, 0, sizeof(real) * width);
            if (d_tau) *d_tau = NAN;
            for (int64_t j = from; j <= i; j++) d_bias[j] = NAN;
            return;
        }
        const real add = lift(r);
        vf mean{}, total{};
        for (int64_t j = 0; j < width; j += L) {
            const vf z = load(s + j), e = power_of_two((z - top[r]) * LOG2E - lse), w = z > HIDDEN ? larger(e + add, vf{}) : vf{};
            const vf a = w > 0 ? load(u + j) : vf{};
            total += a;
            mean += a * e;
            store(s + j, w);
            store(p + j, z > HIDDEN ? e : vf{});
            store(u + j, a);
        }
        const real m = sum<real>(mean);
        for (int64_t j = 0; j < width; j += L) store(u + j, load(p + j) * (load(u + j) - m));
        if (d_tau) *d_tau = sum<real>(total) / (real)(i + 1);
        for (int64_t j = from; j <= i; j++) d_bias[j] += u[j];
    }
    void backward(int64_t first) {
        score(first);
        const int64_t row = (b * c.H + h) * c.N + i0, wide = past.wide, wide_v = past.wide_v;
        memset(g.p, 0, sizeof(real) * ROWS * wide_v);
        pad_rows(c.d_out + row * c.D_v, rows, c.D_v, wide_v, 1, g.p);
        for (int64_t t = 0; t < n_tiles; t++)
            multiply<false>(up(rows, BLOCK_ROWS), wide_v, g.p, wide_v, 1, past.vt.p + t * TILE * wide_v, TILE, U.p + t * TILE, ld, TILE);
        for (int r = 0; r < rows; r++) derive(r, c.lse[row + r]);
        memset(acc.p, 0, sizeof(real) * ROWS * wide);
        for (int64_t t = 0; t < n_tiles; t++) {
            const int64_t j0 = t * TILE, n = past.n - j0 < TILE ? past.n - j0 : TILE;
            multiply<true>(n, rows, S.p + j0, 1, ld, g.p, wide_v, past.dv.p + j0 * wide_v, wide_v, wide_v);
            multiply<true>(n, rows, U.p + j0, 1, ld, q.p, wide, past.dk.p + j0 * wide, wide, wide);
            multiply<true>(rows, n, U.p + j0, ld, 1, past.k.p + j0 * wide, wide, acc.p, wide, wide);
        }
        for (int r = 0; r < rows; r++)
            for (int64_t d = 0; d < c.D; d++) c.dq[(row + r) * c.D + d] = bad[r] ? NAN : acc.p[r * wide + d] * c.scale;
    }
};

int run(const LazyCall& c, int64_t first, int64_t last, bool is_backward) {
    const int64_t most = up(c.N, TILE), group = c.H / c.H_kv;
    Past past(most, up(c.D, 16), up(c.D_v, 16), is_backward);
    Block block(c, past, most, is_backward);
    if (!past.ok() || !block.ok()) return 1;
    for (int64_t item = first; item < last; item++) {
        const int64_t b = item / c.H_kv, kv = item % c.H_kv, n = c.lengths[b], from = item * c.N;
        past.take(c, from, n, is_backward);
        for (int64_t h = kv * group; h < (kv + 1) * group; h++) {
            block.begin_head(b, h);
            for (int64_t i = 0; i < n; i += ROWS) {
                if (is_backward) block.backward(i);
                else block.forward(i);
            }
            if (is_backward && c.d_bias) block.end_head();
        }
        if (!is_backward) continue;
        for (int64_t j = 0; j < n; j++) {
            memcpy(c.dk + (from + j) * c.D, past.dk.p + j * past.wide, sizeof(real) * c.D);
            memcpy(c.dv + (from + j) * c.D_v, past.dv.p + j * past.wide_v, sizeof(real) * c.D_v);
        }
    }
    return 0;
}

}  // namespace

extern "C" int OF_SET(FORWARD)(int, const LazyCall* c, int64_t first, int64_t last) { return run(*c, first, last, false); }
extern "C" int OF_SET(BACKWARD)(int, const LazyCall* c, int64_t first, int64_t last) { return run(*c, first, last, true); }
