/* gated_topk on a CPU: the arithmetic, and below it the kernel that torch's dispatcher calls.
 *
 * The specification is gated_topk_reference, met bit for bit: compile without contraction (-ffp-contract=off) and without
 * any fast-math flag. The exponential is that of exponential.py.
 */
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define MAX_EXPERTS 512
#define MAX_UNITS 64
#define LANES 8 /* every array is padded to a multiple, with experts that no gate allows */
#define SCALE 4294967296.0
/* Adding 1.5 * 2^52 leaves no fraction bits: the processor's rounding, half to even, does the rest. */
#define ROUND 6755399441055744.0
#define FILL_FIRST -2
#define CELLS_PER_THREAD 16384 /* logits that one thread routes before another is worth waking */

/* One function, compiled for each width of vectors and chosen when it is loaded. The bits are the same. */
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define EVERY_WIDTH __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EVERY_WIDTH
#endif

/* Strides are in elements; mass, chosen, weights and ids are contiguous, bias may be NULL. */
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
    double x = d;
    x = x < -104.0 ? -104.0 : x;
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
    uint64_t sum = 0; /* of no meaning beside a NaN */
    int corrupt = 0;

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

    for (int64_t e = 0; e < padded; e++) key[e] = exponential(prob[e] - max);
    for (int64_t e = 0; e < padded; e++) prob[e] = open & bit[e] ? key[e] : 0.0f;
    for (int64_t e = 0; e < padded; e++) {
        sum += (uint64_t)(bits_of((double)prob[e] * SCALE + ROUND) - bits_of(ROUND));
        corrupt |= prob[e] != prob[e];
    }
    float divisor = corrupt ? NAN : (float)(int64_t)sum * (float)(1 / SCALE);
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

