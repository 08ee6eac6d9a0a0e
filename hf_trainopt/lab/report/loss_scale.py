"""Whether the training loss on a run's log lines is a mean, or k times one.

Stock `Trainer` hands `num_items_in_batch` to every model whose `forward` takes `**kwargs`, and expects the loss to be
divided by it: it adds up the k micro-batches of a step and doesn't divide by k. In about half of these classes (BERT
and the like) the loss is a mean of its own. Their logged `loss`, `train_loss` and `grad_norm` are k times too large,
their `eval_loss` isn't. With several ranks and `average_tokens_across_devices`, `Trainer` multiplies all of them by
the number of ranks.

No file of a run says so. It follows from k, from the class of the model and from the code of that class. The first
evaluation confirms it: there the training loss is about k times the evaluated one.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_trainopt.accumulation.loss_scaling import class_ignores_num_items

from .settings import reference_steps, settings_number


_TRAINING = ("loss", "train_loss", "grad_norm")


@dataclass(frozen=True)
class LossScale:
    """How a run's training loss relates to a mean over its micro-batches.

    Args:
        divisor: What losses and gradient norms of training are divided by to be means.
        evaluated: What evaluated losses are divided by.
        in_doubt: Whether the class of the model and the logged values don't say the same: no divisor is known.
        reason: Why, in a sentence, unless they are means.
    """

    divisor: float = 1.0
    evaluated: float = 1.0
    in_doubt: bool = False
    reason: str = ""

    def apply(self, key: str, value: float | None) -> float | None:
        """Return a logged value as a mean; `None` if it is in doubt whether it is one."""
        if value is None or (self.in_doubt and key in _TRAINING):
            return None
        is_evaluated = key.startswith("eval_") and key.endswith("_loss")
        return value / (self.divisor if key in _TRAINING else self.evaluated if is_evaluated else 1.0)


MEAN = LossScale()


def loss_scale(
    settings: Mapping[str, Any], config: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
) -> LossScale:
    """Return what the training losses of a run are.

    Args:
        settings: Arguments that it was started with.
        config: Config of its model, as it was saved.
        history: Lines of its log.
    """
    if any("accumulation_steps" in line for line in history):
        return MEAN  # EfficientTrainer with varying k logs means
    k = reference_steps(settings)
    if k is None or settings.get("label_smoothing_factor"):  # label smoothing divides by num_items_in_batch
        return MEAN
    averages = settings.get("average_tokens_across_devices") is True
    ranks = (settings_number(settings, "world_size") if averages else None) or 1
    factor = k * ranks
    if factor == 1:
        return MEAN
    name, ignores = _model_class(config)
    ratio = _ratio_to_evaluated(history)
    is_near_mean = k > 1 and ratio is not None and ratio <= math.sqrt(k)  # both are of all ranks
    if ignores and not is_near_mean:
        evaluations = f", in evaluations {ranks} times" if ranks > 1 else ""
        reason = f"{name} ignores num_items_in_batch, so stock Trainer logs {factor} times the mean loss{evaluations}"
        return LossScale(float(factor), float(ranks), reason=reason)
    if ignores:
        reason = f"{name} ignores num_items_in_batch, so stock Trainer should have logged {factor} times the mean loss"
        return LossScale(
            in_doubt=True, reason=f"{reason}; but that is {ratio:.2g} times the first evaluated loss only"
        )
    if ignores is None and k > 1 and ratio is not None and not is_near_mean and ratio < k**1.5:
        reason = (
            f"the training loss is {ratio:.2g} times the first evaluated loss. For models that ignore "
            f"num_items_in_batch, stock Trainer logs {factor} times the mean, and the class of this model isn't known"
        )
        return LossScale(in_doubt=True, reason=reason)
    return MEAN


def _model_class(config: Mapping[str, Any]) -> tuple[str, bool | None]:
    """Return the name of a model's class, and whether Trainer leaves it to a loss that ignores `num_items_in_batch`.

    `None`: the class isn't known, or isn't one of transformers.
    """
    import transformers

    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    cls = getattr(transformers, name, None) if name.isidentifier() else None
    if not inspect.isclass(cls) or not hasattr(cls, "forward"):
        return name, None
    kinds = {parameter.kind for parameter in inspect.signature(cls.forward).parameters.values()}
    if not getattr(cls, "accepts_loss_kwargs", inspect.Parameter.VAR_KEYWORD in kinds):
        return name, False  # Trainer divides by k itself
    labels = config.get("id2label")
    num_labels = len(labels) if isinstance(labels, Mapping) else None
    return name, class_ignores_num_items(cls, config.get("problem_type"), num_labels)


def _ratio_to_evaluated(history: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the training loss before the first evaluation over the loss of that; `None` without them.

    Later evaluations tell less: the two part where a model overfits.
    """
    before = None
    for line in history:
        for key, value in line.items():
            if key == "loss":
                before = value
            is_loss = key.startswith("eval_") and key.endswith("_loss")
            if is_loss and before is not None and _positive(before) and _positive(value):
                return before / value
    return None


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
