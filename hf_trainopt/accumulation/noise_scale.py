r"""The gradient noise scale: unbiased estimates from one window, and their running averages.

Micro-batch i of a window (i = 1 … m, m = k micro-batches × W ranks) has n_i items (tokens or samples) and mean
gradient g_i with E g_i = G and Cov g_i = Σ/n_i. The window's gradient is ĝ = Σ w_i g_i with Σ w_i = 1. Then

    L = |ĝ|²             E L = |G|² + c_L tr Σ,      c_L = Σ w_i²/n_i
    A = Σ w_i |g_i|²     E A = |G|² + c_A tr Σ,      c_A = Σ w_i/n_i
    Q = Σ w_i² |g_i|²    E Q = S |G|² + c_L tr Σ,    S = Σ w_i²

so that tr Σ is estimated by (A − L)/(c_A − c_L) and |G|² by (L − Q)/(1 − S), both without bias for any weights. The
second is the weighted mean of g_i·g_j over pairs of different micro-batches: it needs no more than their independence,
and stays unbiased where tokens of one row are correlated and Cov g_i is not Σ/n_i. For equal sizes both are the
estimators of McCandlish et al. 2018 (arXiv 1812.06162), appendix A.1, with B_small one micro-batch and B_big the
window. Note that A is the *weighted* mean of the square norms: the plain mean is biased as soon as sizes differ.

B_noise = tr Σ/|G|² ("B_simple" there) is a ratio of two averages, never an average of ratios.
"""

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class WindowStatistics:
    """What a window must measure, summed over its micro-batches on all ranks.

    Attributes:
        weighted_square_norm: A = Σ w_i |g_i|².
        squared_weight_square_norm: Q = Σ w_i² |g_i|².
        gradient_square_norm: L = |ĝ|², before clipping.
        individual_coefficient: c_A = Σ w_i/n_i.
        mean_coefficient: c_L = Σ w_i²/n_i.
        squared_weight: S = Σ w_i².
        num_micro_batches: m.
        num_items: N = Σ n_i, tokens or samples.
        num_samples: Samples in the window.
    """

    weighted_square_norm: float
    squared_weight_square_norm: float
    gradient_square_norm: float
    individual_coefficient: float
    mean_coefficient: float
    squared_weight: float
    num_micro_batches: int
    num_items: float
    num_samples: float

    @property
    def has_no_gradient(self) -> bool:
        """Whether every micro-batch had a gradient of zero."""
        return self.weighted_square_norm == 0 and self.gradient_square_norm == 0


def estimate_noise(statistics: WindowStatistics) -> tuple[float, float] | None:
    """Unbiased estimates of one window.

    Args:
        statistics: Sums over the window.

    Returns:
        `(trace, square)`: tr Σ for one *item* (≥ 0 up to rounding) and |G|² (may be negative: it must not be clamped
        before it is averaged), or `None` if the window cannot tell (fewer than two micro-batches) or is not finite.
    """
    spread = statistics.individual_coefficient - statistics.mean_coefficient
    pairs = 1.0 - statistics.squared_weight
    norms = (
        statistics.weighted_square_norm,
        statistics.squared_weight_square_norm,
        statistics.gradient_square_norm,
    )
    if statistics.num_micro_batches < 2 or not all(map(math.isfinite, norms)) or spread <= 0 or pairs <= 0:
        return None
    individual, squared, mean = norms
    return (individual - mean) / spread, (mean - squared) / pairs


@dataclass(frozen=True)
class NoiseScale:
    """B_noise with its interval, in samples.

    Attributes:
        value: tr Σ/|G|² (`inf` where the average of |G|² is not positive).
        lower: Lower end of the interval.
        upper: Upper end, `inf` while |G|² is not resolved from zero.
        trace: Average of tr Σ, per sample.
        gradient_square: Average of |G|².
        resolved: Whether the interval of |G|² excludes zero. Nothing should be decided on `value` where it does not.
        effective_windows: Kish's effective number of windows behind it.
    """

    value: float
    lower: float
    upper: float
    trace: float
    gradient_square: float
    resolved: bool
    effective_windows: float

    def resolved_in(self, samples: float) -> float | None:
        """Return B_noise in units of `samples` (a micro-batch, say), or `None` while nothing may be decided on it."""
        return self.value / samples if self.resolved else None


