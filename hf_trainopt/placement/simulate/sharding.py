"""How training is spread over devices: what each of them holds, as far as that is set before a step."""

import sys
from dataclasses import dataclass

import torch


KINDS = ("ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2")
WORDS = {
    "ddp": "DDP",
    "zero0": "DeepSpeed ZeRO-0",
    "zero1": "DeepSpeed ZeRO-1",
    "zero2": "DeepSpeed ZeRO-2",
    "zero3": "DeepSpeed ZeRO-3",
    "fsdp2": "FSDP2",
}
# What can be held on the host: by optimizer, and by parameters.
OFFLOADS_OPTIMIZER = ("zero1", "zero2", "zero3", "fsdp2")
OFFLOADS_PARAMETERS = ("zero3", "fsdp2")


@dataclass(frozen=True)
class Group:
    """Modules whose parameters FSDP2 gathers together: those of one call of `fully_shard`.

    Args:
        modules: Their names; `""` is the model itself, whose group has what the others leave.
        is_kept: Whether parameters stay whole between the forward and the backward pass.
        parameters: Names of their parameters, twice for one that is tied but gathered for each of its modules (as
            transformers 5.23 loads it); `None`: those of the modules that no group inside has.
    """

    modules: tuple[str, ...]
    is_kept: bool = False
    parameters: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ZeroSettings:
    """The settings of DeepSpeed's `zero_optimization` that decide about memory; sizes in numbers, not bytes.

    The defaults are DeepSpeed's (0.19).

    Args:
        reduce_bucket_size: Gradients that are reduced together.
        overlap_comm: Whether there are two such buckets; `None`: in ZeRO-3 only, where it changes nothing here.
        prefetch_bucket_size: Parameters that ZeRO-3 gathers ahead.
        persistence_threshold: Parameters of at most this size stay whole in ZeRO-3.
        model_persistence_threshold: All of these together, at most.
        max_live_parameters: Whole parameters at a time, beyond which ZeRO-3 gathers none ahead.
        max_reuse_distance: ZeRO-3 keeps parameters that are needed again within so many.
        sub_group_size: Parameters that ZeRO-3 steps at a time.
        memory_efficient_linear: Whether ZeRO-3 puts its own function in place of `F.linear`, which also keeps the
            inputs of frozen layers.
    """

    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool | None = None
    prefetch_bucket_size: int = 50_000_000
    persistence_threshold: int = 100_000
    model_persistence_threshold: int = sys.maxsize
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    sub_group_size: int = 1_000_000_000
    memory_efficient_linear: bool = True


@dataclass(frozen=True)
class Sharding:
    """What is spread over how many devices.

    Args:
        kind: One of `KINDS`. On one device, what is gathered and reduced is there all the same (DeepSpeed's master
            weights, buckets), except with DDP.
        num_devices: Of one copy of the model. All of them average gradients.
        offload_optimizer: Whether the optimizer's state, the master weights and the gradients that it takes are on the
            host, where it steps.
        offload_parameters: Whether shards of parameters are on the host.
        dtype: Type that parameters have in forward and backward passes: the `param_dtype` of FSDP2, or what DeepSpeed
            casts the model to. `None`: their own.
        shard_dtype: Type that Accelerate casts FSDP2's shards of trained parameters to; `None`: their own.
        reduce_dtype: Type in which FSDP2 reduces gradients, and adds them up before that; `None`: theirs.
        groups: Of FSDP2; `None`: each stage is one, and the rest of the model another that is kept.
        reduces_always: Whether FSDP2 reduces after each micro-batch (`sync_each_batch`), not only after the last one.
        zero: Settings of DeepSpeed.
    """

    kind: str = "ddp"
    num_devices: int = 1
    offload_optimizer: bool = False
    offload_parameters: bool = False
    dtype: torch.dtype | None = None
    shard_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    groups: tuple[Group, ...] | None = None
    reduces_always: bool = False
    zero: ZeroSettings = ZeroSettings()

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"sharding is '{self.kind}'; choose one of {', '.join(KINDS)}.")
        if self.num_devices < 1:
            raise ValueError(f"num_devices is {self.num_devices}; it must be 1 or more.")
        if self.offload_optimizer and self.kind not in OFFLOADS_OPTIMIZER:
            raise ValueError(
                f"{WORDS[self.kind]} can't offload the optimizer; choose one of {', '.join(OFFLOADS_OPTIMIZER)}."
            )
        if self.offload_parameters and self.kind not in OFFLOADS_PARAMETERS:
            raise ValueError(
                f"{WORDS[self.kind]} can't offload parameters; choose one of {', '.join(OFFLOADS_PARAMETERS)}."
            )
        if self.kind == "fsdp2" and self.offload_optimizer != self.offload_parameters:
            raise ValueError(
                "FSDP2 offloads parameters and the optimizer together; set both offload_optimizer and "
                "offload_parameters, or neither."
            )

    @property
    def is_zero(self) -> bool:
        """Whether DeepSpeed runs the steps."""
        return self.kind.startswith("zero")

    @property
    def keeps_linear_inputs(self) -> bool:
        """Whether linear layers keep their inputs even where their weights are frozen."""
        return self.kind == "zero3" and self.zero.memory_efficient_linear


ONE_DEVICE = Sharding()
