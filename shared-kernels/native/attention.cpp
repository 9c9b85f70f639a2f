// Sparse attention: weights [s x - tau]_+^(1/s) of x = cap(scale q.k) + bias - slope |distance|, times v.
//
// cap(x) is softcap tanh(x / softcap). A sink is one more score of each row; its value is 0, so that it
// takes part in the threshold and in the sum of the weights, and in nothing else.
// Blocks of 24 queries are finished one after the other, with their scores in the second-level cache.
// One real key per tile of 64 stands for the tile: its score bounds the threshold from below, and with
// the tile's radius all scores of the tile from above, so that a tile without a weight need not be
// scored. The maxima of 64 lanes, a part of the row as well, bound the threshold again; what lies
// above it is put side by side and solved. The kept weights are all that the backward pass touches.
// Compiled for float, and by attention_double.cpp for double.
#include "threshold.h"
#include "attention.h"
#include "coarse.h"
#ifndef FORWARD
#define FORWARD attention_forward
#define BACKWARD attention_backward
#endif

namespace {

constexpr bool IS_DOUBLE = sizeof(real) == 8;
const real FAR = IS_DOUBLE ? 20 : 10, LOWEST_EXPONENT = IS_DOUBLE ? -1022 : -126;
const real SMALLEST = IS_DOUBLE ? (real)2.3e-308 : (real)1.2e-38;  // of the positive normal numbers, about
const real SLACK = (real)1e-5;  // by which a bound keeps away from what rounding could do to it
const int64_t LEAST_TILES = 10;  // of a row's choice: for fewer of them coarse scores are not worth their making
const real STEEPEST = (real)1e15;  // of slopes, for coarse scores
const real FLAT = 64;  // of n scores, n times their variance: below it too many of them carry a weight
const int64_t MANY_BYTES = 3 << 19;  // of keys and values, more than a second-level cache holds beside the scores
const int TERMS = IS_DOUBLE ? 20 : 12;

// Writes the numbers at `from`, one per lane, that belong to lanes of `m`. `to` may lie before `from` in one list.
INLINE void compress_keys(int32_t* to, Mask m, const int32_t* from) {
    if (IS_DOUBLE) for (; m; m &= m - 1) *to++ = from[__builtin_ctz(m)];
    else compress(to, m, *(const vint32_any*)from);
}

INLINE real absolute_of(real x) { return fabs(x); }
INLINE vf absolute_of(vf x) { return absolute(x); }
vf tanh_of(vf x) {
    // from FAR on tanh is 1 to rounding; the order of the operands keeps a NaN
    const vf e = exp2_less_one(larger(splat(-FAR), smaller(splat(FAR), x)) * (real)2.885390081777927);
    return x == x ? e / (e + 2) : x;
}

// dp = g . v of the listed rows of v; vectors of dp are written to their end.
void of_products(real* dp, const int32_t* key, int64_t n, const real* g, const real* v, int64_t wide) {
    for (int64_t e = 0; e < n; e += L) {
        vf a[L];
        for (int l = 0; l < L; l++) {
            a[l] = vf{};
            if (e + l >= n) continue;
            const real* x = v + (int64_t)key[e + l] * wide;
            for (int64_t d = 0; d < wide; d += L) a[l] += load(x + d) * load(g + d);
        }
        store(dp + e, across<real, false>(a));
    }
}
// The keys of one sequence and head, with what all blocks of queries need of them; each part is made once.
struct Keys {
    int64_t n, wide, wide_v;   // how many, and the padded head dims
    const real *k, *v;        // n rows of `wide` and of `wide_v`
    bool is_scored, is_transposed;
    Buffer<real> padded_k, kt, padded_v, vt, near, radius;  // near: a key per tile, as tiles of 64 such keys
    Buffer<real> squares;                     // of a tile: the sum of the squares of its keys
    bool is_checked;
    Buffer<uint8_t> finite;                   // of a tile: whether all its values are finite
    Buffer<uint8_t> is_turned;                // of a tile: whether it is in kt, and its square in `squares`
    bool is_coarse;
    Buffer<uint8_t> bytes;                    // the whole tiles of keys as bytes, for coarse scores
    Buffer<Rest> rests;                       // what the bytes leave out; both are made when a row first asks
    Keys(int64_t most, int64_t wide_, int64_t wide_v_)
        : n(0), wide(wide_), wide_v(wide_v_), padded_k(up(most, TILE) * wide_), kt(up(most, TILE) * wide_), padded_v(up(most, TILE) * wide_v_),
          vt(up(most, TILE) * wide_v_), near(up(up(most, TILE) / TILE, TILE) * wide_), radius(up(most, TILE) / TILE + L), squares(up(most, TILE) / TILE + 1), is_checked(false), finite(up(most, TILE) / TILE), is_turned(up(most, TILE) / TILE), is_coarse(false), bytes(HAS_COARSE ? up(most, TILE) * wide_ : 0), rests(HAS_COARSE ? up(most, TILE) / TILE : 0) {}
    bool ok() const { return finite.p && is_turned.p && bytes.p && rests.p && padded_k.p && kt.p && padded_v.p && vt.p && near.p && radius.p && squares.p; }
    void take(const real* keys, const real* values, int64_t n_, int64_t D, int64_t Dv) {
        n = n_;
        // rows that already have the padded length are not copied
        if (D < wide) pad_rows(keys, n, D, wide, 1, padded_k.p);
        if (Dv < wide_v) pad_rows(values, n, Dv, wide_v, 1, padded_v.p);
        k = D < wide ? padded_k.p : keys;
        v = Dv < wide_v ? padded_v.p : values;
        is_scored = is_transposed = is_coarse = is_checked = false;
    }
    // Makes what scores need.
    void prepare_scores(bool skipping) {
        if (is_scored) return;
        is_scored = true;
        memset(is_turned.p, 0, up(n, TILE) / TILE);
        if (skipping) represent();
    }
    // Tile t by columns; made when a block first scores it, as many tiles never are.
    const real* columns(int64_t t) {
        real* to = kt.p + t * TILE * wide;
        if (is_turned.p[t]) return to;
        is_turned.p[t] = 1;
        const int64_t count = n - t * TILE < TILE ? n - t * TILE : TILE;
        transpose_tiles(k + t * TILE * wide, count, wide, to);
        squares.p[t] = sum_of_squares(k + t * TILE * wide, count * wide);
        return to;
    }
    void check_values() {
        if (is_checked) return;
        is_checked = true;
        for (int64_t t = 0; t < up(n, TILE) / TILE; t++) {
            vf zero{};
            for (int64_t i = t * TILE * wide_v; i < (n < (t + 1) * TILE ? n : (t + 1) * TILE) * wide_v; i += L) zero += load(v + i) * 0;
            finite.p[t] = !is_nan(zero);
        }
    }
#if HAS_COARSE
    // What the bytes of whole tile t leave out; the bytes are made when a row first asks.
    const Rest& coarse(int64_t t) {
        if (!is_coarse) for (int64_t a = 0; a < n / TILE; a++) rests.p[a].unit = -1;
        is_coarse = true;
        if (rests.p[t].unit < 0) coarse_tile(k + t * TILE * wide, wide, bytes.p + t * TILE * wide, rests.p[t]);
        return rests.p[t];
    }
#endif
    // Makes what the backward pass of a block without a list of keys needs, too.
    void prepare_values() {
        if (!is_transposed) transpose_tiles(v, n, wide_v, vt.p);
        is_transposed = true;
    }
    // Finds the key of each tile that is nearest to the mean of the tile, and how far the others lie from it.
    void represent() {
        const int64_t tiles = up(n, TILE) / TILE;
        memset(near.p, 0, sizeof(real) * up(tiles, TILE) * wide);
        Buffer<real> mean(wide);
        for (int64_t t = 0; t < tiles; t++) {
            const int64_t count = n - t * TILE < TILE ? n - t * TILE : TILE;
            const real* x = k + t * TILE * wide;
            for (int64_t d = 0; d < wide; d += L) {
                vf a{};
                for (int64_t j = 0; j < count; j++) a += load(x + j * wide + d);
                store(mean.p + d, a * ((real)1 / count));
            }
            // the squared distances of the tile's keys from c
            alignas(VECTOR_BYTES) real square[TILE];
            auto measure = [&](const real* c) {
                for (int64_t j = 0; j < count; j += L) {
                    vf a[L];
                    for (int l = 0; l < L; l++) {
                        a[l] = vf{};
                        if (j + l < count) for (int64_t d = 0; d < wide; d += L) { vf e = load(x + (j + l) * wide + d) - load(c + d); a[l] += e * e; }
                    }
                    store(square + j, across<real, false>(a));
                }
            };
            int64_t best = 0;
            real most = 0;
            measure(mean.p);
            for (int64_t j = 1; j < count; j++) if (square[j] < square[best]) best = j;
            measure(x + best * wide);
            for (int64_t j = 0; j < count; j++) if (!(square[j] <= most)) most = square[j] == square[j] ? square[j] : (real)INFINITY;
            radius.p[t] = sqrt(most) * (1 + SLACK);
            for (int64_t d = 0; d < wide; d++) near.p[t / TILE * wide * TILE + d * TILE + t % TILE] = x[best * wide + d];
        }
    }
};

// A block of queries against one sequence of keys.
struct Work {
    const AttentionCall& c;
    Keys& keys;
    Power<real> P;
    int64_t b, h, q0, k0, n_q, n_k, ld, n_tiles, i0;
    int rows;
    Buffer<real> S, U, q, g, low, top, maxima, value, bend;  // bend: the derivative of the cap at each score
    Buffer<int32_t> key;
    Buffer<int64_t> tiles;
    Buffer<uint64_t> hits;      // [ROWS][chosen tiles]: which scores may carry a weight
    Buffer<int32_t> hit_tiles;  // [ROWS][chosen tiles]: the tiles with such a score
    int64_t n_hits[ROWS], n_own[ROWS];  // n_own: tiles that a row chose itself
    // Of coarse scores: the queries as bytes, and what the bytes leave out (`rests`). `doubt` has the width of
    // the interval around each row's scores in each tile; 0 where they are exact.
    Buffer<int8_t> bytes;
    Buffer<float> doubt, mixed;
    Rest rests[ROWS];
    int32_t sums[ROWS];
    bool bad[ROWS], bounded, is_coarse;
    bool is_tame;  // queries and slopes alone make no score that is not finite
    bool fetches;  // keys and values are MANY_BYTES: those of the next tile are on their way while one is at work
    Work(const AttentionCall& c_, Keys& keys_, int64_t most, double s)
        : c(c_), keys(keys_), P(s), ld(up(most, TILE) + L), S(ROWS * ld), U(ROWS * ld), q(ROWS * keys_.wide), g(ROWS * keys_.wide_v),
          low(ROWS + L), top(ROWS + L), maxima(ROWS * TILE), value(ROWS * ld), bend(c_.softcap > 0 ? ROWS * ld : 1), key(ROWS * ld), tiles(up(most, TILE) / TILE + 1), hits(ROWS * (up(most, TILE) / TILE + 1)), hit_tiles(ROWS * (up(most, TILE) / TILE + 1)), bytes(ROWS * keys_.wide), doubt(ROWS * (up(most, TILE) / TILE + 1)), mixed(HAS_COARSE ? ROWS * ld : 0), is_coarse(false) {}
    bool ok() const { return bytes.p && doubt.p && mixed.p && hit_tiles.p && S.p && U.p && q.p && g.p && low.p && top.p && maxima.p && value.p && bend.p && key.p && tiles.p && hits.p; }
    // Scores x and what bounds them become z = s x when the largest of their row has been subtracted: a
    // product with s is rounded, which beside a large score leaves no digits.
    real factor() const { return P.kind == SOFTMAX ? (real)1.4426950408889634 : P.s; }
    // A margin around x, `by` in units of z.
    template <class V> V slack(V x, real by) const { return by * ((P.s > 0 ? 1 / P.s : 1) + absolute_of(x)); }
    int64_t place(int r) const { return i0 + r + n_k - n_q; }  // of query r among the keys
    real slope() const { return c.slopes ? c.slopes[h] : 0; }
    real cap() const { return (real)c.softcap; }
    real sink() const {
        const real x = c.s_aux ? c.s_aux[h] : (real)-INFINITY;
        return x == (real)-INFINITY ? HIDDEN : x < LEAST ? LEAST : x;
    }
    // Puts the sink behind the nv vectors of a row whose largest score is subtracted. Returns the new number of vectors.
    int64_t add_sink(real* row, int64_t nv, int r) const {
        if (!c.s_aux) return nv;
        store(row + nv * L, splat(HIDDEN));
        row[nv * L] = (sink() - top.p[r]) * factor();
        return nv + 1;
    }
    const real* bias(int64_t i) const { return c.bias ? c.bias + b * c.bias_step[0] + h * c.bias_step[1] + (q0 + i) * c.bias_step[2] + k0 * c.bias_step[3] : nullptr; }
    real* bias_gradient(int64_t i) const { return c.dbias ? c.dbias + b * c.dbias_step[0] + h * c.dbias_step[1] + (q0 + i) * c.dbias_step[2] + k0 * c.dbias_step[3] : nullptr; }
    const uint8_t* mask(int64_t i) const { return c.mask ? c.mask + b * c.mask_step[0] + h * c.mask_step[1] + (q0 + i) * c.mask_step[2] + k0 * c.mask_step[3] : nullptr; }

