/* Operators of training: dequantize, and the gradient of the scales' change.
 * Compiled with -ffp-contract=off: dequantizing rounds in fp32 after the product and after the sum,
 * as the plain PyTorch code does, so that both give the same bits. */
#include "layer.h"

INLINE vf load_bf16(const uint16_t *p, int64_t count) {
    return (vf)(__builtin_convertvector(load_h(p, count), vu) << 16);
}

/* To nearest even; NaN stays NaN. */
INLINE void store_bf16(uint16_t *p, vf v, int64_t count) {
    const vu u = (vu)v;
    const vu is_nan = (vu)(v != v);
    const vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const vh h = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0), vh);
    memcpy(p, &h, (count < LANES ? count : LANES) * sizeof(uint16_t));
}

/* W of input i of a stream, LANES columns; `at`: where their scales and offsets are */
INLINE vf weight(const Layer *l, const int32_t *words, int64_t at, int64_t i, const int bits,
                 int64_t count) {
    const vf scale = load_grid(l->scales, l->scales_fp16, at, count);
    const vf offset = load_grid(l->offsets, l->offsets_fp16, at, count);
    return centred_code(words, l->out_features, i, bits, count) * scale + offset;
}

/* `body` for each LANES columns of [from, to), with the number of them as a constant but at the end */
#define FOR_COLUMNS(c, from, to, body)                                                             \
    {                                                                                              \
        int64_t c = from;                                                                          \
        for (; c + LANES <= to; c += LANES) { const int64_t count = LANES; body }                  \
        if (c < to) { const int64_t count = to - c; body }                                         \
    }

/* ---- out [K, N] = W^T, fp32 or bf16 */
INLINE void dequantize_stream(const Layer *l, const int bits, const int as_bf16, void *out,
                              int64_t stream) {
    const int64_t n = l->out_features, first = stream * STREAM;
    const int32_t *words = l->qweight + stream * bits * n;
    for (int64_t i = 0; i < STREAM && first + i < l->in_features; i++) {
        const int64_t group = group_of(l, first + i) * n, row = (first + i) * n;
        FOR_COLUMNS(c, 0, n, {
            const vf w = weight(l, words + c, group + c, i, bits, count);
            if (as_bf16) store_bf16((uint16_t *)out + row + c, w, count);
            else store_f((float *)out + row + c, w, count);
        })
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
INLINE void group_grad_block(const Layer *l, const int bits, const int is_bf16,
                             const void *product, float *out, int64_t from, int64_t to) {
    const int64_t n = l->out_features;
    for (int64_t k = 0; k < l->in_features; k++) {
        const int32_t *words = l->qweight + k / STREAM * bits * n;
        const int64_t group = group_of(l, k) * n;
        FOR_COLUMNS(c, from, to, {
            const int64_t at = group + c;
            const vf w = weight(l, words + c, at, k % STREAM, bits, count);
            const vf p = is_bf16 ? load_bf16((const uint16_t *)product + k * n + c, count)
                                 : load_f((const float *)product + k * n + c, count);
            store_f(out + at, load_f(out + at, count) + w * p, count);
        })
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
