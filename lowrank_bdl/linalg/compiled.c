/* CPU kernels of a low-rank-plus-diagonal matrix diag(d) + R R', R' stored as K rows of D numbers.

   Every kernel walks over the D coordinates in blocks that stay in the first cache levels and touches memory once.
   Products of a block are summed in REAL, blocks in double; blocks are grouped into a fixed number of pieces whose sums
   are added in order, so a result does not depend on the number of threads. `compiled.h` holds the kernels; it is read
   once for each pair of the type that is stored and the type that is computed in. `compiled.py` is the only caller and
   checks every shape. */

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Bytes of a vector register, and the side of the square of dot products that the registers hold at once. */
#if defined(__AVX512F__)
#define BYTES 64
#define TILE 4
#define IN_REGISTER(v) __asm__("" : "+v"(v))
#elif defined(__AVX__)
#define BYTES 32
#define TILE 2
#define IN_REGISTER(v) __asm__("" : "+x"(v))
#else
#define BYTES 16
#define TILE 4
#define IN_REGISTER(v) ((void)0)
#endif

#define BLOCK 1024
enum { SIDE = 6 }; /* rows of a rotation whose sums, two registers each, are kept at once */
#define PIECES 64
#define LANES ((int)(BYTES / sizeof(REAL)))
/* One line more than a block: rows of the buffer would otherwise all fall into the same set of the first-level cache. */
#define STRIDE (BLOCK + LANES)

#define PASTE(a, b, c) a##_##b##_##c
#define EXPAND(a, b, c) PASTE(a, b, c)
#define NAME(base) EXPAND(base, STORED, REAL)

#define FOR_BLOCKS(piece, dim, block)                                                                                 \
    for (ptrdiff_t blocks_ = ((dim) + BLOCK - 1) / BLOCK, block = blocks_ * (piece) / PIECES;                          \
         block < blocks_ * ((piece) + 1) / PIECES; block++)
#define WIDTH(dim, start) ((dim) - (start) < BLOCK ? (int)((dim) - (start)) : BLOCK)

/* Eight numbers in double and their bits, for logarithms. */
enum { WAYS = 8 };
typedef double wide __attribute__((vector_size(8 * WAYS)));
typedef int64_t whole __attribute__((vector_size(8 * WAYS)));
#define MANTISSA 0xfffffffffffffLL
#define ONE 0x3ff0000000000000LL    /* 1.0 */
#define RAISED 0x4630000000000000LL /* 2^100 */

/* Add the PIECES partial sums of `count` numbers into the first, in order. */
static void add_pieces(double *sums, size_t count) {
    for (int piece = 1; piece < PIECES; piece++)
        for (size_t i = 0; i < count; i++) sums[i] += sums[piece * count + i];
}

#define STORED float
#define LARGEST FLT_MAX
#define REAL float
#include "compiled.h"
#undef REAL
#define REAL double
#include "compiled.h"
#undef STORED
#undef LARGEST
#define STORED double
#define LARGEST DBL_MAX
#include "compiled.h"
