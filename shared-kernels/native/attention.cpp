// Sparse attention: weights [s x - tau]_+^(1/s) of x = scale q.k + bias - slope |distance|, times v.
//
// Blocks of 24 queries are finished one after the other, with their scores in the second-level cache.
// One real key per tile of 64 stands for the tile: its score bounds the threshold from below, and with
// the tile's radius all scores of the tile from above, so that a tile without a weight need not be
// scored. The maxima of 64 lanes, a part of the row as well, bound the threshold again; what lies
// above it is put side by side and solved. The kept weights are all that the backward pass touches.
#include "threshold.h"
#include "attention.h"

namespace {

constexpr int L = Lanes<float>::count;
constexpr int ROWS = 24, TILE = 64, TV = TILE / L;  // TV: vectors of a tile's row
constexpr int BLOCK_ROWS = 6, BLOCK_VECTORS = VECTOR_BYTES == 64 ? 4 : 2;
const float HIDDEN = -1e30f;
typedef Vec<float> vf;

// C (M rows) = or += A (M x K, by strides) B (K rows of `columns`, a multiple of L).
template <int M, int NV, bool ADD>
INLINE void register_block(int64_t K, const float* A, int64_t a_row, int64_t a_k, const float* B, int64_t b_row, float* C, int64_t c_row) {
    vf c[M][NV];
#pragma GCC unroll 6
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) c[i][j] = ADD ? load(C + i * c_row + j * L) : vf{};
    for (int64_t k = 0; k < K; k++) {
        vf b[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) b[j] = load(B + k * b_row + j * L);
#pragma GCC unroll 6
        for (int i = 0; i < M; i++) {
            const float a = A[i * a_row + k * a_k];
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) c[i][j] += b[j] * a;
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) store(C + i * c_row + j * L, c[i][j]);
}
template <int M, bool ADD>
void columns_of(int64_t K, const float* A, int64_t a_row, int64_t a_k, const float* B, int64_t b_row, float* C, int64_t c_row, int64_t columns) {
    int64_t n = 0;
    for (; n + BLOCK_VECTORS * L <= columns; n += BLOCK_VECTORS * L) register_block<M, BLOCK_VECTORS, ADD>(K, A, a_row, a_k, B + n, b_row, C + n, c_row);
    for (; n < columns; n += L) register_block<M, 1, ADD>(K, A, a_row, a_k, B + n, b_row, C + n, c_row);
}
template <bool ADD>
void product(int64_t M, int64_t K, const float* A, int64_t a_row, int64_t a_k, const float* B, int64_t b_row, float* C, int64_t c_row, int64_t columns) {
    int64_t i = 0;
    for (; i + BLOCK_ROWS <= M; i += BLOCK_ROWS) columns_of<BLOCK_ROWS, ADD>(K, A + i * a_row, a_row, a_k, B, b_row, C + i * c_row, c_row, columns);
    for (; i < M; i++) columns_of<1, ADD>(K, A + i * a_row, a_row, a_k, B, b_row, C + i * c_row, c_row, columns);
}

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows of D numbers, filled up with zeros to `wide`, `by` times.
void pad_rows(const float* x, int64_t n, int64_t D, int64_t wide, float by, float* out) {
    for (int64_t r = 0; r < n; r++) {
        for (int64_t d = 0; d < D; d++) out[r * wide + d] = x[r * D + d] * by;
        for (int64_t d = D; d < wide; d++) out[r * wide + d] = 0;
    }
}
// Padded rows -> tiles of 64 rows, transposed: [tile][wide][64].
void transpose_tiles(const float* x, int64_t n, int64_t wide, float* out) {
    memset(out, 0, sizeof(float) * up(n, TILE) * wide);
    for (int64_t j = 0; j < n; j++) {
        float* to = out + j / TILE * wide * TILE + j % TILE;
        for (int64_t d = 0; d < wide; d++) to[d * TILE] = x[j * wide + d];
    }
}

