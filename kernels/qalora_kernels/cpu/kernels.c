/* INT-n operators for CPUs, written with the vector extensions of gcc and clang: one source for
 * AVX2, AVX-512 and NEON. Compiled on first use by build.py; the wrappers are in __init__.py.
 *
 * W[n, k] = scales[g, n] * (q[n, k] - 2^(bits-1)) + offsets[g, n]. Lanes run along n, which is
 * contiguous in every tensor of the GPTQ layout, so unpacking needs no shuffles.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
#define STREAM 32 /* inputs in one bit stream of `bits` words */
#define COLUMNS 512 /* columns that a thread takes at a time: their sums stay in the L1 cache */
#define VECTORS 4 /* vectors of columns that share the loads of x */
#define ROWS 4 /* rows of x that share the unpacking of a weight */

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));

typedef struct {
    const int32_t *qweight; /* [ceil(K/32)*bits, N] */
    const float *scales;    /* [G, N] */
    const float *offsets;   /* [G, N] */
    const int32_t *g_idx;   /* [K] or NULL */
    int64_t bits, group_size, in_features, out_features;
} Layer;

/* Every bit width gets its own code, with shifts and masks as constants. */
#define BY_BITS(bits, call)                                                                        \
    switch (bits) {                                                                                \
        case 2: { enum { BITS = 2 }; call; break; }                                                \
        case 3: { enum { BITS = 3 }; call; break; }                                                \
        case 4: { enum { BITS = 4 }; call; break; }                                                \
        default: { enum { BITS = 8 }; call; break; }                                               \
    }
#define INLINE static inline __attribute__((always_inline))

/* `count` lanes (the rest zero); a full load is one instruction */
INLINE vf load_f(const float *p, int64_t count) {
    vf v = {0};
    if (count >= LANES) memcpy(&v, p, sizeof v);
    else memcpy(&v, p, count * sizeof(float));
    return v;
}
INLINE vu load_u(const int32_t *p, int64_t count) {
    vu v = {0};
    if (count >= LANES) memcpy(&v, p, sizeof v);
    else memcpy(&v, p, count * sizeof(int32_t));
    return v;
}
INLINE void store_f(float *p, vf v, int64_t count) {
    if (count >= LANES) memcpy(p, &v, sizeof v);
    else memcpy(p, &v, count * sizeof(float));
}

/* to bfloat16, to nearest even; NaN stays NaN */
INLINE void store_bf16(uint16_t *p, vf v, int64_t count) {
    vu u = (vu)v;
    vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    vi is_nan = v != v;
    vh h = __builtin_convertvector((rounded & (vu)~is_nan) | ((vu)is_nan & 0x7fc0), vh);
    if (count >= LANES) memcpy(p, &h, sizeof h);
    else memcpy(p, &h, count * sizeof(uint16_t));
}

/* q - 2^(bits-1) of input `i` (0..31) of the stream whose words start at `words`, LANES columns */
INLINE vf centred_code(const int32_t *words, int64_t n, int64_t i, const int bits, int64_t count) {
    const int64_t word = i * bits / 32;
    const int shift = i * bits % 32;
    vu q = load_u(words + word * n, count) >> shift;
    if (shift + bits > 32) q |= load_u(words + (word + 1) * n, count) << (32 - shift);
#ifdef __AVX512F__
    if (bits <= 4) { /* one table look-up, which sees the low 4 bits only, masks and converts */
        vf table;
        for (int j = 0; j < LANES; j++) table[j] = (j & ((1 << bits) - 1)) - (1 << (bits - 1));
        return (vf)_mm512_permutexvar_ps((__m512i)q, (__m512)table);
    }
#endif
    return __builtin_convertvector((vi)(q & ((1u << bits) - 1)) - (1 << (bits - 1)), vf);
}

INLINE int64_t group_of(const Layer *l, int64_t k) {
    return l->g_idx ? l->g_idx[k] : k / l->group_size;
}

/* ---- dequantize: out [K, N], fp32 or bf16. Two roundings in fp32 as in the plain PyTorch code,
 * no fused multiply-add, so that both give the same bits. */
INLINE void dequantize_rows(const Layer *l, const int bits, int as_bf16, void *out, int64_t stream) {
    const int64_t n = l->out_features, first = stream * STREAM;
    const int32_t *words = l->qweight + stream * bits * n;
    const int64_t rows = l->in_features - first < STREAM ? l->in_features - first : STREAM;
    for (int64_t i = 0; i < rows; i++) {
        const int64_t group = group_of(l, first + i) * n;
        for (int64_t c = 0; c < n; c += LANES) {
            const int64_t count = n - c;
            vf w = centred_code(words + c, n, i, bits, count);
            w = w * load_f(l->scales + group + c, count);
            w = w + load_f(l->offsets + group + c, count);
            if (as_bf16) store_bf16((uint16_t *)out + (first + i) * n + c, w, count);
            else store_f((float *)out + (first + i) * n + c, w, count);
        }
    }
}

