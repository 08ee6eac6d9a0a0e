"""What the callbacks add to log lines; docs/evidence.md says what each key means."""

from .memory import PHASES


THROUGHPUT_KEYS = (
    "train_time_s", "samples_seen", "samples_per_second", "tokens_per_second", "flops_per_second", "mfu",
)  # fmt: skip
MEMORY_KEYS = ("peak_memory_gib", *(f"peak_memory_{phase}_gib" for phase in PHASES))
TARGET_KEYS = ("target_reached", "time_to_target_s", "samples_to_target", "steps_to_target")
NOISE_KEYS = ("noise_scale", "noise_scale_low", "noise_scale_high")
EVIDENCE_KEYS = (*THROUGHPUT_KEYS, *MEMORY_KEYS, *TARGET_KEYS, *NOISE_KEYS)


def is_evidence_key(key: str) -> bool:
    """Return whether a key is one of ours (those of a second target end in `_2`, and so on)."""
    return key in EVIDENCE_KEYS or (key.rpartition("_")[0] in TARGET_KEYS and key.rpartition("_")[2].isdigit())
