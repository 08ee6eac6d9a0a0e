"""What must be exact is exact on this device, too: each check trains small models and compares bits or gradients.

Kernels are told to be deterministic. Where an operator has no such kernel, the check is made with the others and its
part says so. A check that fails is repeated against itself: `repeats_itself` tells a difference of ours from a device
that gives other bits each time.
"""

import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import precision_helpers
import test_parity
import test_precision_fallback as fallback
import test_resume
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from cases import exactness_cases, wait_for_plans
from common import Context, DeviceStep, Record, release
from helpers import AnyK, Rows, arguments, free_port, quiet, tiny_gpt2, weights_equal
from oom_helpers import Memory, Recording
from placement_cases import Case
from test_varying_k import statistics_and_twin, window_gradients
from torch.nn.modules._functions import SyncBatchNorm as SyncBatchNormFunction
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from hf_trainopt import EfficientTrainer, EfficientTrainingArguments
from hf_trainopt.accumulation.noise_scale import estimate_noise
from hf_trainopt.core.facts import gradient_scaler
from hf_trainopt.placement.plan.plan import PlacementPlan
from hf_trainopt.placement.plan.policies import named_choices
from hf_trainopt.placement.plan.stages import find_stages
from hf_trainopt.placement.recompute.apply import apply_placement


PRECISIONS = {"fp32": {}, "bf16": {"bf16": True}, "fp16": {"fp16": True}}


# ---- What is compared ----------------------------------------------------------------------------------------------


def run(context: Context, record: Record, prepared: Any) -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    checks = Checks(context, record)
    fixed_is_stock(checks)
    wandering_k(checks)
    out_of_memory(checks)
    overflows(checks)
    resuming(checks)
    one_rank_checks(checks)
    for case in exactness_cases(context):
        try:
            plans = wait_for_plans(context, case.name, max(1.0, context.left - 1))["plans"]
        except RuntimeError as error:
            record.fail(f"{case.name}: plans", str(error))
            continue
        plans = [entry for entry in plans if any(map(context.wants, placement_names(case, entry)))]
        if plans:
            with record.part(case.name):
                placements(checks, case, plans)


class Checks:
    """Runs checks one by one, each in a folder of its own; what a check raises is its own failure.

    Args:
        context: Of the stage.
        record: Where they are noted.
    """

    def __init__(self, context: Context, record: Record):
        self.context, self.record = context, record
        self.device = context.device
        self.where = {"use_cpu": context.rehearse}

    def equal(
        self,
        name: str,
        compare: Callable[[Path, dict[str, Any]], bool],
        repeats: Callable | None = None,
        deterministic: bool = True,
    ) -> None:
        """Make a check.

        Args:
            name: In the record.
            compare: Given a folder and the dictionary of its part; returns whether it holds.
            repeats: The same of stock with itself, for a check that fails.
            deterministic: Whether kernels are told to be so.
        """
        if not self.context.wants(name):
            return
        if self.context.left < self.context.pick(3.0, 1.0):
            self.record.skip(name, "no time is left")
            return
        reset_accelerate()
        found = False
        with self.record.part(name) as part, tempfile.TemporaryDirectory() as folder:
            if deterministic:
                found = self._settled(lambda: compare(Path(folder), part), part)
            else:
                found = _is_true(lambda: compare(Path(folder), part), part)
            part["passed"] = found
            if not found and repeats is not None:
                part["repeats_itself"] = self._settled(lambda: repeats(Path(folder), part), part)
        self.record.check(name, found)

    def _settled(self, compare: Callable[[], bool], part: dict[str, Any]) -> bool:
        torch.use_deterministic_algorithms(True)
        try:
            return _is_true(compare, part)
        except RuntimeError as error:
            if "deterministic" not in str(error):
                raise
            part["has_no_deterministic_kernel"] = str(error).split(". ")[0][:200]
            reset_accelerate()
            torch.use_deterministic_algorithms(True, warn_only=True)
            return _is_true(compare, part)
        finally:
            torch.use_deterministic_algorithms(False)


def _is_true(compare: Callable[[], bool], part: dict[str, Any]) -> bool:
    try:
        return bool(compare())
    except AssertionError as error:
        part["differs"] = (str(error) or "an assertion of the test")[:1000]
        return False