def ratio_interval(
    numerator: float,
    denominator: float,
    numerator_variance: float,
    denominator_variance: float,
    covariance: float,
    z: float,
) -> tuple[float, float]:
    """Interval of a ratio of two means (Fieller 1954), cut at zero.

    Args:
        numerator: Mean above.
        denominator: Mean below.
        numerator_variance: Variance of the mean above.
        denominator_variance: Variance of the mean below.
        covariance: Covariance of the two means.
        z: Normal quantile, 1.96 for 95 %.

    Returns:
        `(lower, upper)`; `upper` is `inf` where the denominator is not resolved from zero at `z`.
    """
    z2 = z * z
    a = denominator**2 - z2 * denominator_variance
    b = numerator * denominator - z2 * covariance
    c = numerator**2 - z2 * numerator_variance
    if denominator <= 0 or a <= 0:
        most = max(denominator, 0.0) + z * math.sqrt(denominator_variance)
        least = max(0.0, numerator - z * math.sqrt(numerator_variance))
        return (least / most if most > 0 else 0.0), math.inf
    root = math.sqrt(max(0.0, b * b - a * c))
    return max(0.0, (b - root) / a), (b + root) / a


@dataclass
class _Sums:
    """Discounted sums behind two weighted means and the covariance matrix of these means."""

    trace_weight: float = 0.0
    trace_total: float = 0.0
    square_weight: float = 0.0
    square_total: float = 0.0
    # of a² and c² as the weights are without their discount: over the sums of weights, what a window has on average
    trace_size: float = 0.0
    square_size: float = 0.0
    # products of the two weights a, c with 1, x, y, x·y, as the covariance of Σax/Σa and Σcy/Σc needs them
    aa: float = 0.0
    aa_x: float = 0.0
    aa_xx: float = 0.0
    cc: float = 0.0
    cc_y: float = 0.0
    cc_yy: float = 0.0
    ac: float = 0.0
    ac_x: float = 0.0
    ac_y: float = 0.0
    ac_xy: float = 0.0