// One sequence and one head of keys with what is made of them once.
struct Keys {
    int64_t n, wide, wide_v;   // how many, and the padded head dims
    Buffer<float> k, kt, v, vt, near, radius;  // near: a key per tile, as tiles of 64 such keys
    Keys(int64_t most, int64_t wide_, int64_t wide_v_)
        : n(0), wide(wide_), wide_v(wide_v_), k(up(most, TILE) * wide_), kt(up(most, TILE) * wide_), v(up(most, TILE) * wide_v_),
          vt(up(most, TILE) * wide_v_), near(up(up(most, TILE) / TILE, TILE) * wide_), radius(up(most, TILE) / TILE + 1) {}
    bool ok() const { return k.p && kt.p && v.p && vt.p && near.p && radius.p; }
    void take(const float* keys, const float* values, int64_t n_, int64_t D, int64_t Dv, bool backward, bool skipping) {
        n = n_;
        memset(k.p + n * wide, 0, sizeof(float) * (up(n, TILE) - n) * wide);
        memset(v.p + n * wide_v, 0, sizeof(float) * (up(n, TILE) - n) * wide_v);
        pad_rows(keys, n, D, wide, 1, k.p);
        pad_rows(values, n, Dv, wide_v, 1, v.p);
        transpose_tiles(k.p, n, wide, kt.p);
        if (backward) transpose_tiles(v.p, n, wide_v, vt.p);
        if (skipping) represent();
    }
    // Of each tile the key nearest to the mean, and how far the others lie from it.
    void represent() {
        const int64_t tiles = up(n, TILE) / TILE;
        memset(near.p, 0, sizeof(float) * up(tiles, TILE) * wide);
        Buffer<float> mean(wide);
        for (int64_t t = 0; t < tiles; t++) {
            const int64_t count = n - t * TILE < TILE ? n - t * TILE : TILE;
            const float* x = k.p + t * TILE * wide;
            for (int64_t d = 0; d < wide; d += L) {
                vf a{};
                for (int64_t j = 0; j < count; j++) a += load(x + j * wide + d);
                store(mean.p + d, a * (1.0f / count));
            }
            auto square = [&](const float* c, int64_t j) {
                vf a{};
                for (int64_t d = 0; d < wide; d += L) { vf e = load(x + j * wide + d) - load(c + d); a += e * e; }
                return sum<float>(a);
            };
            int64_t best = 0;
            float least = INFINITY, most = 0;
            for (int64_t j = 0; j < count; j++) { float e = square(mean.p, j); if (e < least) { least = e; best = j; } }
            for (int64_t j = 0; j < count; j++) { float e = square(x + best * wide, j); if (!(e <= most)) most = e == e ? e : INFINITY; }
            radius.p[t] = sqrtf(most) * (1 + 1e-5f);
            for (int64_t d = 0; d < wide; d++) near.p[t / TILE * wide * TILE + d * TILE + t % TILE] = x[best * wide + d];
        }
    }
};

// A block of queries against one sequence of keys.
struct Work {
    const AttentionCall& c;
    const Keys& keys;
    Power<float> P;
    int64_t b, h, q0, k0, n_q, n_k, ld, n_tiles, i0;
    int rows;
    Buffer<float> S, U, q, g, low, top, maxima, value;
    Buffer<int32_t> key;
    Buffer<int64_t> tiles;
    bool bad[ROWS], bounded;
    Work(const AttentionCall& c_, const Keys& keys_, int64_t most, double s)
        : c(c_), keys(keys_), P(s), ld(up(most, TILE) + L), S(ROWS * ld), U(ROWS * ld), q(ROWS * keys_.wide), g(ROWS * keys_.wide_v),
          low(ROWS + L), top(ROWS + L), maxima(ROWS * TILE), value(ROWS * ld), key(ROWS * ld), tiles(up(most, TILE) / TILE + 1) {}
    bool ok() const { return S.p && U.p && q.p && g.p && low.p && top.p && maxima.p && value.p && key.p && tiles.p; }
    float factor() const { return P.kind == SOFTMAX ? 1.44269504f : P.s; }  // scores are in units of z = s x
    int64_t place(int r) const { return i0 + r + n_k - n_q; }  // of query r among the keys
    float slope() const { return c.slopes ? c.slopes[h] : 0; }
    const float* bias(int64_t i) const { return c.bias ? c.bias + b * c.bias_step[0] + h * c.bias_step[1] + (q0 + i) * c.bias_step[2] + k0 * c.bias_step[3] : nullptr; }
    float* bias_gradient(int64_t i) const { return c.dbias ? c.dbias + b * c.dbias_step[0] + h * c.dbias_step[1] + (q0 + i) * c.dbias_step[2] + k0 * c.dbias_step[3] : nullptr; }
    const uint8_t* mask(int64_t i) const { return c.mask ? c.mask + b * c.mask_step[0] + h * c.mask_step[1] + (q0 + i) * c.mask_step[2] + k0 * c.mask_step[3] : nullptr; }

