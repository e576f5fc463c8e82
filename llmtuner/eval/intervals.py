"""95 % confidence intervals of shares and of their differences, paired by question where the same questions were asked."""

import math
from collections.abc import Sequence
from statistics import fmean, variance

Z = 1.959964  # standard normal quantile of 0.975
# The same of Student's t distribution with 1, 2, ... degrees of freedom; the last one serves for more.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def wilson_interval(correct: float, total: int) -> tuple[float, float]:
    """Interval of a share (Wilson 1927); unlike the normal approximation it is sound near 0 and 1.

    Args:
        correct: how many of `total`; a mean over several runs need not be an integer.
    """
    share = correct / total
    center = (share + Z * Z / (2 * total)) / (1 + Z * Z / total)
    half = Z / (1 + Z * Z / total) * math.sqrt(share * (1 - share) / total + Z * Z / (4 * total * total))
    # At the ends the formula gives 0 and 1 but for rounding.
    return max(0.0, center - half) if correct else 0.0, min(1.0, center + half) if correct < total else 1.0


def paired_difference(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """Mean of `after` minus mean of `before` over the same questions, and its interval (Bonett and Price 2012).

    The interval is a Wald interval after one question more in which each of the two is better.

    Args:
        before, after: of each question 1 if answered correctly and 0 if not, or the mean of that over several runs.
    """
    differences = [new - old for old, new in zip(before, after, strict=True)]
    extended = [*differences, 1.0, -1.0]
    center = sum(extended) / len(extended)
    variance = sum(value * value for value in extended) / len(extended) - center * center
    half = Z * math.sqrt(variance / len(extended))
    return sum(differences) / len(differences), max(-1.0, center - half), min(1.0, center + half)


def unpaired_difference(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """The same where other questions were asked (Agresti and Caffo 2000): one success and one failure more in each."""
    shares = [(sum(values) + 1) / (len(values) + 2) for values in (before, after)]
    variances = [share * (1 - share) / (len(values) + 2) for share, values in zip(shares, (before, after), strict=True)]
    center, half = shares[1] - shares[0], Z * math.sqrt(sum(variances))
    difference = sum(after) / len(after) - sum(before) / len(before)
    return difference, max(-1.0, center - half), min(1.0, center + half)


def seed_difference(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float] | None:
    """Difference of the means over runs that differ in their seeds, and Welch's interval; None below two runs each."""
    counts, means = [len(before), len(after)], [fmean(before), fmean(after)]
    if min(counts) < 2:
        return None
    errors = [variance(values) / count for values, count in zip((before, after), counts, strict=True)]
    total, change = sum(errors), means[1] - means[0]
    if total == 0:
        return change, change, change
    freedom = total**2 / sum(error**2 / (count - 1) for error, count in zip(errors, counts, strict=True))
    half = T_QUANTILES[min(int(freedom + 1e-9), len(T_QUANTILES)) - 1] * math.sqrt(total)
    return change, change - half, change + half
