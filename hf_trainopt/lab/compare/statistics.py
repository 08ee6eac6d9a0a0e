"""Ratios and differences of paired runs, with intervals, where some runs may never have reached their target."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


# Of an interval that is shown. The t quantile of two pairs is 12.7.
FEWEST_PAIRS = 3
# Ratio of the ends of an interval of a ratio beyond which it says nothing that numbers would add to.
WIDEST = 10.0


@dataclass(frozen=True)
class Measured:
    """What one run took.

    Args:
        value: Positive, in any unit.
        censored: Whether the run ended before it was there: the true value is larger.
    """

    value: float
    censored: bool = False


@dataclass(frozen=True)
class Estimate:
    """A ratio or a difference over paired runs.

    Args:
        value: Geometric mean of the ratios, or mean of the differences; `None` where nothing can be said.
        lower: Lower end of the 95 % interval; `None`: not known (one pair, or a bound).
        upper: Upper end.
        bound: `"exact"`; `"at least"` or `"at most"` where runs are censored and `value` is a bound; `"unknown"`.
        num_pairs: Pairs that went in.
        num_censored: Pairs with a censored run.
    """

    value: float | None
    lower: float | None
    upper: float | None
    bound: str
    num_pairs: int
    num_censored: int = 0

    @property
    def ratio(self) -> float | None:
        return self.value

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval, `None` without one or over two pairs: it then stands on a single difference."""
        return None if self.lower is None or self.num_pairs < FEWEST_PAIRS else (self.lower, self.upper)


def check_scipy() -> None:
    """Check that intervals can be computed.

    Raises:
        ValueError: SciPy is not installed.
    """
    try:
        import scipy.stats  # noqa: F401
    except ImportError as error:
        raise ValueError("Intervals over seeds need SciPy: pip install 'hf-trainopt[compare]'.") from error


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Return the mean of independent values and the ends of its 95 % t interval (`None` for one value).

    Raises:
        ValueError: SciPy is not installed, and there are several values.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None, None
    check_scipy()
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def paired_ratio(ours: Sequence[float | Measured], baseline: Sequence[float | Measured]) -> Estimate:
    """Return the geometric mean of the ratios ours/baseline with the t interval of their logarithms.

    A pair whose own run is censored has a ratio that is at least what is computed, one whose baseline is censored at
    most. If all censored pairs lean to one side the mean is a bound without an interval; otherwise nothing is known.

    Args:
        ours: One value per pair.
        baseline: Those to compare with, in the same order.

    Raises:
        ValueError: There are none, numbers differ, or a value is not positive.
    """
    pairs = [(_measured(a), _measured(b)) for a, b in zip(ours, baseline, strict=True)]
    if not pairs:
        raise ValueError("there is no pair to compare.")
    if any(not run.value > 0 for pair in pairs for run in pair):
        raise ValueError("ratios need positive values.")
    censored = [(a.censored, b.censored) for a, b in pairs if a.censored or b.censored]
    if censored and not (all(a and not b for a, b in censored) or all(b and not a for a, b in censored)):
        return Estimate(None, None, None, "unknown", len(pairs), len(censored))
    mean, lower, upper = mean_interval([math.log(a.value / b.value) for a, b in pairs])
    if censored:
        bound = "at least" if censored[0][0] else "at most"
        return Estimate(math.exp(mean), None, None, bound, len(pairs), len(censored))
    ends = (None, None) if lower is None else (math.exp(lower), math.exp(upper))
    return Estimate(math.exp(mean), *ends, "exact", len(pairs))


def paired_difference(ours: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Return the mean of the differences ours − baseline with its t interval.

    Raises:
        ValueError: There are none, or numbers differ.
    """
    differences = [a - b for a, b in zip(ours, baseline, strict=True)]
    if not differences:
        raise ValueError("there is no pair to compare.")
    return Estimate(*mean_interval(differences), "exact", len(differences))


def _measured(value: float | Measured) -> Measured:
    return value if isinstance(value, Measured) else Measured(float(value))
