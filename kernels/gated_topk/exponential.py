"""The exponential of `gated_topk`: the same bits on every processor, in every implementation and at every place.

    n = round_half_even(d · LOG2_E),  r = (d − n · LN2_HIGH) − n · LN2_LOW,  exp(d) = fp32(P(r) · 2ⁿ)

for fp32 d ≤ 0, in float64 without contraction, P the Taylor polynomial of degree 11 by Horner's rule. Its relative
error is below 7e-15, so the one rounding to fp32 is the correct one but for about one argument in 10⁷. Arguments below
LEAST give 0, as correct rounding does; NaN stays NaN. LN2_HIGH ends in zero bits (fdlibm's), so n · LN2_HIGH is exact.
"""

import math

LOG2_E = 1.4426950408889634
LN2_HIGH = 6.93147180369123816490e-01
LN2_LOW = 1.90821492927058770002e-10
COEFFICIENTS = tuple(1 / math.factorial(power) for power in range(11, -1, -1))
"""Of the highest power first."""
LEAST = -104.0
"""exp(LEAST) is less than half of the least subnormal fp32."""
EXPONENT_BIAS = 1023
MANTISSA_BITS = 52
