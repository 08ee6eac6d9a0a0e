"""Arguments of checkpoint placement, on top of `TrainingArguments`."""

import os
from dataclasses import dataclass, field

from ..core.versions import ACTIVATION_CHECKPOINTING, activation_checkpointing
from .plan.budget import parse_budget
from .plan.plan import PlacementPlan
from .plan.policies import named_choices
from .rewrite.allowed_rewrites import check_rewrites


@dataclass
class PlacementArgumentsMixin:
    """Checkpoint placement, for any `TrainingArguments` class.

    Args:
        checkpoint_placement (`str`, *optional*): `"none"`, `"all"`, `"every_n"` (`"every_3"`), `"sqrt"`, `"budget"`,
            or the path of a plan. Unset: `"budget"` if `memory_budget` is set, else `"none"`.
        memory_budget (`str`, *optional*): For `"budget"`: `"12GiB"`, `"device"` (what tensors can take of the GPU),
            `"90% of device"`, `"75%"` of the step's peak without recomputation, or a number of bytes. Unset: no limit.
        memory_rewrites (`str`, defaults to `"auto"`): `"auto"` (where they are cheaper than recomputing more for
            `memory_budget`), `"none"` (results to the bit those of a run without placement), or names out of
            `fused_activations` and `chunked_loss`, separated by commas, that are on under any placement.
        placement_stages (`str`, *optional*): Regular expression for the names of the modules between which activations
            are placed. Unset: layers of transformers, blocks of timm, members of `nn.Sequential`.
        placement_offload (`bool`, defaults to `False`): Whether a plan for `memory_budget` may keep the inputs of
            recomputed layers in memory of the host.
    """

    checkpoint_placement: str | None = field(
        default=None,
        metadata={
            "help": "Which activations are stored and which recomputed. Unset (the default): 'budget' (the fastest "
            "plan within memory_budget) if that is set, else 'none'. Set it for a placement that is the same whatever "
            "the memory: 'all' blocks, 'every_n' (every_2, every_3, ...) or 'sqrt' (segments of √L blocks), or the "
            "path of a plan that `hf-trainopt plan --output` has written."
        },
    )
    memory_budget: str | None = field(
        default=None,
        metadata={
            "help": "Most memory that a training step may take on each device: a size such as '12GiB'; 'device', the "
            "GPU's memory less the CUDA context and what the allocator needs (10 %% with "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, 25 %% without, more for convolutions); '90%% of "
            "device'; '75%%' of the step's own peak without recomputation; or a number of bytes. Unset (the default): "
            "no limit. Set it where a run, or a larger batch, doesn't fit."
        },
    )
    memory_rewrites: str = field(
        default="auto",
        metadata={
            "help": "Ways to save memory without recomputation that change results by rounding only. 'auto' (the "
            "default): the fused activation function and the chunked loss where they are cheaper than recomputing "
            "more for a memory_budget. Set 'none' for results that are to the bit those of a run "
            "without placement, or names out of fused_activations,chunked_loss to have these in any case."
        },
    )
    placement_stages: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression for the whole names of the modules (such as 'encoder\\.layer\\.\\d+') between "
            "which activations are placed. Unset (the default): the layers of transformers, blocks of timm, members "
            "of nn.Sequential. Set it for a model where these are not found, or for finer ones."
        },
    )
    placement_offload: bool = field(
        default=False,
        metadata={
            "help": "Let a plan for memory_budget keep the inputs of recomputed layers in memory of the host, where "
            "copying them costs less time than recomputing more. Default: False. Set it for long sequences, where "
            "these inputs are most of what recomputation leaves, and only on a GPU."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.validate_placement()

    @property
    def placement_policy(self) -> str:
        """`checkpoint_placement` with its default."""
        if self.checkpoint_placement is not None:
            return self.checkpoint_placement
        return "none" if self.memory_budget is None else "budget"

    @property
    def places_checkpoints(self) -> bool:
        """Whether anything differs from stock `Trainer`."""
        return self.placement_policy != "none" or self.memory_rewrites not in ("auto", "none")

    def validate_placement(self) -> None:
        """Check the settings of checkpoint placement against each other and against those of `TrainingArguments`.

        Raises:
            ValueError: One is no such thing or contradicts another.
        """
        policy = self.placement_policy
        check_rewrites(self.memory_rewrites)
        if self.memory_budget is not None:
            parse_budget(self.memory_budget)
            if policy != "budget":
                raise ValueError(
                    f"memory_budget is set but checkpoint_placement is '{policy}'; set it to 'budget' or leave it "
                    "unset."
                )
        elif policy == "budget":
            raise ValueError("checkpoint_placement='budget' needs memory_budget, such as '12GiB' or 'device'.")
        if self.placement_offload and self.memory_budget is None:
            raise ValueError(
                "placement_offload=True needs memory_budget, such as '12GiB' or 'device': no other placement offloads "
                "anything, and a plan file says itself what it offloads."
            )
        if is_plan_file(policy):
            try:
                rewrites = PlacementPlan.load(policy).rewrites.names()
            except ValueError as error:
                raise ValueError(f"checkpoint_placement: {error}") from None
            if rewrites and self.memory_rewrites == "none":
                raise ValueError(
                    f"memory_rewrites is 'none', but the plan {policy} has {' and '.join(rewrites)}; make a plan with "
                    "`hf-trainopt plan --memory_rewrites none`, or leave memory_rewrites at 'auto'."
                )
        elif policy != "budget":
            try:
                named_choices(policy, ["a", "b"])
            except ValueError as error:
                text = str(error)
                raise ValueError(text if "checkpoint_placement" in text else f"checkpoint_placement: {text}") from None
        if not self.places_checkpoints:
            return
        if activation_checkpointing(self):
            raise ValueError(
                f"{ACTIVATION_CHECKPOINTING}=True and checkpoint_placement='{policy}' both choose the activations to "
                f"recompute; set {ACTIVATION_CHECKPOINTING}=False (and gradient_checkpointing=False, if you used that "
                "older name). 'all' is the same placement."
            )
        if self.torch_compile:
            raise ValueError(
                f"checkpoint_placement='{policy}' works on eager models only: torch_compile has a plan of its own "
                "(torch._functorch.config.activation_memory_budget); set torch_compile=False."
            )


def is_plan_file(policy: str) -> bool:
    """Whether `checkpoint_placement` is meant as a path."""
    return policy.endswith(".json") or os.sep in policy
