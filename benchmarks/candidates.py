"""Policies that were tried and are not the default; also examples of how to pass your own to the Trainer."""

from hf_trainopt.accumulation import GoodputPolicy, NoiseScalePolicy


CANDIDATES = {
    # k* = √(r·B_noise) alone.
    "plain_goodput": lambda: GoodputPolicy(annealing_ratio=0.0),
    # Annealing up to a whole noise scale instead of a quarter.
    "annealed_to_noise_scale": lambda: GoodputPolicy(annealing_ratio=1.0),
    # noise_scale_ratio=0.5
    "half_noise_scale": lambda: NoiseScalePolicy(ratio=0.5),
}


def recorded(record: dict, backwards: bool = False):
    """Return a policy that takes k from a recorded run at the same share of the data, or from its mirror image.

    Args:
        record: Of `convergence.py`; its `history` has `samples_seen` and `accumulation_steps`.
        backwards: Whether the sequence is reversed in the data.
    """
    total = record["curve"][-1]["samples"]
    shares = [line["samples_seen"] / total for line in record["history"] if "accumulation_steps" in line]
    values = [line["accumulation_steps"] for line in record["history"] if "accumulation_steps" in line]

    def policy(observation):
        share = 1.0 - observation.progress if backwards else observation.progress
        index = next((i for i, end in enumerate(shares) if end >= share), len(values) - 1)
        return values[index]

    return policy
