// Attention over a band in double precision: band.cpp once more, with numbers of 64 bits.
#define NUMBER double
#define FORWARD band_double_forward
#define BACKWARD band_double_backward
#include "band.cpp"