    // The keys that query r sees: [first, last)
    int64_t first_key(int r) const { int64_t a = c.window < 0 ? 0 : place(r) - c.window + 1; return a < 0 ? 0 : a; }
    int64_t last_key(int r) const {
        int64_t e = n_k;
        if (c.causal && place(r) + 1 < e) e = place(r) + 1;
        if (c.window >= 0 && place(r) + c.window < e) e = place(r) + c.window;
        return e < 0 ? 0 : e;
    }
    void begin(int64_t first, const float* queries) {
        i0 = first;
        rows = n_q - i0 < ROWS ? n_q - i0 : ROWS;
        memset(q.p, 0, sizeof(float) * ROWS * keys.wide);
        pad_rows(queries + i0 * c.D, rows, c.D, keys.wide, c.scale * factor(), q.p);
        memset(bad, 0, sizeof bad);
    }
    void choose_tiles() {
        const int64_t first = first_key(0) / TILE, end = last_key(rows - 1);
        n_tiles = 0;
        bounded = false;
        const int64_t last = up(end, TILE) / TILE;
        if (!c.skip || last - first < 6 || !P.is_bounded()) {
            for (int64_t t = first; t < last; t++) tiles.p[n_tiles++] = t;
            return;
        }
        bounded = true;
        // scores of the tiles' keys: in U, with what they and the tiles' other keys could be
        for (int64_t t = first / TILE * TILE; t < last; t += TILE)
            product<false>(ROWS, keys.wide, q.p, keys.wide, 1, keys.near.p + t * keys.wide, TILE, U.p + t, ld, TILE);
        for (int i = 0; i < ROWS * TILE; i += L) store(maxima.p + i, splat(HIDDEN));
        const float steep = slope() * factor();
        for (int r = 0; r < rows; r++) {
            vf norm2{};
            for (int64_t d = 0; d < keys.wide; d += L) { vf x = load(q.p + r * keys.wide + d); norm2 += x * x; }
            const float norm = sqrtf(sum<float>(norm2)) * (1 + 1e-5f);
            const int64_t i = place(r), a = first_key(r), e = last_key(r);
            for (int64_t t = first; t < last; t++) {
                float* u = U.p + r * ld + t;
                const int64_t left = t * TILE, right = left + TILE;
                const int64_t close = i >= right ? i - right + 1 : i < left ? left - i : 0;
                const int64_t far = i - left > right - 1 - i ? i - left : right - 1 - i;
                if (left >= a && right <= e) { float* m = maxima.p + r * TILE + t % TILE; float z = *u - far * steep; if (z > *m) *m = z; }
                // a negative slope raises with the distance
                *u = right <= a || left >= e ? HIDDEN : *u + norm * keys.radius.p[t] - (steep >= 0 ? close : far) * steep;
            }
        }
        if (steep < 0) for (int i = 0; i < ROWS * TILE; i += L) store(maxima.p + i, splat(HIDDEN));
        bound();
        for (int64_t t = first; t < last; t++) {
            bool some = false;
            for (int r = 0; r < rows; r++) {
                const float u = U.p[r * ld + t], least = low.p[r] - 1;
                const bool may = !(u <= HIDDEN) && !(u < least - 1e-5f * (1 + fabsf(least)));  // also where u is NaN
                U.p[r * ld + t] = may;  // what becomes of a row is up to its own tiles alone
                some |= may;
            }
            if (some) tiles.p[n_tiles++] = t;
        }
    }
    // From the maxima of lanes: the rows' maxima in `top`, and in `low` a unit point not above theirs.
    void bound() {
        const int n = P.n < 2 ? 2 : P.n;
        for (int r0 = 0; r0 < rows; r0 += L) {
            const int R = rows - r0 < L ? rows - r0 : L;
            vf m[L], F[L], G[L], u{};
            for (int r = 0; r < L; r++) {
                m[r] = vf{};
                F[r] = G[r] = splat(1.0f / L);
                if (r >= R) continue;
                const float* x = maxima.p + (r0 + r) * TILE;
                m[r] = load(x);
                for (int k = 1; k < TV; k++) m[r] = larger(m[r], load(x + k * L));
            }
            const vf t = across<float, true>(m);
            for (int i = 0; P.is_bounded() && i < 3; i++) {
                for (int r = 0; r < R; r++) {
                    const float* x = maxima.p + (r0 + r) * TILE;
                    if (n == 2) {
                        vf f{}, g{};
                        for (int k = 0; k < TV; k++) { vf y = larger(load(x + k * L) - t[r] + (1 - u[r]), vf{}); f += y * y; g += y; }
                        F[r] = f; G[r] = g;
                        continue;
                    }
                    alignas(64) float y[TILE];
                    for (int k = 0; k < TV; k++) store(y + k * L, load(x + k * L) - t[r]);
                    Sums<float> s = sums_for<float>(n)(y, TV, u[r], nullptr);
                    F[r] = s.F; G[r] = s.G;
                }
                u += whole_step<float>(across<float, false>(F), across<float, false>(G), n);
            }
            store(top.p + r0, t);
            store(low.p + r0, t + u - 1e-6f * (1 + absolute(t)));
        }
    }
    // Scores of the chosen tiles into S, tile a at column 64 a, and their lane maxima.
    void score(bool first_time) {
        const float steep = slope() * factor(), by = factor();
        if (first_time) for (int i = 0; i < ROWS * TILE; i += L) store(maxima.p + i, splat(HIDDEN));
        vf lane;
        for (int l = 0; l < L; l++) lane[l] = l;
        for (int64_t a = 0; a < n_tiles; a++) {
            const int64_t j0 = tiles.p[a] * TILE;
            float* s = S.p + a * TILE;
            product<false>(rows > 18 ? 24 : rows > 12 ? 18 : rows > 6 ? 12 : 6, keys.wide, q.p, keys.wide, 1, keys.kt.p + j0 * keys.wide, TILE, s, ld, TILE);
            const bool edge = first_key(rows - 1) > j0 || last_key(0) < j0 + TILE, plain = !edge && !steep && !c.bias && !c.mask;
            for (int r = 0; r < rows; r++) {
                float *x = s + r * ld, *m = maxima.p + r * TILE;
                if (!plain) {
                    const int64_t n = n_k - j0 < TILE ? n_k - j0 : TILE;
                    if (const float* add = bias(i0 + r)) for (int64_t j = 0; j < n; j++) x[j] += add[(j0 + j) * c.bias_step[3]] * by;
                    const float offset = (float)(j0 - place(r)), from = (float)(first_key(r) - j0), to = (float)(last_key(r) - j0);
                    for (int k = 0; k < TV; k++) {
                        vf z = load(x + k * L), j = lane + (float)(k * L);
                        if (steep) z -= absolute(j + offset) * steep;
                        z = (j >= from) & (j < to) ? z : splat(HIDDEN);
                        store(x + k * L, z < HIDDEN ? splat(HIDDEN) : z);
                    }
                    if (const uint8_t* seen = mask(i0 + r)) for (int64_t j = 0; j < n; j++) if (!seen[(j0 + j) * c.mask_step[3]]) x[j] = HIDDEN;
                }
                if (!first_time || (bounded && !U.p[r * ld + tiles.p[a]])) continue;
                vf wrong{};
                for (int k = 0; k < TV; k++) {
                    vf z = load(x + k * L);
                    wrong += z * 0;
                    store(m + k * L, larger(load(m + k * L), z));
                }
                if (is_nan(wrong)) bad[r] = true;
            }
        }
    }
    // Tiles without a score above `low` - 1 go; the others move up.
    void prune() {
        int64_t n = 0;
        for (int64_t a = 0; a < n_tiles; a++) {
            bool some = false;
            for (int r = 0; r < rows && !some; r++) {
                const float* x = S.p + r * ld + a * TILE;
                vf m = load(x);
                for (int k = 1; k < TV; k++) m = larger(m, load(x + k * L));
                some = bad[r] || above(m, splat(low.p[r] - 1)) != 0;
            }
            if (!some) continue;
            if (n != a) for (int r = 0; r < rows; r++) memcpy(S.p + r * ld + n * TILE, S.p + r * ld + a * TILE, sizeof(float) * TILE);
            tiles.p[n++] = tiles.p[a];
        }
        n_tiles = n;
    }
    // The unit point of nv vectors of z from `u`, not above it; the weights replace z. 1 / their sum in `inverse`.
    float solve(float* z, int64_t nv, float u, float top_, float& inverse, float* to) {
        if (P.kind == SOFTMAX) {
            vf total{};
            for (int64_t k = 0; k < nv; k++) {
                vf y = load(z + k * L) - top_, w = exp2_of(larger(y, splat(-126.0f)));
                w = y > -126.0f ? w : vf{};
                total += w;
                store(to + k * L, w);
            }
            inverse = 1 / sum<float>(total);
            return top_;
        }
        const float enough = tolerance(P);
        for (int round = 0; round < c.steps; round++) {
            Sums<float> s = sums_of(z, nv, u, (float*)nullptr, P);
            const float F = sum<float>(s.F), before = u, step = newton_step<float>(splat(F), splat(sum<float>(s.G)), P)[0];
            if (step > 0 || P.kind == REAL) u += step;
            if (!(F - 1 > enough) || u == before) break;
        }
        inverse = 1 / sum<float>(sums_of(z, nv, u, to, P).F);
        return u;
    }
};