/* Rows begin to end - 1; rows do not know of each other. */
EVERY_WIDTH static void route(const Routing *r, int64_t begin, int64_t end) {
    uint64_t bit[MAX_EXPERTS];
    float prob[MAX_EXPERTS], key[MAX_EXPERTS];
    int64_t padded = (r->experts + LANES - 1) / LANES * LANES;
    for (int64_t e = 0; e < padded; e++) {
        uint8_t unit = e < r->experts ? r->unit[e * r->unit_step] : UINT8_MAX;
        bit[e] = unit < r->units ? (uint64_t)1 << unit : 0;
    }
    for (int64_t t = begin; t < end; t++) {
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

/* The operator: libtorch's stable C interface, whose functions come by address, so that nothing is linked and neither
 * torch's headers nor a C++ compiler are needed. Names and types: torch/csrc/inductor/aoti_torch/c/shim.h. */
typedef uint64_t Value; /* an entry of the dispatcher's stack */
typedef void *Handle;   /* a tensor; whoever takes one off the stack owns it */

enum { UINT8 = 0, INT32 = 3, INT64 = 4, FLOAT32 = 6 }; /* c10::ScalarType */
enum { CPU = 0 };                                      /* c10::DeviceType */

static struct {
    int (*library_init_impl)(const char *space, const char *key, const char *file, uint32_t line, void **library);
    int (*library_impl)(void *library, const char *name, void (*kernel)(Value *, uint64_t, uint64_t));
    int (*get_data_ptr)(Handle, void **data);
    int (*get_dim)(Handle, int64_t *dim);
    int (*get_sizes)(Handle, int64_t **sizes);
    int (*get_strides)(Handle, int64_t **strides);
    int (*get_dtype)(Handle, int32_t *dtype);
    int (*empty_strided)(int64_t dim, const int64_t *sizes, const int64_t *strides, int32_t dtype, int32_t device_type,
                         int32_t device_index, Handle *made);
    int (*delete_tensor)(Handle);
    int (*parallel_for)(int64_t begin, int64_t end, int64_t grain, void (*rows)(int64_t, int64_t, void *), void *with);
    void (*check)(bool holds, const char *function, const char *file, uint32_t line, const char *message); /* throws */
    void (*operator_delete)(void *);
} torch;

typedef struct {
    void *data;
    int64_t dim, *sizes, *strides;
    bool known; /* of the wanted dtype and number of dimensions */
} View;

static View view(Handle tensor, int32_t dtype, int64_t dim) {
    View v = {0};
    int32_t found = -1;
    bool failed = torch.get_data_ptr(tensor, &v.data) || torch.get_dim(tensor, &v.dim) ||
                  torch.get_sizes(tensor, &v.sizes) || torch.get_strides(tensor, &v.strides) ||
                  torch.get_dtype(tensor, &found);
    v.known = !failed && found == dtype && v.dim == dim;
    return v;
}

static bool row_of(const View *v, int64_t length) { return v->known && v->sizes[0] == length; }

/* What is wrong with the operands, or NULL; the same limits as contract.py, which names them better. */
static const char *fault(const View *logits, const View *gate, const View *unit, const View *bias, const View *mass,
                         const View *chosen, int64_t top_k, int64_t fill) {
    if (!logits->known || logits->sizes[1] < 1 || logits->sizes[1] > MAX_EXPERTS)
        return "router_logits_TE must be float32 [T, E] with E in 1..512";
    int64_t tokens = logits->sizes[0], experts = logits->sizes[1];
    if (!row_of(gate, tokens)) return "gate_T must be int64 [T]";
    if (!row_of(unit, experts)) return "unit_E must be uint8 [E]";
    if (bias && !row_of(bias, experts)) return "bias_E must be float32 [E]";
    if (!mass->known || mass->sizes[0] < tokens || mass->sizes[1] < 1 || mass->sizes[1] > MAX_UNITS)
        return "mass_TU must be int64 [>=T, U] with U in 1..64";
    if (!chosen->known || chosen->sizes[0] < tokens) return "chosen_T must be int64 [>=T]";
    if ((mass->sizes[1] > 1 && mass->strides[1] != 1) || (mass->sizes[0] > 1 && mass->strides[0] != mass->sizes[1]) ||
        (chosen->sizes[0] > 1 && chosen->strides[0] != 1))
        return "mass_TU and chosen_T must be contiguous";
    if (top_k < 1) return "top_k must be at least 1";
    if (fill < FILL_FIRST || fill >= experts) return "fill must be an expert, -1 or -2";
    return NULL;
}

static void rows(int64_t begin, int64_t end, void *routing) { route(routing, begin, end); }

static bool allocate(int64_t tokens, int64_t top_k, int32_t dtype, Handle *made) {
    int64_t sizes[] = {tokens, top_k}, strides[] = {top_k, 1};
    return torch.empty_strided(2, sizes, strides, dtype, CPU, -1, made) == 0;
}

/* (router_logits_TE, gate_T, unit_E, bias_E?, mass_TU, chosen_T, top_k, renormalize, fill) -> (weights_TK, ids_TK) */
static void gated_topk(Value *stack, uint64_t arguments, uint64_t results) {
    (void)arguments, (void)results;
    enum { LOGITS, GATE, UNIT, BIAS, MASS, CHOSEN, TOP_K, RENORMALIZE, FILL };
    Value *optional = (Value *)stack[BIAS]; /* NULL, or a cell on the heap, ours to free, that holds the tensor */
    Handle owned[] = {(Handle)stack[LOGITS], (Handle)stack[GATE],   (Handle)stack[UNIT],
                      (Handle)stack[MASS],   (Handle)stack[CHOSEN], optional ? (Handle)*optional : NULL};
    View logits = view(owned[0], FLOAT32, 2), gate = view(owned[1], INT64, 1), unit = view(owned[2], UINT8, 1);
    View mass = view(owned[3], INT64, 2), chosen = view(owned[4], INT64, 1), bias = {0};
    if (optional) bias = view(owned[5], FLOAT32, 1);
    int64_t top_k = (int64_t)stack[TOP_K], fill = (int64_t)stack[FILL];

    Handle weights = NULL, ids = NULL;
    const char *wrong = fault(&logits, &gate, &unit, optional ? &bias : NULL, &mass, &chosen, top_k, fill);
    if (!wrong && !(allocate(logits.sizes[0], top_k, FLOAT32, &weights) && allocate(logits.sizes[0], top_k, INT32, &ids)))
        wrong = "out of memory";
    if (!wrong) {
        Routing routing = {
            logits.data, logits.strides[0], logits.strides[1], gate.data, gate.strides[0], unit.data, unit.strides[0],
            bias.data, optional ? bias.strides[0] : 0, mass.data, chosen.data, view(weights, FLOAT32, 2).data,
            view(ids, INT32, 2).data, logits.sizes[0], logits.sizes[1], mass.sizes[1], top_k, stack[RENORMALIZE] & 1, fill,
        };
        if (routing.tokens * routing.experts <= CELLS_PER_THREAD)
            route(&routing, 0, routing.tokens);
        else
            torch.parallel_for(0, routing.tokens, CELLS_PER_THREAD / routing.experts, rows, &routing);
    }
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++)
        if (owned[i]) torch.delete_tensor(owned[i]);
    if (optional) torch.operator_delete(optional);
    if (wrong) {
        if (weights) torch.delete_tensor(weights);
        torch.check(false, "gated_topk", __FILE__, __LINE__, wrong);
    }
    stack[0] = (Value)weights;
    stack[1] = (Value)ids;
}

/* Make `gated_topk` the CPU kernel of flexgate::`name`; 0 if that worked. `functions` are those of `torch`, in order. */
int flexgate_register(const void *const *functions, const char *name) {
    void *library; /* kept for as long as the process lives */
    memcpy(&torch, functions, sizeof torch);
    return torch.library_init_impl("flexgate", "CPU", __FILE__, __LINE__, &library) ||
           torch.library_impl(library, name, gated_topk);
}
