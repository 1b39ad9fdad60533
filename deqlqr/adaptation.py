"""The factor that steps put on a damping or penalty: up at a rejection, back afterwards.

Source of the adaptive rule: J. More (1978), The Levenberg-Marquardt algorithm, Lecture Notes in
Mathematics 630.
"""

LEAST, MOST = 1e-12, 1e12  # limits of the factor
_ADAPTATION = 3.0


def raised(factor: float, increase: float) -> float:
    """Return the factor after a rejected attempt."""
    return min(factor * increase, MOST)


def next_factor(
    factor: float,
    *,
    rejected: bool,
    increase: float,
    adaptive: bool = False,
    ratio: float | None = None,
    low: float = 0.25,
    high: float = 0.75,
) -> float:
    """Return the factor that the next step starts from.

    Args:
        factor: That of the last attempt.
        rejected: Whether an attempt was rejected before it.
        increase: What a rejection multiplies the factor by; without `adaptive` its root brings
            the factor back to 1, step by step.
        adaptive: Go by the ratio instead.
        ratio: Decrease over what the quadratic model promised; `None` where it is not known.
        low: The factor rises where the ratio is below this.
        high: And falls where it is above this.
    """
    if rejected:
        return factor
    if not adaptive:
        return max(1.0, factor / increase**0.5)
    if ratio is None:
        return factor
    if ratio > high:
        factor /= _ADAPTATION
    elif ratio < low:
        factor *= _ADAPTATION
    return min(max(factor, LEAST), MOST)