// Where a head's kept weights are: one list for its queries, in order.
struct Kept {
    int32_t* keys;
    float* p;
    int32_t* counts;
    int64_t room, used;
};
Kept kept_of(const AttentionCall& c, int64_t b, int64_t h, int64_t q0, int64_t n_q) {
    const int64_t row = (b * c.H + h) * c.N_q + q0;
    if (!c.counts) return {nullptr, nullptr, nullptr, 0, 0};
    return {c.keys + row * c.room, c.p + row * c.room, c.counts + row, n_q * c.room, 0};
}

void forward_head(Work& w, const float* queries, float* o, float* unit, float* inv, Kept kept) {
    const AttentionCall& c = w.c;
    const int64_t wide = w.keys.wide_v;
    Buffer<float> acc(ROWS * wide);
    int64_t size[ROWS];
    for (int64_t i0 = 0; i0 < w.n_q; i0 += ROWS) {
        w.begin(i0, queries);
        w.choose_tiles();
        w.score(true);
        w.bound();
        if (w.P.is_bounded()) w.prune();
        const int rows = w.rows;
        // a row is solved by what may carry a weight if that is little of what it sees
        bool sparse[ROWS], keep = kept.keys != nullptr, any_whole = false;
        const int64_t used = kept.used;
        for (int r = 0; r < rows; r++) {
            const int64_t seen = w.last_key(r) - w.first_key(r);
            float *value = w.value.p + r * w.ld, *s = w.S.p + r * w.ld;
            int32_t* key = w.key.p + r * w.ld;
            const vf least = splat(w.low.p[r] - 1);
            int64_t n = 0;
            if (w.top.p[r] > HIDDEN && !w.bad[r])
                for (int64_t a = 0; a < w.n_tiles && 5 * n <= 2 * seen + 40; a++) {
                    const int32_t j0 = w.tiles.p[a] * TILE;
                    Mask hit[TV], any = 0;
                    for (int k = 0; k < TV; k++) any |= hit[k] = above(load(s + a * TILE + k * L), least);
                    if (!any) continue;
                    for (int k = 0; k < TV; k++) {
                        compress(value + n, hit[k], load(s + a * TILE + k * L));
                        for (Mask m = hit[k]; m; m &= m - 1) key[n++] = j0 + k * L + __builtin_ctz(m);
                    }
                }
            store(value + n, splat(HIDDEN));
            size[r] = n;
            sparse[r] = w.P.is_bounded() && 5 * n <= 2 * seen + 40;
            any_whole |= !sparse[r];
        }
        keep &= !any_whole;
        memset(acc.p, 0, sizeof(float) * ROWS * wide);
        for (int r = 0; r < rows; r++) {
            const int64_t i = i0 + r;
            if (kept.counts) kept.counts[i] = 0;
            unit[i] = w.top.p[r] > HIDDEN ? 0 : INFINITY;
            inv[i] = 0;
            float* s = w.S.p + r * w.ld;
            if (w.bad[r] || !(w.top.p[r] > HIDDEN)) {
                if (w.bad[r]) unit[i] = NAN;
                memset(s, 0, sizeof(float) * w.n_tiles * TILE);
                continue;
            }
            if (!sparse[r]) {
                const float start = w.P.is_bounded() ? w.low.p[r] : w.top.p[r];
                unit[i] = w.solve(s, w.n_tiles * TV, start, w.top.p[r], inv[i], s);
                continue;
            }
            float* value = w.value.p + r * w.ld;
            int32_t* key = w.key.p + r * w.ld;
            unit[i] = w.solve(value, (size[r] + L - 1) / L, w.low.p[r], w.top.p[r], inv[i], value);
            int64_t n = 0;
            for (int64_t e = 0; e < size[r]; e++) { value[n] = value[e]; key[n] = key[e]; n += value[e] > 0; }
            float* out = acc.p + r * wide;
            int64_t d = 0;
            auto gather = [&](auto count) {
                constexpr int NV = decltype(count)::value;
                vf x[NV], y[NV];
                for (int k = 0; k < NV; k++) x[k] = y[k] = vf{};
                int64_t e = 0;
                for (; e + 1 < n; e += 2) {
                    const float *v0 = w.keys.v.p + (int64_t)key[e] * wide + d, *v1 = w.keys.v.p + (int64_t)key[e + 1] * wide + d;
                    for (int k = 0; k < NV; k++) { x[k] += load(v0 + k * L) * value[e]; y[k] += load(v1 + k * L) * value[e + 1]; }
                }
                if (e < n) for (int k = 0; k < NV; k++) x[k] += load(w.keys.v.p + (int64_t)key[e] * wide + d + k * L) * value[e];
                for (int k = 0; k < NV; k++) store(out + d + k * L, x[k] + y[k]);
                d += NV * L;
            };
            while (d + 4 * L <= wide) gather(std::integral_constant<int, 4>());
            while (d < wide) gather(std::integral_constant<int, 1>());
            memset(s, 0, sizeof(float) * (any_whole ? w.n_tiles * TILE : 0));
            keep &= kept.used + n <= kept.room;
            if (keep) {
                memcpy(kept.keys + kept.used, key, sizeof(int32_t) * n);
                for (int64_t e = 0; e < n; e++) kept.p[kept.used + e] = value[e] * inv[i];
                kept.used += n;
                kept.counts[i] = n;
            }
        }
        if (kept.counts && !keep) {
            kept.used = used;
            for (int r = 0; r < rows; r++) kept.counts[i0 + r] = -1;
        }
        if (any_whole)
            for (int64_t a = 0; a < w.n_tiles; a++) {
                const int64_t j0 = w.tiles.p[a] * TILE, n = w.n_k - j0 < TILE ? w.n_k - j0 : TILE;
                product<true>(rows, n, w.S.p + a * TILE, w.ld, 1, w.keys.v.p + j0 * wide, wide, acc.p, wide, wide);
            }
        for (int r = 0; r < rows; r++)
            for (int64_t d = 0; d < c.D_v; d++) o[(i0 + r) * c.D_v + d] = w.bad[r] ? NAN : acc.p[r * wide + d] * inv[i0 + r];
    }
}

