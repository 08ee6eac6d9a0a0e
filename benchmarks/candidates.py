"""Policies that were tried and are not the default; also examples of how to pass your own to the Trainer."""

from hf_trainopt.accumulation import GoodputPolicy


CANDIDATES = {
    # k* = √(r·B_noise) alone.
    "plain_goodput": lambda: GoodputPolicy(annealing_ratio=0.0),
    # Annealing up to a whole noise scale instead of a quarter.
    "annealed_to_noise_scale": lambda: GoodputPolicy(annealing_ratio=1.0),
}
