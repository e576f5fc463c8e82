"""95 % confidence intervals of shares and of their differences, paired by question where the same questions were asked."""

import math
from collections.abc import Sequence

Z = 1.959964  # standard normal quantile of 0.975


def wilson_interval(correct: float, total: int) -> tuple[float, float]:
    """Interval of a share (Wilson 1927); unlike the normal approximation it is sound near 0 and 1.

    Args:
        correct: how many of `total`; a mean over several runs need not be an integer.
    """
    share = correct / total
    center = (share + Z * Z / (2 * total)) / (1 + Z * Z / total)
    half = Z / (1 + Z * Z / total) * math.sqrt(share * (1 - share) / total + Z * Z / (4 * total * total))
    return max(0.0, center - half), min(1.0, center + half)


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
