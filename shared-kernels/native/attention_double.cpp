// Sparse attention in double precision: attention.cpp once more, with numbers of 64 bits.
#define NUMBER double
#define ONLY_SCORES  // coarse.h is made for float
#define FORWARD attention_double_forward
#define BACKWARD attention_double_backward
#include "attention.cpp"
