"""A placement and what others do to the same model: caches, flags of transformers, forward methods."""

import logging

import pytest
import torch
from helpers import Rows, arguments, quiet, weights_equal
from placement_models import gpt2, llama
from transformers import T5Config, T5ForConditionalGeneration, TrainerCallback

from hf_trainopt import EfficientTrainer
from hf_trainopt.core.versions import ACTIVATION_CHECKPOINTING
from hf_trainopt.placement import apply_placement
from hf_trainopt.placement.plan.plan import PlacementPlan, StageChoice
from hf_trainopt.placement.plan.stages import find_stages


def t5():
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=97, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=None,
        )
    )  # fmt: skip


MODELS = {
    "llama": lambda: llama(initializer_range=0.5),
    "gpt2": lambda: gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.5),  # cache by position
    "t5": t5,
}
PLANS = {
    "all": lambda names: {name: StageChoice("full") for name in names},
    "every second": lambda names: {
        name: StageChoice("full" if i % 2 == 0 else "none") for i, name in enumerate(names)
    },
    "a run": lambda names: {name: StageChoice("full", run=1) for name in names},
    "activations": lambda names: {name: StageChoice("activation") for name in names},
}


def plan_of(model, kind):
    return PlacementPlan("mine", PLANS[kind](find_stages(model)))


def train_mode_without_dropout(model):
    model.train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_generation_in_train_mode_uses_its_cache(model, kind):
    model = train_mode_without_dropout(model())
    prompt = torch.randint(3, 90, (2, 9))

    @torch.no_grad()
    def sample():
        return model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, pad_token_id=0,
            eos_token_id=None, use_cache=True,
        ).tolist()  # fmt: skip

    expected = sample()
    if kind == "a run" and isinstance(model, T5ForConditionalGeneration):
        pytest.skip("encoder and decoder are two runs")
    with apply_placement(model, plan_of(model, kind)):
        assert sample() == expected
        with torch.no_grad():
            assert (
                model(prompt, decoder_input_ids=prompt, use_cache=True).past_key_values is not None
                if isinstance(model, T5ForConditionalGeneration)
                else model(prompt, use_cache=True).past_key_values.get_seq_length() == 9
            )


def test_a_filled_cache_is_an_error_that_names_it():
    """A recomputation would update it twice; transformers drops its content without an error."""
    model = llama()
    tokens = torch.randint(3, 90, (2, 9))
    with torch.no_grad():
        past = model.eval()(tokens, use_cache=True).past_key_values
    with (
        apply_placement(model.train(), plan_of(model, "all")),
        pytest.raises(RuntimeError, match=r"past_key_values.*use_cache=False.*Prefix tuning"),
    ):
        model(tokens, past_key_values=past, labels=tokens)


class Switches(TrainerCallback):
    """Turns activation checkpointing of transformers off and on, as callbacks that sample do."""

    def __init__(self, do):
        self.do = do

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            self.do(model)


def switch(model, how):
    getattr(model, f"{ACTIVATION_CHECKPOINTING}_{how}")()


def drop_forward(model):
    for module in model.model.layers:
        module.__dict__.pop("forward", None)


CHANGES = {
    "enable": lambda model: switch(model, "enable"),
    "off and on": lambda model: (switch(model, "disable"), switch(model, "enable")),
    "off": lambda model: switch(model, "disable"),
    "forward": drop_forward,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_plan_that_is_overwritten_is_put_back(change, tmp_path, caplog):
    """Layers 0 and 2 of three are recomputed once a micro-batch, in each step."""
    model, calls, by_step = llama(), [0, 0, 0], []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, i=index: calls.__setitem__(i, calls[i] + 1))

    class Counts(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            calls[:] = [0, 0, 0]

        def on_step_end(self, args, state, control, **kwargs):
            by_step.append(list(calls))

    def run(folder, model, **kwargs):
        settings = {"accumulation_policy": "fixed", "max_steps": 4, "gradient_accumulation_steps": 1} | kwargs
        trainer = quiet(EfficientTrainer(model=model, args=arguments(folder, **settings), train_dataset=Rows()))
        if kwargs:
            trainer.add_callback(Counts())
            trainer.add_callback(Switches(CHANGES[change]))
        trainer.train()
        return trainer

    with caplog.at_level(logging.WARNING):
        planned = run(tmp_path, model, checkpoint_placement="every_n")
    assert by_step == [[2, 1, 2]] * 4
    assert caplog.text.count("The checkpoint placement is put back") == (0 if change == "off" else 1)
    assert weights_equal(planned.model, run(tmp_path / "plain", llama()).model)
    assert not any("forward" in layer.__dict__ for layer in planned.model.model.layers)
    assert not getattr(planned.model, f"is_{ACTIVATION_CHECKPOINTING}")
