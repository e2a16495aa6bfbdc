/* The arithmetic of gated_topk on a CPU, on both sides of the exponential, which torch computes in between.
 *
 * A decode step routes a few tokens over fewer than ten slots; called through a tensor library, each of the twenty-odd
 * steps costs more than all of the arithmetic. The specification is gated_topk_reference, met bit for bit: compile
 * without contraction (-ffp-contract=off) and without any fast-math flag.
 *
 * logits, prob: fp32 [tokens, slots]; gate, chosen: int64 [tokens]; bias: fp32 [slots] or NULL;
 * mass: int64 [tokens, slots]; weights: fp32 [tokens, top_k]; ids: int32 [tokens, top_k]. All contiguous.
 */
#include <math.h>
#include <stdint.h>

#define MASS_SCALE 4294967296.0
/* Adding 1.5 * 2^52 leaves no fraction bits: the processor's rounding, half to even, does the rest. */
#define ROUND 6755399441055744.0
#define FILL_FIRST -2

static int allowed(int64_t gate, int64_t slot) { return (int)((uint64_t)gate >> slot & 1); }

/* prob[t, e] = logits[t, e] + bias[e] - max over the gate, -inf outside it. */
void flexgate_gated_shift(const float *logits, const int64_t *gate, const float *bias, float *prob, int64_t tokens,
                          int64_t slots) {
    for (int64_t t = 0; t < tokens; t++, logits += slots, prob += slots) {
        float max = -INFINITY;
        for (int64_t e = 0; e < slots; e++) {
            if (!allowed(gate[t], e)) continue;
            prob[e] = bias ? logits[e] + bias[e] : logits[e];
            if (prob[e] > max) max = prob[e];
        }
        for (int64_t e = 0; e < slots; e++) prob[e] = allowed(gate[t], e) ? prob[e] - max : -INFINITY;
    }
}

/* exp(shifted logits) -> probabilities (in place), picks, attribution. */
void flexgate_gated_pick(float *prob, const int64_t *gate, int64_t *mass, int64_t *chosen, float *weights, int32_t *ids,
                         int64_t tokens, int64_t slots, int64_t top_k, int64_t renormalize, int64_t fill) {
    for (int64_t t = 0; t < tokens; t++, prob += slots, mass += slots, weights += top_k, ids += top_k) {
        uint64_t left = (uint64_t)gate[t];
        if (slots < 64) left &= ((uint64_t)1 << slots) - 1;

        float sum = 0;
        for (int64_t e = 0; e < slots; e++)
            if (left >> e & 1) sum += prob[e];
        for (int64_t e = 0; e < slots; e++)
            if (left >> e & 1) prob[e] /= sum;

        int64_t picks = 0;
        float total = 0;
        for (; picks < top_k && left; picks++) {
            /* A NaN is greater than nothing: a corrupt token's picks are its lowest slots. */
            int64_t best = -1;
            for (int64_t e = 0; e < slots; e++)
                if (left >> e & 1 && (best < 0 || prob[e] > prob[best])) best = e;
            left &= ~((uint64_t)1 << best);
            ids[picks] = (int32_t)best;
            weights[picks] = prob[best];
            total += prob[best];
        }
        for (int64_t k = 0; k < picks; k++) {
            if (renormalize) weights[k] /= total;
            if (weights[k] == weights[k]) mass[ids[k]] += (int64_t)((double)weights[k] * MASS_SCALE + ROUND - ROUND);
            chosen[t] |= (int64_t)((uint64_t)1 << ids[k]);
        }
        int32_t filler = (int32_t)(fill != FILL_FIRST ? fill : picks ? ids[0] : 0);
        for (int64_t k = picks; k < top_k; k++) weights[k] = 0, ids[k] = filler;
    }
}
