// Attention over a band and landmarks: weights M exp(scale q.k), divided by their sum, times v.
//
// A key at distance d in 0 .. has M = m = clamp((R + w - d) / R, 0, 1), and a landmark adds
// (1 - m) g. Blocks of queries are finished one after the other, with their scores in the cache; the
// tiles of keys that a block sees lie in a ring that holds the widest window. Tiles begin at multiples
// of 64 from the start of the sequence and all sums go in the order of the keys, so that the bits of a
// row depend on what the row sees alone. Scores get into units of log 2 when the largest one of their row has been subtracted.
#include "band.h"
#ifndef FORWARD
#define FORWARD band_forward
#define BACKWARD band_backward
#endif

namespace {

typedef vreal vf;
constexpr int L = Lanes<real>::count;
constexpr int ROWS = 24, TILE = 64;
constexpr bool IS_DOUBLE = sizeof(real) == 8;
const real LOG2E = (real)1.4426950408889634, HIDDEN = IS_DOUBLE ? (real)-1e300 : (real)-1e38;
const real LOWEST_EXPONENT = IS_DOUBLE ? -1022 : -126;

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
vf lanes() {
    vf x;
    for (int l = 0; l < L; l++) x[l] = l;
    return x;
}
bool is_finite(const real* x, int64_t n) {
    vf zero{};
    int64_t i = 0;
    for (; i + L <= n; i += L) zero += load(x + i) * 0;
    real rest = 0;
    for (; i < n; i++) rest += x[i] * 0;
    return !is_nan(zero) && rest == 0;
}
void copy_row(const real* x, int64_t D, int64_t wide, real by, real* out) {
    for (int64_t d = 0; d < D; d++) out[d] = x[d] * by;
    for (int64_t d = D; d < wide; d++) out[d] = 0;
}
// Weights 2^x: numbers below the smallest normal one are zero.
INLINE vf weight_of(vf x) {
    const vf e = exp2_of(larger(x, splat(LOWEST_EXPONENT)));
    return x > LOWEST_EXPONENT ? e : vf{};
}

// Rows of `wide` numbers as products take them: row by row, and column by column.
struct Tile {
    const real *rows, *columns;
    int64_t step;
    bool finite;
};
// The tiles of keys (or values) of one sequence and head that were asked for last.
struct Ring {
    const real* from;
    int64_t n, D, wide, step, size;
    bool turned;
    Buffer<real> rows, columns;
    Buffer<int64_t> held;
    Buffer<uint8_t> finite;
    Ring(int64_t D_, int64_t step_, int64_t size_, bool turned_)
        : D(D_), wide(up(D_, 16)), step(step_), size(size_), turned(turned_), rows(D_ < wide ? size_ * TILE * wide : 0), columns(turned_ ? size_ * TILE * wide : 0), held(size_), finite(size_) {}
    bool ok() const { return rows.p && columns.p && held.p && finite.p; }
    void begin(const real* from_, int64_t n_) {
        from = from_;
        n = n_;
        for (int64_t i = 0; i < size; i++) held.p[i] = -1;
    }
    int64_t count(int64_t t) const { return n - t * TILE < TILE ? n - t * TILE : TILE; }
    Tile tile(int64_t t) {
        const int64_t slot = t % size;
        const bool copied = D < wide;
        const real* source = from + t * TILE * step;
        real* own = rows.p + slot * TILE * wide;
        const Tile found{copied ? own : source, columns.p + slot * TILE * wide, copied ? wide : step, true};
        if (held.p[slot] != t) {
            held.p[slot] = t;
            bool all = true;
            for (int64_t j = 0; j < count(t); j++) {
                if (copied) copy_row(source + j * step, D, wide, 1, own + j * wide);
                all &= is_finite(source + j * step, D);
            }
            finite.p[slot] = all;
            if (turned) turn(found.rows, found.step, count(t), wide, TILE, columns.p + slot * TILE * wide);
        }
        return {found.rows, found.columns, found.step, finite.p[slot] != 0};
    }
};
// One list of landmarks, gathered.
struct Marks {
    const real *k, *v, *k_columns, *v_columns;
    bool finite_k, finite_v;
};
// The lists of a group's heads that were asked for last.
struct Lists {
    const BandCall& c;
    const real *keys, *values;
    int64_t wide, slots, ways;
    Buffer<real> room;
    Buffer<int64_t> held;
    Buffer<uint8_t> finite;
    Lists(const BandCall& c_, const real* keys_, const real* values_)
        : c(c_), keys(keys_), values(values_), wide(up(c_.D, 16)), slots(up(c_.K, L)), ways(c_.n_lists < 8 ? c_.n_lists : 8), room(places() * 4 * slots * wide), held(places()), finite(2 * places()) {
        for (int64_t i = 0; held.p && i < places(); i++) held.p[i] = -1;
    }
    bool ok() const { return room.p && held.p && finite.p; }
    int64_t places() const { return c.H / c.H_kv * ways; }
    // List `list` of head `head` of the group; `idx` has its landmarks.
    Marks list(int64_t head, int64_t list, const int32_t* idx) {
        const int64_t place = head * ways + list % ways, size = slots * wide;
        real* k = room.p + 4 * size * place;
        real *v = k + size, *k_columns = v + size, *v_columns = k_columns + size;
        if (held.p[place] != list) {
            held.p[place] = list;
            for (int64_t i = 0; i < c.K; i++) {
                const bool empty = idx[i] < 0 || idx[i] >= c.N_k;  // any row will do: its factor is 0
                copy_row(keys + (empty ? 0 : idx[i]) * c.k_step[2], c.D, wide, 1, k + i * wide);
                copy_row(values + (empty ? 0 : idx[i]) * c.v_step[2], c.D, wide, 1, v + i * wide);
            }
            finite.p[2 * place] = is_finite(k, c.K * wide);
            finite.p[2 * place + 1] = is_finite(v, c.K * wide);
            turn(k, wide, c.K, wide, slots, k_columns);
            turn(v, wide, c.K, wide, slots, v_columns);
        }
        return {k, v, k_columns, v_columns, finite.p[2 * place] != 0, finite.p[2 * place + 1] != 0};
    }
};

// A block of queries of one head: scores against the band (S) and the landmarks (T), which weights
// replace, and what the backward pass needs.
struct Block {
    const BandCall& c;
    const real ramp;
    Ring &keys, &values;
    int64_t wide, ld, slots, start, lo, hi, from, to;  // lo, hi, from, to, first, full count from the start of the sequence
    int rows;
    int64_t first[ROWS], full[ROWS], place[ROWS], list[ROWS];  // full: from here on m is 1
    real w[ROWS];
    bool bad[ROWS], is_clean;
    Buffer<real> q, S, T, U, gates, acc, g, dS, dT, part;  // gates: log g of the landmarks that are seen
    Block(const BandCall& c_, Ring& keys_, Ring& values_, bool backward)
        : c(c_), ramp((real)c_.ramp), keys(keys_), values(values_), wide(keys_.wide), ld(keys_.size * TILE), slots(up(c_.K, L)), q(ROWS * wide), S(ROWS * ld), T(ROWS * slots), U(ROWS * slots), gates(c_.bias ? ROWS * slots : 0), acc(ROWS * wide),
          g(backward ? ROWS * wide : 0), dS(backward ? ROWS * ld : 0), dT(backward ? ROWS * slots : 0), part(backward ? slots * wide : 0) {}
    bool ok() const { return q.p && S.p && T.p && U.p && gates.p && acc.p && g.p && dS.p && dT.p && part.p; }

