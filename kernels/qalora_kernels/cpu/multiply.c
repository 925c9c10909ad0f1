/* Operator of generation: y = x W^T for a few rows of x, the weights unpacked in registers.
 *
 * y = sum_g scales[g] * (x . (q - mid))_g + offsets[g] * (sum of x)_g, all in fp32: the group
 * algebra of arXiv 2309.14717, eq. 5-7, costs one product and one sum a group instead of a weight.
 */
#include "layer.h"

#define ROWS 4 /* rows of x that share the unpacking of a weight */

/* dot[r][v] += (q - mid) * x of input i of a stream */
INLINE void multiply_input(const int32_t *words, int64_t n, int64_t i, const int bits,
                           const int rows, const int vectors, int64_t count, const float *x,
                           vf dot[ROWS][TILE]) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) {
        const vf q = centred_code(words + v * LANES, n, i, bits, count);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) dot[r][v] += q * x[r];
    }
}

#ifdef __AVX512BF16__
/* bf16 x: two inputs a lane and instruction. 2 and 4 bits, whole words of one group.
 * A code becomes the bf16 number LEAST + q by setting the bits of its mantissa below those of LEAST,
 * in both halves of a word at once; what that adds to the sum is LEAST times the sum of x. */
INLINE void multiply_pairs(const int32_t *words, int64_t n, const int bits, const int rows,
                           const int vectors, const uint32_t *pairs, vf dot[ROWS][TILE]) {
    const int place = 7 - bits; /* of a code in a mantissa of 7 bits */
    const uint32_t mask = ((1u << bits) - 1) * 0x10001u << place;
    const uint32_t least = (0x3f80u + (bits << 7)) * 0x10001u; /* 2^bits */
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) {
        const vu word = load_u(words + v * LANES, LANES);
#pragma GCC unroll 8
        for (int j = 0; j < 16 / bits; j++) {
            const int shift = j * bits - place;
            const vu q = ((shift < 0 ? word << -shift : word >> shift) & mask) | least;
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                const vu x = (vu){0} + pairs[j * rows + r];
                dot[r][v] = (vf)_mm512_dpbf16_ps((__m512)dot[r][v], (__m512bh)q, (__m512bh)x);
            }
        }
    }
}
#endif

/* x [K, rows] fp32 that holds bf16 numbers -> the pairs that `multiply_pairs` takes: input j of a
 * word and input j + half, for each half of a word's inputs */
static void make_pairs(const float *x, int64_t k, const int bits, const int rows, uint32_t *pairs) {
    const int half = 16 / bits;
    uint32_t u, high;
    for (int64_t word = 0; word + 2 * half <= k; word += 2 * half)
        for (int i = 0; i < half * rows; i++) {
            memcpy(&u, x + word * rows + i, sizeof u);
            memcpy(&high, x + (word + half) * rows + i, sizeof high);
            pairs[word / 2 * rows + i] = u >> 16 | (high & 0xffff0000u);
        }
}

/* Inputs [k, end) of one group and one stream; `vectors` vectors of columns, the last `count`
 * long. sums [rows][COLUMNS] += */
INLINE void multiply_tile(const Layer *l, const int bits, const int rows, const int vectors,
                          const float *x, const uint32_t *pairs, const float *pooled, int64_t k,
                          int64_t end, int64_t column, int64_t count, float *sums) {
    const int64_t n = l->out_features, at = group_of(l, k) * n + column;
    const int32_t *words = l->qweight + k / STREAM * bits * n + column;
    vf dot[ROWS][TILE] = {0};
    /* the next stream's words: rows are too short for the hardware to see the pattern */
    for (int v = 0; vectors > 1 && v < vectors * bits; v++)
        __builtin_prefetch(words + (bits + v / vectors) * n + v % vectors * LANES);
#ifdef __AVX512BF16__
    const int per_word = 32 / bits;
    if (pairs && vectors > 1 && (bits == 2 || bits == 4) && (k | end) % per_word == 0) {
        for (int64_t i = k; i < end; i += per_word, words += n)
            multiply_pairs(words + k % STREAM / per_word * n, n, bits, rows, vectors,
                           pairs + i / 2 * rows, dot);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) /* 2^bits, and the mid-code */
            for (int r = 0; r < rows; r++) dot[r][v] -= 1.5f * (1 << bits) * pooled[r];
    } else