INLINE vf escort_of(vf p, const Power<float>& P) {
    if (P.kind == SOFTMAX) return p;
    if (P.kind == LINEAR) return p > 0 ? splat(1.0f) : vf{};
    if (P.kind == SQUARE) return root(p);
    vf g = exp2_of((1 - P.s) * log2_of(larger(p, splat(1.2e-38f))));
    return p > 0 ? g : vf{};
}
// h = p L^2 phi(-s L), L = log p: -dp/ds at a fixed threshold in x.
INLINE vf curvature_of(vf p, vf g, float s) {
    vf log = log2_of(larger(p, splat(1.2e-38f))) * 0.693147181f, a = log * -s, small = smaller(a, splat(1.0f)), phi = splat(1.0f);
    for (int k = 12; k >= 3; k--) phi = phi * small * (1.0f / k) + 1.0f;
    vf h = a < 1 ? phi * 0.5f * log * log * p : (g - p - p * a) / (s * s);
    return p > 0 ? h : vf{};
}

// Of nv vectors of weights p and dp: ds (in dp's place) and, where asked for, the row's derivative in s.
void derive_row(Work& w, const float* p, float* dp, int64_t nv, float* d_s) {
    vf mass{}, moment{}, total{};
    for (int64_t k = 0; k < nv; k++) { vf g = escort_of(load(p + k * L), w.P); mass += g; moment += g * load(dp + k * L); }
    const float m = sum<float>(mass), mean = m > 0 ? sum<float>(moment) / m : 0;
    for (int64_t k = 0; k < nv; k++) {
        vf y = load(p + k * L), g = escort_of(y, w.P), d = load(dp + k * L) - mean;
        if (d_s) total -= curvature_of(y, g, w.P.s) * d;
        store(dp + k * L, g * d);
    }
    if (d_s) *d_s = sum<float>(total);
}

