"""What replays say about single stages, put together to the chain that the solver works on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ...machine.costs import Cost
from ...machine.devices import DeviceSpec
from ..simulate.host_copies import copy_cost
from ..simulate.replay import SAVED_TENSORS, Replay
from .plan import FULL, STORE, StageChoice
from .solver import Chain, Segment


# Choosing less is better where the time is the same: this share of a step is added for each stage that is touched.
_TOUCH = 1e-9


@dataclass(frozen=True)
class OptionProfile:
    """What one choice does to one stage.

    Args:
        choice: The choice.
        forward_delta: Bytes that its forward pass leaves behind, its output not counted.
        forward_peak: Most bytes in its forward pass beyond those at its beginning.
        backward_delta: Change of bytes over its backward pass.
        backward_peak: Most bytes in its backward pass beyond those at its beginning.
        holds_output: Whether its output is kept for its own backward pass.
        extra: Cost beyond storing everything.
    """

    choice: StageChoice
    forward_delta: int
    forward_peak: int
    backward_delta: int
    backward_peak: int
    holds_output: bool
    extra: Cost

    def dominates(self, other: "OptionProfile") -> bool:
        """Whether this is nowhere worse than `other`."""
        return (
            self.forward_delta <= other.forward_delta
            and self.forward_delta + self.backward_peak <= other.forward_delta + other.backward_peak
            and self.forward_peak <= other.forward_peak
            and self.holds_output <= other.holds_output
            and self.extra.device_seconds <= other.extra.device_seconds
            and self.extra.host_seconds <= other.extra.host_seconds
        )


@dataclass(frozen=True)
class StageProfile:
    """What can be done with one stage.

    Args:
        name: Module name.
        boundary_bytes: Size of its output.
        after_delta: Bytes that the code between it and the next stage leaves behind.
        again: Cost of its forward pass within a recomputation.
        options: Choice -> profile; `STORE` is among them.
        joined: Whether it takes an output of the stage before it as it is, so that both can be of one run.
        led: Whether that is the first of its inputs that was computed, which is the one that can be moved to the host.
    """

    name: str
    boundary_bytes: int
    after_delta: int
    again: Cost
    options: Mapping[StageChoice, OptionProfile]
    joined: bool = True
    led: bool = True


@dataclass(frozen=True)
class ChainProfile:
    """A whole step as the sum of its parts.

    Args:
        stages: In the order of the forward pass.
        before_bytes: Live bytes when the first stage begins.
        head_peak: Most bytes between the end of the last stage and the beginning of its backward pass, beyond those
            at its end.
        head_delta: Change of bytes over that time.
        fixed_peak: Peak of what no choice changes, in bytes: what comes before the first stage, its backward pass, the
            optimizer's step.
        cost: Cost of the step that recomputes nothing.
    """

    stages: Sequence[StageProfile]
    before_bytes: int
    head_peak: int
    head_delta: int
    fixed_peak: int
    cost: Cost


def option_profile(replay: Replay, baseline: Replay, stage: str, choice: StageChoice) -> OptionProfile:
    """Return what `choice` does to `stage`, from a replay in which the stage made it."""
    forward, backward = replay.section("forward", stage), replay.section("backward", stage)
    cost = forward.cost + backward.cost
    stock = baseline.section("forward", stage).cost + baseline.section("backward", stage).cost
    extra = cost - stock
    return OptionProfile(
        choice,
        forward.end_bytes - forward.start_bytes,
        forward.peak_bytes - forward.start_bytes,
        backward.end_bytes - backward.start_bytes,
        backward.peak_bytes - backward.start_bytes,
        stage in replay.holds_output,
        replace(extra, device_seconds=max(0.0, extra.device_seconds), host_seconds=max(0.0, extra.host_seconds)),
    )


def chain_profile(baseline: Replay, options: Mapping[str, Mapping[StageChoice, OptionProfile]]) -> ChainProfile:
    """Return the profile of a step from the replay without recomputation and the options of each stage."""
    names = baseline.order
    sections = baseline.sections
    starts: dict[str, list[int]] = {}  # one for each forward pass
    for index, section in enumerate(sections):
        if section.phase == "forward":
            starts.setdefault(section.stage, []).append(index)
    stages = []
    for name in names:
        forward = baseline.section("forward", name)
        afters = [sections[index + 1] for index in starts[name]]
        delta = sum(after.end_bytes - after.start_bytes for after in afters if after.phase == "between")
        stages.append(
            StageProfile(
                name,
                baseline.boundary_bytes[name],
                delta,
                replace(forward.cost, host_seconds=(1 + SAVED_TENSORS) * forward.cost.host_seconds),
                options[name],
                name in baseline.joined,
                name in baseline.led,
            )
        )
    head = baseline.section("head")
    before = starts[names[0]][0]
    outside = [section for section in sections if section.phase in ("tail", "step")]
    return ChainProfile(
        stages,
        sections[before].start_bytes,
        head.peak_bytes - head.start_bytes,
        head.end_bytes - head.start_bytes,
        max(section.peak_bytes for section in outside + sections[:before]),
        sum((section.cost for section in sections), Cost()),
    )


def build_chain(
    profile: ChainProfile, share: float = 1.0, *, max_run: int | None = None, link: DeviceSpec | None = None
) -> Chain:
    """Return the solver's chain: every option of every stage, and every run of up to `max_run` stages.

    Args:
        profile: The step.
        share: Weight of the device's time against the host's, 0 to 1.
        max_run: Longest run that is looked at; `None`: all if there are at most 48 stages, else 2√L.
        link: Device over whose link to the host the inputs of recomputed stages may be moved; `None`: none is.
    """
    stages = profile.stages
    count = len(stages)
    if max_run is None:
        max_run = count if count <= 48 else 2 * math.ceil(math.sqrt(count))
    # What the backward passes of all later stages and of the head leave behind (gradients), whatever is chosen there.
    left = [0] * (count + 1)
    left[count] = profile.head_delta
    for index in reversed(range(count)):
        left[index] = left[index + 1] + _net(stages, index)
    touch = _TOUCH * profile.cost.seconds
    segments = []
    for index, stage in enumerate(stages):
        for option in stage.options.values():
            held = stage.boundary_bytes if option.holds_output else 0
            backward = option.forward_delta + held + left[index + 1] + option.backward_peak
            segments.append(
                Segment(
                    index,
                    index + 1,
                    option.forward_delta + stage.after_delta + stage.boundary_bytes,
                    max(option.forward_peak, backward),
                    option.extra.mixed(share) + touch * (option.choice != STORE),
                    (option.choice,),
                )
            )
    for start in range(count):
        for stop in range(start + 2, min(count, start + max_run) + 1):
            if not stages[stop - 1].joined or not all(FULL in stage.options for stage in stages[start:stop]):
                break
            segments.append(_run(stages, start, stop, left, touch, share))
    if link is not None:
        segments += _offloaded(stages, segments, link, share)
    return Chain(count, tuple(segments), profile.before_bytes, profile.head_peak, profile.fixed_peak)


def _offloaded(
    stages: Sequence[StageProfile], segments: Sequence[Segment], link: DeviceSpec, share: float
) -> list[Segment]:
    """Return the segments once more, with their inputs on the host.

    The input is the output of the stage before, and counts among what that one keeps. From the forward pass of the
    segment to its own backward pass it isn't on the device; in both passes it is. Nothing is freed where the stage
    before keeps its output for its backward pass, nor, maybe, at the first stage, whose input the model's code holds.
    """
    found = []
    for segment in segments:
        first = segment.choice[0]
        if not segment.start or first.recompute not in ("full", "selective") or not stages[segment.start].led:
            continue
        before = stages[segment.start - 1]
        if any(option.holds_output for option in before.options.values()):
            continue
        copies = copy_cost(before.boundary_bytes, link) + copy_cost(before.boundary_bytes, link)
        found.append(
            replace(
                segment,
                keep_bytes=segment.keep_bytes - before.boundary_bytes,
                seconds=segment.seconds + copies.mixed(share),
                choice=(replace(first, offload=True), *segment.choice[1:]),
            )
        )
    return found


def _net(stages: Sequence[StageProfile], index: int) -> int:
    """Bytes that are there after the backward pass of a stage and were not before its forward pass."""
    option = stages[index].options[STORE]
    before = stages[index - 1].after_delta if index else 0
    return option.forward_delta + option.backward_delta + before


def _run(
    stages: Sequence[StageProfile], start: int, stop: int, left: Sequence[int], touch: float, share: float
) -> Segment:
    """Return the segment in which stages `start` to `stop - 1` are recomputed together."""
    members = stages[start:stop]
    after = sum(stage.after_delta for stage in members)
    keep = sum(stage.options[FULL].forward_delta for stage in members)
    need = 0
    for number, stage in enumerate(members):  # the forward pass: one boundary at a time
        entering = members[number - 1].boundary_bytes if number else 0
        need = max(need, entering + stage.options[FULL].forward_peak)
    inside = 0
    base = keep + after - members[-1].after_delta + left[stop]
    for number, stage in enumerate(members):
        option = stage.options[STORE]
        need = max(need, base + inside + option.forward_peak)
        later = left[start + number + 1] - left[stop]
        # Recomputed outputs are no boundaries of the step: one that its own stage saves lives on in here.
        held = stage.boundary_bytes if option.holds_output else 0
        need = max(need, base + inside + option.forward_delta + held + later + option.backward_peak)
        inside += option.forward_delta + stage.boundary_bytes
    again = sum((stage.again for stage in members[:-1]), Cost()) + members[-1].options[FULL].extra
    return Segment(
        start,
        stop,
        keep + after + members[-1].boundary_bytes,
        need,
        again.mixed(share) + touch * len(members),
        (FULL,) * len(members),
    )


def path_of(chain: Chain, stages: Mapping[str, StageChoice]) -> tuple[Segment, ...] | None:
    """Return the path on which each stage makes the given choice; `None` if the chain lacks one of these choices."""
    known = {(segment.start, segment.stop, segment.choice): segment for segment in chain.segments}
    choices, path, start = list(stages.values()), [], 0
    while start < len(choices):
        stop = start + 1
        run = choices[start].run
        while run is not None and stop < len(choices) and choices[stop].run == run:
            stop += 1
        members = tuple(replace(choice, run=None) for choice in choices[start:stop])
        segment = known.get((start, stop, members))
        if segment is None:
            return None
        path.append(segment)
        start = stop
    return tuple(path)


def choices_of(profile: ChainProfile, path: Sequence[Segment]) -> dict[str, StageChoice]:
    """Return the choice of each stage on a path of the solver."""
    choices: dict[str, StageChoice] = {}
    run = 0
    for segment in path:
        names = [stage.name for stage in profile.stages[segment.start : segment.stop]]
        if len(names) > 1:
            choices |= {name: replace(c, run=run) for name, c in zip(names, segment.choice, strict=True)}
            run += 1
        else:
            choices[names[0]] = segment.choice[0]
    return choices
