// Lazy attention in double precision: lazy.cpp once more, with numbers of 64 bits.
#define NUMBER double
#define FORWARD lazy_double_forward
#define BACKWARD lazy_double_backward
#include "lazy.cpp"
