/* Operator of generation: y = x W^T for a few rows of x, the weights unpacked in registers.
 *
 * y = sum_g scales[g] * (x . (q - mid))_g + offsets[g] * (sum of x)_g, all in fp32: the group
 * algebra of arXiv 2309.14717, eq. 5-7, costs one product and one sum a group instead of a weight.
 */
#include "layer.h"

#define VECTORS 4    /* most vectors of columns that share the loads of x */
#define ROWS 4       /* rows of x that share the unpacking of a weight */

/* dot[r][v] += (q - mid) * x of input i of a stream */
INLINE void multiply_input(const int32_t *words, int64_t n, int64_t i, const int bits,
                           const int rows, const int vectors, int64_t count, const float *x,
                           vf dot[ROWS][VECTORS]) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) {
        const vf q = centred_code(words + v * LANES, n, i, bits, count);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) dot[r][v] += q * x[r];
    }
}

/* Inputs [k, end) of one group and one stream; `vectors` vectors of columns, the last `count`
 * long. sums [rows][COLUMNS] += */
INLINE void multiply_tile(const Layer *l, const int bits, const int rows, const int vectors,
                          const float *x, const float *pooled, int64_t k, int64_t end,
                          int64_t column, int64_t count, float *sums) {
    const int64_t n = l->out_features, at = group_of(l, k) * n + column;
    const int32_t *words = l->qweight + k / STREAM * bits * n + column;
    vf dot[ROWS][VECTORS] = {0};
    /* the next stream's words: rows are too short for the hardware to see the pattern */
    for (int v = 0; vectors > 1 && v < vectors * bits; v++)
        __builtin_prefetch(words + (bits + v / vectors) * n + v % vectors * LANES);
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
                           float *y, int64_t from, int64_t to) {
    const int vectors = rows == 1 ? VECTORS : VECTORS / 2; /* the sums have to stay in registers */
    float sums[ROWS * COLUMNS] = {0};
    for (int64_t k = 0, end; k < l->in_features; k = end) {
        float pooled[ROWS] = {0};
        for (end = k; end < l->in_features && end / STREAM == k / STREAM &&
                      group_of(l, end) == group_of(l, k); end++)
            for (int r = 0; r < rows; r++) pooled[r] += x[end * rows + r];
        int64_t c = from;
        for (; c + vectors * LANES <= to; c += vectors * LANES)
            multiply_tile(l, bits, rows, vectors, x, pooled, k, end, c, LANES, sums + c - from);
        for (; c < to; c += LANES)
            multiply_tile(l, bits, rows, 1, x, pooled, k, end, c, to - c, sums + c - from);
    }
    for (int r = 0; r < rows; r++)
        memcpy(y + r * l->out_features + from, sums + r * COLUMNS, (to - from) * sizeof(float));
}

/* x [tiles, K, rows], y [tiles * rows, N]; rows is 1 or ROWS */
void qalora_multiply(const Layer *l, const float *x, float *y, int64_t tiles, int rows,
                     int threads) {
    const int64_t n = l->out_features, columns = block_columns(n, threads);
    const int64_t blocks = (n + columns - 1) / columns;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(dynamic)
    for (int64_t b = 0; b < blocks; b++) {
        for (int64_t t = 0; t < tiles; t++) {
            const int64_t from = b * columns, to = from + columns < n ? from + columns : n;
            const float *xt = x + t * l->in_features * rows;
            float *yt = y + t * rows * n;
            if (rows == 1) { BY_BITS(l->bits, multiply_block(l, BITS, 1, xt, yt, from, to)) }
            else { BY_BITS(l->bits, multiply_block(l, BITS, ROWS, xt, yt, from, to)) }
        }
    }
}
