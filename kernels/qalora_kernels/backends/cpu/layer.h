/* A packed layer, and its codes as vectors.
 *
 * Written with the vector extensions of gcc and clang, so one source serves AVX-512, AVX2 and
 * NEON. Lanes run along n, which is contiguous in every tensor of the GPTQ layout: unpacking needs
 * no shuffles, and no layout of our own is prepared.
 */
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define STREAM 32 /* inputs in one bit stream of `bits` words */
#define TILE 4    /* vectors of columns that share what is loaded for an input */
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));

typedef struct {
    const int32_t *qweight; /* [ceil(K/32)*bits, N] */
    const void *scales;     /* [G, N], fp16 or fp32 */
    const void *offsets;    /* [G, N], fp16 or fp32 */
    const int32_t *g_idx;   /* [K] or NULL */
    int64_t bits, group_size, in_features, out_features;
    int64_t scales_fp16, offsets_fp16;
} Layer;

/* Every bit width gets its own code, with shifts and masks as constants. */
#define BY_BITS(bits, call)                                                                        \
    switch (bits) {                                                                                \
        case 2: { enum { BITS = 2 }; call; break; }                                                \
        case 3: { enum { BITS = 3 }; call; break; }                                                \
        case 4: { enum { BITS = 4 }; call; break; }                                                \
        default: { enum { BITS = 8 }; call; break; }                                               \
    }

/* The first `count` lanes, the rest zero; with a constant LANES one instruction. */
#define LOAD(name, vector, type)                                                                   \
    INLINE vector name(const type *p, int64_t count) {                                             \
        vector v = {0};                                                                            \
        memcpy(&v, p, (count < LANES ? count : LANES) * sizeof(type));                             \
        return v;                                                                                  \
    }
LOAD(load_f, vf, float)
LOAD(load_u, vu, int32_t)
LOAD(load_h, vh, uint16_t)
INLINE void store_f(float *p, vf v, int64_t count) {
    memcpy(p, &v, (count < LANES ? count : LANES) * sizeof(float));
}

/* Columns that a thread takes at a time: whole pages of each row, but enough blocks for all. */
#define COLUMNS 4096
INLINE int64_t block_columns(int64_t n, int threads) {
    const int64_t share = ((n + threads - 1) / threads + 63) / 64 * 64;
    return share < COLUMNS ? share : COLUMNS;
}

INLINE vf half_to_float(vh h) {
#ifdef __AVX512F__
    return (vf)_mm512_cvtph_ps((__m256i)h);
#else /* a product rebases the exponent, which makes subnormals normal: exact */
    const vu u = __builtin_convertvector(h, vu);
    const vf rebased = (vf)((u & 0x7fff) << 13) * 0x1p112f;
    const vu special = (vu)((u & 0x7c00) == 0x7c00) & 0x7f800000; /* infinity and NaN */
    return (vf)((vu)rebased | special | (u & 0x8000) << 16);
#endif
}

INLINE vf load_bf16(const uint16_t *p, int64_t count) {
    return (vf)(__builtin_convertvector(load_h(p, count), vu) << 16);
}

/* To nearest even; NaN stays NaN. */
INLINE void store_bf16(uint16_t *p, vf v, int64_t count) {
#ifdef __AVX512BF16__ /* takes subnormals, below 1.2e-38, for zero */
    const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
#else
    const vu u = (vu)v;
    const vu is_nan = (vu)(v != v);
    const vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const vh h = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0), vh);
#endif
    memcpy(p, &h, (count < LANES ? count : LANES) * sizeof(uint16_t));
}

/* Numbers of an activation or a result, fp32 or bf16, from index `at` on */
INLINE vf load_x(const void *p, const int is_bf16, int64_t at, int64_t count) {
    return is_bf16 ? load_bf16((const uint16_t *)p + at, count)
                   : load_f((const float *)p + at, count);
}
INLINE void store_x(void *p, const int is_bf16, int64_t at, vf v, int64_t count) {
    if (is_bf16) store_bf16((uint16_t *)p + at, v, count);
    else store_f((float *)p + at, v, count);
}

/* LANES scales or offsets from index `at` on */
INLINE vf load_grid(const void *p, int64_t fp16, int64_t at, int64_t count) {
    return fp16 ? half_to_float(load_h((const uint16_t *)p + at, count))
                : load_f((const float *)p + at, count);
}

INLINE int64_t group_of(const Layer *l, int64_t k) {
    return l->g_idx ? l->g_idx[k] : k / l->group_size;
}

/* q - 2^(bits-1) of input i (0..31) of the stream whose words start at `words` */
INLINE vf centred_code(const int32_t *words, int64_t n, int64_t i, const int bits, int64_t count) {
    const int64_t word = i * bits / 32;
    const int shift = i * bits % 32;
    vu q = load_u(words + word * n, count) >> shift;
    if (shift + bits > 32) q |= load_u(words + (word + 1) * n, count) << (32 - shift);
#ifdef __AVX512F__
    if (bits <= 4) { /* a table look-up, which sees the low 4 bits only, masks and converts */
        vf table;
        for (int j = 0; j < LANES; j++) table[j] = (j & ((1 << bits) - 1)) - (1 << (bits - 1));
        return (vf)_mm512_permutexvar_ps((__m512i)q, (__m512)table);
    }
#endif
    return __builtin_convertvector((vi)(q & ((1u << bits) - 1)) - (1 << (bits - 1)), vf);
}
