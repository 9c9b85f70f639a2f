// Repeated association: q <- softmax(scale q k^T + mask) k, `steps` times, then softmax(..) v.
//
// A block of queries stays in the cache from the first update to the read-out. All sums go in the order
// of the keys, so that the bits of a row depend on its own query alone. Scores are in units of log 2:
// the states are kept times scale log2(e). Workspace of a thread: the keys and values of one head four
// times, and 48 numbers per key.
#include "tiles.h"

// The door fills it in with ctypes, field by field.
struct AssociationCall {
    // fp32 by steps of batch, head and token: q (B, H, L, D), k (B, H, S, D), v (B, H, S, D_v)
    const float *q, *k, *v;
    float* o;             // (B, H, L, D_v), contiguous like all that follow but for the masks
    const uint8_t* seen;  // (B, H, L, S) by seen_step, nonzero where a key is seen; or null
    const float* add;     // (B, H, L, S) by add_step, added to the scores; or null
    float* states;        // (steps, B, H, L, D), the updated states times scale log2(e); or null
    float* lse;           // (steps + 1, B, H, L), log2 of what divides a row; with states
    const float* d_out;   // (B, H, L, D_v)
    float *dq, *dk, *dv;
    int64_t B, H, L, S, D, D_v, steps;
    int64_t q_step[3], k_step[3], v_step[3], seen_step[4], add_step[4];
    float scale;
};