    // Queries i .. i + rows of head `row` (its first query's number in (B, H, N_q)).
    void begin(int64_t i, int n, int64_t start_, int64_t row, const real* queries) {
        rows = n;
        start = start_;
        lo = INT64_MAX;
        for (int r = 0; r < rows; r++) {
            place[r] = i + r + c.N_k - c.N_q - start;
            list[r] = c.lists[i + r];
            w[r] = c.windows[row + i + r];
            first[r] = place[r] - farthest(w[r] + ramp, place[r]);
            // one token less: R + w is rounded
            const real inside = floor(w[r] + ramp - ramp) - 1;
            full[r] = inside >= (real)place[r] ? 0 : inside > 0 ? place[r] - (int64_t)inside : place[r];
            if (full[r] < first[r]) full[r] = first[r];
            if (first[r] < lo) lo = first[r];
            bad[r] = false;
            copy_row(queries + (i + r) * c.q_step[2], c.D, wide, (real)c.scale, q.p + r * wide);
        }
        from = lo;
        to = place[rows - 1] + 1;
        lo = lo / TILE * TILE;
        hi = up(to, TILE);
        is_clean = true;
    }
    // The largest whole distance below w + R, at most `most`.
    static int64_t farthest(real reach, int64_t most) {
        const real d = ceil(reach) - 1;
        return d >= (real)most ? most : d > 0 ? (int64_t)d : 0;
    }
    real* of(Buffer<real>& x, int r) { return x.p + r * ld - lo; }  // by place of the key
    // m of L keys, the first at place j
    vf edge(int r, int64_t j) const {
        const vf d = (real)(place[r] - j) - lanes();
        return smaller(larger(w[r] + ramp - d, vf{}), splat(ramp)) / ramp;
    }
    vf seen(int r, int64_t j, vf x, real other) const {
        const vf at = lanes() + (real)(j - lo);
        return (at >= (real)(first[r] - lo)) & (at <= (real)(place[r] - lo)) ? x : splat(other);
    }
    // Runs of queries that share a list: f(first row, how many)
    template <class F> void in_lists(F f) {
        for (int r = 0, n; r < rows; r += n) {
            for (n = 1; r + n < rows && list[r + n] == list[r]; n++) {}
            f(r, n);
        }
    }
    // Of the tile at j: the keys [first, second) that a row of the block sees.
    std::pair<int64_t, int64_t> seen_of(int64_t j) const { return {from > j ? from : j, to < j + TILE ? to : j + TILE}; }
    void score(bool all) {
        for (int64_t j = lo; j < hi; j += TILE) {
            const Tile k = keys.tile(j / TILE);
            // whole blocks of vectors: single ones are slower
            const int64_t a = (seen_of(j).first - j) / (2 * L) * 2 * L, n = up(seen_of(j).second - j, 2 * L) - a, at = j - lo + a;
            multiply<false>(rows, c.D, q.p, wide, 1, k.columns + a, TILE, S.p + at, ld, n);
            const Tile v = values.tile(j / TILE);
            is_clean &= v.finite && (!all || k.finite);
            if (all) multiply<false>(rows, c.D, g.p, wide, 1, v.columns + a, TILE, dS.p + at, ld, n);
        }
    }
    // Landmark scores of rows r .. r + n, and their factor 1 - m: 0 where they are not seen.
    void score_marks(const Marks& m, int r, int n, int64_t at, bool all) {
        const int32_t* idx = c.landmarks + (at + list[r]) * c.K;
        const real* bias = c.bias ? c.bias + (at + list[r]) * c.K : nullptr;
        multiply<false>(n, c.D, q.p + r * wide, wide, 1, m.k_columns, slots, T.p + r * slots, slots, slots);
        if (all) multiply<false>(n, c.D, g.p + r * wide, wide, 1, m.v_columns, slots, dT.p + r * slots, slots, slots);
        is_clean &= m.finite_v && (!all || m.finite_k);
        for (int64_t s = 0; s < slots; s += L) {
            vf l, b{};
            for (int i = 0; i < L; i++) {
                const bool is = s + i < c.K && idx[s + i] >= start && idx[s + i] < c.N_k;
                l[i] = is ? (real)(idx[s + i] - start - place[r]) : INFINITY;
                if (is && bias) b[i] = bias[s + i];
            }
            for (int i = r; i < r + n; i++) {
                const vf u = smaller(larger((real)(i - r) - l - w[i], vf{}), splat(ramp)) / ramp;
                store(U.p + i * slots + s, u);
                if (bias) store(gates.p + i * slots + s, u > 0 ? b : vf{});
            }
        }
    }
    vf gate(int r, int64_t s) const { return c.bias ? load(gates.p + r * slots + s) : vf{}; }
    // Landmark scores less the largest of the row, beside which a gate would have no digits, then the gate.
    vf gated(int r, int64_t s, real top) const { return load(T.p + r * slots + s) - top + gate(r, s); }
    // Scores of row r -> weights that are not yet divided; their sum, and their largest score.
    real weigh(int r, real& top) {
        real *s = of(S, r), *t = T.p + r * slots, *u = U.p + r * slots;
        const int64_t a = first[r] / L * L, e = place[r] + 1;
        vf most = splat(HIDDEN), zero{};
        for (int64_t j = a; j < e; j += L) {
            vf x = load(s + j);
            if (j < first[r] || j + L > e) store(s + j, x = seen(r, j, x, HIDDEN));
            most = larger(most, x);
            zero += x * 0;
        }
        for (int64_t j = 0; j < slots; j += L) {
            const vf x = load(u + j) > 0 ? load(t + j) : splat(HIDDEN);
            store(t + j, x);
            most = larger(most, x + gate(r, j));
            zero += (x + gate(r, j)) * 0;
        }
        top = maximum<real>(most);
        if (is_nan(zero)) bad[r] = has_nan(s, a, e) || has_nan(t, 0, slots) || (c.bias && has_nan(gates.p + r * slots, 0, slots));
        memset(s + lo, 0, sizeof(real) * (a - lo));
        memset(s + up(e, L), 0, sizeof(real) * (hi - up(e, L)));
        if (bad[r]) {
            memset(s + lo, 0, sizeof(real) * (hi - lo));
            memset(t, 0, sizeof(real) * slots);
            return NAN;
        }
        vf total{};
        int64_t j = a;
        for (; j < full[r] && j < e; j += L) {
            const vf x = weight_of((load(s + j) - top) * LOG2E) * edge(r, j);
            store(s + j, x);
            total += x;
        }
        for (; j < e; j += L) {
            const vf x = weight_of((load(s + j) - top) * LOG2E);
            store(s + j, x);
            total += x;
        }
        for (j = 0; j < slots; j += L) {
            const vf x = weight_of(gated(r, j, top) * LOG2E) * load(u + j);
            store(t + j, x);
            total += x;
        }
        if (!(top > HIDDEN)) {  // all scores are -inf
            memset(s + lo, 0, sizeof(real) * (hi - lo));
            memset(t, 0, sizeof(real) * slots);
            return 0;
        }
        return sum<real>(total);
    }
    static bool has_nan(const real* x, int64_t from, int64_t to) {
        for (int64_t j = from; j < to; j++) if (x[j] != x[j] || x[j] == INFINITY) return true;
        return false;
    }
    // acc += weights times rows. Where not all numbers are finite, each query takes the keys that it sees.
    void add_band(Buffer<real>& weights, Ring& ring) {
        for (int64_t j = lo; j < hi; j += TILE) {
            const Tile x = ring.tile(j / TILE);
            const int64_t n = ring.count(j / TILE), a = seen_of(j).first, e = seen_of(j).second;
            if (is_clean) multiply<true>(rows, e - a, weights.p + a - lo, ld, 1, x.rows + (a - j) * x.step, x.step, acc.p, wide, wide);
            else for (int r = 0; r < rows; r++)
                for (int64_t i = 0; i < n; i++)
                    if (j + i >= first[r] && j + i <= place[r]) add_row(of(weights, r)[j + i], x.rows + i * x.step, acc.p + r * wide);
        }
    }
    void add_marks(Buffer<real>& weights, const real* from, int r, int n) {
        if (is_clean) return multiply<true>(n, c.K, weights.p + r * slots, slots, 1, from, wide, acc.p + r * wide, wide, wide);
        for (int i = r; i < r + n; i++)
            for (int64_t s = 0; s < c.K; s++)
                if (U.p[i * slots + s] > 0) add_row(weights.p[i * slots + s], from + s * wide, acc.p + i * wide);
    }
    void add_row(real by, const real* x, real* to) const {
        for (int64_t d = 0; d < wide; d += L) store(to + d, load(to + d) + load(x + d) * by);
    }
    // Rows of keys += weights times rows of queries. `sums` is the row of the first key of the sequence.
    void give_band(Buffer<real>& weights, const real* x, real* sums) {
        if (is_clean) return multiply<true>(to - from, rows, weights.p + from - lo, 1, ld, x, wide, sums + from * wide, wide, wide);
        for (int r = 0; r < rows; r++)
            for (int64_t j = first[r]; j <= place[r]; j++) add_row(of(weights, r)[j], x + r * wide, sums + j * wide);
    }
    void give_marks(Buffer<real>& weights, const real* x, int r, int n, const int32_t* idx, real* to) {
        if (is_clean) multiply<false>(c.K, n, weights.p + r * slots, 1, slots, x + r * wide, wide, part.p, wide, wide);
        for (int64_t s = 0; s < c.K; s++) {
            if (idx[s] < start || idx[s] >= c.N_k) continue;
            real* row = to + (idx[s] - start) * wide;
            if (is_clean) add_row(1, part.p + s * wide, row);
            else for (int i = r; i < r + n; i++) if (U.p[i * slots + s] > 0) add_row(weights.p[i * slots + s], x + i * wide, row);
        }
    }
    // Replaces the scores and g.v of row r by weights and derivatives in the scores. Returns the derivative in w.
    real derive(int r, real top, real lse, real delta) {
        real *s = of(S, r), *ds = of(dS, r), *t = T.p + r * slots, *u = U.p + r * slots, *dt = dT.p + r * slots;
        const int64_t a = first[r] / L * L, e = place[r] + 1;
        for (real* x : {s, ds}) {
            memset(x + lo, 0, sizeof(real) * (a - lo));
            memset(x + up(e, L), 0, sizeof(real) * (hi - up(e, L)));
        }
        vf moved{};
        int64_t j = a;
        auto one = [&](bool at_edge) {
            vf x = load(s + j);
            if (j < first[r] || j + L > e) x = seen(r, j, x, HIDDEN);
            const vf y = (x - top) * LOG2E - lse, p = is_nan(y) ? (y == y ? weight_of(y) : y) : weight_of(y);
            vf d = p == 0 ? vf{} : p * (load(ds + j) - delta);
            if (at_edge) {
                const vf m = edge(r, j);
                moved += (m > 0) & (m < 1) ? d : vf{};
                store(s + j, p * m);
                d *= m;
            } else store(s + j, p);
            store(ds + j, d);
        };
        for (; j < full[r] && j < e; j += L) one(true);
        for (; j < e; j += L) one(false);
        for (j = 0; j < slots; j += L) {
            const vf f = load(u + j), y = gated(r, j, top) * LOG2E - lse;
            vf p = y == y ? weight_of(y) : y;
            p = f > 0 ? p : vf{};
            const vf d = p == 0 ? vf{} : p * (load(dt + j) - delta);
            moved -= (f > 0) & (f < 1) ? d : vf{};
            store(t + j, p * f);
            store(dt + j, d * f);
        }
        return sum<real>(moved) / ramp;
    }
};

// What the rings must hold for the queries of one head of keys: tiles of the widest block.
int64_t widest(const BandCall& c, int64_t b, int64_t kv) {
    const int64_t group = c.H / c.H_kv;
    int64_t most = 1;
    for (int64_t h = kv * group; h < (kv + 1) * group; h++)
        for (int64_t i = 0; i < c.N_q; i++) {
            const int64_t d = Block::farthest(c.windows[(b * c.H + h) * c.N_q + i] + (real)c.ramp, i + c.N_k - c.N_q - c.starts[i]);
            most = d > most ? d : most;
        }
    return (most + ROWS + 2 * TILE) / TILE + 1;
}

void forward_block(Block& x, Lists& lists, int64_t head, int64_t i, int64_t row, int64_t at) {
    const BandCall& c = x.c;
    x.score(false);
    auto marks = [&](int r) { return lists.list(head, x.list[r], c.landmarks + (at + x.list[r]) * c.K); };
    if (c.K) x.in_lists([&](int r, int n) { x.score_marks(marks(r), r, n, at, false); });
    real total[ROWS];
    for (int r = 0; r < x.rows; r++) {
        real top;
        total[r] = x.weigh(r, top);
        c.top[row + i + r] = top;
        c.lse[row + i + r] = total[r] == 0 ? INFINITY : log2(total[r]);
    }
    memset(x.acc.p, 0, sizeof(real) * ROWS * x.wide);
    x.add_band(x.S, x.values);
    if (c.K) x.in_lists([&](int r, int n) { x.add_marks(x.T, marks(r).v, r, n); });
    for (int r = 0; r < x.rows; r++)
        for (int64_t d = 0; d < c.D; d++) c.o[(row + i + r) * c.D + d] = x.bad[r] ? NAN : total[r] == 0 ? 0 : x.acc.p[r * x.wide + d] / total[r];
}

// dk and dv are the rows of the first key of the sequence.
void backward_block(Block& x, Lists& lists, int64_t head, int64_t i, int64_t row, int64_t at, real* dk, real* dv) {
    const BandCall& c = x.c;
    const int64_t wide = x.wide;
    real delta[ROWS];
    for (int r = 0; r < x.rows; r++) {
        const real* o = c.o + (row + i + r) * c.D;
        copy_row(c.d_out + (row + i + r) * c.D, c.D, wide, 1, x.g.p + r * wide);
        vf products{};
        for (int64_t d = 0; d < c.D; d += L) products += load(x.g.p + r * wide + d) * (d + L <= c.D ? load(o + d) : load_part(o + d, (int)(c.D - d), (real)0));
        delta[r] = sum<real>(products);
        x.is_clean &= c.lse[row + i + r] == c.lse[row + i + r];
    }
    x.is_clean &= is_finite(x.g.p, x.rows * wide) && is_finite(x.q.p, x.rows * wide);
    x.score(true);
    auto marks = [&](int r) { return lists.list(head, x.list[r], c.landmarks + (at + x.list[r]) * c.K); };
    if (c.K) x.in_lists([&](int r, int n) { x.score_marks(marks(r), r, n, at, true); });
    for (int r = 0; r < x.rows; r++) {
        const real moved = x.derive(r, c.top[row + i + r], c.lse[row + i + r], delta[r]);
        if (c.d_windows) c.d_windows[row + i + r] = moved;
    }
    memset(x.acc.p, 0, sizeof(real) * ROWS * wide);
    x.add_band(x.dS, x.keys);
    x.give_band(x.S, x.g.p, dv);
    x.give_band(x.dS, x.q.p, dk);
    if (c.K) x.in_lists([&](int r, int n) {
        const int64_t list = (at + x.list[r]) * c.K;
        x.add_marks(x.dT, marks(r).k, r, n);
        x.give_marks(x.T, x.g.p, r, n, c.landmarks + list, dv);
        x.give_marks(x.dT, x.q.p, r, n, c.landmarks + list, dk);
        for (int k = r; c.d_bias && k < r + n; k++)
            for (int64_t s = 0; s < c.K; s++) c.d_bias[list + s] += x.dT.p[k * x.slots + s];
    });
    for (int r = 0; r < x.rows; r++)
        for (int64_t d = 0; d < c.D; d++) c.dq[(row + i + r) * c.D + d] = x.acc.p[r * wide + d] * (real)c.scale;
}

int run(const BandCall& c, int64_t from, int64_t to, bool backward) {
    const int64_t group = c.H / c.H_kv, wide = up(c.D, 16);
    for (int64_t item = from; item < to; item++) {
        const int64_t b = item / c.H_kv, kv = item % c.H_kv, size = widest(c, b, kv);
        const real *k = c.k + b * c.k_step[0] + kv * c.k_step[1], *v = c.v + b * c.v_step[0] + kv * c.v_step[1];
        Ring keys(c.D, c.k_step[2], size, true), values(c.D, c.v_step[2], size, backward);
        Lists lists(c, k, v);
        Block x(c, keys, values, backward);
        if (!keys.ok() || !values.ok() || !lists.ok() || !x.ok()) return 1;
        int64_t start = -1;
        for (int64_t i = 0, n; i < c.N_q; i += n) {
            for (n = 1; n < ROWS && i + n < c.N_q && c.starts[i + n] == c.starts[i]; n++) {}
            if (c.starts[i] != start) {
                start = c.starts[i];
                int64_t end = i;
                while (end < c.N_q && c.starts[end] == start) end++;
                keys.begin(k + start * c.k_step[2], end + c.N_k - c.N_q - start);
                values.begin(v + start * c.v_step[2], end + c.N_k - c.N_q - start);
            }
            for (int64_t h = kv * group; h < (kv + 1) * group; h++) {
                const int64_t row = (b * c.H + h) * c.N_q, at = (b * c.H + h) * c.n_lists, first = (item * c.N_k + start) * wide;
                x.begin(i, (int)n, start, row, c.q + b * c.q_step[0] + h * c.q_step[1]);
                if (backward) backward_block(x, lists, h - kv * group, i, row, at, c.dk + first, c.dv + first);
                else forward_block(x, lists, h - kv * group, i, row, at);
            }
        }
    }
    return 0;
}

}  // namespace

extern "C" int OF_SET(FORWARD)(int, const BandCall* c, int64_t first, int64_t last) { return run(*c, first, last, false); }
extern "C" int OF_SET(BACKWARD)(int, const BandCall* c, int64_t first, int64_t last) { return run(*c, first, last, true); }