class NoiseScaleTracker:
    """Running averages of tr Σ and |G|², discounted by samples, with the spread of their ratio.

    The two are averaged separately and divided afterwards. tr Σ is weighted by its degrees of freedom (m − 1) and
    |G|², which is a mean over pairs of micro-batches, by the number of pairs m(m − 1)/2 and the size of what is
    paired: that is inverse-variance weighting where noise dominates. A weight halves every `half_life` samples, so
    that the memory does not depend on k. Means are debiased (divided by the sum of the weights). Their variances are
    sandwich estimates, Σ ω²(x − x̄)²/(Σ ω)², times n/(n − 1) with Kish's effective n.

    Args:
        half_life: In samples over all ranks.
        z: Normal quantile of the interval and of `resolved`.
        min_windows: Windows before anything counts as resolved (two numbers have no reliable spread).

    Attributes:
        num_windows: Windows that were used.
        num_dropped: Windows that were dropped because their gradients weren't finite.
        last_value: Last finite noise scale, in samples; `None` before there was one.
    """

    def __init__(self, half_life: float, z: float = 1.96, min_windows: int = 4):
        if half_life <= 0:
            raise ValueError(f"half_life must be positive, got {half_life}.")
        self.half_life = half_life
        self.z = z
        self.min_windows = min_windows
        self.num_windows = 0
        self.num_dropped = 0
        self.last_value: float | None = None
        self._pending_samples = 0.0
        self._sums = _Sums()

    def skip(self, num_samples: float) -> None:
        """Account for a window that was not measured: what is known ages with the data."""
        self._pending_samples += num_samples

    def update(self, statistics: WindowStatistics, in_halves: bool = False) -> bool:
        """Take in one window.

        Args:
            statistics: Sums over the window.
            in_halves: Whether it is one micro-batch in halves. It tells a quarter of what two micro-batches do, by
                which windows are weighted, so that older windows would count for long after they are out of date.
                They are given no more weight than this one.

        Returns:
            Whether it was used. A window with non-finite gradients is dropped and counted in `num_dropped`. One
            without any gradient (nothing to predict in it) is dropped uncounted: it says nothing about the others.
        """
        estimate = estimate_noise(statistics)
        self.skip(statistics.num_samples)
        if statistics.has_no_gradient:
            return False
        if estimate is None:
            self.num_dropped += 1
            return False
        items_per_sample = statistics.num_items / statistics.num_samples
        x, y = estimate[0] / items_per_sample, estimate[1]
        m = statistics.num_micro_batches
        a, c = m - 1.0, (m - 1.0) / m * statistics.num_samples**2
        decay = 0.5 ** (self._pending_samples / self.half_life)
        self._pending_samples = 0.0
        s = self._sums
        cap_trace = cap_square = 1.0
        if in_halves and s.trace_size and s.square_size:
            cap_trace = min(1.0, a * s.trace_weight / s.trace_size)
            cap_square = min(1.0, c * s.square_weight / s.square_size)
        of_trace, of_square = decay * cap_trace, decay * cap_square
        for name, factor, new in (
            ("trace_weight", of_trace, a), ("trace_total", of_trace, a * x),
            ("square_weight", of_square, c), ("square_total", of_square, c * y),
            ("trace_size", of_trace * cap_trace, a * a), ("square_size", of_square * cap_square, c * c),
            ("aa", of_trace**2, a * a), ("aa_x", of_trace**2, a * a * x), ("aa_xx", of_trace**2, a * a * x * x),
            ("cc", of_square**2, c * c), ("cc_y", of_square**2, c * c * y), ("cc_yy", of_square**2, c * c * y * y),
            ("ac", of_trace * of_square, a * c), ("ac_x", of_trace * of_square, a * c * x),
            ("ac_y", of_trace * of_square, a * c * y), ("ac_xy", of_trace * of_square, a * c * x * y),
        ):  # fmt: skip
            setattr(s, name, getattr(s, name) * factor + new)
        self.num_windows += 1
        running = self.estimate()
        if running is not None and math.isfinite(running.value):
            self.last_value = running.value
        return True

    def estimate(self) -> NoiseScale | None:
        """Return B_noise in samples with its interval, or `None` before two windows were measured."""
        s = self._sums
        if self.num_windows < 2 or s.trace_weight == 0 or s.square_weight == 0:
            return None
        trace, square = s.trace_total / s.trace_weight, s.square_total / s.square_weight
        effective = s.square_weight**2 / s.cc
        correction = effective / max(effective - 1.0, 1e-9)
        trace_variance = max(0.0, s.aa_xx - 2 * trace * s.aa_x + trace**2 * s.aa) / s.trace_weight**2 * correction
        square_variance = max(0.0, s.cc_yy - 2 * square * s.cc_y + square**2 * s.cc) / s.square_weight**2 * correction
        covariance = (s.ac_xy - trace * s.ac_y - square * s.ac_x + trace * square * s.ac) * correction
        covariance /= s.trace_weight * s.square_weight
        lower, upper = ratio_interval(trace, square, trace_variance, square_variance, covariance, self.z)
        resolved = self.num_windows >= self.min_windows and square > 0 and square > self.z * math.sqrt(square_variance)
        return NoiseScale(
            value=trace / square if square > 0 else math.inf,
            lower=lower,
            upper=upper if resolved else math.inf,
            trace=trace,
            gradient_square=square,
            resolved=resolved,
            effective_windows=effective,
        )

    def state_dict(self) -> dict:
        return {
            "num_windows": self.num_windows,
            "num_dropped": self.num_dropped,
            "last_value": self.last_value,
            "pending_samples": self._pending_samples,
            "sums": asdict(self._sums),
        }

    def load_state_dict(self, state: dict) -> None:
        self.num_windows = state["num_windows"]
        self.num_dropped = state["num_dropped"]
        self.last_value = state.get("last_value")  # not in older checkpoints
        self._pending_samples = state["pending_samples"]
        self._sums = _Sums(**state["sums"])


def noise_logs(noise: NoiseScale | None, last: float | None) -> dict[str, float]:
    """Return what is logged of the noise scale: `noise_scale`, `noise_scale_low`, and `noise_scale_high` where finite.

    Curves have no gaps: while the running averages give no finite value, `noise_scale` keeps the last one that they
    gave, raised to the lower end of the interval. `noise_scale_high` is missing there.

    Args:
        noise: Running noise scale, if any.
        last: Last finite value (`NoiseScaleTracker.last_value`), if any.
    """
    if noise is None:
        return {}
    value = noise.value if math.isfinite(noise.value) or last is None else max(last, noise.lower)
    values = {"noise_scale": value, "noise_scale_low": noise.lower, "noise_scale_high": noise.upper}
    return {name: value for name, value in values.items() if value < math.inf}
