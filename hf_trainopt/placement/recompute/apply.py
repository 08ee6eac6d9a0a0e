"""Puts a placement plan on a model, and takes it off again."""

import weakref
from typing import Any

import torch
from torch import nn

from hf_trainopt.models.liger import liger_kernels
from hf_trainopt.placement.plan.plan import PlacementPlan, describe, runs_of
from hf_trainopt.placement.recompute.regions import ForwardOverride, activation_modules
from hf_trainopt.placement.recompute.segments import Run, RunMember


# Models that hold a placement. A deep copy is not among them, but holds the overrides, which are looked for too.
_APPLIED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class AppliedPlacement:
    """A plan that is on a model. Use as a context manager, or call `undo`."""

    def __init__(self, model: nn.Module, plan: PlacementPlan, strict_logits: bool = False):
        self.model = model
        self.plan = plan
        self._strict_logits = strict_logits
        self._rewrites: Any = None
        self._overrides: list[tuple[nn.Module, ForwardOverride]] = []
        self._flagged = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        self._undone = False

    def __enter__(self) -> "AppliedPlacement":
        return self

    def __exit__(self, *exception) -> None:
        self.undo()

    def undo(self) -> None:
        """Restore the model as it was; a second call does nothing. Graphs that exist can still be run backward."""
        if self._undone:
            return
        self._undone = True
        for module, override in reversed(self._overrides):
            # Inert, if someone has wrapped the forward since (accelerate does) and goes on calling this one.
            override.active = False
            if module.__dict__.get("forward") is not override:
                continue
            if override.replaced is not None:
                module.__dict__["forward"] = override.replaced
            else:
                del module.__dict__["forward"]
        if self._rewrites is not None:
            self._rewrites.undo()
        _APPLIED.discard(self.model)

    def restore_lost(self) -> list[str]:
        """Put back what others have taken off the model or put beside the plan since; cheap enough for every step.

        Returns:
            What it was; empty if the plan is as it was applied.
        """
        if self._undone:
            return []
        lost = []
        flagged = [module for module in self._flagged if module.gradient_checkpointing is True]
        for module in flagged:
            module.gradient_checkpointing = False
        if flagged:
            lost.append(f"activation checkpointing of transformers was turned on in {len(flagged)} modules")
        missing = [(module, override) for module, override in self._overrides if "forward" not in module.__dict__]
        for module, override in missing:
            override.replaced = None
            module.__dict__["forward"] = override
        if missing:
            lost.append(f"the forward pass of {len(missing)} of its modules was replaced")
        return lost

    def _enter_at(self, module: nn.Module, enter: RunMember) -> None:
        enter.run.buffers.prepare(module)
        override = ForwardOverride(module, enter)
        self._overrides.append((module, override))
        module.__dict__["forward"] = override

    def _apply(self) -> None:
        if self.plan.rewrites.names():
            from hf_trainopt.placement.rewrite.rewrites import apply_rewrites

            self._rewrites = apply_rewrites(self.model, self.plan.rewrites, self._strict_logits)
        modules = dict(self.model.named_modules())
        runs: dict[str, tuple[Run, int]] = {}
        for names in runs_of(self.plan.stages):
            run = Run(names, offload=self.plan.stages[names[0]].offload)
            runs |= {name: (run, place) for place, name in enumerate(names)}
        shared: set[nn.Module] = set()  # an activation function can be a member of several stages
        for name, choice in self.plan.stages.items():
            if choice.recompute == "activation":
                for inner in activation_modules(modules[name]):
                    function = modules[name].get_submodule(inner)
                    if function not in shared:
                        shared.add(function)
                        self._enter_at(function, RunMember(Run([f"{name}.{inner}" if inner else name]), 0))
            elif name in runs:
                self._enter_at(modules[name], RunMember(*runs[name]))
            elif choice.recompute != "none":
                self._enter_at(modules[name], RunMember(Run([name], choice.saved_ops, choice.offload), 0))


