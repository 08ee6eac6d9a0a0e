"""Contexts in which code that looks at values runs on fake tensors as it does in most real steps."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import masking_utils


@contextmanager
def no_logged_traceback() -> Iterator[None]:
    """Context in which PyTorch does not log what it raises anyway: an error of an operator on fake tensors."""
    noisy = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, noisy.disabled = noisy.disabled, True
    try:
        yield
    finally:
        noisy.disabled = was_disabled


@contextmanager
def no_checks_of_values() -> Iterator[None]:
    """Context in which assertions on the values of tensors pass: LLaVA and others count the tokens of images so."""
    stock = torch._check_tensor_all_with
    torch._check_tensor_all_with = lambda *args, **kwargs: None
    try:
        yield
    finally:
        torch._check_tensor_all_with = stock


@contextmanager
def no_packed_sequences() -> Iterator[None]:
    """Context in which transformers does not look for packed sequences in positions that the model made itself.

    On fake tensors it cannot see that there are none, and would build a mask that a real run does without.
    """
    stock = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = stock