void backward_head(Work& w, const float* queries, const float* d_out, const float* unit, const float* inv, Kept kept, float* dq, float* dk, float* dv, float* d_s, float* d_slope) {
    const AttentionCall& c = w.c;
    const int64_t wide = w.keys.wide, wide_v = w.keys.wide_v;
    const float by = c.scale;
    Buffer<float> acc(ROWS * wide), raw(ROWS * wide);
    for (int64_t i0 = 0; i0 < w.n_q; i0 += ROWS) {
        w.begin(i0, queries);
        const int rows = w.rows;
        memset(w.g.p, 0, sizeof(float) * ROWS * wide_v);
        pad_rows(d_out + i0 * c.D_v, rows, c.D_v, wide_v, 1, w.g.p);
        memset(raw.p, 0, sizeof(float) * ROWS * wide);
        pad_rows(queries + i0 * c.D, rows, c.D, wide, by, raw.p);
        memset(acc.p, 0, sizeof(float) * ROWS * wide);
        const bool sparse = kept.counts && kept.counts[i0] >= 0;
        if (sparse) {
            for (int r = 0; r < rows; r++) {
                const int64_t n = kept.counts[i0 + r];
                const int32_t* key = kept.keys + kept.used;
                const float *g = w.g.p + r * wide_v, *q = raw.p + r * wide;
                float *p = w.S.p, *dp = w.U.p, *to = acc.p + r * wide;
                memcpy(p, kept.p + kept.used, sizeof(float) * n);
                store(p + n, vf{});
                kept.used += n;
                for (int64_t e = 0; e < n; e += L) {
                    vf a[L];
                    for (int l = 0; l < L; l++) {
                        a[l] = vf{};
                        if (e + l >= n) continue;
                        const float* v = w.keys.v.p + (int64_t)key[e + l] * wide_v;
                        for (int64_t d = 0; d < wide_v; d += L) a[l] += load(v + d) * load(g + d);
                    }
                    store(dp + e, across<float, false>(a));
                }
                derive_row(w, p, dp, (n + L - 1) / L, d_s ? d_s + i0 + r : nullptr);
                for (int64_t e = 0; e < n; e++) {
                    const int64_t j = key[e];
                    const float ds = dp[e], weight = p[e];
                    const float* k = w.keys.k.p + j * wide;
                    float *a = dk + j * wide, *b = dv + j * wide_v;
                    for (int64_t d = 0; d < wide; d += L) {
                        store(to + d, load(to + d) + load(k + d) * ds);
                        store(a + d, load(a + d) + load(q + d) * ds);
                    }
                    for (int64_t d = 0; d < wide_v; d += L) store(b + d, load(b + d) + load(g + d) * weight);
                }
                if (d_slope) {
                    float t = 0;
                    for (int64_t e = 0; e < n; e++) t -= dp[e] * fabsf((float)(key[e] - w.place(r)));
                    d_slope[i0 + r] = t;
                }
                if (float* to_bias = w.bias_gradient(i0 + r)) for (int64_t e = 0; e < n; e++) to_bias[key[e] * c.dbias_step[3]] += dp[e];
            }
        } else {
            w.choose_tiles();
            w.score(false);
            for (int r = 0; r < rows; r++) w.low.p[r] = unit[i0 + r];
            if (w.P.is_bounded()) w.prune();
            const int64_t width = w.n_tiles * TILE;
            for (int64_t a = 0; a < w.n_tiles; a++)
                product<false>(ROWS, wide_v, w.g.p, wide_v, 1, w.keys.vt.p + w.tiles.p[a] * TILE * wide_v, TILE, w.U.p + a * TILE, w.ld, TILE);
            for (int r = 0; r < rows; r++) {
                float *p = w.S.p + r * w.ld, *dp = w.U.p + r * w.ld;
                const float u = unit[i0 + r], share = inv[i0 + r];
                if (u == INFINITY) memset(p, 0, sizeof(float) * width);
                else if (w.P.kind == SOFTMAX)
                    for (int64_t k = 0; k < width; k += L) { vf y = load(p + k) - u, e = exp2_of(larger(y, splat(-126.0f))) * share; store(p + k, y > -126.0f ? e : vf{}); }
                else {
                    sums_of(p, width / L, u, p, w.P);
                    for (int64_t k = 0; k < width; k += L) store(p + k, load(p + k) * share);
                }
                derive_row(w, p, dp, width / L, d_s ? d_s + i0 + r : nullptr);
                float t = 0;
                float* to_bias = w.bias_gradient(i0 + r);
                if (d_slope || to_bias)
                    for (int64_t a = 0; a < w.n_tiles; a++)
                        for (int64_t j = w.tiles.p[a] * TILE, e = a * TILE; e < (a + 1) * TILE && j < w.n_k; e++, j++) {
                            t -= dp[e] * fabsf((float)(j - w.place(r)));
                            if (to_bias) to_bias[j * c.dbias_step[3]] += dp[e];
                        }
                if (d_slope) d_slope[i0 + r] = t;
            }
            for (int64_t a = 0; a < w.n_tiles; a++) {
                const int64_t j0 = w.tiles.p[a] * TILE, n = w.n_k - j0 < TILE ? w.n_k - j0 : TILE;
                product<true>(n, rows, w.S.p + a * TILE, 1, w.ld, w.g.p, wide_v, dv + j0 * wide_v, wide_v, wide_v);
                product<true>(n, rows, w.U.p + a * TILE, 1, w.ld, raw.p, wide, dk + j0 * wide, wide, wide);
                product<true>(rows, n, w.U.p + a * TILE, w.ld, 1, w.keys.k.p + j0 * wide, wide, acc.p, wide, wide);
            }
        }
        for (int r = 0; r < rows; r++) {
            const bool nan = unit[i0 + r] != unit[i0 + r];
            for (int64_t d = 0; d < c.D; d++) dq[(i0 + r) * c.D + d] = nan ? NAN : acc.p[r * wide + d] * by;
        }
    }
}

