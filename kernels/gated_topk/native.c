/* gated_topk on a CPU. The specification is gated_topk_reference, met bit for bit: compile without contraction
 * (-ffp-contract=off) and without any fast-math flag. The exponential is that of exponential.py.
 *
 * logits: fp32 [tokens, experts] with strides in elements; gate: int64 [tokens]; unit: uint8 [experts]; bias: fp32
 * [experts] or NULL; mass: int64 [tokens, units], chosen: int64 [tokens]; weights: fp32 [tokens, top_k], ids: int32
 * [tokens, top_k], the last four contiguous. At most 512 experts and 64 units.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define MAX_EXPERTS 512
#define LANES 8 /* every array is padded to a multiple, with experts that no gate allows */
#define SCALE 4294967296.0
/* Adding 1.5 * 2^52 leaves no fraction bits: the processor's rounding, half to even, does the rest. */
#define ROUND 6755399441055744.0
#define FILL_FIRST -2

/* One function, compiled for each width of vectors and chosen when it is loaded. The bits are the same. */
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define EVERY_WIDTH __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EVERY_WIDTH
#endif

typedef struct {
    const float *logits;
    int64_t logits_row, logits_column;
    const int64_t *gate;
    int64_t gate_step;
    const uint8_t *unit;
    int64_t unit_step;
    const float *bias;
    int64_t bias_step;
    int64_t *mass, *chosen;
    float *weights;
    int32_t *ids;
    int64_t tokens, experts, units, top_k, renormalize, fill;
} Routing;

static inline int64_t bits_of(double value) {
    int64_t bits;
    memcpy(&bits, &value, 8);
    return bits;
}

/* exp(d) for d <= 0; a NaN stays one. */
static inline float exponential(float d) {
    double x = d < -104.0f ? -104.0 : (double)d;
    double rounded = x * 1.4426950408889634 + ROUND;
    double n = rounded - ROUND;
    double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
    double p = 1.0 / 39916800;
    p = p * r + 1.0 / 3628800;
    p = p * r + 1.0 / 362880;
    p = p * r + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    /* The low bits of `rounded` are n in two's complement. */
    uint64_t exponent = ((uint64_t)bits_of(rounded) + 1023) << 52;
    double power;
    memcpy(&power, &exponent, 8);
    return (float)(p * power);
}

/* prob[e] where the unit of e is open, key[e] its rank's key: prob, 0 for NaN, -1 where not allowed. */
static inline void probabilities(const Routing *r, int64_t t, const uint64_t *bit, int64_t padded, float *prob,
                                 float *key) {
    const float *logits = r->logits + t * r->logits_row;
    uint64_t open = (uint64_t)r->gate[t * r->gate_step];
    float greatest[LANES], max = -INFINITY;
    int64_t sum = 0, corrupt = 0;

    for (int64_t e = 0; e < r->experts; e++)
        prob[e] = r->bias ? logits[e * r->logits_column] + r->bias[e * r->bias_step] : logits[e * r->logits_column];
    for (int64_t e = r->experts; e < padded; e++) prob[e] = -INFINITY;
    /* Selected, never multiplied or added: what an excluded expert holds may be NaN. */
    for (int64_t e = 0; e < padded; e++) prob[e] = open & bit[e] ? prob[e] : -INFINITY;

    for (int64_t lane = 0; lane < LANES; lane++) greatest[lane] = -INFINITY;
    for (int64_t e = 0; e < padded; e += LANES)
        for (int64_t lane = 0; lane < LANES; lane++)
            greatest[lane] = prob[e + lane] > greatest[lane] ? prob[e + lane] : greatest[lane];
    for (int64_t lane = 0; lane < LANES; lane++) max = greatest[lane] > max ? greatest[lane] : max;

    for (int64_t e = 0; e < padded; e++) {
        float x = exponential(prob[e] - max);
        prob[e] = open & bit[e] ? x : 0.0f;
    }
    for (int64_t e = 0; e < padded; e++) {
        int64_t fixed = bits_of((double)prob[e] * SCALE + ROUND) - bits_of(ROUND);
        sum += prob[e] == prob[e] ? fixed : 0;
        corrupt |= prob[e] != prob[e];
    }
    float divisor = corrupt ? NAN : (float)sum * (float)(1 / SCALE);
    for (int64_t e = 0; e < padded; e++) {
        prob[e] = prob[e] / divisor;
        key[e] = open & bit[e] ? (prob[e] == prob[e] ? prob[e] : 0.0f) : -1.0f;
    }
}

/* The ids of the greatest keys that are not negative, in order; of equal ones the lowest. Returns how many. */
static inline int64_t pick(const float *key, int64_t experts, int64_t top_k, int32_t *ids) {
    int64_t picks = 0;
    float least = -1.0f; /* what a key has to exceed */
    for (int64_t e = 0; e < experts; e++) {
        if (!(key[e] > least)) continue;
        int64_t place = picks < top_k ? picks++ : top_k - 1;
        for (; place > 0 && key[ids[place - 1]] < key[e]; place--) ids[place] = ids[place - 1];
        ids[place] = (int32_t)e;
        if (picks == top_k) least = key[ids[top_k - 1]];
    }
    return picks;
}

EVERY_WIDTH void flexgate_gated_topk(const Routing *r) {
    uint64_t bit[MAX_EXPERTS];
    float prob[MAX_EXPERTS], key[MAX_EXPERTS];
    int64_t padded = (r->experts + LANES - 1) / LANES * LANES;
    for (int64_t e = 0; e < padded; e++) {
        uint8_t unit = e < r->experts ? r->unit[e * r->unit_step] : UINT8_MAX;
        bit[e] = unit < r->units ? (uint64_t)1 << unit : 0;
    }
    for (int64_t t = 0; t < r->tokens; t++) {
        int64_t *mass = r->mass + t * r->units;
        float *weights = r->weights + t * r->top_k;
        int32_t *ids = r->ids + t * r->top_k;
        probabilities(r, t, bit, padded, prob, key);
        int64_t picks = pick(key, r->experts, r->top_k, ids);

        float total = 0;
        for (int64_t k = 0; k < picks; k++) {
            weights[k] = prob[ids[k]];
            total += weights[k];
        }
        for (int64_t k = 0; k < picks; k++) {
            uint8_t unit = r->unit[ids[k] * r->unit_step];
            if (r->renormalize) weights[k] /= total;
            if (weights[k] == weights[k]) mass[unit] += (int64_t)((double)weights[k] * SCALE + ROUND - ROUND);
            r->chosen[t] |= (int64_t)((uint64_t)1 << unit);
        }
        int32_t filler = (int32_t)(r->fill != FILL_FIRST ? r->fill : picks ? ids[0] : 0);
        for (int64_t k = picks; k < r->top_k; k++) weights[k] = 0, ids[k] = filler;
    }
}
