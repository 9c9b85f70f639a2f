// Decoding over pages: sparse attention of the newest queries, which reads the pages that can matter.
//
// The bounds of a page give the largest score that a key of it can have. Pages are read in falling
// order of it. The threshold of what was read is a lower bound of the threshold of all, so that
// reading ends at the first page whose bound is at most that: what was not read has weight 0.
// The weight of a score x is [1 + s (x - top) - u]_+^(1/s), top the largest one: it has none at or below
// top + (u - 1) / s. Beside a large score neither u nor a product with s would have digits left.
#include <algorithm>

#include "threshold.h"
#include "pages.h"

namespace {

constexpr int L = Lanes<float>::count;
typedef Vec<float> vf;
// Where several rows share the pages of a head, a head that needs more than one page in so many is
// left to a pass over all keys, which reads them once for all rows.
constexpr int64_t DENSE = 4, HOPELESS = 2, FIRST = 8;

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The inner product of D numbers; x ends with zeros at a multiple of L, y may end anywhere.
INLINE vf product(const float* x, const float* y, int64_t D) {
    vf a{}, b{};
    int64_t d = 0;
    for (; d + 2 * L <= D; d += 2 * L) { a += load(x + d) * load(y + d); b += load(x + d + L) * load(y + d + L); }
    for (; d + L <= D; d += L) a += load(x + d) * load(y + d);
    if (d < D) b += load(x + d) * load_part(y + d, (int)(D - d), 0.0f);
    return a + b;
}

struct Candidate { float bound; int32_t page; };  // page: its place in the sequence
bool operator<(const Candidate& a, const Candidate& b) { return a.bound < b.bound || (a.bound == b.bound && a.page > b.page); }

// The rows of one sequence and one head of keys, one row after the other.
struct Rows {
    const PagesCall& c;
    int64_t b, kv, held, wide;
    Buffer<float> q, above, under, z, y, w, score, o;
    Buffer<int64_t> key;
    Buffer<Candidate> heap;
    Buffer<uint8_t> seen;
    Rows(const PagesCall& c_, int64_t b_, int64_t kv_)
        : c(c_), b(b_), kv(kv_), held((c_.lengths[b_] + c_.size - 1) / c_.size), wide(up(c_.D, L)), q(wide), above(wide), under(wide),
          z(held * c_.size + L + 1), y(held * c_.size + L + 1), w(held * c_.size + L + 1), score(c_.size), o(up(c_.D_v, L)), key(held * c_.size + L + 1), heap(held + 1), seen(held + 1) {}
    bool ok() const { return q.p && above.p && under.p && z.p && y.p && w.p && score.p && o.p && key.p && heap.p && seen.p; }

