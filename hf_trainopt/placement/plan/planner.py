"""From a model, a batch and a budget to a plan that a replay has shown to fit."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ...core.installed import installed_versions
from ...machine.device_memory import DeviceMemory, stated_memory
from ..errors import PlacementError
from ..rewrite.allowed_rewrites import allowed_rewrites, check_rewrites
from ..rewrite.rewrites import available_rewrites
from ..simulate.optimizers import name_of
from ..simulate.quantized import num_parameters
from ..simulate.replay import Replay, StepReplayer
from ..simulate.sharding import WORDS
from ..simulate.step_setup import DEFAULT_SETUP, StepSetup
from .budget import enough_share, gib, is_of_device, parse_budget, stated_budget
from .candidate import Candidate, rank_of
from .chain import ChainProfile, build_chain, chain_profile, choices_of, path_of
from .options import OptionExplorer
from .plan import NO_REWRITES, STORE, PlacementPlan, Rewrites, StageChoice
from .policies import named_choices
from .solver import Chain, Solution, least_peak, solve
from .stages import find_stages


logger = logging.getLogger(__name__)

# Solutions whose replay does not fit are corrected by the difference and solved again, this many times at most.
_CORRECTIONS = 6
# The chain was seen to count up to 3.5 % more bytes than a replay (T5), and never fewer. It is right about bytes that
# no choice changes, so this is of the rest.
_OVERESTIMATED = 1.1


class PlacementPlanner:
    """Profiles a model once and plans for as many budgets as wanted.

    Args:
        model: The model, real or made of fake tensors in `mode`.
        batch: An example batch, real or fake, of the largest shapes that training will meet.
        setup: How a training step is made.
        stages: Names of the stages, or a regular expression for them; `None`: found by `find_stages`.
        memory_rewrites: `"auto"`: any of those that the model allows, where they are cheaper than recomputing more;
            `"none"`; or names of `Rewrites`, separated by commas, that are on in every plan.
        available: The rewrites that the model allows; `None`: what its structure says.
        offload: Whether plans for a budget may keep inputs of recomputed stages on the host.
        mode: The mode of the model's fake tensors.
        like: A planner of the same model with another batch. Only choices that are worth having there are measured.
        progress: Called with a line of text after each piece of work.

    Raises:
        ValueError: The model has no stages, cannot be replayed, or does not allow the rewrites; or inputs are to be
            offloaded and the device is the host.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        setup: StepSetup = DEFAULT_SETUP,
        *,
        stages: Sequence[str] | str | None = None,
        memory_rewrites: str = "auto",
        available: Rewrites | None = None,
        offload: bool = False,
        mode: Any = None,
        like: "PlacementPlanner | None" = None,
        progress: Callable[[str], None] | None = None,
    ):
        self._like = like
        names = find_stages(model, stages) if stages is None or isinstance(stages, str) else list(stages)
        self.setup = setup
        if offload and not setup.device.link:
            raise PlacementError("placement_offload needs a GPU with memory of its own; leave it out here.")
        self._link = setup.device if offload else None
        self.progress = progress or (lambda text: None)
        self.available = available_rewrites(model) if available is None else available
        if setup.sharding.kind in ("fsdp2", "zero3"):
            if "chunked_loss" in check_rewrites(memory_rewrites):
                raise PlacementError(
                    f"the chunked loss needs the whole weight of the head, which {WORDS[setup.sharding.kind]} has in "
                    "pieces outside the head's forward pass; leave chunked_loss out of memory_rewrites."
                )
            self.available = dataclasses.replace(self.available, chunked_loss=False)
        self.allowed = allowed_rewrites(memory_rewrites, self.available)
        self.replayer = StepReplayer(model, batch, setup, names, mode)
        self.baseline = self.replayer.replay_choices(dict.fromkeys(self.replayer.stages, STORE))
        self.progress("the step without recomputation")
        self.stages = self.baseline.order
        self._candidates: dict[Any, Candidate] = {}
        self._chains: dict[float, dict[Rewrites, Chain]] = {}
        self._overestimate = 0
        self._add(dict.fromkeys(self.stages, STORE), self.allowed[0])

    # ---- Profiles --------------------------------------------------------------------------------------------------

    def _explored(self, fused: bool) -> OptionExplorer:
        known = None if self._like is None else self._like._options.get(fused)
        return OptionExplorer(self.replayer, Rewrites(fused_activations=fused), self.progress, known)

    @cached_property
    def _options(self) -> dict[bool, Any]:
        return {
            fused: self._explored(fused).explore() for fused in sorted({r.fused_activations for r in self.allowed})
        }

    @cached_property
    def profiles(self) -> dict[Rewrites, ChainProfile]:
        """Rewrites -> profile of the step with them."""
        if len(self.allowed) > 1:
            self.allowed = [rewrites for rewrites in self.allowed if self._runs_with(rewrites)]
        found = {}
        for rewrites in self.allowed:
            baseline = self._stored(rewrites)
            found[rewrites] = chain_profile(baseline, self._options[rewrites.fused_activations])
        return found

    def _runs_with(self, rewrites: Rewrites) -> bool:
        """Whether a step with these rewrites runs: T5 looks at the logits that a chunked loss leaves out."""
        try:
            self._stored(rewrites)
        except ValueError as error:
            logger.info("Plans have no %s for this model: %s", " and ".join(rewrites.names()), error)
            return False
        return True

    def chains(self, share: float = 1.0) -> dict[Rewrites, Chain]:
        """Return rewrites -> what the solver works on; `share` is the weight of the device's time."""
        if share not in self._chains:
            self._chains[share] = {
                rewrites: build_chain(profile, share, link=self._link) for rewrites, profile in self.profiles.items()
            }
        return self._chains[share]

    def replay(self, stages: Mapping[str, StageChoice], rewrites: Rewrites = NO_REWRITES) -> Replay:
        """Return what one step takes under these choices."""
        return self.replayer.replay_choices(stages, rewrites)

    def _stored(self, rewrites: Rewrites) -> Replay:
        """Return what one step takes in which rewrites are all that is done."""
        return self.replay(dict.fromkeys(self.stages, STORE), rewrites)

    def _rewritten_seconds(self, rewrites: Rewrites) -> float:
        """Seconds that rewrites together add to a step; negative where they save some."""
        return self._stored(rewrites).cost.seconds - self.baseline.cost.seconds

    @property
    def step_seconds(self) -> float:
        """Time of a step without recomputation and rewrites."""
        return self.baseline.cost.seconds

    @property
    def flops(self) -> int:
        """FLOPs of a step without recomputation and rewrites."""
        return self.baseline.cost.flops

    def _add(self, stages: Mapping[str, StageChoice], rewrites: Rewrites) -> Candidate:
        """Replay choices and keep them as a candidate."""
        key = (rewrites, tuple(stages.items()))
        if key not in self._candidates:
            replay = self.replay(stages, rewrites)
            extra = max(0.0, replay.cost.seconds - self._stored(rewrites).cost.seconds)
            rewritten = self._rewritten_seconds(rewrites)
            self._candidates[key] = Candidate(dict(stages), rewrites, replay.peak_bytes, extra, rewritten)
            self.progress(f"replayed a plan: {gib(replay.peak_bytes)}")
        return self._candidates[key]

    def _add_named(self, budget: int) -> None:
        """Replay the named placements that may be best: no plan of a budget is slower than one of them that fits.

        The chain contains them, so by its figures the solver's plan is at least as good. But the chain counts up to
        a few per cent too many bytes, and not equally many for all plans.
        """
        for policy in ("all", "sqrt", *(f"every_{n}" for n in (2, 3, 4) if n < len(self.stages))):
            stages, rewrites, best = self._choices(policy), self.allowed[0], self._best(budget)
            path = path_of(self.chains()[rewrites], stages)
            if path is not None:
                stored = self._stored(rewrites).cost
                least = sum(segment.seconds for segment in path) + stored.device_seconds - self.step_seconds
                if self._least_bytes(rewrites, self.chains()[rewrites].peak(path)) > budget:
                    continue
                if best is not None and best.rank <= rank_of(least, rewrites):
                    continue
            self._add(stages, rewrites)

    def _least_bytes(self, rewrites: Rewrites, counted: int) -> float:
        """Return the least peak that a replay may have where the chain counts so many bytes."""
        fixed = self.chains()[rewrites].fixed_bytes
        return fixed + (counted - fixed) / _OVERESTIMATED

    def _choices(self, policy: str, every_n: int = 2) -> dict[str, StageChoice]:
        """Return the choices of a named policy; runs end where a stage does not take the output of the one before."""
        choices = named_choices(policy, self.stages, every_n)
        if all(choice.run is None for choice in choices.values()):
            return choices
        split, number, before = {}, -1, None
        for name, choice in choices.items():
            if choice.run is None:
                split[name] = choice
            else:
                number += choice.run != before or name not in self.baseline.joined
                split[name] = dataclasses.replace(choice, run=number)
            before = choice.run
        return split

    @cached_property
    def floor(self) -> Candidate:
        """The candidate with the least peak."""
        found, everything = [], self._choices("all")
        for rewrites, chain in self.chains().items():
            chains = [chain]
            if self._link is not None:  # a chain can count more as moved than a replay does
                kept = tuple(segment for segment in chain.segments if not segment.choice[0].offload)
                chains.append(dataclasses.replace(chain, segments=kept))
            for one in chains:
                solution = least_peak(one)
                found.append((solution.peak_bytes, rewrites, choices_of(self.profiles[rewrites], solution.path)))
            path = path_of(chain, everything)
            found.append((chain.fixed_bytes if path is None else chain.peak(path), rewrites, everything))
        least = None
        for counted, rewrites, stages in sorted(found, key=lambda item: item[0]):
            if least is None or self._least_bytes(rewrites, counted) < least:  # what the replays could turn round
                replayed = self._add(stages, rewrites).peak_bytes
                least = replayed if least is None else min(least, replayed)
        return min(self._candidates.values(), key=lambda candidate: (candidate.peak_bytes, candidate.order))

    # ---- Plans -----------------------------------------------------------------------------------------------------

    def named(self, policy: str, every_n: int = 2) -> PlacementPlan:
        """Return the plan of a named policy, with the rewrites that are on in every plan.

        Raises:
            ValueError: There is no such policy.
        """
        return self._plan(policy, self._add(self._choices(policy, every_n), self.allowed[0]))

    def for_budget(self, memory_budget: str | int | float) -> PlacementPlan:
        """Return the plan whose replayed peak is within the budget and that costs the least time.

        What it costs is the time to recompute and what rewrites add to it or save of it (`extra_time_ratio` and
        `details["rewritten_time_ratio"]`, whose sum, where it is positive, does not rise with the budget).

        Args:
            memory_budget: As `parse_budget` takes it; shares are of the peak without recomputation.

        Raises:
            PlacementError: No plan fits; the message names the floor and what would lower it.
        """
        budget = self.bytes_of(memory_budget)
        if self.baseline.peak_bytes <= budget and self.allowed[0] == NO_REWRITES:
            stock = self._add(dict.fromkeys(self.stages, STORE), NO_REWRITES)  # nothing ranks above it
            return dataclasses.replace(self._plan("budget", stock), budget_bytes=budget, optimality_gap=0.0)
        self.check_budget(memory_budget)
        bound = self._search(budget)
        best = self._best(budget)
        gap = None if bound is None else max(0.0, best.cost_seconds - bound) / self.step_seconds
        if gap is not None:
            gap = round(gap, 6) if gap > 1e-6 else 0.0
        return dataclasses.replace(self._plan("budget", best), budget_bytes=budget, optimality_gap=gap)

    def check_budget(self, memory_budget: str | int | float) -> None:
        """Refuse a budget that no plan meets.

        Raises:
            PlacementError: It is below the floor; the message names the floor and what would lower it.
        """
        budget = self.bytes_of(memory_budget)
        if self.floor.peak_bytes > budget:
            raise PlacementError(self._over_budget(memory_budget, budget))

    def bytes_of(self, memory_budget: str | int | float) -> int:
        """Return a budget in bytes.

        Raises:
            PlacementError: It is said in terms of a device whose memory isn't known.
        """
        if is_of_device(memory_budget) and self.memory is None:
            raise PlacementError(
                f"memory_budget is '{memory_budget}', which needs a GPU, and the memory of this device isn't known; "
                "give a size, such as '12GiB'."
            )
        return parse_budget(memory_budget, self.baseline.peak_bytes, self.memory)

    @cached_property
    def memory(self) -> DeviceMemory | None:
        """Memory of the device: as the set-up has it, else by its data sheet; `None` if neither says it."""
        if self.setup.memory is not None or not self.setup.device.memory:
            return self.setup.memory
        return stated_memory(self.setup.device, self.replayer.model, self.setup.sharding.num_devices)

    def frontier(self, points: int = 10) -> list[PlacementPlan]:
        """Return plans from the baseline's peak down to the floor, each faster than all that need less memory."""
        high, low = self.baseline.peak_bytes, self.floor.peak_bytes
        for index in range(points):
            self._search(round(low + (high - low) * index / points))
        ordered = sorted(self._candidates.values(), key=lambda candidate: (candidate.peak_bytes, candidate.order))
        front: list[Candidate] = []
        for candidate in ordered:
            if not front or candidate.rank < front[-1].rank:
                front.append(candidate)
        return [self._plan("budget", candidate) for candidate in reversed(front)]

    def _search(self, budget: int) -> float | None:
        """Add the candidates that the solver finds for a budget; return a bound on the cost from below, in seconds.

        The solver adds up times, but a step takes the device's time or the host's, whichever is longer. So it first
        looks for the least time of the device. If the host limits the plan that it finds, it looks for the least time
        of the host, and if the device limits that one, for the least mean of both. No mean is above the longer of the
        two times, so each search gives a bound.
        """
        bounds = []
        for share in (1.0, 0.0, 0.5):
            bounds.append(self._search_with(budget, share))
            best = self._best(budget)
            cost = None if best is None else self.replay(best.stages, best.rewrites).cost
            host_limits = cost is not None and cost.host_seconds > cost.device_seconds
            if host_limits == (share == 0.0):
                break  # this plan has the least of the time that limits it
        self._add_named(budget)
        known = [bound for bound in bounds if bound is not None]
        return max(0.0, *known) if known else None

    def _best(self, budget: int) -> Candidate | None:
        """Return the best of the candidates that fit."""
        fitting = [candidate for candidate in self._candidates.values() if candidate.peak_bytes <= budget]
        return min(fitting, key=lambda candidate: candidate.order, default=None)

    def _search_with(self, budget: int, share: float) -> float | None:
        """Search with one weight of the device's time.

        The bound is the solver's, for the budget and the most by which it was seen to count too many bytes; `None` if
        it has no plan even so.
        """
        found = []
        for rewrites, chain in self.chains(share).items():
            # Where the chain counts too many bytes, its least peak may be above a budget that can be met.
            limit = max(budget, least_peak(chain).peak_bytes)
            if limit <= 1.15 * budget:
                found.append((rank_of(self._bound(rewrites, limit, share), rewrites), limit, rewrites))
        found.sort(key=lambda item: item[0])
        for rank, limit, rewrites in found:
            best = self._best(budget)
            if best is not None and best.rank <= rank:
                break  # replayed already, and no later one is better
            self._correct(budget, limit, rewrites, share)
        bounds = [
            self._bound(rewrites, max(limit, budget + self._overestimate), share) for _, limit, rewrites in found
        ]
        return min(bounds) if bounds else None

    def _bound(self, rewrites: Rewrites, limit: int, share: float) -> float:
        """Seconds that a step takes longer at least, with these rewrites and a peak within the limit."""
        solution = solve(self.chains(share)[rewrites], limit)
        stored = self._stored(rewrites).cost
        return solution.seconds - solution.gap_seconds + stored.mixed(share) - self.step_seconds

    def _correct(self, budget: int, limit: int, rewrites: Rewrites, share: float) -> None:
        """Replay what the solver finds for a budget with some rewrites, until it fits in truth as well."""
        chain, tried = self.chains(share)[rewrites], set()
        for _ in range(_CORRECTIONS):
            solution = solve(chain, limit)
            if solution is None:
                return
            candidate = self._add(choices_of(self.profiles[rewrites], solution.path), rewrites)
            tried.add(limit)
            self._overestimate = max(self._overestimate, solution.peak_bytes - candidate.peak_bytes)
            # Where the replay needs less than the chain said, more may fit; where it needs more, less.
            limit = budget + solution.peak_bytes - candidate.peak_bytes
            if candidate.peak_bytes > budget:
                limit = min(limit, min(tried) - (candidate.peak_bytes - budget))
            elif limit in tried or not self._faster(chain, limit, solution):
                return
            if limit in tried:
                return

    @staticmethod
    def _faster(chain: Chain, limit: int, than: Solution) -> bool:
        found = solve(chain, limit)
        return found is not None and found.seconds < than.seconds - 1e-9

    def _plan(self, policy: str, candidate: Candidate) -> PlacementPlan:
        replay = self.replay(candidate.stages, candidate.rewrites)
        stock = self._stored(candidate.rewrites)
        return PlacementPlan(
            policy=policy,
            stages=dict(candidate.stages),
            rewrites=candidate.rewrites,
            baseline_peak_bytes=self.baseline.peak_bytes,
            predicted_peak_bytes=candidate.peak_bytes,
            floor_peak_bytes=self.floor.peak_bytes if policy == "budget" and "floor" in vars(self) else None,
            extra_time_ratio=round(candidate.extra_seconds / self.step_seconds, 6),
            details={
                "extra_flops_ratio": round((replay.cost.flops - stock.cost.flops) / max(1, self.flops), 6),
                "rewritten_time_ratio": round(candidate.rewritten_seconds / self.step_seconds, 6),
                "baseline_by_kind": self.baseline.peak_by_kind(),
                "predicted_by_kind": replay.peak_by_kind(),
                "device": self.setup.device.name,
                "precision": str(self.setup.autocast_dtype or torch.float32).removeprefix("torch."),
                "accumulation_steps": self.setup.accumulation_steps,
                "sharding": self.setup.sharding.kind,
                "num_devices": self.setup.sharding.num_devices,
                "host_bytes": replay.host_bytes,
                "optimizer": name_of(self.replayer.optimizer),
                "model": type(self.replayer.model).__name__,
                "kernels": self.replayer.kernels,
                "num_parameters": num_parameters(self.replayer.model),
                "batch": _shapes(self.replayer.batch),
                "versions": installed_versions(("torch", "transformers", "timm", "hf-trainopt")),
            },
        )

    def _over_budget(self, memory_budget: str | int | float, budget: int) -> str:
        replay = self.replay(self.floor.stages, self.floor.rewrites)
        resident = replay.resident_bytes
        remedies = ["a smaller per_device_train_batch_size (with more gradient_accumulation_steps)"]
        remedies.append("shorter sequences or smaller images")
        missing = [
            name for name in self.available.names() if not any(getattr(rewrites, name) for rewrites in self.allowed)
        ]
        if missing:
            remedies.insert(0, f"memory_rewrites='auto' ({', '.join(missing)})")
        if self._link is None and self.setup.device.link:
            remedies.append("placement_offload=True")
        if resident > 0.4 * replay.peak_bytes:
            remedies.append("an optimizer with less state (optim='adafactor', 'adamw_8bit')")
        if self.setup.autocast_dtype is None and self.setup.device.kind == "cuda":
            remedies.append("bf16=True")
        floor = gib(self.floor.peak_bytes, up=True)
        share = enough_share(self.floor.peak_bytes, self.baseline.peak_bytes)
        return (
            f"memory_budget is {stated_budget(memory_budget, budget)}, but no placement needs less than {floor} (the "
            f"floor, {share} of the {gib(self.baseline.peak_bytes)} without recomputation; at its peak, parameters, "
            f"gradients and optimizer state take {gib(resident)}). Raise memory_budget to {floor.replace(' ', '')} or "
            f"{share}, or lower the floor with {'; '.join(remedies)}."
        )


def _shapes(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return {name: _shapes(value) for name, value in batch.items()}
    return list(batch.shape) if isinstance(batch, torch.Tensor) else type(batch).__name__
