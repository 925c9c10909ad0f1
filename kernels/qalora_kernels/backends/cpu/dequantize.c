/* Operators of training: dequantize, and the gradient of the scales' change.
 * Compiled with -ffp-contract=off: dequantizing rounds in fp32 after the product and after the sum,
 * as the plain PyTorch code does, so that both give the same bits. */
#include "layer.h"

/* ---- out [K, N] = W^T, fp32 or bf16 */

/* Inputs [i, end) of one stream, all of one group; `vectors` vectors of columns, the last `count`
 * long. `out` and `at`: where W^T of input i and the group's grid have the first column */
INLINE void dequantize_tile(const Layer *l, const int32_t *words, const int bits, int64_t i,
                            int64_t end, const int vectors, int64_t count, int64_t at,
                            const int as_bf16, void *out, int64_t row) {
    const int64_t n = l->out_features;
    vf scale[TILE], offset[TILE];
#pragma GCC unroll 8 /* 32 takes 12 s to compile and is no faster */
    for (int v = 0; v < vectors; v++) {
        scale[v] = load_grid(l->scales, l->scales_fp16, at + v * LANES, count);
        offset[v] = load_grid(l->offsets, l->offsets_fp16, at + v * LANES, count);
    }
#pragma GCC unroll 8
    for (; i < end; i++, row += n) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            const vf q = centred_code(words + v * LANES, n, i, bits, count);
            const vf w = q * scale[v] + offset[v];
            store_x(out, as_bf16, row + v * LANES, w, count);
        }
    }
}

INLINE void dequantize_stream(const Layer *l, const int bits, const int as_bf16, void *out,
                              int64_t stream) {
    const int64_t n = l->out_features, first = stream * STREAM;
    const int32_t *words = l->qweight + stream * bits * n;
    for (int64_t i = 0, end; i < STREAM && first + i < l->in_features; i = end) {
        const int64_t group = group_of(l, first + i);
        for (end = i + 1; end < STREAM && first + end < l->in_features &&
                          group_of(l, first + end) == group;) end++;
        const int64_t at = group * n, row = (first + i) * n;
        int64_t c = 0;
        if (end - i == STREAM) /* the common case gets its shifts as constants */
            for (; c + TILE * LANES <= n; c += TILE * LANES)
                dequantize_tile(l, words + c, bits, 0, STREAM, TILE, LANES, at + c, as_bf16, out,
                                row + c);
        for (; c + LANES <= n; c += LANES)
            dequantize_tile(l, words + c, bits, i, end, 1, LANES, at + c, as_bf16, out, row + c);
        if (c < n)
            dequantize_tile(l, words + c, bits, i, end, 1, n - c, at + c, as_bf16, out, row + c);
    }
}

void qalora_dequantize(const Layer *l, void *out, int as_bf16, int threads) {
    const int64_t streams = (l->in_features + STREAM - 1) / STREAM;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t s = 0; s < streams; s++) {
        if (as_bf16) { BY_BITS(l->bits, dequantize_stream(l, BITS, 1, out, s)) }
        else { BY_BITS(l->bits, dequantize_stream(l, BITS, 0, out, s)) }
    }
}

/* ---- out [G, N] = sums over each group of (x^T dy) [K, N] * W^T; out comes zeroed */
INLINE void group_grad_lanes(const Layer *l, const int bits, const int is_bf16, const void *product,
                             float *out, int64_t k, int64_t c, int64_t count) {
    const int64_t n = l->out_features, at = group_of(l, k) * n + c;
    const vf scale = load_grid(l->scales, l->scales_fp16, at, count);
    const vf offset = load_grid(l->offsets, l->offsets_fp16, at, count);
    const int32_t *words = l->qweight + k / STREAM * bits * n + c;
    const vf w = centred_code(words, n, k % STREAM, bits, count) * scale + offset;
    const vf p = load_x(product, is_bf16, k * n + c, count);
    store_f(out + at, load_f(out + at, count) + w * p, count);
}

INLINE void group_grad_block(const Layer *l, const int bits, const int is_bf16,
                             const void *product, float *out, int64_t from, int64_t to) {
    for (int64_t k = 0; k < l->in_features; k++) {
        int64_t c = from;
        for (; c + LANES <= to; c += LANES)
            group_grad_lanes(l, bits, is_bf16, product, out, k, c, LANES);
        if (c < to) group_grad_lanes(l, bits, is_bf16, product, out, k, c, to - c);
    }
}

void qalora_group_grad(const Layer *l, const void *product, float *out, int is_bf16, int threads) {
    const int64_t n = l->out_features, columns = block_columns(n, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t c = 0; c < n; c += columns) {
        const int64_t to = c + columns < n ? c + columns : n;
        if (is_bf16) { BY_BITS(l->bits, group_grad_block(l, BITS, 1, product, out, c, to)) }
        else { BY_BITS(l->bits, group_grad_block(l, BITS, 0, product, out, c, to)) }
    }
}
