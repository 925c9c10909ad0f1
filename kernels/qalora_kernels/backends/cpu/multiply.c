/* Operator of generation: y = x W^T for a few rows of x, the weights unpacked in registers.
 *
 * y = sum_g scales[g] * (x . (q - mid))_g + offsets[g] * (sum of x)_g, all in fp32: the group
 * algebra of arXiv 2309.14717, eq. 5-7, costs one product and one sum a group instead of a weight.
 */
#include "layer.h"

#define ROWS 4  /* rows of x that share the unpacking of a weight */
#define PARTS 4 /* of the inputs, summed apart: as many whatever the threads, for the same bits */

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

/* The pairs that `multiply_pairs` takes, from x [K, rows] that holds bf16 numbers: input j of a word
 * and input j + half, for each half of a word's inputs */
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

/* Columns that are fetched ahead: rows of words are read side by side, more of them than the
 * hardware follows by itself */
#define AHEAD 256

/* Inputs [k, end) of one group and one stream; `vectors` vectors of columns, the last `count`
 * long. sums [rows, N] += */
INLINE void multiply_tile(const Layer *l, const int bits, const int rows, const int vectors,
                          const float *x, const uint32_t *pairs, const float *pooled, int64_t k,
                          int64_t end, int64_t column, int64_t count, float *sums) {
    const int64_t n = l->out_features, at = group_of(l, k) * n + column;
    const int32_t *words = l->qweight + k / STREAM * bits * n + column;
    vf dot[ROWS][TILE] = {0};
    if (vectors > 1) {
        for (int i = 0; i < vectors * bits; i++)
            __builtin_prefetch(words + i / vectors * n + i % vectors * LANES + AHEAD);
        for (int v = 0; v < vectors; v++) {
            const int64_t next = at + v * LANES + AHEAD;
            __builtin_prefetch((const char *)l->scales + next * (l->scales_fp16 ? 2 : 4));
            __builtin_prefetch((const char *)l->offsets + next * (l->offsets_fp16 ? 2 : 4));
        }
    }
#ifdef __AVX512BF16__
    const int per_word = 32 / bits;
    if (pairs && vectors > 1 && (bits == 2 || bits == 4) && (k | end) % per_word == 0) {
        for (int64_t i = k; i < end; i += per_word)
            multiply_pairs(words + i % STREAM / per_word * n, n, bits, rows, vectors,
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
            float *sum = sums + r * n + column + v * LANES;
            store_f(sum, load_f(sum, count) + scale * dot[r][v] + offset * pooled[r], count);
        }
    }
}

/* Inputs [k, end) of one group and one stream, columns [from, to) */
INLINE void multiply_columns(const Layer *l, const int bits, const int rows, const float *x,
                             const uint32_t *pairs, float *sums, int64_t k, int64_t end,
                             int64_t from, int64_t to) {
    const int vectors = rows == 1 ? TILE : TILE / 2; /* the sums have to stay in registers */
    float pooled[ROWS] = {0};
    for (int64_t i = k; i < end; i++)
        for (int r = 0; r < rows; r++) pooled[r] += x[i * rows + r];
    int64_t c = from;
    for (; c + vectors * LANES <= to; c += vectors * LANES)
        multiply_tile(l, bits, rows, vectors, x, pairs, pooled, k, end, c, LANES, sums);
    for (; c + LANES <= to; c += LANES)
        multiply_tile(l, bits, rows, 1, x, pairs, pooled, k, end, c, LANES, sums);
    if (c < to) multiply_tile(l, bits, rows, 1, x, pairs, pooled, k, end, c, to - c, sums);
}

/* One of PARTS, columns [from, to): rows of words, one after the other. sums [tiles * rows, N] */
static void multiply_part(const Layer *l, const float *x, const uint32_t *pairs, float *sums,
                          int64_t tiles, int rows, int64_t part, int64_t from, int64_t to) {
    const int64_t features = l->in_features, streams = (features + STREAM - 1) / STREAM;
    const int64_t stop = streams * (part + 1) / PARTS * STREAM;
    const int64_t last = stop < features ? stop : features;
    for (int64_t i = 0; i < tiles * rows; i++)
        memset(sums + i * l->out_features + from, 0, (to - from) * sizeof(float));
    for (int64_t k = streams * part / PARTS * STREAM, end; k < last; k = end) {
        for (end = k + 1; end < last && end % STREAM && group_of(l, end) == group_of(l, k);) end++;
        for (int64_t t = 0; t < tiles; t++) {
            const float *xt = x + t * features * rows;
            const uint32_t *pt = pairs ? pairs + t * (features / 2) * rows : NULL;
            float *st = sums + t * rows * l->out_features;
            if (rows == 1) { BY_BITS(l->bits, multiply_columns(l, BITS, 1, xt, pt, st, k, end, from, to)) }
            else { BY_BITS(l->bits, multiply_columns(l, BITS, ROWS, xt, pt, st, k, end, from, to)) }
        }
    }
}

/* x [M, K] -> [tiles, K, rows] fp32, with rows of zeros at the end */
static void arrange(const void *x, int is_bf16, int64_t m, int64_t k, int rows, float *out) {
    const int64_t whole = (m + rows - 1) / rows * rows;
    for (int64_t i = 0; i < whole; i++) {
        float *to = out + i / rows * k * rows + i % rows;
        for (int64_t j = 0; j < k; j++) {
            float value = 0;
            if (i < m && is_bf16) {
                const uint32_t u = (uint32_t)((const uint16_t *)x)[i * k + j] << 16;
                memcpy(&value, &u, sizeof u);
            } else if (i < m) value = ((const float *)x)[i * k + j];
            to[j * rows] = value;
        }
    }
}

/* y [M, N] = x W^T + bias: x [M, K] and y both fp32 or both bf16; bias [N] fp32 or NULL; `rows` is 1
 * or ROWS. scratch: fp32, (1.5 K + PARTS N) for each row of x, these rounded up to whole tiles. */
void qalora_multiply(const Layer *l, const void *x, const float *bias, void *y, int is_bf16,
                     int64_t m, int rows, float *scratch, int threads) {
    const int64_t k = l->in_features, n = l->out_features;
    const int64_t tiles = (m + rows - 1) / rows, size = tiles * rows * n;
    const int64_t columns = block_columns(n, (threads + PARTS - 1) / PARTS);
    float *const xs = scratch, *const sums = xs + tiles * rows * k;
    uint32_t *pairs = (uint32_t *)(sums + PARTS * size);
    arrange(x, is_bf16, m, k, rows, xs);
    if (!is_bf16 || (l->bits != 2 && l->bits != 4)) pairs = NULL;
    for (int64_t t = 0; pairs && t < tiles; t++)
        make_pairs(xs + t * k * rows, k, l->bits, rows, pairs + t * (k / 2) * rows);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static) collapse(2)
        for (int64_t p = 0; p < PARTS; p++)
            for (int64_t c = 0; c < n; c += columns)
                multiply_part(l, xs, pairs, sums + p * size, tiles, rows, p, c,
                              c + columns < n ? c + columns : n);
#pragma omp for schedule(static) collapse(2)
        for (int64_t i = 0; i < m; i++)
            for (int64_t c = 0; c < n; c += LANES) {
                const int64_t count = n - c < LANES ? n - c : LANES;
                vf sum = bias ? load_f(bias + c, count) : (vf){0};
                for (int64_t p = 0; p < PARTS; p++)
                    sum += load_f(sums + p * size + i * n + c, count);
                store_x(y, is_bf16, i * n + c, sum, count);
            }
    }
}
