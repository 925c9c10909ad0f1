/* Packing: codes of 4 bits in another order become streams of `qweight`. */
#include <stdint.h>
#include <string.h>

#define ROWS 16 /* whole cache lines of each row of `out` */

/* The low halves of eight bytes, side by side. */
static inline int32_t low_halves(uint64_t x) {
    x &= 0x0F0F0F0F0F0F0F0Full;
    x = (x | x >> 4) & 0x00FF00FF00FF00FFull;
    x = (x | x >> 8) & 0x0000FFFF0000FFFFull;
    return (int32_t)(uint32_t)(x | x >> 16);
}

/* out [4*streams, ld], columns [0, rows): of each stream of 16 bytes byte i holds the codes of
 * inputs i (low half) and i + 16. `row` and `stream`: bytes from one to the next. */
void qalora_pack_halves(const uint8_t *halves, int64_t row, int64_t stream, int64_t rows,
                        int64_t streams, int32_t *out, int64_t ld, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < rows; first += ROWS) {
        const int64_t end = first + ROWS < rows ? first + ROWS : rows;
        for (int64_t s = 0; s < streams; s++) {
            int32_t *words = out + 4 * s * ld;
            for (int64_t r = first; r < end; r++) {
                uint64_t x[2];
                memcpy(x, halves + r * row + s * stream, sizeof x);
                words[r] = low_halves(x[0]);
                words[ld + r] = low_halves(x[1]);
                words[2 * ld + r] = low_halves(x[0] >> 4);
                words[3 * ld + r] = low_halves(x[1] >> 4);
            }
        }
    }
}
