"""Accuracy and perplexity as `evaluate.Metric` classes that need no download (`evaluate.load` fetches a script)."""

from . import _required  # noqa: F401


# isort: split
import math
from collections.abc import Mapping
from typing import Any

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction


IGNORED_LABEL = -100


class Accuracy(evaluate.Metric):
    """Share of predictions that equal their reference; references of -100 (padding) do not count.

    `compute(predictions=..., references=...)` or `add_batch(...)` and then `compute()`, with flat sequences of
    integers: classes, or the tokens of all rows. Returns `{"accuracy": float}` in [0, 1], NaN when nothing counts.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of predictions that equal their reference; references of -100 do not count.",
            citation="",
            inputs_description="predictions: integers; references: integers, -100 where there is nothing to predict",
            features=datasets.Features(
                {"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}
            ),
            format="numpy",
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predictions, references = np.asarray(predictions), np.asarray(references)
        counted = references != IGNORED_LABEL
        if not counted.any():
            return {"accuracy": math.nan}
        return {"accuracy": float((predictions[counted] == references[counted]).mean())}


class Perplexity(evaluate.Metric):
    """Exponential of the mean loss per token.

    `predictions` are mean losses in nats per token and `references` the number of tokens each is the mean of, so that
    rows or batches of unequal length weigh as they should; for one loss over a whole evaluation any positive number
    will do. Returns `{"perplexity": float}`, infinite where the exponential overflows.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Exponential of the mean loss per token; infinite where that overflows.",
            citation="",
            inputs_description="predictions: mean losses in nats per token; references: numbers of tokens",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
            # Not in the format "numpy", which rounds to 32 bits.
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        mean_loss = float(np.average(np.asarray(predictions), weights=np.asarray(references)))
        try:
            return {"perplexity": math.exp(mean_loss)}
        except OverflowError:
            return {"perplexity": math.inf}


def predicted_classes(logits: Any, labels: Any) -> Any:
    """`preprocess_logits_for_metrics` of the scripts: the logits of a whole evaluation would fill the memory."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def accuracy_of_classes(evaluation: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` for one label per sample and `predicted_classes`."""
    return Accuracy(keep_in_memory=True).compute(
        predictions=evaluation.predictions.reshape(-1), references=evaluation.label_ids.reshape(-1)
    )


def accuracy_of_next_tokens(evaluation: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` for causal language models and `predicted_classes`: position t predicts label t+1."""
    return accuracy_of_classes(EvalPrediction(evaluation.predictions[:, :-1], evaluation.label_ids[:, 1:]))


def perplexity_of_loss(metrics: Mapping[str, float]) -> dict[str, float]:
    """Perplexity of `eval_loss`, the mean over all tokens."""
    return Perplexity(keep_in_memory=True).compute(predictions=[metrics["eval_loss"]], references=[1])