def reset_accelerate() -> None:
    """Forget what is process-wide in Accelerate: the precision of the check before, its devices."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def with_fp16(context: Context, cls: type) -> type:
    """Return a Trainer class that can do fp16 on this device, with a scale from which nothing overflows at first."""
    return type(f"Half{cls.__name__}", (precision_helpers.HalfOnCPU, cls), {"scaler": {"init_scale": 2.0**8}})


@contextlib.contextmanager
def abilities(context: Context) -> Iterator[None]:
    """Context in which a CPU passes for a device that has bf16 and scales fp16; a GPU says what it is."""
    if context.on_gpu:
        yield
        return
    device = precision_helpers.scales_fp16(native_bf16=True)
    with mock.patch.object(precision_helpers.precision_arguments, "device_abilities", return_value=device):
        yield


# ---- Stock and ours ------------------------------------------------------------------------------------------------


def fixed_is_stock(checks: Checks) -> None:
    context = checks.context
    for task in ("gpt2", "resnet"):
        for precision, flags in PRECISIONS.items():
            if task == "resnet" and precision == "fp16" and context.rehearse:
                continue  # its depthwise kernels in fp16 take a CPU half a minute
            settings = flags | checks.where

            def train(folder, trainer_class, args_class, settings=settings, task=task, precision=precision, **kwargs):
                if precision == "fp16":
                    trainer_class = with_fp16(context, trainer_class)
                with abilities(context):
                    return test_parity.run(task, 3, folder, trainer_class, args_class, **(settings | kwargs))

            def stock(folder, train=train):
                return train(folder, Trainer, TrainingArguments)

            def fixed(folder, part, train=train, stock=stock):
                ours = train(folder, EfficientTrainer, EfficientTrainingArguments, accumulation_policy="fixed")
                test_parity.assert_same(stock(folder), ours, extra_keys=set(OVERFLOW_KEYS))
                part["steps"] = ours[0].state.global_step
                return True

            def windows(folder, part, train=train, stock=stock):
                ours = train(
                    folder, EfficientTrainer, EfficientTrainingArguments, accumulation_policy="ramp",
                    accumulation_ramp="0:3",
                )  # fmt: skip
                test_parity.assert_same(stock(folder), ours, extra_keys=test_parity.OUR_KEYS | set(OVERFLOW_KEYS))
                return True

            def itself(folder, part, stock=stock):
                test_parity.assert_same(stock(folder), stock(folder), extra_keys=set())
                return True

            checks.equal(f"fixed is stock, {task}, {precision}", fixed, itself)
            if precision != "fp16":
                checks.equal(f"windows at constant k are stock, {task}, {precision}", windows, itself)


# Of fp16 runs; stock does not log them.
OVERFLOW_KEYS = ("loss_scale", "skipped_steps")


# ---- Varying k -----------------------------------------------------------------------------------------------------


def wandering_k(checks: Checks) -> None:
    def gradients(folder, part):
        worst = 0.0
        for found, expected in window_gradients(folder, [3, 1, 5, 2, 7, 4], **checks.where):
            for one, other in zip(found, expected, strict=True):
                worst = max(worst, ((one - other).norm() / other.norm().clamp_min(1e-12)).item())
        part["largest_difference"] = worst
        return worst < 1e-9

    def statistics(folder, part):
        worst, compared = 0.0, 0
        for k in (2, 3):
            for found, _, expected, counts in statistics_and_twin(folder, k, **checks.where):
                for one, other in zip(estimate_noise(found), expected, strict=True):
                    worst = max(worst, abs(one / other - 1))
                compared += 1
                assert found.num_items == sum(counts)
        part |= {"largest_difference": worst, "windows": compared}
        return compared > 8 and worst < 1e-3

    checks.equal("a window of any k has the gradient of one big batch, fp64", gradients)
    checks.equal("gradient statistics are those of the slow twin", statistics)


def resuming(checks: Checks) -> None:
    for policy in ("goodput", "ramp"):

        def resume(folder, part, policy=policy):
            whole = test_resume.make(folder / "whole", policy, **checks.where)
            whole.train()
            try:
                test_resume.make(folder / "part", policy, callbacks=[test_resume.Kill(17)], **checks.where).train()
            except test_resume.Killed:
                part["killed"] = True
            resumed = test_resume.make(folder / "part", policy, **checks.where)
            resumed.train(resume_from_checkpoint=True)
            assert test_resume.loss_history(resumed) == test_resume.loss_history(whole), "the logged losses differ"
            return part.get("killed", False) and weights_equal(resumed.model, whole.model)

        def itself(folder, part, policy=policy):
            runs = [test_resume.make(folder / name, policy, saves=False, **checks.where) for name in ("one", "two")]
            for trainer in runs:
                trainer.train()
            return weights_equal(runs[0].model, runs[1].model)

        checks.equal(f"a run that is killed and resumed ends with the same bits, {policy}", resume, itself)


# ---- Placement -----------------------------------------------------------------------------------------------------


def placement_names(case: Case, entry: dict[str, Any]) -> tuple[str, str]:
    """Return the names of the two checks of a plan."""
    labels = ", ".join([entry["placement"], *entry["also"]])
    return f"{case.name}: {labels} is none to the bit", f"{case.name}: {labels} agrees with none, default kernels"


def placements(checks: Checks, case: Case, plans: Sequence[dict[str, Any]]) -> None:
    steps = checks.context.pick(6, 3)
    step = DeviceStep(case, checks.device)
    start = {name: value.clone() for name, value in step.model.state_dict().items()}

    def trained(plan: PlacementPlan | None, steps: int = steps) -> list[Any]:
        step.model.load_state_dict(start)
        step.model.zero_grad()  # of a run that an error has cut off
        step.optimizer = torch.optim.SGD(step.model.parameters(), lr=0.02, momentum=0.9)
        torch.manual_seed(1)
        found: list[Any] = []
        handles = []
        with contextlib.ExitStack() as stack:
            if plan is not None:
                stack.enter_context(apply_placement(step.model, plan))
            handles += [step.optimizer.register_step_pre_hook(lambda *_: found.append(gradients(step.model)))]
            for _ in range(steps):
                found.append(step())
        for handle in handles:
            handle.remove()
        found += [value.clone() for value in step.model.state_dict().values()]
        found.append(torch.get_rng_state())
        if checks.device.type == "cuda":
            found.append(torch.cuda.get_rng_state(checks.device))
        return found

    def same(one: list[Any], other: list[Any]) -> bool:
        return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    stored: dict[str, list[Any]] = {}

    def unplaced() -> list[Any]:
        key = str(torch.is_deterministic_algorithms_warn_only_enabled())
        if key not in stored:
            stored[key] = trained(None)
        return stored[key]

    for entry in plans:
        plan = PlacementPlan.from_dict(entry["plan"])
        if plan.is_stock:
            continue

        def equal(folder, part, plan=plan):
            part |= {"choices": plan.counts(), "steps": steps, "finite": all(map(_finite, unplaced()[: 2 * steps]))}
            return same(unplaced(), trained(plan)) and part["finite"]

        same_bits, agrees = placement_names(case, entry)
        checks.equal(same_bits, equal, lambda *_: same(trained(None), trained(None)))
        if case.autocast_dtype is None:
            continue

        def close(folder, part, plan=plan):
            first, again, found = (trained(chosen, 1)[0] for chosen in (None, None, plan))
            part |= {"repeats_within": difference(again, first), "largest_difference": difference(found, first)}
            return part["largest_difference"] <= max(CLOSE, 10 * part["repeats_within"])

        # On an H100 another kernel of attention (cuDNN's) runs by default than the deterministic one (flash). Masks of
        # dropout that differ would make the gradients differ by a good part of themselves.
        checks.equal(agrees, close, deterministic=False)


CLOSE = 1e-2


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the norm of the difference over that of the second."""
    return ((one - other).double().norm() / other.double().norm()).item()


def gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


# ---- Out of memory -------------------------------------------------------------------------------------------------


ROWS = 8


def out_of_memory(checks: Checks) -> None:
    context, device = checks.context, checks.device
    length, width, vocabulary = context.pick((512, 128, 8192), (12, 16, 64))

    def trainer(folder, batch, k, **kwargs):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=vocabulary, n_positions=length, n_embd=width, n_layer=2, n_head=2, bos_token_id=0,
            eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
        model.loss_type = "ForCausalLM"
        args = arguments(
            folder, per_device_train_batch_size=batch, gradient_accumulation_steps=k, accumulation_policy="fixed",
            num_train_epochs=1, **(checks.where | kwargs),
        )  # fmt: skip
        rows = Rows(4 * ROWS, length, vocabulary, numbered=True)
        return quiet(Recording(model=model, args=args, train_dataset=rows))

    def halved(folder, part):
        if context.on_gpu:
            whole = trainer(folder, ROWS, 2, max_steps=1)
            torch.cuda.reset_peak_memory_stats(device)
            whole.train()
            part["peak_without_limit_bytes"] = torch.cuda.max_memory_allocated(device)
            part["limit_bytes"] = int(0.72 * part["peak_without_limit_bytes"])
            del whole
            release(device)
            errors = torch.cuda.memory_stats(device).get("num_ooms", 0)
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(part["limit_bytes"] / total, device)
        try:
            ours = trainer(folder, ROWS, 2, auto_micro_batch=True)
            if context.rehearse:
                simulated = Memory(ours.model, most_rows=ROWS // 4)
            ours.train()
        finally:
            if context.on_gpu:
                torch.cuda.set_per_process_memory_fraction(1.0, device)
        if context.on_gpu:
            part["errors"] = torch.cuda.memory_stats(device).get("num_ooms", 0) - errors
        else:
            part["errors"] = len(simulated.failures)
        last = [line for line in ours.state.log_history if "loss" in line][-1]
        size = part["micro_batch"] = last.get("micro_batch_size", ROWS)
        part["batches"] = [sum(map(len, window)) for window in ours.windows]
        seen = sorted(row for window in ours.windows for piece in window for row in piece)
        smaller = trainer(folder, size, 2 * ROWS // size)
        smaller.train()
        part["bit_equal_to_the_smaller"] = weights_equal(ours.model, smaller.model)
        return (
            part["errors"] > 0
            and size < ROWS
            and set(part["batches"]) == {2 * ROWS} == {int(last["effective_batch_size"])}
            and seen == list(range(4 * ROWS))
            and part["bit_equal_to_the_smaller"]
        )

    checks.equal("out of memory: smaller micro-batches, the same batch, the same bits", halved)


# ---- fp16 ----------------------------------------------------------------------------------------------------------


def overflows(checks: Checks) -> None:
    context = checks.context
    points, make = precision_helpers.Points, precision_helpers.make

    def skipped(folder, part):
        poisoned = (3, 4, 9)
        data = fallback.factors(16, poisoned)
        with abilities(context):
            run = make(folder, points(data), scaler=fallback.GENTLE, precision="fp16", **checks.where)
            run.train()
            rows = fallback.rows_without(16, poisoned)
            clean = make(folder, points(data, rows), scaler=fallback.GENTLE, precision="fp16", **checks.where)
            clean.train()
        part |= {
            "skipped_steps": fallback.lines(run)[-1]["skipped_steps"],
            "loss_scale": gradient_scaler(run).get_scale(),
        }
        part["samples_seen"] = run.state.log_history[-1].get("samples_seen")
        return (
            part["skipped_steps"] == len(poisoned)
            and set(run.model.precisions) == {torch.float16}
            and run.model.numbers == list(range(16 * fallback.WINDOW))
            and weights_equal(run.model, clean.model)
        )

    def left(folder, part):
        scaler, poisoned, expected, _ = fallback.COLLAPSES["in a row"]
        data = fallback.factors(24, poisoned)
        with abilities(context):
            run = make(folder, points(data), scaler=scaler, precision="fp16", **checks.where)
            run.train()
        before = 2 * (expected[-1] + 1)
        part |= {
            "precisions": [f"{len([p for p in run.model.precisions if p == dtype])} x {dtype}"
                           for dtype in dict.fromkeys(run.model.precisions)],
            "now": run.accelerator.mixed_precision,
            "skipped_steps": fallback.lines(run)[-1]["skipped_steps"],
        }  # fmt: skip
        return (
            run.model.precisions == [torch.float16] * before + [torch.bfloat16] * (48 - before)
            and run.accelerator.scaler is None
            and all(math.isfinite(line["loss"]) for line in fallback.lines(run)[expected[-1] + 1 :])
        )

    checks.equal("fp16: windows that overflow leave no trace", skipped)
    checks.equal("fp16 is left for bf16 where it does not work out", left)


# ---- One rank ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def process_group(checks: Checks, backend: str) -> Iterator[bool]:
    """Context with a process group of one rank; whether it could be opened."""
    opened = False
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": str(free_port())}  # fmt: skip
    with mock.patch.dict(os.environ, variables):
        with checks.record.part(f"process group, {backend}") as part:
            torch.distributed.init_process_group(backend)
            value = torch.ones(4, device=checks.device)
            torch.distributed.all_reduce(value)
            part["backend"] = torch.distributed.get_backend()
            checks.record.check(all_reduce_name(backend), bool((value == 1).all()))
            opened = True
        try:
            yield opened
        finally:
            reset_accelerate()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def varying_k_run(checks: Checks, folder: Path, **kwargs: Any) -> AnyK:
    """Return a Trainer that has trained with dropout and varying k."""
    args = arguments(folder, gradient_accumulation_steps=2, **(checks.where | kwargs))
    trainer = quiet(AnyK(model=tiny_gpt2(dropout=0.1), args=args, train_dataset=Rows(), sequence=[2, 3, 1, 4]))
    torch.use_deterministic_algorithms(True)
    try:
        trainer.train()
    finally:
        torch.use_deterministic_algorithms(False)
    return trainer


def one_rank_checks(checks: Checks) -> None:
    """Make the checks that need a process group, if they are asked for."""
    backend = backend_of(checks)
    if not any(map(checks.context.wants, (all_reduce_name(backend), one_rank_name(backend), SYNC_NAME))):
        return
    alone = None
    with checks.record.part("a run without a process group"), tempfile.TemporaryDirectory() as folder:
        reset_accelerate()
        alone = varying_k_run(checks, Path(folder)).model
    with process_group(checks, backend) as opened:
        if opened and alone is not None:
            one_rank(checks, backend, alone)
        if opened:
            sync_batch_norm(checks)


def backend_of(checks: Checks) -> str:
    return "nccl" if checks.context.on_gpu else "gloo"


def all_reduce_name(backend: str) -> str:
    return f"{backend}: all_reduce on one rank"


def one_rank_name(backend: str) -> str:
    return f"{backend}: a run with varying k on one rank of DDP is that without, to the bit"


SYNC_NAME = "SyncBatchNorm: every placement is none to the bit, running statistics too"


def ddp_on_one_rank(checks: Checks) -> contextlib.AbstractContextManager:
    """Context in which Accelerate wraps a model in DDP on the only GPU; it does so on a CPU, and else from two on."""
    if not checks.context.on_gpu:
        return contextlib.nullcontext()
    return mock.patch.object(Accelerator, "multi_device", property(lambda self: True))


def one_rank(checks: Checks, backend: str, alone: torch.nn.Module) -> None:
    def equal(folder, part):
        with ddp_on_one_rank(checks):
            ours = varying_k_run(checks, folder, ddp_backend=backend)
        wrapped = part["wrapped_in"] = type(ours.model_wrapped).__name__
        part["distributed_type"] = str(ours.accelerator.distributed_type)
        part["bit_equal"] = weights_equal(ours.model, alone)
        return wrapped == "DistributedDataParallel" and weights_equal(ours.model, alone)

    checks.equal(one_rank_name(backend), equal)


class OwnKernel(torch.nn.SyncBatchNorm):
    """SyncBatchNorm that takes its own kernels on one rank, too, where the stock one takes those of BatchNorm."""

    def forward(self, x):
        if x.device.type == "cpu":  # there it has none
            return torch.nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
            )
        self.num_batches_tracked.add_(1)
        group = torch.distributed.group.WORLD
        return SyncBatchNormFunction.apply(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.eps, self.momentum, group, 1
        )


def sync_batch_norm(checks: Checks) -> None:
    def train(policy):
        torch.manual_seed(0)
        blocks = [
            torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1), OwnKernel(8), torch.nn.ReLU()) for _ in range(5)
        ]
        model = torch.nn.Sequential(*blocks).to(checks.device).train()
        x = torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(0)).to(checks.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        plan = PlacementPlan(policy, named_choices(policy, find_stages(model)))
        found = []
        with apply_placement(model, plan):
            for _ in range(4):
                loss = model(x).square().mean()
                loss.backward()
                found += [loss.detach(), gradients(model)]
                optimizer.step()
                optimizer.zero_grad()
        return found + [value.clone() for value in model.state_dict().values()]

    def equal(folder, part):
        part["kernel"] = "SyncBatchNorm's own" if checks.context.on_gpu else "batch_norm: a CPU has no other"
        stored = train("none")
        return all(
            torch.equal(a, b)
            for policy in ("all", "every_2", "sqrt")
            for a, b in zip(stored, train(policy), strict=True)
        )

    checks.equal(SYNC_NAME, equal)
