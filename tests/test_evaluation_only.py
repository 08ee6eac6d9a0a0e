"""A Trainer that is made to evaluate or predict is not refused for settings of training."""

import pytest
import torch
from helpers import Rows, arguments, quiet, tiny_gpt2

from hf_trainopt import EfficientTrainer
from hf_trainopt.core.versions import ACTIVATION_CHECKPOINTING


# What `train()` refuses, and the words that it does it with.
REFUSED = {
    "samplers": ({"train_sampling_strategy": "group_by_length"}, "set it to 'random'"),
    "batch size": ({"auto_find_batch_size": True}, "set it to False"),
    "optimizer": ({"optim": "lomo"}, "in the backward pass of every micro-batch"),
    "re-entrant": (
        {ACTIVATION_CHECKPOINTING: True, f"{ACTIVATION_CHECKPOINTING}_kwargs": {"use_reentrant": True}},
        "use_reentrant=True",
    ),
    "re-entrant placement": (
        {"checkpoint_placement": "all", f"{ACTIVATION_CHECKPOINTING}_kwargs": {"use_reentrant": True}},
        "remove use_reentrant",
    ),
    "weights": ({"precision": "fp32"}, "needs weights in fp32"),
    "budget": ({"memory_budget": "40KiB"}, "no placement needs less than"),
    "no epochs": ({"num_train_epochs": 0}, "nothing is trained"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_evaluation_and_prediction_work(case, tmp_path):
    settings, message = REFUSED[case]
    model = tiny_gpt2(dtype=torch.bfloat16 if case == "weights" else torch.float32)
    trainer = quiet(
        EfficientTrainer(
            model=model, args=arguments(tmp_path, **settings), train_dataset=Rows(12), eval_dataset=Rows(6)
        )
    )
    assert trainer.evaluate()["eval_loss"] > 0
    assert len(trainer.predict(Rows(6)).predictions) == 6
    with pytest.raises(ValueError, match=message):
        trainer.train()
