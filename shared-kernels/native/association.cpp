// Repeated association: q <- softmax(scale q k^T + mask) k, `steps` times, then softmax(..) v.
//
// A block of queries stays in the cache from the first update to the read-out. All sums go in the order
// of the keys, so that the bits of a row depend on its own query alone. The states are kept times scale.
// A score is multiplied by log2(e) only beside one of its row: a large product has no digits left for
// what tells two of them apart. The forward pass goes over the keys once in tiles of 64,
// whose scores and weights stay in the first-level cache: what was added up is divided again where a
// later tile has a larger score. Workspace of a thread: the keys and values of one head, the keys once
// more in columns; backward the values in columns, too, both gradients and 48 numbers per key.
#include <cfloat>

#include "tiles.h"

// association.py fills it in with ctypes, field by field.
struct AssociationCall {
    // fp32 by steps of batch, head and token: q (B, H, L, D), k (B, H, S, D), v (B, H, S, D_v)
    const float *q, *k, *v;
    float* o;             // (B, H, L, D_v), contiguous like all that follow but for the masks
    const uint8_t* seen;  // (B, H, L, S) by seen_step, nonzero where a key is seen; or null
    const float* add;     // (B, H, L, S) by add_step, added to the scores; or null
    float* states;        // (steps, B, H, L, D), the updated states times scale; or null
    // (2, steps + 1, B, H, L), with states: a score of a row, and log2 of what divides the weights beside it
    float* lse;
    const float* d_out;   // (B, H, L, D_v)
    float *dq, *dk, *dv;
    int64_t B, H, L, S, D, D_v, steps;
    int64_t q_step[3], k_step[3], v_step[3], seen_step[4], add_step[4];
    float scale;
};