    // The keys that query r sees: [first, last)
    int64_t first_key(int r) const { int64_t a = c.window < 0 ? 0 : place(r) - c.window + 1; return a < 0 ? 0 : a; }
    int64_t last_key(int r) const {
        int64_t e = n_k;
        if (c.causal && place(r) + 1 < e) e = place(r) + 1;
        if (c.window >= 0 && place(r) + c.window < e) e = place(r) + c.window;
        return e < 0 ? 0 : e;
    }
    void begin(int64_t first, const real* queries) {
        i0 = first;
        rows = n_q - i0 < ROWS ? n_q - i0 : ROWS;
        memset(q.p, 0, sizeof(real) * ROWS * keys.wide);
        pad_rows(queries + i0 * c.D, rows, c.D, keys.wide, (real)c.scale, q.p);
        memset(bad, 0, sizeof bad);
        is_tame = sum_of_squares(q.p, ROWS * keys.wide) < TAME && fabs(slope()) * (real)(n_k + n_q) < TAME;
    }
    void choose_tiles() {
        keys.prepare_scores(c.skip);
        const int64_t first = first_key(0) / TILE, end = last_key(rows - 1);
        n_tiles = 0;
        bounded = false;
        const int64_t last = up(end, TILE) / TILE;
        if (!c.skip || last - first < 6 || !P.is_bounded()) {
            for (int64_t t = first; t < last; t++) tiles.p[n_tiles++] = t;
            for (int r = 0; r < ROWS; r++) n_own[r] = n_tiles;
            return;
        }
        bounded = true;
        memset(n_own, 0, sizeof n_own);
        // U takes the scores of the keys that stand for tiles, and then upper bounds of all scores of each tile
        for (int64_t t = first / TILE * TILE; t < last; t += TILE)
            multiply<false>(ROWS, keys.wide, q.p, keys.wide, 1, keys.near.p + t * keys.wide, TILE, U.p + t, ld, last - t < TILE ? up(last - t, L) : TILE);
        for (int i = 0; i < ROWS * TILE; i += L) store(maxima.p + i, splat(HIDDEN));
        const real steep = slope(), most_of_all = cap();
        const auto capped = [most_of_all](vf u) { return most_of_all > 0 ? most_of_all * tanh_of(u / most_of_all) : u; };
        vf lane;
        for (int l = 0; l < L; l++) lane[l] = l;
        for (int r = 0; r < rows; r++) {
            vf norm2{};
            for (int64_t d = 0; d < keys.wide; d += L) { vf x = load(q.p + r * keys.wide + d); norm2 += x * x; }
            const real norm = sqrt(sum<real>(norm2)) * (1 + SLACK);
            const real i = (real)place(r), a = (real)first_key(r), e = (real)last_key(r);
            for (int64_t t = first / L * L; t < last; t += L) {
                const vf u = load(U.p + r * ld + t), left = (lane + (real)t) * (real)TILE, right = left + (real)TILE;
                const vf close = larger(larger(i - right + 1, left - i), vf{}), far = larger(i - left, right - 1 - i);
                real* m = maxima.p + r * TILE + t % TILE;
                const vf z = larger(load(m), capped(u) - far * steep);
                store(m, (left >= a) & (right <= e) ? z : load(m));
                // a negative slope raises scores with the distance
                const vf most = capped(u + norm * load(keys.radius.p + t)) - (steep >= 0 ? close : far) * steep;
                store(U.p + r * ld + t, (right <= a) | (left >= e) ? splat(HIDDEN) : most);
            }
        }
        if (steep < 0) for (int i = 0; i < ROWS * TILE; i += L) store(maxima.p + i, splat(HIDDEN));
        bound();
        for (int64_t t = first / L * L; t < last; t += L) {
            Mask some = 0;
            for (int r = 0; r < rows; r++) {
                const real least = low.p[r];
                const vf u = load(U.p + r * ld + t);
                // a tile is also kept where u is NaN; a row is computed from the tiles that it keeps itself
                const vf may = (u <= HIDDEN) | (u < least - slack(least, SLACK)) ? vf{} : splat((real)1);
                store(U.p + r * ld + t, may);
                const Mask own = above(may, vf{});
                n_own[r] += bits(own);
                some |= own;
            }
            for (; some; some &= some - 1) tiles.p[n_tiles++] = t + __builtin_ctz(some);
        }
    }
    // The sink is seen by each row that sees a key: it joins the first lane.
    void take_sink() {
        const real z = sink();
        if (!(z > HIDDEN && z < (real)INFINITY)) return;
        for (int r = 0; r < rows; r++) {
            real* x = maxima.p + r * TILE;
            vf m = load(x);
            for (int k = 1; k < TV; k++) m = larger(m, load(x + k * L));
            if (maximum<real>(m) > HIDDEN && x[0] < z) x[0] = z;
        }
    }
    // From the maxima of lanes: the rows' maxima in `top`, and in `low` a score not above their threshold.
    void bound() {
        take_sink();
        const int n = P.n < 2 ? 2 : P.n;
        for (int r0 = 0; r0 < rows; r0 += L) {
            const int R = rows - r0 < L ? rows - r0 : L;
            vf m[L], F[L], G[L], u{};
            for (int r = 0; r < L; r++) {
                m[r] = vf{};
                F[r] = G[r] = splat((real)1 / L);
                if (r >= R) continue;
                const real* x = maxima.p + (r0 + r) * TILE;
                m[r] = load(x);
                for (int k = 1; k < TV; k++) m[r] = larger(m[r], load(x + k * L));
            }
            const vf t = across<real, true>(m);
            for (int i = 0; P.is_bounded() && i < 3; i++) {
                for (int r = 0; r < R; r++) {
                    const real* x = maxima.p + (r0 + r) * TILE;
                    if (n == 2) {
                        vf f{}, g{};
                        for (int k = 0; k < TV; k++) { vf y = larger((load(x + k * L) - t[r]) * P.s + (1 - u[r]), vf{}); f += y * y; g += y; }
                        F[r] = f; G[r] = g;
                        continue;
                    }
                    alignas(64) real y[TILE];
                    for (int k = 0; k < TV; k++) store(y + k * L, (load(x + k * L) - t[r]) * P.s);
                    Sums<real> s = sums_for<real>(n)(y, TV, u[r], nullptr);
                    F[r] = s.F; G[r] = s.G;
                }
                u += whole_step<real>(across<real, false>(F), across<real, false>(G), n);
            }
            store(top.p + r0, t);
            store(low.p + r0, threshold(t, u));
        }
    }
    // A score below which there is no weight, from the largest one and the unit point counted from it.
    template <class V> V threshold(V largest_score, V u) const {
        return P.kind == SOFTMAX ? largest_score : largest_score + (u - 1) / P.s - slack(largest_score, SLACK / 10);
    }
    // Whether a tile is one that the row chose itself.
    bool is_own(int r, int64_t t) const { return !bounded || U.p[r * ld + t] != 0; }
    // Scores of the chosen tiles into S, tile a at column 64 a, and their lane maxima.
    void score(bool first_time) {
        const real steep = slope(), most = cap();
        if (first_time) for (int i = 0; i < ROWS * TILE; i += L) store(maxima.p + i, splat(HIDDEN));
        const int padded = rows > 18 ? 24 : rows > 12 ? 18 : rows > 6 ? 12 : 6;
        vf lane;
        for (int l = 0; l < L; l++) lane[l] = l;
        bool own[ROWS] = {};
        for (int64_t a = 0; a < n_tiles; a++) {
            const int64_t j0 = tiles.p[a] * TILE;
            real* s = S.p + a * TILE;
            for (int r = 0; r < rows; r++) own[r] = is_own(r, tiles.p[a]);
#if HAS_COARSE
            // later queries see keys from a later one on, and up to a later one
            const bool all_whole = sees_whole(0, tiles.p[a]) && sees_whole(rows - 1, tiles.p[a]);
            bool whole[ROWS] = {}, any_whole = is_coarse && all_whole;
            for (int r = 0; is_coarse && !all_whole && r < rows; r++) any_whole |= whole[r] = sees_whole(r, tiles.p[a]);
            any_whole = any_whole && keys.coarse(tiles.p[a]).unit > 0;
            for (int r = 0; is_coarse && !any_whole && r < rows; r++) doubt.p[r * (ld / TILE) + a] = 0;
            if (any_whole && all_whole) {
                coarse_tile_scores(tiles.p[a], s, own, doubt.p + a, ld / TILE);
                continue;
            }
            if (any_whole) {  // rows that see the tile whole beside rows that see a part: both kinds
                bool own_whole[ROWS] = {};
                for (int r = 0; r < rows; r++) {
                    own_whole[r] = own[r] && whole[r];
                    own[r] = own[r] && !whole[r];
                }
                coarse_tile_scores(tiles.p[a], mixed.p, own_whole, doubt.p + a, ld / TILE);
                for (int r = 0; r < rows; r++) if (!whole[r]) doubt.p[r * (ld / TILE) + a] = 0;
            }
            struct Replace {  // at the tile's end: coarse scores of the rows that see it whole
                bool needed;
                const bool* whole;
                const real* from;
                real* to;
                int64_t ld;
                int rows;
                ~Replace() { for (int r = 0; needed && r < rows; r++) if (whole[r]) memcpy(to + r * ld, from + r * ld, sizeof(real) * TILE); }
            } replace{any_whole, whole, mixed.p, s, ld, rows};
#endif
            const real *kt = keys.columns(tiles.p[a]), *next = keys.kt.p + after(a) * TILE * keys.wide;
            const bool edge = first_key(rows - 1) > j0 || last_key(0) < j0 + TILE, tame = is_tame && !c.bias && keys.squares.p[tiles.p[a]] < TAME;
            if (tame && !c.mask && !most) {
                const real* to = next;
                const int64_t columns = up(seen(a), L);
                for (int r = 0; r < padded; r += BLOCK_ROWS)
                    to = edge || steep ? score_tame<true>(r, a, kt, columns, first_time, own, to) : score_tame<false>(r, a, kt, columns, first_time, own, to);
                for (int r = 0; r < rows; r++) for (int64_t j = columns; j < TILE; j += L) store(s + r * ld + j, splat(HIDDEN));
                continue;
            }
            product<false>(padded, keys.wide, q.p, keys.wide, 1, kt, TILE, s, ld, TILE, next);
            const int64_t n = n_k - j0 < TILE ? n_k - j0 : TILE;
            for (int r = 0; r < rows; r++) {
                real *x = s + r * ld, *m = maxima.p + r * TILE;
                for (int k = 0; most > 0 && k < TV; k++) {
                    const vf t = tanh_of(load(x + k * L) / most);
                    store(bend.p + r * ld + a * TILE + k * L, 1 - t * t);
                    store(x + k * L, most * t);
                }
                if (const real* add = bias(i0 + r)) for (int64_t j = 0; j < n; j++) x[j] += add[(j0 + j) * c.bias_step[3]];
                const real offset = (real)(j0 - place(r)), from = (real)(first_key(r) - j0), to = (real)(last_key(r) - j0);
                for (int k = 0; k < TV; k++) {
                    vf z = load(x + k * L), j = lane + (real)(k * L);
                    if (steep) z -= absolute(j + offset) * steep;
                    if (!tame) z = z == (real)-INFINITY ? splat(HIDDEN) : z < LEAST ? splat(LEAST) : z;
                    if (edge) z = (j >= from) & (j < to) ? z : splat(HIDDEN);
                    store(x + k * L, z);
                }
                if (const uint8_t* seen = mask(i0 + r)) for (int64_t j = 0; j < n; j++) if (!seen[(j0 + j) * c.mask_step[3]]) x[j] = HIDDEN;
                if (!first_time || !own[r]) continue;
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
    // The tile behind the a-th one.
    int64_t after(int64_t a) const { return tiles.p[a + 1 < n_tiles ? a + 1 : a]; }
    // Of the a-th tile: how many keys, from the first one on, a query of the block may see.
    int64_t seen(int64_t a) const {
        const int64_t n = last_key(rows - 1) - tiles.p[a] * TILE;
        return n < 0 ? 0 : n < TILE ? n : TILE;
    }
    // Scores of BLOCK_ROWS queries from r0 on against the first keys of the a-th tile, `columns` of which are
    // in kt, where all are finite. BENT: with a slope, or where not all queries see all of these keys.
    template <bool BENT> const real* score_tame(int r0, int64_t a, const real* kt, int64_t columns, bool first_time, const bool* own, const real* next) {
        const real steep = slope();
        real offset[BLOCK_ROWS], from[BLOCK_ROWS], to[BLOCK_ROWS], *top_of = maxima.p + r0 * TILE;
        const int64_t j0 = tiles.p[a] * TILE;
        for (int i = 0; BENT && i < BLOCK_ROWS; i++) {
            offset[i] = (real)(j0 - place(r0 + i));
            from[i] = (real)(first_key(r0 + i) - j0);
            to[i] = (real)(last_key(r0 + i) - j0);
        }
        vf lane;
        for (int l = 0; l < L; l++) lane[l] = l;
        return rows_of<BLOCK_ROWS, false>(keys.wide, q.p + r0 * keys.wide, keys.wide, 1, kt, TILE, S.p + r0 * ld + a * TILE, ld, columns, next, [&](int i, int64_t n, vf z) {
            if (BENT) {
                const vf j = lane + (real)n;
                z -= absolute(j + offset[i]) * steep;
                z = (j >= from[i]) & (j < to[i]) ? z : splat(HIDDEN);
            }
            real* m = top_of + i * TILE + n;
            if (first_time && own[r0 + i]) store(m, larger(load(m), z));
            return z;
        });
    }
    // As in products.h; what stands at `next` is fetched where that pays.
    template <int M, bool ADD, class Finish> const real* rows_of(int64_t K, const real* A, int64_t a_row, int64_t a_k, const real* B, int64_t b_row, real* C, int64_t c_row, int64_t columns, const real* next, const Finish& finish) const {
        return fetches ? products::rows_of<M, ADD, true>(K, A, a_row, a_k, B, b_row, C, c_row, columns, next, finish)
                       : products::rows_of<M, ADD, false>(K, A, a_row, a_k, B, b_row, C, c_row, columns, next, finish);
    }
    template <bool ADD> void product(int64_t M, int64_t K, const real* A, int64_t a_row, int64_t a_k, const real* B, int64_t b_row, real* C, int64_t c_row, int64_t columns, const real* next) const {
        if (fetches) multiply<ADD, true>(M, K, A, a_row, a_k, B, b_row, C, c_row, columns, next);
        else multiply<ADD>(M, K, A, a_row, a_k, B, b_row, C, c_row, columns);
    }
    bool sees_whole(int r, int64_t t) const { return first_key(r) <= t * TILE && last_key(r) >= (t + 1) * TILE; }
    // Which rows are found by coarse scores, and whether there is one. Only what the row sees decides, so
    // that its bits do not depend on the others: the first tile that it sees whole shows how far its
    // scores lie from each other.
    bool begin_coarse(bool* by_coarse) {
        memset(by_coarse, 0, ROWS);
        is_coarse = false;
#if HAS_COARSE
        bool many = false;
        for (int r = 0; r < rows; r++) many |= bounded && n_own[r] >= LEAST_TILES;
        if (!c.coarse || !many || c.bias || c.mask || c.softcap > 0 || !(fabs(slope()) < STEEPEST)) return false;
        coarse_queries(q.p, ROWS, keys.wide, bytes.p, sums, rests);
        int64_t shown = -1;
        for (int r = 0; r < rows; r++) {
            const int64_t first = up(first_key(r), TILE) / TILE;
            if (n_own[r] < LEAST_TILES || rests[r].unit == 0 || !sees_whole(r, first) || keys.coarse(first).unit == 0) continue;
            if (first != shown) coarse_tile_scores(first, S.p, nullptr);
            shown = first;
            vf total{}, squares{};
            for (int k = 0; k < TV; k++) { const vf z = load(S.p + r * ld + k * L); total += z; squares += z * z; }
            const real mean = sum<real>(total) / TILE, variance = (sum<real>(squares) / TILE - mean * mean) * factor() * factor();
            by_coarse[r] = variance * (real)(last_key(r) - first_key(r)) >= FLAT;
            is_coarse |= by_coarse[r];
        }
#endif
        return is_coarse;
    }
#if HAS_COARSE
    // Writes lower bounds of the block's scores against tile t to `s`, and the columns' largest to `maxima`.
    void coarse_tile_scores(int64_t t, float* s, const bool* own, float* wider = nullptr, int64_t wider_step = 0) {
        const Rest& of = keys.coarse(t);
        const bool none[ROWS] = {};
        float unit[ROWS], less[ROWS], from[ROWS];
        for (int r = 0; r < ROWS; r++) {
            unit[r] = rests[r].unit * of.unit;
            less[r] = (rests[r].error * of.norm + (rests[r].norm + rests[r].error) * of.error) + 2 * SLACK * rests[r].norm * of.norm;
            from[r] = (float)(place(r) - t * TILE);
            if (wider) wider[r * wider_step] = 2 * less[r];
        }
        for (int r = 0; r < rows; r += BLOCK_ROWS)
            coarse_block(keys.wide, bytes.p + r * keys.wide, sums + r, keys.bytes.p + t * TILE * keys.wide, unit + r, less + r, slope(), from + r, s + r * ld, ld, maxima.p + r * TILE, (own ? own : none) + r);
    }
#endif
    uint64_t* hits_of(int r) { return hits.p + r * (ld / TILE + 1); }
    int32_t* hit_tiles_of(int r) { return hit_tiles.p + r * (ld / TILE + 1); }
    // Marks the scores that may lie above `low`: no others carry a weight.
    void find() {
        for (int r = 0; r < rows; r++) {
            uint64_t* hit = hits_of(r);
            int32_t* listed = hit_tiles_of(r);
            const real* s = S.p + r * ld;
            const bool none = bad[r] || !(top.p[r] > HIDDEN);
            const real lowest = none ? (real)INFINITY : low.p[r] - (is_coarse ? slack(low.p[r], SLACK / 10) : 0);
            int64_t n = 0, tiles_hit = 0;
            for (int64_t a = 0; a < n_tiles; a++) {
                uint64_t m = 0;
                const vf least = splat(lowest - (is_coarse ? (real)doubt.p[r * (ld / TILE) + a] : 0));
                for (int k = 0; k < TV; k++) m |= (uint64_t)above(load(s + a * TILE + k * L), least) << (k * L);
                // a tile that another row chose has no weight for this row, which coarse scores may not show
                if (is_coarse && !is_own(r, tiles.p[a])) m = 0;
                hit[tiles_hit] = m;
                listed[tiles_hit] = (int32_t)a;  // without a branch: a processor cannot foresee which tiles are hit
                tiles_hit += m != 0;
                n += __builtin_popcountll(m);
            }
            n_hits[r] = n;
            hit[tiles_hit] = 0;
            listed[tiles_hit] = 0;
        }
    }
    // Writes the keys that `find` marked in row r side by side, and their z less the largest.
    void collect(int r) {
        real *z = value.p + r * ld, *s = S.p + r * ld;
        int32_t* found = key.p + r * ld;
        const uint64_t* hit = hits_of(r);
        const int32_t* listed = hit_tiles_of(r);
        const int64_t n = n_hits[r];
        // Four hits of a tile are written whether it has them or not, so that a tile need not wait for the
        // one before it, and a processor, which cannot foresee how many there are, seldom has to.
        for (int64_t e = 0, tile = 0; e < n; tile++) {
            uint64_t m = hit[tile];
            const int64_t a = listed[tile];
            const int32_t j0 = (int32_t)(tiles.p[a] * TILE);
            const int64_t next = e + __builtin_popcountll(m);
            do {
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++, m &= m - 1) {
                    const int j = __builtin_ctzll(m | 1ull << 63);
                    found[e + i] = j0 + j;
                    z[e + i] = s[a * TILE + j];
                }
                e += 4;
            } while (m);
            e = next;
        }
        store(z + n, splat(HIDDEN));
        if (is_coarse) score_found(r);
        for (int64_t e = 0; e < n; e += L) store(z + e, (load(z + e) - top.p[r]) * factor());
        store(z + n, splat(HIDDEN));
    }
    // Replaces the coarse scores of the marked keys by scores, and finds the largest.
    void score_found(int r) {
        real* z = value.p + r * ld;
        const int32_t* found = key.p + r * ld;
        const int64_t n = n_hits[r];
        of_products(z, found, n, q.p + r * keys.wide, keys.k, keys.wide);
        store(z + n, splat(HIDDEN));
        const real steep = slope(), from = (real)place(r);
        if (steep) for (int64_t e = 0; e < n; e++) z[e] -= fabs((real)found[e] - from) * steep;
        vf most = splat(sink());
        for (int64_t e = 0; e < n; e += L) most = larger(most, load(z + e));
        top.p[r] = largest<real>(most);
    }
    void score_and_bound() {
        score(true);
        bound();
        if (!(sink() < (real)INFINITY)) for (int r = 0; r < rows; r++) bad[r] |= top.p[r] > HIDDEN;
    }
    // Finds the rows of `of` in which few of the keys that they see may carry a weight: those rows are
    // solved from these keys alone.
    void find_sparse(const bool* of, bool* sparse) {
        if (P.is_bounded()) find();
        for (int r = 0; r < rows; r++) {
            if (!of[r]) continue;
            sparse[r] = P.is_bounded() && 5 * n_hits[r] <= 2 * (last_key(r) - first_key(r)) + 40;
            if (sparse[r]) collect(r);
        }
    }
    // Scores a block and collects the keys of its sparse rows. Returns whether a row is left that is solved whole.
    bool score_rows(bool* sparse) {
        bool by_coarse[ROWS], rest[ROWS];
        real tops[ROWS], lows[ROWS];
        int64_t hits_by_coarse[ROWS];
        memset(sparse, 0, ROWS);
        const bool any_coarse = begin_coarse(by_coarse);
        if (any_coarse) {
            score_and_bound();
            find_sparse(by_coarse, sparse);
        }
        bool any = false;
        for (int r = 0; r < rows; r++) {
            rest[r] = !sparse[r];
            any |= rest[r];
            if (!any_coarse) continue;
            tops[r] = top.p[r]; lows[r] = low.p[r]; hits_by_coarse[r] = n_hits[r];
        }
        if (!any) return false;
        is_coarse = false;
        score_and_bound();
        find_sparse(rest, sparse);
        bool any_whole = false;
        for (int r = 0; r < rows; r++) {
            if (!rest[r]) { top.p[r] = tops[r]; low.p[r] = lows[r]; n_hits[r] = hits_by_coarse[r]; }
            any_whole |= !sparse[r];
        }
        return any_whole;
    }
    // A lower bound of row r's unit point, counted from the largest score.
    real start(int r) const {
        const real u = P.is_bounded() ? (low.p[r] - top.p[r]) * P.s + 1 : 0;
        return u > 0 ? u : 0;
    }
    void subtract_top(int r) {
        real* s = S.p + r * ld;
        const vf most = splat(top.p[r]);
        for (int64_t k = 0; k < n_tiles * TILE; k += L) store(s + k, (load(s + k) - most) * factor());
    }
    // Drops the tiles without a score above `low`; the others move up.
    void prune() {
        int64_t n = 0;
        for (int64_t a = 0; a < n_tiles; a++) {
            bool some = false;
            for (int r = 0; r < rows && !some; r++) {
                const real* x = S.p + r * ld + a * TILE;
                vf m = load(x);
                for (int k = 1; k < TV; k++) m = larger(m, load(x + k * L));
                some = bad[r] || above(m, splat(low.p[r])) != 0;
            }
            if (!some) continue;
            for (int r = 0; n != a && r < rows; r++) {
                memcpy(S.p + r * ld + n * TILE, S.p + r * ld + a * TILE, sizeof(real) * TILE);
                if (c.softcap > 0) memcpy(bend.p + r * ld + n * TILE, bend.p + r * ld + a * TILE, sizeof(real) * TILE);
            }
            tiles.p[n++] = tiles.p[a];
        }
        n_tiles = n;
    }
    // The weight of the sink in a row that is solved.
    real sink_weight(real most, real u, real inverse) const {
        alignas(VECTOR_BYTES) real z[L];
        store(z, splat(HIDDEN));
        z[0] = (sink() - most) * factor();
        sums_of(z, 1, u, z, P);
        return z[0] * inverse;
    }
    // Solves the rows of `at`, of nv vectors each, whose largest number is 0, from `unit`, which is not above
    // the unit point: each row's own comes to stand there. The weights replace the numbers, and `inverse`
    // is 1 / their sum. What happens between two passes happens for as many rows at once as there are lanes.
    void solve(int n, real* const* at, const int64_t* nv, real* unit, real* inverse) {
        const real enough = tolerance(P);
        for (int r0 = 0; r0 < n; r0 += L) {
            const int R = n - r0 < L ? n - r0 : L;
            vf F[L], G[L], u{}, live{};
            for (int r = 0; r < L; r++) F[r] = G[r] = splat((real)1 / L);
            for (int r = 0; r < R; r++) {
                u[r] = unit[r0 + r];
                live[r] = P.kind == SOFTMAX ? 0 : 1;
            }
            Mask late = above(live, vf{});
            for (int round = 0; round < c.steps && late; round++) {
                for (int r = 0; r < R; r++) {
                    if (!(late >> r & 1)) continue;
                    const Sums<real> s = sums_of(at[r0 + r], nv[r0 + r], u[r], (real*)nullptr, P);
                    F[r] = s.F; G[r] = s.G;
                }
                const vf f = across<real, false>(F), step = newton_step<real>(f, across<real, false>(G), P);
                const vf next = u + (live > 0 ? P.kind == REAL ? step : larger(step, vf{}) : vf{});
                live = f - 1 > enough ? live : vf{};
                live = next == u ? vf{} : live;
                u = next;
                late = above(live, vf{});
            }
            for (int r = 0; r < R; r++) F[r] = P.kind == SOFTMAX ? exponentials(at[r0 + r], nv[r0 + r]) : sums_of(at[r0 + r], nv[r0 + r], u[r], at[r0 + r], P).F;
            const vf share = 1 / across<real, false>(F);
            for (int r = 0; r < R; r++) {
                unit[r0 + r] = u[r];
                inverse[r0 + r] = share[r];
            }
        }
    }
    // Replaces z by 2^z. Returns the sums.
    static vf exponentials(real* z, int64_t nv) {
        vf total{};
        for (int64_t k = 0; k < nv; k++) {
            vf y = load(z + k * L), w = exp2_of(larger(y, splat(LOWEST_EXPONENT)));
            w = y > LOWEST_EXPONENT ? w : vf{};
            total += w;
            store(z + k * L, w);
        }
        return total;
    }
};

// Vectors of a row, four at a time and the rest one by one: f(how many, from where).
template <class F> INLINE void in_chunks(int64_t wide, F f) {
    int64_t d = 0;
    for (; d + 4 * L <= wide; d += 4 * L) f(std::integral_constant<int, 4>(), d);
    for (; d < wide; d += L) f(std::integral_constant<int, 1>(), d);
}
// out = the listed rows of v, each times its weight.
template <int NV>
INLINE void gather(const real* weight, const int32_t* key, int64_t n, const real* v, real* out, int64_t wide) {
    vf x[NV], y[NV];
    for (int k = 0; k < NV; k++) x[k] = y[k] = vf{};
    int64_t e = 0;
    for (; e + 1 < n; e += 2) {
        const real *v0 = v + (int64_t)key[e] * wide, *v1 = v + (int64_t)key[e + 1] * wide;
        for (int k = 0; k < NV; k++) { x[k] += load(v0 + k * L) * weight[e]; y[k] += load(v1 + k * L) * weight[e + 1]; }
    }
    if (e < n) for (int k = 0; k < NV; k++) x[k] += load(v + (int64_t)key[e] * wide + k * L) * weight[e];
    for (int k = 0; k < NV; k++) store(out + k * L, x[k] + y[k]);
}

// Where a head's kept weights are: one list for its queries, in order.
struct Kept {
    int32_t* keys;
    real* p;
    int32_t* counts;
    int64_t room, used;
};
Kept kept_of(const AttentionCall& c, int64_t b, int64_t h, int64_t q0, int64_t n_q) {
    const int64_t row = (b * c.H + h) * c.N_q + q0;
    if (!c.counts) return {nullptr, nullptr, nullptr, 0, 0};
    return {c.keys + row * c.room, c.p + row * c.room, c.counts + row, n_q * c.room, 0};
}

void forward_head(Work& w, const real* queries, real* o, real* top, real* unit, real* inv, Kept kept) {
    const AttentionCall& c = w.c;
    const int64_t wide = w.keys.wide_v;
    Buffer<real> acc(ROWS * wide);
    for (int64_t i0 = 0; i0 < w.n_q; i0 += ROWS) {
        w.begin(i0, queries);
        w.choose_tiles();
        bool sparse[ROWS], keep = kept.keys != nullptr;
        const bool any_whole = w.score_rows(sparse);
        const int rows = w.rows;
        const int64_t used = kept.used;
        if (any_whole && w.P.is_bounded()) w.prune();
        keep &= !any_whole;
        memset(acc.p, 0, sizeof(real) * ROWS * wide);
        real *solved[ROWS], units[ROWS], shares[ROWS];
        int64_t vectors[ROWS];
        int from[ROWS], n_solved = 0;
        const bool has_sink = c.s_aux != nullptr;
        for (int r = 0; r < rows; r++) {
            const int64_t i = i0 + r;
            if (kept.counts) kept.counts[i] = 0;
            top[i] = w.top.p[r];
            unit[i] = w.top.p[r] > HIDDEN ? 0 : (real)INFINITY;
            inv[i] = 0;
            real *s = w.S.p + r * w.ld, *value = w.value.p + r * w.ld;
            if (w.bad[r] || !(w.top.p[r] > HIDDEN)) {
                if (w.bad[r]) unit[i] = NAN;
                memset(s, 0, sizeof(real) * w.n_tiles * TILE);
                continue;
            }
            if (!sparse[r]) w.subtract_top(r);
            else if (has_sink) value[w.n_hits[r]] = (w.sink() - w.top.p[r]) * w.factor();
            from[n_solved] = r;
            solved[n_solved] = sparse[r] ? value : s;
            vectors[n_solved] = sparse[r] ? (w.n_hits[r] + has_sink + L - 1) / L : w.add_sink(s, w.n_tiles * TV, r);
            units[n_solved++] = w.start(r);
        }
        w.solve(n_solved, solved, vectors, units, shares);
        for (int k = 0; k < n_solved; k++) {
            const int r = from[k];
            const int64_t i = i0 + r, nv = vectors[k];
            unit[i] = units[k];
            inv[i] = shares[k];
            if (!sparse[r]) continue;
            real *s = w.S.p + r * w.ld, *value = solved[k];
            int32_t* key = w.key.p + r * w.ld;
            if (has_sink) value[w.n_hits[r]] = 0;  // it has no value to be averaged
            int64_t n = 0;
            for (int64_t e = 0; e < nv; e++) {
                const vf x = load(value + e * L);
                const Mask m = above(x, vf{});
                compress(value + n, m, x);
                compress_keys(key + n, m, key + e * L);
                n += bits(m);
            }
            real* out = acc.p + r * wide;
            in_chunks(wide, [&](auto count, int64_t d) { gather<decltype(count)::value>(value, key, n, w.keys.v + d, out + d, wide); });
            memset(s, 0, sizeof(real) * (any_whole ? w.n_tiles * TILE : 0));
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
        if (any_whole) w.keys.check_values();
        for (int64_t a = 0; any_whole && a < w.n_tiles; a++) {
            const int64_t j0 = w.tiles.p[a] * TILE, n = w.seen(a);
            const real *p = w.S.p + a * TILE, *v = w.keys.v + j0 * wide;
            if (w.keys.finite.p[w.tiles.p[a]]) {
                w.product<true>(rows, n, p, w.ld, 1, v, wide, acc.p, wide, wide, w.keys.v + w.after(a) * TILE * wide);
                continue;
            }
            // 0 times infinity is NaN: a value reaches the queries that give it a weight, and no others
            for (int r = 0; r < rows; r++)
                for (int64_t j = 0; j < n; j++) {
                    real* to = acc.p + r * wide;
                    for (int64_t d = 0; p[r * w.ld + j] > 0 && d < wide; d += L) store(to + d, load(to + d) + load(v + j * wide + d) * p[r * w.ld + j]);
                }
        }
        for (int r = 0; r < rows; r++)
            for (int64_t d = 0; d < c.D_v; d++) o[(i0 + r) * c.D_v + d] = w.bad[r] ? NAN : acc.p[r * wide + d] * inv[i0 + r];
    }
}

INLINE vf escort_of(vf p, const Power<real>& P) {
    if (P.kind == SOFTMAX) return p;
    if (P.kind == LINEAR) return p > 0 ? splat((real)1) : vf{};
    if (P.kind == SQUARE) return root(p);
    vf g = exp2_of((1 - P.s) * log2_of(larger(p, splat(SMALLEST))));
    return p > 0 ? g : vf{};
}
// h = p L^2 phi(-s L), L = log p: -dp/ds at a fixed threshold in x.
INLINE vf curvature_of(vf p, vf g, real s) {
    vf log = log2_of(larger(p, splat(SMALLEST))) * (real)0.6931471805599453, a = log * -s, small = smaller(a, splat((real)1)), phi = splat((real)1);
    for (int k = TERMS; k >= 3; k--) phi = phi * small * ((real)1 / k) + 1;
    vf h = a < 1 ? phi * (real)0.5 * log * log * p : (g - p - p * a) / (s * s);
    return p > 0 ? h : vf{};
}

// Of nv vectors of weights p, once they are multiplied by `share`, and dp: ds (in dp's place) and, where asked
// for, the row's derivative in s. What has no weight is left out, as its dp need not be finite. g is scratch.
void derive_row(Work& w, real* p, real* dp, real* g, int64_t nv, real share, real* d_s) {
    vf mass{}, moment{}, total{};
    for (int64_t k = 0; k < nv; k++) {
        const vf y = load(p + k * L) * share, e = escort_of(y, w.P);
        mass += e;
        moment += e > 0 ? e * load(dp + k * L) : vf{};
        store(p + k * L, y);
        store(g + k * L, e);
    }
    const real m = sum<real>(mass), mean = m > 0 ? sum<real>(moment) / m : 0;
    for (int64_t k = 0; k < nv; k++) {
        const vf e = load(g + k * L), d = load(dp + k * L) - mean;
        if (d_s) { const vf y = load(p + k * L); total -= y > 0 ? curvature_of(y, e, w.P.s) * d : vf{}; }
        store(dp + k * L, e > 0 ? e * d : vf{});
    }
    if (d_s) *d_s = sum<real>(total);
}

// to += the listed rows of `from`, each times its weight; the listed rows of `on` += x times the weight.
template <int NV>
INLINE void add_rows(const real* weight, const int32_t* key, int64_t n, const real* x, const real* from, real* to, real* on, int64_t wide) {
    vf row[NV], total[NV];
    for (int k = 0; k < NV; k++) { row[k] = load(x + k * L); total[k] = to ? load(to + k * L) : vf{}; }
    for (int64_t e = 0; e < n; e++) {
        const int64_t at = (int64_t)key[e] * wide;
        const real by = weight[e];
        for (int k = 0; k < NV; k++) {
            if (from) total[k] += load(from + at + k * L) * by;
            store(on + at + k * L, load(on + at + k * L) + row[k] * by);
        }
    }
    if (to) for (int k = 0; k < NV; k++) store(to + k * L, total[k]);
}

void backward_head(Work& w, const real* queries, const real* d_out, const real* top, const real* unit, const real* inv, Kept kept, real* dq, real* dk, real* dv, real* d_s, real* d_slope, real* d_aux) {
    const AttentionCall& c = w.c;
    const int64_t wide = w.keys.wide, wide_v = w.keys.wide_v;
    const real by = (real)c.scale;
    Buffer<real> acc(ROWS * wide), raw(ROWS * wide);
    for (int64_t i0 = 0; i0 < w.n_q; i0 += ROWS) {
        w.begin(i0, queries);
        const int rows = w.rows;
        memset(w.g.p, 0, sizeof(real) * ROWS * wide_v);
        pad_rows(d_out + i0 * c.D_v, rows, c.D_v, wide_v, 1, w.g.p);
        memset(raw.p, 0, sizeof(real) * ROWS * wide);
        pad_rows(queries + i0 * c.D, rows, c.D, wide, by, raw.p);
        memset(acc.p, 0, sizeof(real) * ROWS * wide);
        const bool sparse = kept.counts && kept.counts[i0] >= 0;
        if (sparse) {
            for (int r = 0; r < rows; r++) {
                const int64_t n = kept.counts[i0 + r];
                const int32_t* key = kept.keys + kept.used;
                const real *g = w.g.p + r * wide_v, *q = raw.p + r * wide;
                real *p = w.S.p, *dp = w.U.p, *to = acc.p + r * wide;
                memcpy(p, kept.p + kept.used, sizeof(real) * n);
                store(p + n, vf{});
                kept.used += n;
                of_products(dp, key, n, g, w.keys.v, wide_v);
                store(dp + n, vf{});
                if (c.s_aux) p[n] = w.sink_weight(top[i0 + r], unit[i0 + r], inv[i0 + r]);
                derive_row(w, p, dp, w.value.p, (n + (c.s_aux != nullptr) + L - 1) / L, 1, d_s ? d_s + i0 + r : nullptr);
                if (d_aux) d_aux[i0 + r] = dp[n];
                in_chunks(wide_v, [&](auto count, int64_t d) { add_rows<decltype(count)::value>(p, key, n, g + d, nullptr, nullptr, dv + d, wide_v); });
                if (d_slope) {
                    real t = 0;
                    for (int64_t e = 0; e < n; e++) t -= dp[e] * fabs((real)(key[e] - w.place(r)));
                    d_slope[i0 + r] = t;
                }
                if (real* to_bias = w.bias_gradient(i0 + r)) for (int64_t e = 0; e < n; e++) to_bias[key[e] * c.dbias_step[3]] += dp[e];
                if (c.softcap > 0) {
                    real* x = w.value.p;
                    of_products(x, key, n, q, w.keys.k, wide);
                    for (int64_t e = 0; e < n; e += L) {
                        const vf t = tanh_of(load(x + e) / (real)c.softcap);
                        store(dp + e, load(dp + e) * (1 - t * t));
                    }
                }
                in_chunks(wide, [&](auto count, int64_t d) { add_rows<decltype(count)::value>(dp, key, n, q + d, w.keys.k + d, to + d, dk + d, wide); });
            }
        } else {
            w.choose_tiles();
            w.score(false);
            w.keys.prepare_values();
            for (int r = 0; r < rows; r++) {
                w.top.p[r] = top[i0 + r];
                w.low.p[r] = w.threshold(top[i0 + r], unit[i0 + r]);
            }
            if (w.P.is_bounded()) w.prune();
            const int64_t width = w.n_tiles * TILE;
            for (int64_t a = 0; a < w.n_tiles; a++)
                w.product<false>(ROWS, wide_v, w.g.p, wide_v, 1, w.keys.vt.p + w.tiles.p[a] * TILE * wide_v, TILE, w.U.p + a * TILE, w.ld, up(w.seen(a), L), w.keys.vt.p + w.after(a) * TILE * wide_v);
            for (int r = 0; r < rows; r++) {
                real *p = w.S.p + r * w.ld, *dp = w.U.p + r * w.ld;
                const real u = unit[i0 + r];
                w.subtract_top(r);
                const int64_t all = w.add_sink(p, width / L, r) * L;
                store(dp + width, vf{});
                if (u == (real)INFINITY) memset(p, 0, sizeof(real) * all);
                else if (w.P.kind == SOFTMAX) w.exponentials(p, all / L);
                else sums_of(p, all / L, u, p, w.P);
                derive_row(w, p, dp, w.value.p, all / L, u == (real)INFINITY ? 0 : inv[i0 + r], d_s ? d_s + i0 + r : nullptr);
                if (d_aux) d_aux[i0 + r] = dp[width];
                real t = 0;
                real* to_bias = w.bias_gradient(i0 + r);
                if (d_slope || to_bias)
                    for (int64_t a = 0; a < w.n_tiles; a++)
                        for (int64_t j = w.tiles.p[a] * TILE, e = a * TILE; e < (a + 1) * TILE && j < w.n_k; e++, j++) {
                            t -= dp[e] * fabs((real)(j - w.place(r)));
                            if (to_bias) to_bias[j * c.dbias_step[3]] += dp[e];
                        }
                if (d_slope) d_slope[i0 + r] = t;
                for (int64_t k = 0; c.softcap > 0 && k < width; k += L) store(dp + k, load(dp + k) * load(w.bend.p + r * w.ld + k));
            }
            vf zero{};
            for (int64_t d = 0; d < rows * wide_v; d += L) zero += load(w.g.p + d) * 0;
            const bool finite = !is_nan(zero);
            for (int64_t a = 0; a < w.n_tiles; a++) {
                const int64_t j0 = w.tiles.p[a] * TILE, n = w.seen(a);
                if (finite) w.product<true>(n, rows, w.S.p + a * TILE, 1, w.ld, w.g.p, wide_v, dv + j0 * wide_v, wide_v, wide_v, dk + j0 * wide);
                for (int r = 0; !finite && r < rows; r++)  // 0 times infinity is NaN, as in the forward pass
                    for (int64_t j = 0; j < n; j++) {
                        const real p = w.S.p[r * w.ld + a * TILE + j];
                        real* to = dv + (j0 + j) * wide_v;
                        for (int64_t d = 0; p > 0 && d < wide_v; d += L) store(to + d, load(to + d) + load(w.g.p + r * wide_v + d) * p);
                    }
                w.product<true>(n, rows, w.U.p + a * TILE, 1, w.ld, raw.p, wide, dk + j0 * wide, wide, wide, w.keys.k + j0 * wide);
                w.product<true>(rows, n, w.U.p + a * TILE, w.ld, 1, w.keys.k + j0 * wide, wide, acc.p, wide, wide, dv + w.after(a) * TILE * wide_v);
            }
        }
        for (int r = 0; r < rows; r++) {
            const bool nan = unit[i0 + r] != unit[i0 + r];
            if (nan && d_aux) d_aux[i0 + r] = NAN;
            for (int64_t d = 0; d < c.D; d++) dq[(i0 + r) * c.D + d] = nan ? NAN : acc.p[r * wide + d] * by;
        }
    }
}

int run(const AttentionCall& c, int64_t first, int64_t last, bool backward) {
    int64_t most = 1;
    for (int64_t t = first; t < last; t++) { int64_t n = c.segments[t / c.H_kv * 5 + 4]; most = n > most ? n : most; }
    const int64_t wide = up(c.D, 16), wide_v = up(c.D_v, 16), group = c.H / c.H_kv;
    Keys keys(most, wide, wide_v);
    Buffer<real> dk(backward ? up(most, TILE) * wide : 1), dv(backward ? up(most, TILE) * wide_v : 1);
    if (!keys.ok() || !dk.p || !dv.p) return 1;
    for (int64_t t = first; t < last; t++) {
        const int64_t* at = c.segments + t / c.H_kv * 5;
        const int64_t kv = t % c.H_kv, b = at[0], q0 = at[1], n_q = at[2], k0 = at[3], n_k = at[4];
        if (n_q <= 0) continue;
        const int64_t from = (b * c.H_kv + kv) * c.N_k + k0;
        keys.take(c.k + from * c.D, c.v + from * c.D_v, n_k, c.D, c.D_v);
        if (backward) { memset(dk.p, 0, sizeof(real) * up(n_k, TILE) * wide); memset(dv.p, 0, sizeof(real) * up(n_k, TILE) * wide_v); }
        for (int64_t h = kv * group; h < (kv + 1) * group; h++) {
            Work w(c, keys, most, c.s[h]);
            if (!w.ok()) return 1;
            w.fetches = (int64_t)sizeof(real) * n_k * (backward ? 3 * wide + 2 * wide_v : wide + wide_v) > MANY_BYTES;
            w.b = b; w.h = h; w.q0 = q0; w.k0 = k0; w.n_q = n_q; w.n_k = n_k;
            const int64_t row = (b * c.H + h) * c.N_q + q0;
            Kept kept = kept_of(c, b, h, q0, n_q);
            if (!backward) forward_head(w, c.q + row * c.D, c.o + row * c.D_v, c.top + row, c.unit + row, c.inverse + row, kept);
            else backward_head(w, c.q + row * c.D, c.d_out + row * c.D_v, c.top + row, c.unit + row, c.inverse + row, kept, c.dq + row * c.D, dk.p, dv.p, c.d_s ? c.d_s + row : nullptr, c.d_slope ? c.d_slope + row : nullptr, c.d_aux ? c.d_aux + row : nullptr);
        }
        if (!backward) continue;
        for (int64_t j = 0; j < n_k; j++) {
            memcpy(c.dk + (from + j) * c.D, dk.p + j * wide, sizeof(real) * c.D);
            memcpy(c.dv + (from + j) * c.D_v, dv.p + j * wide_v, sizeof(real) * c.D_v);
        }
    }
    return 0;
}

}  // namespace

extern "C" int OF_SET(FORWARD)(int, const AttentionCall* c, int64_t first, int64_t last) { return run(*c, first, last, false); }
extern "C" int OF_SET(BACKWARD)(int, const AttentionCall* c, int64_t first, int64_t last) { return run(*c, first, last, true); }
