// Nearest rows of y for each row of x: float products propose, double differences decide.
//
// A block of rows goes over y tile by tile. Each row keeps the scores that lie below its threshold, the
// `keep`-th smallest of those before, and the list is cut back to `keep` when it is full. What was kept
// is scored again in double and ordered by score and then index.
#include <algorithm>

#include "products.h"

// neighbours.py fills it in with ctypes, field by field.
struct NeighboursCall {
    const float *x, *y, *y_sq;         // (n, D), (m, D) centred, and |y|^2 (m), or null for -x.y
    const double *exact_x, *exact_y;   // the same points in double
    double* scores;                    // (n, k), ascending
    int64_t* index;                    // (n, k)
    float* worst;                      // (n): the largest score, |y|^2 - 2 x.y or -x.y, that was kept
    int64_t m, D, k, keep;             // k <= keep <= m, less one with `self`
    int self;                          // whether row i of y is left out for row i of x
};

namespace {

constexpr int L = Lanes<float>::count;
constexpr int ROWS = 240, TILE = 64, SPARE = 12;

struct Candidate { float score; int32_t index; };
struct Exact { double score; int64_t index; };
INLINE bool operator<(const Candidate& a, const Candidate& b) { return a.score < b.score; }
INLINE bool operator<(const Exact& a, const Exact& b) { return a.score < b.score || (a.score == b.score && a.index < b.index); }

// |x - y|^2, or -x.y: smaller is nearer.
double exact_score(const double* x, const double* y, int64_t D, bool squares) {
    constexpr int W = Lanes<double>::count;
    Vec<double> a{}, b{};
    int64_t d = 0;
    auto term = [&](int64_t at) {
        const Vec<double> u = load(x + at), v = load(y + at);
        return squares ? (u - v) * (u - v) : -u * v;
    };
    for (; d + 2 * W <= D; d += 2 * W) { a += term(d); b += term(d + W); }
    for (; d + W <= D; d += W) a += term(d);
    double total = sum<double>(a + b);
    for (; d < D; d++) total += squares ? (x[d] - y[d]) * (x[d] - y[d]) : -x[d] * y[d];
    return total;
}

struct Search {
    const NeighboursCall& c;
    int64_t room, counts[ROWS];
    float below[ROWS];
    Buffer<float> x, y, S;
    Buffer<float> score;     // (ROWS, room)
    Buffer<int32_t> index;
    Buffer<Candidate> order;
    Buffer<Exact> exact;
    explicit Search(const NeighboursCall& c_)
        : c(c_), room(c_.keep + SPARE + 2 * TILE + 2 * L), x(ROWS * c_.D), y(c_.D * TILE), S(ROWS * TILE), score(ROWS * room), index(ROWS * room), order(room), exact(c_.keep) {}
    bool ok() const { return x.p && y.p && S.p && score.p && index.p && order.p && exact.p; }

