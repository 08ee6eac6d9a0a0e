"""Our metrics against NumPy, and without any download."""

import needs_scripts  # noqa: F401


# isort: split
import math

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from hf_trainopt.scripting.metrics import (
    Accuracy,
    Perplexity,
    accuracy_of_classes,
    accuracy_of_next_tokens,
    perplexity_of_loss,
    predicted_classes,
)


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def test_accuracy_ignores_padding(generator):
    predictions = generator.integers(0, 3, 1000)
    references = generator.integers(0, 3, 1000)
    references[::7] = -100
    counted = references != -100
    expected = float(np.mean(predictions[counted] == references[counted]))
    assert Accuracy(keep_in_memory=True).compute(predictions=predictions, references=references) == {
        "accuracy": expected
    }


def test_accuracy_in_batches(generator, tmp_path):
    predictions, references = generator.integers(0, 2, (2, 10, 8))
    metric = Accuracy(cache_dir=str(tmp_path))
    for row, reference in zip(predictions, references, strict=True):
        metric.add_batch(predictions=row, references=reference)
    assert metric.compute()["accuracy"] == float(np.mean(predictions == references))


def test_accuracy_of_nothing():
    result = Accuracy(keep_in_memory=True).compute(predictions=[1, 2], references=[-100, -100])
    assert math.isnan(result["accuracy"])


def test_perplexity_weighs_by_tokens(generator):
    losses, tokens = generator.random(20), generator.integers(1, 100, 20)
    expected = math.exp(np.sum(losses * tokens) / np.sum(tokens))
    result = Perplexity(keep_in_memory=True).compute(predictions=losses, references=tokens)
    assert result["perplexity"] == pytest.approx(expected, rel=1e-12)


def test_perplexity_overflow_and_of_loss():
    assert perplexity_of_loss({"eval_loss": 1000.0}) == {"perplexity": math.inf}
    assert perplexity_of_loss({"eval_loss": 2.0})["perplexity"] == pytest.approx(math.exp(2.0))


def test_next_tokens_are_compared_with_shifted_labels():
    labels = np.array([[5, 6, 7, -100], [1, 2, 3, 4]])
    predictions = np.array([[6, 7, 0, 0], [2, 0, 4, 9]])
    # Targets are 6 7 (padding) and 2 3 4: four of the five are met.
    assert accuracy_of_next_tokens(EvalPrediction(predictions, labels)) == {"accuracy": 0.8}


def test_classes():
    logits = torch.tensor([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0]])
    predictions = predicted_classes((logits, "cache"), None)
    assert torch.equal(predictions, predicted_classes(logits, None))
    result = accuracy_of_classes(EvalPrediction(predictions.numpy(), np.array([1, 0, 0])))
    assert result["accuracy"] == pytest.approx(2 / 3)
