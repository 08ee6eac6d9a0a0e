"""Other Trainer classes are made efficient with the mixins."""

from dataclasses import dataclass

import pytest
from helpers import Rows, arguments, quiet, tiny_gpt2
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_trainopt import EfficientTrainer, EfficientTrainerMixin, EfficientTrainingArguments
from hf_trainopt import EfficientTrainingArgumentsMixin as ArgumentsMixin


def test_seq2seq_trainer(tmp_path):
    class EfficientSeq2SeqTrainer(EfficientTrainerMixin, Seq2SeqTrainer):
        pass

    @dataclass
    class EfficientSeq2SeqTrainingArguments(ArgumentsMixin, Seq2SeqTrainingArguments):
        pass

    args = arguments(tmp_path, EfficientSeq2SeqTrainingArguments, predict_with_generate=True)
    trainer = quiet(EfficientSeq2SeqTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows()))
    trainer.train()
    assert trainer.state.log_history[-1]["samples_seen"] == 100


def test_a_trainer_with_its_own_training_step(tmp_path):
    """Overrides below the mixin run once a micro-batch, those above it once a window."""
    calls = {"below": 0, "above": 0}

    class Below(Trainer):
        def training_step(self, *args, **kwargs):
            calls["below"] += 1
            return super().training_step(*args, **kwargs)

    class Above(EfficientTrainerMixin, Below):
        def training_step(self, *args, **kwargs):
            calls["above"] += 1
            return super().training_step(*args, **kwargs)

    args = arguments(tmp_path, accumulation_policy="ramp", accumulation_ramp="0:4", num_train_epochs=1)
    quiet(Above(model=tiny_gpt2(), args=args, train_dataset=Rows(48))).train()
    assert calls == {"below": 16, "above": 4}


class Subscripts(EfficientTrainer):
    def training_step(self, model, inputs, *args):
        return super().training_step(model, {"input_ids": inputs["input_ids"]}, *args)


class Unpacks(EfficientTrainer):
    def training_step(self, model, inputs, *args):
        return model(**inputs).loss


class Searches(EfficientTrainer):
    def training_step(self, model, inputs, *args):
        return self.compute_loss(model, inputs, *args)


class Counts(EfficientTrainer):
    def get_batch_samples(self, *args):
        batches, items = super().get_batch_samples(*args)
        self.tokens = sum(batch["labels"].numel() for batch in batches)
        return batches, items


class Pops(EfficientTrainer):
    def training_step(self, model, inputs, *args):
        weight = inputs.pop("weight")
        return super().training_step(model, inputs, *args) * weight


class Moves(EfficientTrainer):
    def training_step(self, model, inputs, *args):
        return super().training_step(model, {key: value.float() for key, value in inputs.items()}, *args)


@pytest.mark.parametrize("cls", [Subscripts, Unpacks, Searches, Counts, Pops, Moves])
def test_a_window_that_is_taken_for_a_micro_batch_says_what_to_do(tmp_path, cls):
    trainer = quiet(cls(model=tiny_gpt2(), args=arguments(tmp_path), train_dataset=Rows(), compute_loss_func=scaled))
    error = AttributeError if cls in (Pops, Moves) else TypeError
    with pytest.raises(error, match=r"class Efficient\(EfficientTrainerMixin, YourTrainer\)"):
        trainer.train()


def scaled(outputs, labels, num_items_in_batch):
    return outputs.loss / num_items_in_batch


def test_trl_sft_trainer(tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not a dependency")
    from datasets import Dataset  # trl needs it
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [
        f"the {a} {b} jumps" for a in ("quick", "brown", "lazy", "red") for b in ("fox", "dog", "cat", "hen", "cow")
    ]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=64, special_tokens=["<pad>", "<eos>"], show_progress=False)
    )
    processing = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")

    class EfficientSFTTrainer(EfficientTrainerMixin, trl.SFTTrainer):
        pass

    @dataclass
    class EfficientSFTConfig(ArgumentsMixin, trl.SFTConfig):
        pass

    args = arguments(
        tmp_path, EfficientSFTConfig, max_length=16, gradient_accumulation_steps=2, bf16=False,
        gradient_checkpointing=False, accumulation_policy="noise_scale",
    )  # fmt: skip
    trainer = quiet(
        EfficientSFTTrainer(
            model=tiny_gpt2(), args=args, train_dataset=Dataset.from_dict({"text": texts}), processing_class=processing
        )
    )
    trainer.train()
    assert trainer.state.log_history[-1]["samples_seen"] == 40
    assert "accumulation_steps" in trainer.state.log_history[0]
    assert trainer.trainopt.accumulation.controller.tracker.num_windows > 2


def test_hyperparameter_changes_between_calls_are_seen(tmp_path):
    args = arguments(tmp_path, accumulation_policy="ramp", accumulation_ramp="0:4", num_train_epochs=1)
    trainer = quiet(EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows(48)))
    trainer.train()
    assert trainer.state.global_step == 4
    args.accumulation_ramp = "0:8"
    trainer.train()
    assert trainer.state.global_step == 2


def test_the_module_is_typed():
    from importlib.resources import files

    assert (files("hf_trainopt") / "py.typed").is_file()
    assert issubclass(EfficientTrainingArguments, ArgumentsMixin)


@dataclass
class OwnArguments(TrainingArguments):
    beta: float = 0.5


class Converts(Trainer):
    """Makes arguments of its own class of plain ones, as TRL's trainers do."""

    def __init__(self, model=None, args=None, **kwargs):
        if not isinstance(args, OwnArguments):
            args = OwnArguments(**args.to_dict())
        super().__init__(model, args, **kwargs)


class EfficientConverts(EfficientTrainerMixin, Converts):
    pass


@pytest.mark.parametrize("by_name", [True, False])
def test_a_trainer_that_makes_arguments_of_its_own_class_keeps_our_settings(tmp_path, by_name):
    given = arguments(tmp_path, accumulation_policy="ramp", accumulation_ramp="0:4", num_train_epochs=1)
    passed = {"args": given} if by_name else {}
    trainer = quiet(EfficientConverts(tiny_gpt2(), *([] if by_name else [given]), **passed, train_dataset=Rows(48)))
    assert isinstance(trainer.args, OwnArguments)
    assert (trainer.args.beta, trainer.args.accumulation_ramp) == (0.5, "0:4")
    assert given.to_dict()["accumulation_ramp"] == "0:4"
    trainer.train()
    assert trainer.state.global_step == 4
    trainer.save_model(tmp_path)  # training_args.bin