namespace {

const float LOG2_E = 1.44269504f;
const float RISE = 3;  // a weight that is not divided yet is e^RISE at most

// 2^x for x < 127; 0 where that is less than about 2^-126, and NaN of NaN. The polynomial errs by half a
// unit in the last place. `big` leaves the exponent's bits of 2^n at the end of t: they are 0 at n = -127.
INLINE vf power(vf x) {
    const float big = 12582912.0f + 127;  // 1.5 * 2^23: adding it rounds to whole numbers
    const vf z = larger(splat(-127.0f), x), t = z + big, r = z - (t - big);
    const vf y = 1.0f + r * (0.693147004f + r * (0.240222424f + r * (0.0555073358f + r * (0.00967151299f + r * 0.00132647273f))));
    return y * (vf)((Lanes<float>::I)t << 23);
}

struct Head {
    const AssociationCall& c;
    const bool goes_back;
    int64_t wide, wide_v, widest, ld, head = 0;
    Buffer<float> k, k_columns, v, v_columns, q, scores, d_scores, sum_of_rows, g, dk, dv;
    Head(const AssociationCall& c_, bool back)
        : c(c_), goes_back(back), wide(up(c_.D, 16)), wide_v(up(c_.D_v, 16)), widest(wide > wide_v ? wide : wide_v),
          // a row of scores is no multiple of a page long: rows would take the same places of the cache
          ld(back ? up(c_.S, TILE) + L : TILE),
          k(c_.S * wide), k_columns(up(c_.S, TILE) * wide), v(c_.S * wide_v), v_columns(back ? up(c_.S, TILE) * wide_v : 1), q(ROWS * wide), scores(ROWS * ld),
          d_scores(back ? ROWS * ld : 1), sum_of_rows(ROWS * widest), g(ROWS * widest), dk(back ? c_.S * wide : 1), dv(back ? c_.S * wide_v : 1) {}
    bool ok() const {
        return k.p && k_columns.p && v.p && v_columns.p && q.p && scores.p && d_scores.p && sum_of_rows.p && g.p && dk.p && dv.p;
    }
    static void copy(const float* x, int64_t step, int64_t n, int64_t D, int64_t wide, float by, float* out) {
        for (int64_t i = 0; i < n; i++) pad_rows(x + i * step, 1, D, wide, by, out + i * wide);
    }
    void begin(int64_t item) {
        head = item;
        memset(q.p, 0, sizeof(float) * ROWS * wide);  // rows behind the last are computed with it
        memset(g.p, 0, sizeof(float) * ROWS * widest);
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
        copy(c.q + b * c.q_step[0] + h * c.q_step[1] + i * c.q_step[2], c.q_step[2], rows, c.D, wide, c.scale, q.p);
    }
    // A block of rows against the tile of keys that starts at j: multiples of six rows are quick.
    void tile_scores(int rows, const float* x, int64_t K, int64_t x_row, const float* columns, int64_t j, int64_t height, float* out) {
        multiply<false>(up(rows, BLOCK_ROWS), K, x, x_row, 1, columns + j * height, TILE, out, ld, up(keys_at(j), L));
    }
    int64_t keys_at(int64_t j) const { return c.S - j < TILE ? c.S - j : TILE; }
    // What the masks do to row i of a tile's scores; there is nothing behind the last key.
    void mask(int64_t i, int64_t j0, float* s) {
        const int64_t b = head / c.H, h = head % c.H, n = keys_at(j0);
        if (c.add) {
            const float* add = c.add + b * c.add_step[0] + h * c.add_step[1] + i * c.add_step[2] + j0 * c.add_step[3];
            for (int64_t j = 0; j < n; j++) s[j] += add[j * c.add_step[3]];
        }
        if (c.seen) {
            const uint8_t* seen = c.seen + b * c.seen_step[0] + h * c.seen_step[1] + i * c.seen_step[2] + j0 * c.seen_step[3];
            for (int64_t j = 0; j < n; j++) s[j] = seen[j * c.seen_step[3]] ? s[j] : -INFINITY;
        }
        for (int64_t j = n; j < up(n, L); j++) s[j] = -INFINITY;
    }
    // The scores of a tile -> e^(score - top), and their sums to `part`, a vector a row. `top` is a score
    // of the row, less than RISE below the largest so far: where a tile has a larger one, what was added
    // up before it is made smaller. NaN and infinity make a row's sums NaN.
    template <bool FULL> void weigh_tile(int rows, int64_t columns, int64_t width, float* top, float* part) {
        const int64_t end = FULL ? TILE : columns;
        for (int r = 0; r < rows; r++) {
            float *s = scores.p + r * ld, *sums = part + r * L;
            vf most = load(s), total = load(sums);
            for (int64_t j = L; j < end; j += L) most = larger(most, load(s + j));
            if (above(most, splat(top[r] + RISE))) {
                const float now = largest<float>(most), by = power(splat((top[r] - now) * LOG2_E))[0];
                float* to = sum_of_rows.p + r * width;
                for (int64_t d = 0; d < width; d += L) store(to + d, load(to + d) * by);
                total *= by;
                top[r] = now;
            }
            const vf from = splat(top[r]);
            for (int64_t j = 0; j < end; j += L) {
                const vf y = power((load(s + j) - from) * LOG2_E);
                store(s + j, y);
                total += y;
            }
            store(sums, total);
        }
    }
    void forward(int64_t i, int rows) {
        first_state(i, rows);
        const int64_t all = c.B * c.H * c.L, first = head * c.L + i;
        alignas(VECTOR_BYTES) float top[ROWS], part[ROWS * L];
        for (int64_t step = 0; step <= c.steps; step++) {
            const bool is_last = step == c.steps;
            const int64_t width = is_last ? wide_v : wide, n = is_last ? c.D_v : c.D;
            for (int r = 0; r < ROWS; r++) top[r] = -FLT_MAX;
            memset(part, 0, sizeof part);
            memset(sum_of_rows.p, 0, sizeof(float) * ROWS * width);
            for (int64_t j = 0; j < c.S; j += TILE) {
                tile_scores(rows, q.p, c.D, wide, k_columns.p, j, wide, scores.p);
                if (c.add || c.seen || j + TILE > c.S) for (int r = 0; r < rows; r++) mask(i + r, j, scores.p + r * ld);
                if (keys_at(j) == TILE) weigh_tile<true>(rows, TILE, width, top, part);
                else weigh_tile<false>(rows, up(keys_at(j), L), width, top, part);
                multiply<true>(up(rows, BLOCK_ROWS), keys_at(j), scores.p, ld, 1, (is_last ? v.p : k.p) + j * width, width, sum_of_rows.p, width, width);
            }
            for (int r = 0; r < rows; r++) {
                const float total = sum<float>(load(part + r * L));  // 0 where no key is seen
                const float by = total == 0 ? 0 : is_last ? 1 / total : c.scale / total;
                float* to = is_last ? c.o + (first + r) * c.D_v : q.p + r * wide;
                pad_rows(sum_of_rows.p + r * width, 1, n, n, by, to);
                if (!c.lse) continue;
                c.lse[step * all + first + r] = top[r];
                c.lse[(c.steps + 1 + step) * all + first + r] = total == 0 ? INFINITY : log2f(total);
                if (!is_last) memcpy(c.states + (step * all + first + r) * c.D, to, sizeof(float) * c.D);
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
            vf mean[ROWS] = {};  // of a row: lanes of sum p dp, the mean of the weights' gradients
            for (int64_t j = 0; j < c.S; j += TILE) {
                float *p = scores.p + j, *dp = d_scores.p + j;
                tile_scores(rows, q.p, c.D, wide, k_columns.p, j, wide, p);
                tile_scores(rows, g.p, is_last ? c.D_v : c.D, width, is_last ? v_columns.p : k_columns.p, j, width, dp);
                for (int r = 0; r < rows; r++) {
                    mask(i + r, j, p + r * ld);
                    const float top = c.lse[step * all + first + r], log_sum = c.lse[(c.steps + 1 + step) * all + first + r];
                    for (int64_t e = r * ld; e < r * ld + up(keys_at(j), L); e += L) {
                        const vf weight = log_sum == log_sum ? power((load(p + e) - top) * LOG2_E - log_sum) : splat(NAN);
                        store(p + e, weight);
                        mean[r] += weight * load(dp + e);
                    }
                }
                multiply<true>(keys_at(j), rows, p, 1, ld, g.p, width, (is_last ? dv.p : dk.p) + j * width, width, width);
            }
            memset(sum_of_rows.p, 0, sizeof(float) * ROWS * wide);
            for (int r = 0; r < rows; r++) mean[r] = splat(sum<float>(mean[r]));
            for (int64_t j = 0; j < c.S; j += TILE) {
                float *p = scores.p + j, *dp = d_scores.p + j;
                for (int r = 0; r < rows; r++)
                    for (int64_t e = r * ld; e < r * ld + up(keys_at(j), L); e += L) store(dp + e, load(p + e) * (load(dp + e) - mean[r]));
                multiply<true>(keys_at(j), rows, dp, 1, ld, q.p, wide, dk.p + j * wide, wide, wide);
                multiply<true>(up(rows, BLOCK_ROWS), keys_at(j), dp, ld, 1, k.p + j * wide, wide, sum_of_rows.p, wide, wide);
            }
            for (int64_t d = 0; d < rows * wide; d += L) store(g.p + d, load(sum_of_rows.p + d) * c.scale);
        }
        for (int r = 0; r < rows; r++) memcpy(c.dq + (first + r) * c.D, g.p + r * wide, sizeof(float) * c.D);
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