    void turn_tile(int64_t j0, int64_t n) {
        const int64_t whole = c.D / L * L;  // a last few columns one by one
        turn(c.y + j0 * c.D, c.D, n, whole, TILE, y.p);
        for (int64_t d = whole; d < c.D; d++)
            for (int64_t j = 0; j < TILE; j++) y.p[d * TILE + j] = j < n ? c.y[(j0 + j) * c.D + d] : 0;
    }
    // Cuts a list of at least `keep` entries back to the `keep` smallest.
    void cut(int r) {
        float* s = score.p + r * room;
        int32_t* at = index.p + r * room;
        for (int64_t i = 0; i < counts[r]; i++) order.p[i] = {s[i], at[i]};
        std::nth_element(order.p, order.p + c.keep - 1, order.p + counts[r]);
        for (int64_t i = 0; i < c.keep; i++) { s[i] = order.p[i].score; at[i] = order.p[i].index; }
        below[r] = order.p[c.keep - 1].score;
        counts[r] = c.keep;
    }
    // Cuts a list back to a few more entries than `keep`: halves the interval of its scores until a bound fits.
    void shrink(int r) {
        float* s = score.p + r * room;
        int32_t* at = index.p + r * room;
        const int64_t n = counts[r], nv = (n + L - 1) / L;
        for (int64_t i = n; i < nv * L; i++) s[i] = s[0];
        vfloat least = load(s), most = least;
        for (int64_t v = 1; v < nv; v++) { least = smaller(least, load(s + v * L)); most = larger(most, load(s + v * L)); }
        for (int64_t i = n; i < nv * L; i++) s[i] = INFINITY;
        float low = -largest<float>(-least), high = largest<float>(most);
        for (int step = 0; step < 16; step++) {
            const float middle = 0.5f * low + 0.5f * high;
            int64_t beyond = 0;
            for (int64_t v = 0; v < nv; v++) beyond += bits(above(load(s + v * L), splat(middle)));
            const int64_t within = nv * L - beyond;
            if (within < c.keep) { low = middle; continue; }
            high = middle;
            if (within <= c.keep + SPARE) break;
        }
        int64_t kept = 0;
        for (int64_t v = 0; v < nv; v++) {
            const vfloat x = load(s + v * L);
            const vint32 j = *(const vint32_any*)(at + v * L);
            const Mask m = ~above(x, splat(high)) & ((1ull << L) - 1);
            compress(s + kept, m, x);
            compress(at + kept, m, j);
            kept += bits(m);
        }
        counts[r] = kept;
        below[r] = high;
    }
    void rows(int64_t i0, int n) {
        for (int64_t i = 0; i < n * c.D; i++) x.p[i] = c.x[i0 * c.D + i] * (c.y_sq ? -2.0f : -1.0f);
        vint32 lane;
        for (int l = 0; l < L; l++) lane[l] = l;
        for (int r = 0; r < n; r++) { counts[r] = 0; below[r] = INFINITY; }
        for (int64_t j0 = 0; j0 < c.m; j0 += TILE) {
            const int64_t there = c.m - j0 < TILE ? c.m - j0 : TILE;
            turn_tile(j0, there);
            multiply<false>(n, c.D, x.p, c.D, 1, y.p, TILE, S.p, TILE, TILE);
            alignas(64) float squares[TILE];
            for (int64_t j = 0; j < TILE; j++) squares[j] = j >= there ? INFINITY : c.y_sq ? c.y_sq[j0 + j] : 0;
            for (int r = 0; r < n; r++) {
                if (c.self && i0 + r >= j0 && i0 + r < j0 + TILE) S.p[r * TILE + i0 + r - j0] = INFINITY;
                float* s = score.p + r * room;
                int32_t* at = index.p + r * room;
                vfloat t[TILE / L], least = splat(INFINITY);
                for (int j = 0; j < TILE / L; j++) {
                    t[j] = load(S.p + r * TILE + j * L) + load(squares + j * L);
                    least = smaller(t[j], least);
                }
                const vfloat bound = splat(below[r]);
                if (!above(bound, least)) continue;  // of most tiles no key is near enough
                for (int j = 0; j < TILE / L; j++) {
                    const Mask m = above(bound, t[j]);
                    if (!m) continue;
                    compress(s + counts[r], m, t[j]);
                    compress(at + counts[r], m, lane + (int32_t)(j0 + j * L));
                    counts[r] += bits(m);
                }
                if (counts[r] + TILE + L <= room) continue;
                shrink(r);
                if (counts[r] + TILE + L > room) cut(r);  // many equal scores
            }
        }
        for (int r = 0; r < n; r++) {
            if (counts[r] < c.keep) {  // scores that overflow: nothing is proven
                c.worst[i0 + r] = -INFINITY;
                for (int64_t i = 0; i < c.k; i++) { c.scores[(i0 + r) * c.k + i] = INFINITY; c.index[(i0 + r) * c.k + i] = 0; }
                continue;
            }
            if (counts[r] > c.keep + SPARE) shrink(r);
            cut(r);
            c.worst[i0 + r] = below[r];
            const double* from = c.exact_x + (i0 + r) * c.D;
            for (int64_t i = 0; i < c.keep; i++) {
                const int64_t j = index.p[r * room + i];
                exact.p[i] = {exact_score(from, c.exact_y + j * c.D, c.D, c.y_sq != nullptr), j};
            }
            std::partial_sort(exact.p, exact.p + c.k, exact.p + c.keep);
            for (int64_t i = 0; i < c.k; i++) {
                c.scores[(i0 + r) * c.k + i] = exact.p[i].score;
                c.index[(i0 + r) * c.k + i] = exact.p[i].index;
            }
        }
    }
};

}  // namespace

extern "C" int OF_SET(neighbours_search)(int, const NeighboursCall* c, int64_t first, int64_t last) {
    Search search(*c);
    if (!search.ok()) return 1;
    for (int64_t i = first; i < last; i += ROWS) search.rows(i, last - i < ROWS ? (int)(last - i) : ROWS);
    return 0;
}
