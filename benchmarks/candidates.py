"""Policies that were tried and are not the default; also examples of how to pass your own to the Trainer."""

from hf_trainopt.accumulation import NoiseScalePolicy


CANDIDATES = {
    # noise_scale_ratio=0.5
    "half_noise_scale": lambda: NoiseScalePolicy(ratio=0.5),
}
