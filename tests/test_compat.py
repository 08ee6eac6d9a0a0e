"""Every private name of transformers that we touch is where we expect it: fails loudly when upstream moves it."""

import inspect
import re
from pathlib import Path

import pytest
from transformers import Trainer

import hf_trainopt
from hf_trainopt import _compat
from hf_trainopt._compat import PRIVATE_API, TESTED_TRANSFORMERS, check_transformers_version


PACKAGE = Path(hf_trainopt.__file__).parent


@pytest.mark.parametrize("name", PRIVATE_API)
def test_private_names_are_there(name):
    parameters, reason = PRIVATE_API[name]
    assert reason
    source = inspect.getsource(Trainer)
    if parameters is None:  # an attribute of instances
        assert re.search(rf"self\.{name}\b", source), f"Trainer.{name} is gone"
    else:
        found = inspect.signature(getattr(Trainer, name)).parameters
        assert set(parameters) <= set(found), f"Trainer.{name} takes {list(found)}"


def test_no_other_private_names_are_touched():
    """Names that begin with an underscore on `self`, `super()` or `trainer`: ours, or in the list."""
    source = (PACKAGE / "trainer.py").read_text() + (PACKAGE / "checks.py").read_text()
    used = set(re.findall(r"(?:self|super\(\)|trainer)\.(_[a-z]\w*)", source))
    ours = set(re.findall(r"def (_[a-z]\w*)", source)) | set(re.findall(r"self\.(_[a-z]\w*)(?:: [^=\n]+)? = ", source))
    of_trainer = {name for name in used if re.search(rf"(self\.|def ){name}\b", inspect.getsource(Trainer))}
    assert of_trainer <= set(PRIVATE_API), of_trainer - set(PRIVATE_API)
    assert used <= ours | set(PRIVATE_API), used - ours - set(PRIVATE_API)
    assert set(PRIVATE_API) <= used | ours, "listed, but not used any more"


def test_the_loop_is_what_we_wrap():
    """The places in the upstream loop that windows rely on."""
    run_epoch = inspect.getsource(Trainer._run_epoch)
    for fragment in (
        "range(num_update_steps_trained, num_update_steps_per_epoch)",
        "self.get_batch_samples(epoch_iterator, num_batches, self.args.device)",
        "self.training_step(model, inputs, num_items_in_batch)",
        "self.floating_point_ops(inputs)",
        "self._track_num_input_tokens(inputs)",
        "steps_trained_in_current_epoch // self.args.gradient_accumulation_steps",
        "self.control.should_epoch_stop",
    ):
        assert fragment in run_epoch, fragment
    assert "self.set_initial_training_values(args, train_dataloader)" in inspect.getsource(
        Trainer._inner_training_loop
    )
    saving = inspect.getsource(Trainer._save_checkpoint)
    assert 'f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"' in saving
    assert "self._get_output_dir(trial=trial)" in saving


def test_another_version_is_warned_of(monkeypatch):
    monkeypatch.setattr(_compat.transformers, "__version__", "99.0.0")
    with pytest.warns(UserWarning, match="not with 99"):
        check_transformers_version()
    assert len(TESTED_TRANSFORMERS) == 2