#endif
    if (vectors > 1 && end - k == STREAM) {
#pragma GCC unroll 8
        for (int i = 0; i < STREAM; i++)
            multiply_input(words, n, i, bits, rows, vectors, count, x + (k + i) * rows, dot);
    } else {
        for (int64_t i = k; i < end; i++)
            multiply_input(words, n, i % STREAM, bits, rows, vectors, count, x + i * rows, dot);
    }
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) {
        const vf scale = load_grid(l->scales, l->scales_fp16, at + v * LANES, count);
        const vf offset = load_grid(l->offsets, l->offsets_fp16, at + v * LANES, count);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            float *sum = sums + r * COLUMNS + v * LANES;
            store_f(sum, load_f(sum, LANES) + scale * dot[r][v] + offset * pooled[r], LANES);
        }
    }
}

INLINE void multiply_block(const Layer *l, const int bits, const int rows, const float *x,
                           const uint32_t *pairs, float *y, int64_t from, int64_t to) {
    const int vectors = rows == 1 ? TILE : TILE / 2; /* the sums have to stay in registers */
    float sums[ROWS * COLUMNS] = {0};
    for (int64_t k = 0, end; k < l->in_features; k = end) {
        float pooled[ROWS] = {0};
        for (end = k; end < l->in_features && end / STREAM == k / STREAM &&
                      group_of(l, end) == group_of(l, k); end++)
            for (int r = 0; r < rows; r++) pooled[r] += x[end * rows + r];
        int64_t c = from;
        for (; c + vectors * LANES <= to; c += vectors * LANES)
            multiply_tile(l, bits, rows, vectors, x, pairs, pooled, k, end, c, LANES, sums + c - from);
        for (; c < to; c += LANES)
            multiply_tile(l, bits, rows, 1, x, pairs, pooled, k, end, c, to - c, sums + c - from);
    }
    for (int r = 0; r < rows; r++)
        memcpy(y + r * l->out_features + from, sums + r * COLUMNS, (to - from) * sizeof(float));
}

/* x [tiles, K, rows], y [tiles * rows, N]; rows is 1 or ROWS. pairs: room for [tiles, K/2, rows]
 * where x holds bf16 numbers, else NULL */
void qalora_multiply(const Layer *l, const float *x, uint32_t *pairs, float *y, int64_t tiles,
                     int rows, int threads) {
    const int64_t k = l->in_features, n = l->out_features, columns = block_columns(n, threads);
    const int64_t blocks = (n + columns - 1) / columns;
    if (l->bits != 2 && l->bits != 4) pairs = NULL;
    for (int64_t t = 0; pairs && t < tiles; t++)
        make_pairs(x + t * k * rows, k, l->bits, rows, pairs + t * (k / 2) * rows);
#pragma omp parallel for collapse(2) num_threads(threads) schedule(dynamic)
    for (int64_t b = 0; b < blocks; b++) {
        for (int64_t t = 0; t < tiles; t++) {
            const int64_t from = b * columns, to = from + columns < n ? from + columns : n;
            const float *xt = x + t * k * rows;
            const uint32_t *pt = pairs ? pairs + t * (k / 2) * rows : NULL;
            float *yt = y + t * rows * n;
            if (rows == 1) { BY_BITS(l->bits, multiply_block(l, BITS, 1, xt, pt, yt, from, to)) }
            else { BY_BITS(l->bits, multiply_block(l, BITS, ROWS, xt, pt, yt, from, to)) }
        }
    }
}