int run(const AttentionCall& c, int64_t first, int64_t last, bool backward) {
    int64_t most = 1;
    for (int64_t t = first; t < last; t++) { int64_t n = c.segments[t / c.H_kv * 5 + 4]; most = n > most ? n : most; }
    const int64_t wide = up(c.D, 16), wide_v = up(c.D_v, 16), group = c.H / c.H_kv;
    Keys keys(most, wide, wide_v);
    Buffer<float> dk(backward ? up(most, TILE) * wide : 1), dv(backward ? up(most, TILE) * wide_v : 1);
    if (!keys.ok() || !dk.p || !dv.p) return 1;
    for (int64_t t = first; t < last; t++) {
        const int64_t* at = c.segments + t / c.H_kv * 5;
        const int64_t kv = t % c.H_kv, b = at[0], q0 = at[1], n_q = at[2], k0 = at[3], n_k = at[4];
        if (n_q <= 0) continue;
        const int64_t from = (b * c.H_kv + kv) * c.N_k + k0;
        keys.take(c.k + from * c.D, c.v + from * c.D_v, n_k, c.D, c.D_v, backward, c.skip);
        if (backward) { memset(dk.p, 0, sizeof(float) * up(n_k, TILE) * wide); memset(dv.p, 0, sizeof(float) * up(n_k, TILE) * wide_v); }
        for (int64_t h = kv * group; h < (kv + 1) * group; h++) {
            Work w(c, keys, most, c.s[h]);
            if (!w.ok()) return 1;
            w.b = b; w.h = h; w.q0 = q0; w.k0 = k0; w.n_q = n_q; w.n_k = n_k;
            const int64_t row = (b * c.H + h) * c.N_q + q0;
            Kept kept = kept_of(c, b, h, q0, n_q);
            if (!backward) forward_head(w, c.q + row * c.D, c.o + row * c.D_v, c.unit + row, c.inverse + row, kept);
            else backward_head(w, c.q + row * c.D, c.d_out + row * c.D_v, c.unit + row, c.inverse + row, kept, c.dq + row * c.D, dk.p, dv.p, c.d_s ? c.d_s + row : nullptr, c.d_slope ? c.d_slope + row : nullptr);
        }
        if (!backward) continue;
        for (int64_t j = 0; j < n_k; j++) {
            memcpy(c.dk + (from + j) * c.D, dk.p + j * wide, sizeof(float) * c.D);
            memcpy(c.dv + (from + j) * c.D_v, dv.p + j * wide_v, sizeof(float) * c.D_v);
        }
    }
    return 0;
}

}  // namespace

extern "C" int OF_SET(attention_forward)(int, const AttentionCall* c, int64_t first, int64_t last) { return run(*c, first, last, false); }
extern "C" int OF_SET(attention_backward)(int, const AttentionCall* c, int64_t first, int64_t last) { return run(*c, first, last, true); }
