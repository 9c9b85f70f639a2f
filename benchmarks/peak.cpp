// Twelve sums that do not wait for each other: as many multiply-adds as one thread can finish.
#include "simd.h"

extern "C" float multiply_adds(int64_t rounds, float by, float more) {
    vfloat sums[12];
    for (int i = 0; i < 12; i++) sums[i] = splat((float)i);
    for (int64_t n = 0; n < rounds; n++)
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++) sums[i] = sums[i] * by + more;
    vfloat all{};
    for (int i = 0; i < 12; i++) all += sums[i];
    return sum<float>(all);
}
extern "C" int64_t operations(int64_t rounds) { return rounds * 12 * 2 * Lanes<float>::count; }