    // The score of a product. With a cap, products are in units of the cap.
    float capped(float x, float by) const { return c.softcap > 0 ? by * tanhf(x) : x; }
    int64_t page_of(int64_t place) const { return c.table[b * c.most + place]; }
    // Makes a heap of the pages that query i sees, with their bounds. Returns how many.
    int64_t bound(int64_t at, int64_t from, float steep, float by) {
        int64_t n = 0;
        for (int64_t p = from / c.size; p <= at / c.size; p++) {
            const float* x = c.bounds + (kv * c.pages + page_of(p)) * 2 * c.D;
            float u = capped(sum<float>(product(above.p, x, c.D) + product(under.p, x + c.D, c.D)), by);
            const int64_t left = p * c.size, right = left + c.size - 1;
            const int64_t near = at > right ? at - right : 0;
            if (steep) u -= steep * (float)(steep > 0 ? near : at - left);
            heap.p[n++] = {u == u ? u : INFINITY, (int32_t)p};
        }
        std::make_heap(heap.p, heap.p + n);
        return n;
    }
    // Scores a page's keys, -inf where hidden. Returns whether a score that is seen is NaN or inf.
    bool read(int64_t place, int64_t at, int64_t from, float steep, float by) {
        const float* k = c.keys + (kv * c.pages + page_of(place)) * c.size * c.D;
        const int64_t left = place * c.size;
        bool bad = false;
        for (int64_t j = 0; j < c.size; j += L) {
            vf a[L];
            for (int r = 0; r < L; r++) a[r] = product(q.p, k + (j + r) * c.D, c.D);
            store(score.p + j, across<float, false>(a));
        }
        if (c.softcap > 0) for (int64_t j = 0; j < c.size; j++) score.p[j] = capped(score.p[j], by);
        const int64_t first = from > left ? from - left : 0, last = at + 1 - left < c.size ? at + 1 - left : c.size;
        for (int64_t j = 0; j < first; j++) score.p[j] = -INFINITY;
        for (int64_t j = last; j < c.size; j++) score.p[j] = -INFINITY;
        vf wrong{};
        for (int64_t j = 0; j < c.size; j += L) {
            vf y = load(score.p + j);
            if (steep) {
                for (int l = 0; l < L; l++) y[l] -= steep * (float)(at - left - j - l);
                store(score.p + j, y);
            }
            wrong += y * 0;
        }
        if (is_nan(wrong))  // a NaN, or infinities: look again
            for (int64_t j = 0; j < c.size; j++) bad |= score.p[j] != score.p[j] || score.p[j] == INFINITY;
        return bad;
    }
    // u of n candidates from one that is not above it.
    float solve(int64_t n, float top, float u, const Power<float>& P, float enough) {
        for (int64_t i = n; i < up(n, L); i++) z.p[i] = -INFINITY;
        for (int64_t i = 0; i < n; i += L) store(y.p + i, (load(z.p + i) - top) * P.s);
        for (int round = 0; round < 60; round++) {
            Sums<float> sums = sums_of(y.p, up(n, L) / L, u, (float*)nullptr, P);
            const float F = sum<float>(sums.F), before = u, step = newton_step<float>(F, sum<float>(sums.G), P);
            if (step > 0 || P.kind == REAL) u += step;
            if (!(F - 1 > enough) || u == before) break;
        }
        return u;
    }
    // The u of an earlier top less the present one, at least 0: where the largest score weighs 1.
    static float start(float u, float before, float top, const Power<float>& P) { return larger_of(u + (before - top) * P.s, 0.0f); }
    static float larger_of(float a, float b) { return a > b ? a : b; }
    // The threshold of a top and its u, less what rounding may have added to it.
    static float below(float top, float u, const Power<float>& P) {
        const float low = top + (u - 1) / P.s;
        return low - (1e-5f / P.s + 4 * Lanes<float>::epsilon * (1 / P.s + fabsf(low)));
    }
    // What is left of n candidates when all at or below `low` go.
    int64_t prune(int64_t n, float low) {
        int64_t kept = 0;
        for (int64_t i = 0; i < n; i++) { z.p[kept] = z.p[i]; key.p[kept] = key.p[i]; kept += z.p[i] > low; }
        return kept;
    }
    // Computes query i of head h. Returns false where bounds do not separate.
    bool row(int64_t h, int64_t i, bool alone) {
        const Power<float> P(c.s[h]);
        const int64_t at = c.lengths[b] - c.n + i;
        if (at < 0) return true;
        if (P.kind == SOFTMAX) return false;
        const float by = c.softcap, unit = c.softcap > 0 ? c.scale / c.softcap : c.scale;
        const float* query = c.q + ((b * c.H + h) * c.n + i) * c.D;
        for (int64_t d = 0; d < wide; d++) {
            const float x = d < c.D ? query[d] * unit : 0;
            q.p[d] = x;
            above.p[d] = x < 0 ? 0 : x;  // a NaN goes to both
            under.p[d] = x > 0 ? 0 : x;
        }
        const float steep = c.slopes ? c.slopes[h] : 0;
        const int64_t from = c.window >= 0 && at - c.window + 1 > 0 ? at - c.window + 1 : 0;
        const int64_t visible = bound(at, from, steep, by);
        int64_t n = 0, pages = 0, next = 1;
        float top = -INFINITY, u = 0, low = -INFINITY, solved = -INFINITY;  // u: that of the largest score `solved`
        bool bad = false;
        if (c.s_aux) {  // the sink: a candidate without a key
            z.p[n] = top = c.s_aux[h];
            key.p[n++] = -1;
            low = below(top, 0, P);
            bad = top != top || top == INFINITY;
        }
        for (int64_t left = visible; left > 0 && !bad; left--) {
            const Candidate best = heap.p[0];
            if (best.bound <= low) break;
            std::pop_heap(heap.p, heap.p + left);
            bad = read(best.page, at, from, steep, by);
            seen.p[best.page] = 1;
            pages++;
            const int64_t id = page_of(best.page) * c.size;
            for (int64_t j = 0; j < c.size; j++) top = score.p[j] > top ? score.p[j] : top;
            low = larger_of(below(top, 0, P), low);  // the largest weight is at most 1
            for (int64_t j = 0; j < c.size; j += L)
                for (Mask m = above_mask(j, low); m; m &= m - 1) {
                    const int64_t l = j + __builtin_ctz(m);
                    z.p[n] = score.p[l];
                    key.p[n++] = id + l;
                }
            if (pages < next || top == -INFINITY) continue;
            u = solve(n, top, start(u, solved, top, P), P, tolerance(P));
            solved = top;
            low = larger_of(below(top, u, P), low);
            next = pages + pages / 4 + 1;
            n = prune(n, low);
            if (alone) continue;
            if (pages * DENSE > visible && pages > FIRST && left > 1 && heap.p[0].bound > low) return false;
            if (pages >= FIRST && pages < FIRST + 3) {
                int64_t more = 0;
                for (int64_t k = 0; k < left - 1; k++) more += heap.p[k].bound > low;
                if (more * HOPELESS > visible) return false;
            }
        }
        float* to = c.out + ((b * c.H + h) * c.n + i) * c.D_v;
        if (bad) { for (int64_t d = 0; d < c.D_v; d++) to[d] = NAN; return true; }
        if (top > -INFINITY) weigh(n, solve(n, top, start(u, solved, top, P), P, 4 * Lanes<float>::epsilon), P, to);
        return true;
    }
    Mask above_mask(int64_t j, float low) const { return ::above(load(score.p + j), splat(low)); }
    // The values, averaged with the weights at the unit point u.
    void weigh(int64_t n, float u, const Power<float>& P, float* to) {
        const float F = sum<float>(sums_of(y.p, up(n, L) / L, u, w.p, P).F);
        memset(o.p, 0, sizeof(float) * up(c.D_v, L));
        for (int64_t i = 0; i < n; i++) {
            if (w.p[i] == 0 || key.p[i] < 0) continue;
            const float* v = c.values + (kv * c.pages * c.size + key.p[i]) * c.D_v;
            int64_t d = 0;
            for (; d + L <= c.D_v; d += L) store(o.p + d, load(o.p + d) + load(v + d) * w.p[i]);
            for (; d < c.D_v; d++) o.p[d] += v[d] * w.p[i];
        }
        for (int64_t d = 0; d < c.D_v; d++) to[d] = o.p[d] / F;
    }
};

int run(const PagesCall& c, int64_t first, int64_t last) {
    const int64_t group = c.H / c.H_kv;
    for (int64_t item = first; item < last; item++) {
        Rows rows(c, item / c.H_kv, item % c.H_kv);
        if (!rows.ok()) return 1;
        memset(rows.seen.p, 0, rows.held + 1);
        bool separate = true;
        const bool alone = group * c.n == 1;
        for (int64_t r = 0; r < group * c.n && separate; r++) separate = rows.row(rows.kv * group + r / c.n, r % c.n, alone);
        int64_t read = 0;
        for (int64_t p = 0; p < rows.held; p++) read += rows.seen.p[p];
        c.read[item] = separate ? read : -1;
    }
    return 0;
}

}  // namespace

extern "C" int OF_SET(pages_decode)(int, const PagesCall* c, int64_t first, int64_t last) { return run(*c, first, last); }
