"""Measures what each choice does to each stage, in as few replays as possible."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..errors import ModifiedOutputError
from ..recompute.regions import activation_modules
from ..simulate.replay import Replay, StepReplayer
from .chain import OptionProfile, option_profile
from .plan import FULL, NO_REWRITES, STORE, Rewrites, StageChoice


logger = logging.getLogger(__name__)

Key = Any

# A class of stages is small beside one that is so many times larger, and then so many choices are tried for it.
_SMALL, _OF_A_SMALL_CLASS = 8, 5


class OptionExplorer:
    """Finds the choices that are worth having for each stage of a model, by replays in which stages differ.

    Stages that are the same (class, bytes, FLOPs) stand for each other, so that a stack of twelve equal layers tries
    twelve choices in one replay: what a stage does to memory does not depend on the choices of the others.

    Args:
        replayer: Replays steps.
        rewrites: The rewrites that are on in all of them.
        progress: Called after each replay with what was done.
        known: Stage -> choices that are worth having for the same model with another batch; `None`: all are tried.
    """

    def __init__(
        self,
        replayer: StepReplayer,
        rewrites: Rewrites = NO_REWRITES,
        progress: Callable[[str], None] | None = None,
        known: Mapping[str, Iterable[StageChoice]] | None = None,
    ):
        self._known = known
        self.replayer = replayer
        self.rewrites = rewrites
        self.progress = progress or (lambda text: None)
        self.baseline = replayer.replay_choices({}, rewrites)
        self.classes: dict[Key, list[str]] = {}
        for name in self.baseline.order:
            self.classes.setdefault(self._key(name), []).append(name)
        self._found: dict[Key, dict[StageChoice, OptionProfile]] = {key: {} for key in self.classes}
        # Operators whose outputs the stage modifies in place, so that they cannot be kept.
        self._modified: dict[Key, set[int]] = {key: set() for key in self.classes}

    def explore(self) -> dict[str, dict[StageChoice, OptionProfile]]:
        """Return stage -> choice -> profile, without choices that another one beats in everything."""
        for key, names in self.classes.items():
            self._found[key][STORE] = option_profile(self.baseline, self.baseline, names[0], STORE)
        if self._known is not None:
            self._measure({key: list(self._known.get(names[0], [])) for key, names in self.classes.items()})
        else:
            models = {key: self._model_of(key) for key in self.classes}
            full = {key: names for key, names in self.classes.items() if models[key] == key}
            self._measure({key: self._first_choices(names[0]) for key, names in full.items()})
            self._measure({key: self._nested_choices(key, names[0]) for key, names in full.items()})
            self._measure({key: self._taken_over(key, model) for key, model in models.items() if model != key})
        options = {}
        for key, names in self.classes.items():
            useful = _undominated(self._found[key])
            for name in names:
                # Its own, for what its backward pass leaves behind: the first stage frees what comes before it.
                options[name] = useful | {STORE: option_profile(self.baseline, self.baseline, name, STORE)}
        return {name: options[name] for name in self.baseline.order}

    def _key(self, name: str) -> Key:
        module = self.replayer.model.get_submodule(name)
        forward, backward = self.baseline.section("forward", name), self.baseline.section("backward", name)
        return (
            type(module),
            self.baseline.has_backward(name),
            self.baseline.boundary_bytes[name],
            forward.end_bytes - forward.start_bytes,
            forward.peak_bytes - forward.start_bytes,
            name in self.baseline.holds_output,
            *(
                (section.cost.flops, section.cost.num_bytes, tuple(section.compute_ops))
                for section in (forward, backward)
            ),
        )

    def _model_of(self, key: Key) -> Key:
        """Return the largest class with the same forward pass: of its choices, those worth having are enough to try.

        The first layer of a frozen model differs from the others in its backward pass only.
        """

        def forward_of(key: Key) -> Any:
            name = self.classes[key][0]
            section = self.baseline.section("forward", name)
            costs = (section.cost.flops, section.cost.num_bytes, tuple(section.compute_ops))
            return type(self.replayer.model.get_submodule(name)), self.baseline.has_backward(name), costs

        alike = [other for other in self.classes if forward_of(other) == forward_of(key)]
        return max(alike, key=lambda other: len(self.classes[other]))  # the first of equals

    def _taken_over(self, key: Key, model: Key) -> list[StageChoice]:
        """Return the choices of a larger class that are tried for this one: all, or some of all sizes if it is small.

        A class of one stage needs a replay of the whole model for each choice.
        """
        worth_having = _undominated(self._found[model])
        choices = sorted(worth_having, key=lambda choice: worth_having[choice].forward_delta)
        if len(self.classes[model]) < _SMALL * len(self.classes[key]) or len(choices) <= _OF_A_SMALL_CLASS:
            return choices
        last = len(choices) - 1
        places = {round(number * last / (_OF_A_SMALL_CLASS - 1)) for number in range(_OF_A_SMALL_CLASS)}
        return [choices[place] for place in sorted(places)]

    def _num_ops(self, name: str) -> int:
        return len(self.baseline.section("forward", name).compute_ops)

    def _first_choices(self, name: str) -> list[StageChoice]:
        """Everything recomputed, the activation functions, all but the compute-bound operators, and one more each."""
        if not self.baseline.has_backward(name):
            return []  # nothing is saved for a backward pass
        choices = [FULL]
        if activation_modules(self.replayer.model.get_submodule(name)):
            choices.append(StageChoice("activation"))
        count = self._num_ops(name)
        if count:
            every = range(count)
            choices.append(StageChoice("selective", tuple(every)))
            choices += [StageChoice("selective", _without(every, {i})) for i in every if count > 1]
        return choices

    def _nested_choices(self, key: Key, name: str) -> list[StageChoice]:
        """Operators given up one after another, in the order of bytes freed per second."""
        found, every = self._found[key], _without(range(self._num_ops(name)), self._modified[key])
        base = found.get(StageChoice("selective", every))
        if base is None or len(every) < 3:
            return []

        def worth(index: int) -> tuple[float, int]:
            one = found.get(StageChoice("selective", _without(every, {index})))
            if one is None:
                return (0.0, index)
            freed = base.forward_delta - one.forward_delta
            seconds = max(one.extra.device_seconds - base.extra.device_seconds, 1e-12)
            return (freed / seconds, -index)

        order = sorted(every, key=worth, reverse=True)
        given_up = [set(order[:count]) for count in range(2, len(every))]
        return [StageChoice("selective", tuple(i for i in every if i not in gone)) for gone in given_up]

    def _measure(self, wanted: dict[Key, list[StageChoice]]) -> None:
        waiting = wanted
        while True:
            waiting = {key: self._open(key, choices) for key, choices in waiting.items()}
            tried = [
                (key, name, choice)
                for key, choices in waiting.items()
                for name, choice in zip(self.classes[key], choices, strict=False)
            ]
            if not tried:
                return
            waiting = {key: choices[len(self.classes[key]) :] for key, choices in waiting.items()}
            try:
                replay = self._replay({name: choice for _, name, choice in tried})
            except ValueError:  # a choice that cannot work, such as to keep what the stage modifies in place
                self._measure_apart(tried)
                continue
            for key, name, choice in tried:
                self._found[key][choice] = option_profile(replay, self.baseline, name, choice)
            self.progress("one choice" if len(tried) == 1 else f"{len(tried)} choices at once")

    def _open(self, key: Key, choices: Iterable[StageChoice]) -> list[StageChoice]:
        """Return choices that are yet to be measured, without the outputs that turned out to be modified."""
        savable = (replace(choice, saved_ops=_without(choice.saved_ops, self._modified[key])) for choice in choices)
        return [
            choice
            for choice in dict.fromkeys(savable)
            if choice not in self._found[key] and (choice.saved_ops or choice.recompute != "selective")
        ]

    def _measure_apart(self, tried: list[tuple[Key, str, StageChoice]]) -> None:
        """Measure choices one by one; those that cannot work are no options."""
        for key, name, wanted in tried:
            while open_choices := self._open(key, [wanted]):
                (choice,) = open_choices
                try:
                    replay = self._replay({name: choice})
                except ValueError as error:
                    if not isinstance(error.__cause__, ModifiedOutputError):
                        logger.debug("%s cannot be %s: %s", name, choice, error)
                        break
                    self._modified[key].add(error.__cause__.index)
                    continue
                self._found[key][choice] = option_profile(replay, self.baseline, name, choice)
                self.progress("a choice of one stage")

    def _replay(self, trial: dict[str, StageChoice]) -> Replay:
        ordered = {name: trial.get(name, STORE) for name in self.baseline.order}
        return self.replayer.replay_choices(ordered, self.rewrites)


def _without(indices: Iterable[int], gone: set[int]) -> tuple[int, ...]:
    return tuple(index for index in indices if index not in gone)


def _undominated(found: dict[StageChoice, OptionProfile]) -> dict[StageChoice, OptionProfile]:
    """Drop the choices that another one beats; what stores everything and what recomputes everything stay."""
    kept: dict[StageChoice, OptionProfile] = {}
    for choice, option in found.items():
        beaten = any(
            other.dominates(option) and (not option.dominates(other) or rank(rival) < rank(choice))
            for rival, other in found.items()
            if rival != choice
        )
        if not beaten or choice in (STORE, FULL):
            kept[choice] = option
    return kept


def rank(choice: StageChoice) -> tuple[int, int]:
    """Order of choices that do the same: the simplest first."""
    return ("none", "activation", "full", "selective").index(choice.recompute), len(choice.saved_ops)