void qalora_dequantize(const Layer *l, void *out, int as_bf16, int threads) {
    const int64_t streams = (l->in_features + STREAM - 1) / STREAM;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t s = 0; s < streams; s++) {
        if (as_bf16) { BY_BITS(l->bits, dequantize_rows(l, BITS, 1, out, s)) }
        else { BY_BITS(l->bits, dequantize_rows(l, BITS, 0, out, s)) }
    }
}

/* ---- multiply: y = x W^T for a few rows of x, the weights unpacked in registers.
 * y = sum_g scales[g] * (x . (q - mid))_g + offsets[g] * (sum of x)_g, all in fp32. */

/* inputs [k, end) of one group and one stream, `vectors` * LANES columns; the last vector holds
 * `count`. sums [rows][COLUMNS] += */
INLINE void multiply_tile(const Layer *l, const int bits, const int rows, const int vectors,
                          const float *x, const float *pooled, int64_t k, int64_t end,
                          int64_t group, int64_t column, int64_t count, float *sums) {
    const int64_t n = l->out_features;
    const int32_t *words = l->qweight + k / STREAM * bits * n + column;
    vf dot[ROWS][VECTORS] = {0};
#define STEP(i)                                                                                    \
    for (int v = 0; v < vectors; v++) {                                                            \
        const vf q = centred_code(words + v * LANES, n, i, bits, count);                           \
        for (int r = 0; r < rows; r++) dot[r][v] += q * x[(k - k % STREAM + (i)) * rows + r];      \
    }
    if (end - k == STREAM) {
#pragma GCC unroll 32
        for (int i = 0; i < STREAM; i++) { STEP(i) }
    } else {
        for (int64_t i = k % STREAM; i < k % STREAM + end - k; i++) { STEP(i) }
    }
    for (int v = 0; v < vectors; v++) {
        const vf scale = load_f(l->scales + group * n + column + v * LANES, count);
        const vf offset = load_f(l->offsets + group * n + column + v * LANES, count);
        for (int r = 0; r < rows; r++) {
            float *sum = sums + r * COLUMNS + v * LANES;
            store_f(sum, load_f(sum, LANES) + scale * dot[r][v] + offset * pooled[r], LANES);
        }
    }
}

INLINE void multiply_block(const Layer *l, const int bits, const int rows, const float *x, float *y,
                           int64_t from, int64_t to) {
    float sums[ROWS * COLUMNS] = {0};
    for (int64_t k = 0, end; k < l->in_features; k = end) {
        const int64_t group = group_of(l, k), stream = k / STREAM;
        float pooled[ROWS] = {0};
        for (end = k; end < l->in_features && end / STREAM == stream && group_of(l, end) == group;
             end++)
            for (int r = 0; r < rows; r++) pooled[r] += x[end * rows + r];
        int64_t c = from;
        for (; c + VECTORS * LANES <= to; c += VECTORS * LANES)
            multiply_tile(l, bits, rows, VECTORS, x, pooled, k, end, group, c, LANES,
                          sums + (c - from));
        for (; c < to; c += LANES)
            multiply_tile(l, bits, rows, 1, x, pooled, k, end, group, c, to - c, sums + (c - from));
    }
    for (int r = 0; r < rows; r++)
        memcpy(y + r * l->out_features + from, sums + r * COLUMNS, (to - from) * sizeof(float));
}

/* x [tiles, K, rows], y [tiles * rows, N]; rows is 1 or ROWS */
void qalora_multiply(const Layer *l, const float *x, float *y, int64_t tiles, int rows,
                     int threads) {
    const int64_t n = l->out_features, blocks = (n + COLUMNS - 1) / COLUMNS;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(dynamic)
    for (int64_t b = 0; b < blocks; b++) {
        for (int64_t t = 0; t < tiles; t++) {
            const int64_t from = b * COLUMNS, to = from + COLUMNS < n ? from + COLUMNS : n;
            const float *xt = x + t * l->in_features * rows;
            float *yt = y + t * rows * n;
            if (rows == 1) { BY_BITS(l->bits, multiply_block(l, BITS, 1, xt, yt, from, to)) }
            else { BY_BITS(l->bits, multiply_block(l, BITS, ROWS, xt, yt, from, to)) }
        }
    }
}