def apply_placement(model: nn.Module, plan: PlacementPlan, strict_logits: bool = False) -> AppliedPlacement:
    """Make a model store and recompute what a plan says.

    Losses, gradients, buffers and random numbers stay bit for bit what they are without a plan (rewrites excepted). No
    module or parameter is renamed or wrapped, evaluation and forward passes without gradients are untouched.

    Args:
        model: The model itself, before it is wrapped for distributed training; its stages are named in `plan`.
        plan: A plan made for this model.
        strict_logits: With the chunked loss, whether it is an error to use the logits of a training step. If not, they
            are computed when they are used, and the first time a warning says so.

    Returns:
        The placement, whose `undo()` restores the model.

    Raises:
        ValueError: The plan names stages that the model lacks, that have no forward pass or whose runs are not
            consecutive; or the model holds a placement or activation checkpointing already, is compiled, scripted or a
            `DataParallel`; or it has kernels of Liger and the plan keeps outputs of a model that has others.
    """
    check_model(model)
    modules = dict(model.named_modules())
    unknown = [name for name in plan.stages if name not in modules]
    if unknown:
        raise ValueError(
            f"the placement plan names stages that {type(model).__name__} lacks: {describe(unknown)}; the plan was "
            "made for another model, so make one for this model."
        )
    for name in plan.stages:
        if not name:
            raise ValueError(
                "the placement plan names the whole model ('') as a stage; name modules inside it, such as its layers."
            )
        if type(modules[name]).forward is nn.Module.forward and "forward" not in modules[name].__dict__:
            members = [f"{name}.{member}" for member, _ in modules[name].named_children()]
            raise ValueError(
                f"the stage {name} of the placement plan is a {type(modules[name]).__name__}, which has no forward "
                f"pass of its own; name its members instead{f' ({describe(members)})' if members else ''}."
            )
    by_module: dict[nn.Module, str] = {}
    for name in plan.stages:
        if (other := by_module.setdefault(modules[name], name)) != name:
            raise ValueError(f"the stages {other} and {name} are one module; name only {other} in the plan.")
    runs_of(plan.stages)
    kernels = liger_kernels(model) if "selective" in plan.counts() else []
    if kernels and plan.details.get("kernels") != kernels:
        # Liger overwrites outputs that such a plan may keep, and autograd doesn't notice.
        raise ValueError(
            "the placement plan keeps outputs of operators, and the model has kernels of Liger that the plan wasn't "
            "made for and that overwrite some of them; make a plan for this model, with memory_budget in the run or "
            "with `hf-trainopt plan --use_liger_kernel`."
        )
    applied = AppliedPlacement(model, plan, strict_logits)
    try:
        applied._apply()
    except BaseException:
        applied.undo()
        raise
    _APPLIED.add(model)
    return applied


def check_model(model: nn.Module) -> None:
    """Refuse a model on which no placement can be put.

    Raises:
        ValueError: It holds one already, checkpoints activations itself, or is compiled, scripted or a `DataParallel`.
    """
    for name, module in model.named_modules():
        where = f"module '{name}'" if name else "the model"
        if module in _APPLIED or isinstance(module.__dict__.get("forward"), ForwardOverride):
            raise ValueError(f"{where} holds a placement already; call undo() on apply_placement's result first.")
        if getattr(module, "gradient_checkpointing", False) is True:
            raise ValueError(
                f"{where} uses activation checkpointing already; turn it off with "
                "model.gradient_checkpointing_disable() or leave out the placement."
            )
        if getattr(module, "grad_checkpointing", False) is True:
            raise ValueError(
                f"{where} uses timm's activation checkpointing already; turn it off with "
                "model.set_grad_checkpointing(False) or leave out the placement."
            )
        if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None:
            raise ValueError(
                f"{where} is compiled, and torch.compile cannot trace a checkpoint placement; train without "
                "compiling, or without a placement and with torch._functorch.config.activation_memory_budget."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{where} is a TorchScript module, whose forward cannot be recomputed; use the original.")
        if isinstance(module, nn.DataParallel):
            raise ValueError(
                f"{where} is an nn.DataParallel, whose replicas would recompute with the parameters of the first; use "
                "DistributedDataParallel (torchrun), or show one device only (CUDA_VISIBLE_DEVICES=0)."
            )
