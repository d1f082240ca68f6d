"""Means with their 95 % intervals: over seeds by Student's t, over examples by a bootstrap."""

import functools
import math
import statistics

import numpy as np


@functools.cache
def student_table(degrees):
    """Return angles u, and for each the share of Student's T within +-sqrt(degrees) tan u.

    With T = sqrt(degrees) tan u, the density of u is cos(u)^(degrees - 1), but for a factor.
    """
    u = np.linspace(0, math.pi / 2, 200_001)
    middles = (u[1:] + u[:-1]) / 2
    density = np.cos(middles) ** (degrees - 1)
    area = np.concatenate([[0], np.cumsum(density)])
    return u, area / area[-1]


def student_t(p, degrees):
    """Return the p-quantile of Student's t, 0.5 < p < 1, with so many degrees of freedom."""
    u, shares = student_table(degrees)
    return math.sqrt(degrees) * math.tan(np.interp(2 * p - 1, shares, u))


def p_of_t(t, degrees):
    """Return the two-sided p of t, a number or an array, with so many degrees of freedom."""
    u, shares = student_table(degrees)
    return 1 - np.interp(np.arctan(np.abs(t) / math.sqrt(degrees)), u, shares)


def p_value(differences):
    """Return the two-sided p of Student's t test that the mean difference is 0.

    1 if all differences are equal, up to rounding: then nothing tells how far they vary.
    """
    n = len(differences)
    if max(differences) - min(differences) < 1e-9:
        return 1.0
    error = statistics.stdev(differences) / math.sqrt(n)
    return float(p_of_t(statistics.mean(differences) / error, n - 1))


def holm(p_values):
    """Return the p-values corrected for their number by Holm's method, in the same order."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected = list(p_values)
    highest = 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - place) * p_values[i]))
        corrected[i] = highest
    return corrected


def mean_and_half_width(values):
    """Return the mean, and half the width of its 95 % interval: infinite for one value."""
    mean = statistics.mean(values)
    n = len(values)
    if n == 1:
        return mean, math.inf
    error = statistics.stdev(values) / math.sqrt(n)
    return mean, error * student_t(0.975, n - 1)


def detectable(differences):
    """Return the smallest true mean difference that so many pairs detect in four cases of five.

    "Detect" means that the 95 % interval, uncorrected, does not hold 0. An approximation, by a
    shifted t: with two or three pairs it is rather three cases of four.
    """
    degrees = len(differences) - 1
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return error * (student_t(0.975, degrees) + student_t(0.8, degrees))


def over_examples(differences, draws=10_000):
    """Return the ends of the 95 % interval of a mean over examples (n,): a bootstrap.

    It tells how far the mean would move with other examples from the same source.
    """
    n = len(differences)
    values, counts = np.unique(differences, return_counts=True)
    # To draw n examples with replacement is to draw how often each of the few values comes.
    numbers = np.random.default_rng(0).multinomial(n, counts / n, size=draws)  # (draws, values)
    low, high = np.quantile(numbers @ values / n, (0.025, 0.975))
    return float(low), float(high)