namespace {

const float LOG2_E = 1.44269504f, LOG_2 = 0.693147181f;

// 2^(x - top) for x <= top; 0 where that is less than 2^-126.
INLINE vf power_below(vf x, float top) {
    const vf z = x - top, e = exp2_of(larger(z, splat(-126.0f)));
    return z > -126.0f ? e : vf{};
}

struct Head {
    const AssociationCall& c;
    const bool goes_back;
    int64_t wide, wide_v, widest, ld, head = 0;
    Buffer<float> k, k_columns, v, v_columns, q, scores, d_scores, sum_of_rows, g, dk, dv;
    Head(const AssociationCall& c_, bool back)
        : c(c_), goes_back(back), wide(up(c_.D, 16)), wide_v(up(c_.D_v, 16)), widest(wide > wide_v ? wide : wide_v), ld(up(c_.S, TILE)),
          k(c_.S * wide), k_columns(ld * wide), v(c_.S * wide_v), v_columns(back ? ld * wide_v : 1), q(ROWS * wide), scores(ROWS * ld),
          d_scores(back ? ROWS * ld : 1), sum_of_rows(ROWS * widest), g(ROWS * widest), dk(back ? c_.S * wide : 1), dv(back ? c_.S * wide_v : 1) {}
    bool ok() const {
        return k.p && k_columns.p && v.p && v_columns.p && q.p && scores.p && d_scores.p && sum_of_rows.p && g.p && dk.p && dv.p;
    }
    static void copy(const float* x, int64_t step, int64_t n, int64_t D, int64_t wide, float by, float* out) {
        for (int64_t i = 0; i < n; i++) pad_rows(x + i * step, 1, D, wide, by, out + i * wide);
    }
    void begin(int64_t item) {
        head = item;
        const int64_t b = item / c.H, h = item % c.H;
        copy(c.k + b * c.k_step[0] + h * c.k_step[1], c.k_step[2], c.S, c.D, wide, 1, k.p);
        copy(c.v + b * c.v_step[0] + h * c.v_step[1], c.v_step[2], c.S, c.D_v, wide_v, 1, v.p);
        transpose_tiles(k.p, c.S, wide, k_columns.p);
        if (!goes_back) return;
        transpose_tiles(v.p, c.S, wide_v, v_columns.p);
        memset(dk.p, 0, sizeof(float) * c.S * wide);
        memset(dv.p, 0, sizeof(float) * c.S * wide_v);
    }
    void first_state(int64_t i, int rows) {
        const int64_t b = head / c.H, h = head % c.H;
        copy(c.q + b * c.q_step[0] + h * c.q_step[1] + i * c.q_step[2], c.q_step[2], rows, c.D, wide, c.scale * LOG2_E, q.p);
    }
    // Rows of x times the keys or the values, whose transposed tiles are given.
    void products(int rows, const float* x, int64_t K, int64_t x_row, const float* columns, int64_t height, float* out) {
        for (int64_t j = 0; j < c.S; j += TILE) multiply<false>(rows, K, x, x_row, 1, columns + j * height, TILE, out + j, ld, TILE);
    }
    // What the masks do to row i of the scores; there is nothing behind the last key.
    void mask(int64_t i, float* s) {
        const int64_t b = head / c.H, h = head % c.H;
        if (c.add) {
            const float* add = c.add + b * c.add_step[0] + h * c.add_step[1] + i * c.add_step[2];
            for (int64_t j = 0; j < c.S; j++) s[j] += add[j * c.add_step[3]] * LOG2_E;
        }
        if (c.seen) {
            const uint8_t* seen = c.seen + b * c.seen_step[0] + h * c.seen_step[1] + i * c.seen_step[2];
            for (int64_t j = 0; j < c.S; j++) s[j] = seen[j * c.seen_step[3]] ? s[j] : -INFINITY;
        }
        for (int64_t j = c.S; j < ld; j++) s[j] = -INFINITY;
    }
    // Scores -> weights that are not divided yet. `total` divides them: 0 where no key is seen, NaN
    // where a score is. Returns log2 of what the exponentials of the scores are divided by.
    float weigh(float* s, float& total) {
        vf most[2] = {load(s), load(s + L)}, wrong[2] = {};
        for (int64_t j = 0; j < ld; j += 2 * L)
            for (int n = 0; n < 2; n++) {
                const vf x = load(s + j + n * L);
                most[n] = larger(most[n], x);
                wrong[n] += x == x ? vf{} : x;
            }
        const float top = maximum<float>(larger(most[0], most[1]));
        if (is_nan(wrong[0] + wrong[1]) || top == INFINITY) return total = NAN;
        if (top == -INFINITY) {
            memset(s, 0, sizeof(float) * ld);
            total = 0;
            return INFINITY;
        }
        vf part[2] = {};
        for (int64_t j = 0; j < ld; j += 2 * L)
            for (int n = 0; n < 2; n++) {
                const vf y = power_below(load(s + j + n * L), top);
                store(s + j + n * L, y);
                part[n] += y;
            }
        total = sum<float>(part[0] + part[1]);
        return top + log2f(total);
    }
    void forward(int64_t i, int rows) {
        first_state(i, rows);
        const int64_t all = c.B * c.H * c.L, first = head * c.L + i;
        for (int64_t step = 0; step <= c.steps; step++) {
            const bool is_last = step == c.steps;
            const int64_t width = is_last ? wide_v : wide, n = is_last ? c.D_v : c.D;
            products(rows, q.p, c.D, wide, k_columns.p, wide, scores.p);
            float total[ROWS];
            for (int r = 0; r < rows; r++) {
                mask(i + r, scores.p + r * ld);
                const float lse = weigh(scores.p + r * ld, total[r]);
                if (c.lse) c.lse[step * all + first + r] = lse;
            }
            multiply<false>(rows, c.S, scores.p, ld, 1, is_last ? v.p : k.p, width, sum_of_rows.p, width, width);
            for (int r = 0; r < rows; r++) {
                const float by = total[r] == 0 ? 0 : is_last ? 1 / total[r] : c.scale * LOG2_E / total[r];
                float* to = is_last ? c.o + (first + r) * c.D_v : q.p + r * wide;
                for (int64_t d = 0; d < n; d++) to[d] = by == by ? sum_of_rows.p[r * width + d] * by : NAN;
                if (!is_last && c.states) memcpy(c.states + (step * all + first + r) * c.D, to, sizeof(float) * c.D);
            }
        }
    }
    // From the last association to the first: g is the gradient of what it gave.
    void backward(int64_t i, int rows) {
        const int64_t all = c.B * c.H * c.L, first = head * c.L + i;
        copy(c.d_out + first * c.D_v, c.D_v, rows, c.D_v, wide_v, 1, g.p);
        for (int64_t step = c.steps; step >= 0; step--) {
            const bool is_last = step == c.steps;
            const int64_t width = is_last ? wide_v : wide;
            if (step == 0) first_state(i, rows);
            else copy(c.states + ((step - 1) * all + first) * c.D, c.D, rows, c.D, wide, 1, q.p);
            products(rows, q.p, c.D, wide, k_columns.p, wide, scores.p);
            products(rows, g.p, is_last ? c.D_v : c.D, width, is_last ? v_columns.p : k_columns.p, width, d_scores.p);
            for (int r = 0; r < rows; r++) {
                mask(i + r, scores.p + r * ld);
                slopes(scores.p + r * ld, d_scores.p + r * ld, c.lse[step * all + first + r], false);
            }
            multiply<true>(c.S, rows, scores.p, 1, ld, g.p, width, is_last ? dv.p : dk.p, width, width);
            for (int r = 0; r < rows; r++) slopes(scores.p + r * ld, d_scores.p + r * ld, 0, true);
            // the states are stored times scale log2(e)
            for (int64_t d = 0; d < rows * wide; d += L) store(q.p + d, load(q.p + d) * LOG_2);
            multiply<true>(c.S, rows, d_scores.p, 1, ld, q.p, wide, dk.p, wide, wide);
            multiply<false>(rows, c.S, d_scores.p, ld, 1, k.p, wide, sum_of_rows.p, wide, wide);
            for (int64_t d = 0; d < rows * wide; d += L) store(g.p + d, load(sum_of_rows.p + d) * c.scale);
        }
        for (int r = 0; r < rows; r++) memcpy(c.dq + (first + r) * c.D, g.p + r * wide, sizeof(float) * c.D);
    }
    // A row of scores -> weights p; then, where they are, the gradients dp of weights -> those of
    // scores, p (dp - sum p dp).
    void slopes(float* p, float* dp, float lse, bool are_weights) {
        if (!are_weights) {
            for (int64_t j = 0; j < ld; j += L) store(p + j, lse == lse ? power_below(load(p + j), lse) : splat(NAN));
            return;
        }
        vf part{};
        for (int64_t j = 0; j < ld; j += L) part += load(p + j) * load(dp + j);
        const float mean = sum<float>(part);
        for (int64_t j = 0; j < ld; j += L) store(dp + j, load(p + j) * (load(dp + j) - mean));
    }
    void end() {
        for (int64_t j = 0; j < c.S; j++) {
            memcpy(c.dk + (head * c.S + j) * c.D, dk.p + j * wide, sizeof(float) * c.D);
            memcpy(c.dv + (head * c.S + j) * c.D_v, dv.p + j * wide_v, sizeof(float) * c.D_v);
        }
    }
};

int heads(const AssociationCall* c, int64_t first, int64_t last, bool back) {
    Head head(*c, back);
    if (!head.ok()) return 1;
    for (int64_t item = first; item < last; item++) {
        head.begin(item);
        for (int64_t i = 0; i < c->L; i += ROWS) {
            const int rows = c->L - i < ROWS ? (int)(c->L - i) : ROWS;
            if (back) head.backward(i, rows);
            else head.forward(i, rows);
        }
        if (back) head.end();
    }
    return 0;
}

}  // namespace

extern "C" int OF_SET(association_forward)(int, const AssociationCall* c, int64_t first, int64_t last) { return heads(c, first, last, false); }
extern "C" int OF_SET(association_backward)(int, const AssociationCall* c, int64_t first, int64_t last) { return heads(c, first, last, true); }
