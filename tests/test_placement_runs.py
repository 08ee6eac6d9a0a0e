"""Placement around the plain run: second runs, state of one's own, odd data, frozen layers, exceptions, plan files."""

import collections
import copy
import itertools
import json
import logging
import random
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from helpers import Rows, arguments, quiet, table
from placement_models import gpt2, llama, tokens
from test_placement_trainer import FIXED, losses, measured, run
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import TrainerCallback, set_seed

from hf_trainopt import EfficientTrainer
from hf_trainopt.core.state import STATE_NAME
from hf_trainopt.core.versions import ACTIVATION_CHECKPOINTING
from hf_trainopt.machine.devices import DEVICES
from hf_trainopt.placement.part import PLAN_NAME
from hf_trainopt.placement.plan.budget import gib, parse_budget
from hf_trainopt.placement.plan.plan import FULL, STORE, PlacementPlan, Rewrites, StageChoice
from hf_trainopt.placement.plan.plan_model import plan_placement
from hf_trainopt.placement.plan.planner import PlacementPlanner
from hf_trainopt.placement.recompute.apply import apply_placement
from hf_trainopt.placement.simulate.example_batch import largest_batch
from hf_trainopt.placement.simulate.step_setup import StepSetup
from hf_trainopt.reliability.manifest import MANIFEST_NAME


CPU = StepSetup(device=DEVICES["cpu"])
EXACT = {"memory_budget": "70%", "memory_rewrites": "none"}
SHORT = {**FIXED, "gradient_accumulation_steps": 1, "max_steps": 2}


@pytest.fixture(autouse=True)
def _no_timing(monkeypatch):
    """The CPU by its data sheet: the same times in every run, and none spent on measuring them."""
    monkeypatch.setattr("hf_trainopt.placement.plan.run_planner.device_spec", lambda device: DEVICES["cpu"])


# ---- Second runs, optimizers ---------------------------------------------------------------------------------------


class Handing(torch.optim.AdamW):
    """Hands on what it does not name, and keeps more in its defaults than anything takes."""

    def __init__(self, params, warmth=3, **kwargs):
        super().__init__(params, **kwargs)
        self.defaults |= {"warmth": warmth, "unknown": 1}


class Needy(torch.optim.SGD):
    def __init__(self, params, helper):
        super().__init__(params, lr=helper["lr"])


@pytest.mark.parametrize("optimizer", [None, Handing], ids=["args", "own"])
def test_a_second_run_is_planned_and_measured_as_the_first(tmp_path, optimizer):
    model = gpt2()
    own = {"optimizers": (optimizer(model.parameters(), lr=1e-3), None)} if optimizer else {}
    trainer = run(tmp_path, model=lambda: model, trainer_kwargs=own, **SHORT, **EXACT)
    first = trainer.placement_plan
    assert measured(trainer) == pytest.approx(1, abs=0.01)
    trainer.train()
    second = trainer.placement_plan
    assert second is not first
    assert second.stages == first.stages
    assert second.predicted_peak_bytes == first.predicted_peak_bytes
    assert second.measured_peak_bytes == pytest.approx(first.measured_peak_bytes, rel=0.001)
    assert not second.is_stock


def test_a_second_run_in_bf16_with_the_chunked_loss(tmp_path):
    """Accelerate has put a `forward` of its own on the model by then."""
    trainer = run(tmp_path, **SHORT, bf16=True, checkpoint_placement="every_n", memory_rewrites="chunked_loss")
    first = trainer.placement_plan
    trainer.train()
    assert trainer.placement_plan.predicted_peak_bytes == first.predicted_peak_bytes
    assert measured(trainer) == pytest.approx(1, abs=0.02)


def test_an_optimizer_that_cannot_be_made_again(tmp_path, caplog):
    def needy():
        model = gpt2()
        return {
            "model": lambda: model,
            "trainer_kwargs": {"optimizers": (Needy(model.parameters(), {"lr": 0.1}), None)},
        }

    with pytest.raises(ValueError, match=r"no optimizer like that of the run.*helper.*pass optim=.*'all'"):
        run(tmp_path, **needy(), **SHORT, memory_budget="70%")
    trainer = run(tmp_path, **needy(), **SHORT, checkpoint_placement="all")
    assert "No peak is predicted for checkpoint_placement='all': no optimizer like" in caplog.text
    assert trainer.state.global_step == 2
    assert trainer.placement_plan.counts() == {"full": 4}


# ---- Own compute_loss ----------------------------------------------------------------------------------------------


class Meter:
    def __init__(self):
        self.count, self.values = 0, []

    def update(self, loss):
        self.count += 1
        self.values.append(loss)


class Metric(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(()))

    def update(self, loss):
        self.total = self.total + loss


class Keeps(EfficientTrainer):
    """Keeps things in every place that there is."""

    seen: list = []  # noqa: RUF012

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = 0
        self.last = None
        self.list = []
        self.nested = {"train": collections.defaultdict(list)}
        self.recent = collections.deque(maxlen=100)
        self.meter, self.metric = Meter(), Metric()
        self.keep = self.meter.update
        self.steps, self.sums = torch.zeros(()), [torch.zeros(2)]

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        kept = loss.detach()
        self.calls += 1
        self.steps += 1  # in place, as in the list
        self.sums[0][1].add_(1)
        self.last = kept
        for place in (self.list, self.nested["train"]["loss"], self.recent, self.seen):
            place.append(kept)
        self.keep(kept)
        self.metric.update(kept)
        self.state.total_flos += 1
        self.log({"calls": self.calls})
        for parameter in self.model.parameters():  # not that of the arguments
            parameter.seen = self.calls
        return loss


def test_planning_leaves_no_counts_and_no_fake_tensors_in_the_trainer(tmp_path, caplog):
    Keeps.seen.clear()
    trainer = run(tmp_path, cls=Keeps, **SHORT, **EXACT)
    assert "cannot be replayed" not in caplog.text
    assert trainer.calls == trainer.meter.count == trainer.steps == 2
    assert trainer.sums[0].tolist() == [0, 2]
    places = [trainer.list, trainer.nested["train"]["loss"], trainer.recent, trainer.seen, trainer.meter.values]
    assert [len(place) for place in places] == [2] * 5
    kept = [trainer.last, trainer.metric.total, *itertools.chain(*places)]
    assert not any(isinstance(tensor, FakeTensor) for tensor in kept)
    assert trainer.metric.total == sum(trainer.list)
    assert [entry["calls"] for entry in trainer.state.log_history if "calls" in entry] == [1, 2]
    assert all(parameter.seen == 2 for parameter in trainer.model.parameters())
    assert measured(trainer) == pytest.approx(1, abs=0.01)


class OwnModel(EfficientTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return self.model(**inputs).loss


def test_a_loss_of_the_trainers_model_gives_it_no_fake_gradients(tmp_path):
    set_seed(7)
    args = arguments(tmp_path, **SHORT, **EXACT)
    trainer = quiet(OwnModel(model=gpt2(), args=args, train_dataset=Rows(48, length=24)))
    trainer.trainopt.placement._agreed_plan(trainer.get_train_dataloader())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


class Keeping(EfficientTrainer):
    """What it keeps of one step is there in the backward pass, and until the next step replaces it."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        outputs = model(**inputs)
        self.kept = outputs.logits.detach().double()
        return outputs.loss


def test_what_compute_loss_keeps_is_in_the_predicted_peak(tmp_path):
    plain = run(tmp_path / "plain", **SHORT, checkpoint_placement="all")
    keeping = run(tmp_path / "keeping", cls=Keeping, **SHORT, checkpoint_placement="all")
    kept = 12 * 24 * 211 * 8
    more = keeping.placement_plan.predicted_peak_bytes - plain.placement_plan.predicted_peak_bytes
    assert more == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize("rewrites", ["auto", "chunked_loss"])
def test_a_loss_that_is_looked_at_is_not_chunked_unasked(tmp_path, caplog, rewrites):
    class Looks(EfficientTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return loss if loss.item() > 0 else -loss

    placement = {"memory_budget": "50%", "memory_rewrites": rewrites}
    trainer = run(tmp_path, cls=Looks, **SHORT, **placement)
    assert "Looks.compute_loss cannot be replayed" in caplog.text
    assert trainer.placement_plan.rewrites.chunked_loss == (rewrites == "chunked_loss")
    assert trainer.state.global_step == 2
    plain = run(tmp_path / "plain", cls=EfficientTrainer, **SHORT)
    torch.testing.assert_close(torch.tensor(losses(trainer)), torch.tensor(losses(plain)), rtol=1e-5, atol=0)


# ---- Data ----------------------------------------------------------------------------------------------------------


def stacked(samples):
    return {name: torch.stack([torch.as_tensor(sample[name]) for sample in samples]) for name in samples[0]}


class TorchNoise:
    """A collator that hides labels by a generator of its own."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)

    def __call__(self, samples):
        batch = stacked(samples)
        hidden = torch.rand(batch["labels"].shape, generator=self.generator) < 0.3
        return {**batch, "labels": batch["labels"].masked_fill(hidden, -100)}


class PythonNoise(TorchNoise):
    def __init__(self):
        self.rng = random.Random(3)

    def __call__(self, samples):
        batch = stacked(samples)
        batch["labels"][:, : self.rng.randrange(1, 20)] = -100
        return batch


class NoisyRows(Rows):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rng = np.random.default_rng(3)

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        sample["labels"][: self.rng.integers(1, 20)] = -100
        return sample


class Transform:
    def __init__(self):
        self.rng = random.Random(3)

    def __call__(self, batch):
        labels = [[-100] * (cut := self.rng.randrange(1, 20)) + list(row[cut:]) for row in batch["input_ids"]]
        return {"input_ids": batch["input_ids"], "labels": labels}


def transformed_rows():
    rows = table({"input_ids": Rows(48, length=24).rows.tolist()})
    rows.set_transform(Transform())
    return rows


@pytest.mark.parametrize(
    ("data", "collator"),
    [
        (lambda: Rows(48, length=24), TorchNoise),
        (lambda: Rows(48, length=24), PythonNoise),
        (lambda: NoisyRows(48, length=24), lambda: stacked),
        (transformed_rows, lambda: stacked),
    ],
    ids=["torch.Generator", "random.Random", "dataset", "transform"],
)
def test_generators_of_data_and_collator_are_where_they_were(tmp_path, data, collator):
    def trained(placement):
        options = {**SHORT, **placement, "remove_unused_columns": False}
        return losses(run(tmp_path, data=data(), trainer_kwargs={"data_collator": collator()}, **options))

    assert trained(EXACT) == trained({})


class OneShot(IterableDataset):
    def __init__(self, source):
        self.source = source

    def __iter__(self):
        return self.source


class OneShotItself(OneShot):
    def __iter__(self):
        return self

    def __next__(self):
        return next(self.source)


class Sees:
    """A collator that keeps the first token of every sample."""

    def __init__(self):
        self.tokens = []

    def __call__(self, samples):
        self.tokens += [int(sample["input_ids"][0]) for sample in samples]
        return stacked(samples)


def rows_once(num_rows=48):
    rows = Rows(num_rows, length=24, numbered=True)
    return (rows[index] for index in range(num_rows))


@pytest.mark.parametrize("stream", [OneShot, OneShotItself])
def test_a_stream_that_can_be_read_once_loses_no_samples(tmp_path, caplog, stream):
    with pytest.raises(ValueError, match=r"the training data cannot be copied.*choose checkpoint_placement='all'"):
        run(tmp_path, data=stream(rows_once()), **SHORT, memory_budget="70%")
    plan = tmp_path / "plan.json"
    plan_placement(gpt2(), tokens(12, 24), checkpoint_placement="all", setup=CPU).save(plan)
    for placement, said in (("all", "No peak is predicted"), (str(plan), "is not known: the training data")):
        caplog.clear()
        sees = Sees()
        trainer = run(
            tmp_path, data=stream(rows_once()), trainer_kwargs={"data_collator": sees},
            **{**SHORT, "max_steps": 4}, checkpoint_placement=placement,
        )  # fmt: skip
        assert said in caplog.text
        assert sorted(sees.tokens) == list(range(48))
        assert trainer.placement_plan.counts() == {"full": 4}
        assert trainer.placement_plan.measured_peak_bytes


def test_a_stream_over_an_iterator_that_can_be_copied_loses_no_samples(tmp_path):
    sees = Sees()
    stream = OneShotItself(iter([*rows_once()]))
    options = {**SHORT, "max_steps": 4, "memory_budget": "70%"}
    trainer = run(tmp_path, data=stream, trainer_kwargs={"data_collator": sees}, **options)
    assert sorted(sees.tokens) == list(range(48))
    assert measured(trainer) == pytest.approx(1, abs=0.01)


def test_the_chunked_loss_of_a_plan_file_needs_a_batch(tmp_path):
    plan = PlacementPlan("x", {"transformer.h.0": FULL}, Rewrites(chunked_loss=True))
    plan.save(tmp_path / "plan.json")
    with pytest.raises(ValueError, match=r"plan.json: its chunked loss is compared .*--memory_rewrites none"):
        run(tmp_path, data=OneShot(rows_once()), **SHORT, checkpoint_placement=str(tmp_path / "plan.json"))


class Lengths(torch.utils.data.Dataset):
    def __init__(self, lengths):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        ids = (torch.arange(self.lengths[index]) + index) % 211
        return {"input_ids": ids, "labels": ids.clone()}


def padded(samples):
    """Pad on the right; the mask says where."""
    length = max(len(sample["input_ids"]) for sample in samples)
    pads = {"input_ids": 0, "labels": -100}
    batch = {
        name: torch.stack(
            [torch.nn.functional.pad(sample[name], (0, length - len(sample[name])), value=pad) for sample in samples]
        )
        for name, pad in pads.items()
    }
    batch["attention_mask"] = torch.stack(
        [(torch.arange(length) < len(sample["input_ids"])).long() for sample in samples]
    )
    return batch


def test_padded_batches_have_no_higher_peak_than_predicted(tmp_path):
    """The longest samples alone make a mask of ones, which a model drops; those of real batches it does not."""
    trainer = run(
        tmp_path,
        model=lambda: llama(num_layers=2),
        data=Lengths([48 if index % 2 else 40 for index in range(48)]),
        trainer_kwargs={"data_collator": padded},
        **SHORT,
        **EXACT,
    )
    assert not trainer.placement_plan.is_stock
    assert 0.97 < measured(trainer) < 1.0001  # a few scalars


def test_the_longest_samples_of_any_dataset_are_found():
    def longest(data, collate=padded):
        return largest_batch(DataLoader(data, batch_size=2, collate_fn=collate), 2)

    plain = Lengths([5, 30, 6, 7, 29, 3])
    batch = longest(plain)
    assert batch["input_ids"].shape == (2, 30)
    assert batch["attention_mask"].sum() == 59
    assert longest(Subset(plain, [0, 2, 3]))["input_ids"].shape == (2, 7)
    rows = {"input_ids": [[1] * n for n in plain.lengths], "labels": [0, 1, 0, 1, 0, 1]}
    found = longest(table(rows), collate=lambda samples: samples)  # classes are no sequences
    assert [len(sample["input_ids"]) for sample in found] == [30, 29]
    labelled = [{"input_ids": torch.ones(n), "labels": torch.tensor(n % 2)} for n in plain.lengths]  # no dimension
    assert [len(sample["input_ids"]) for sample in longest(labelled, lambda samples: samples)] == [30, 29]


def test_a_mask_of_ones_stays_where_nothing_is_padded():
    def mask(data):
        return largest_batch(DataLoader(data, batch_size=2, collate_fn=stacked), 2)["attention_mask"]

    whole = {"input_ids": [[1, 2, 3]] * 6, "attention_mask": [[1, 1, 1]] * 6}
    assert mask(table(whole)).all()
    assert not mask(table({**whole, "attention_mask": [[1, 1, 1]] * 5 + [[1, 1, 0]]})).all()
    assert largest_batch(DataLoader(Lengths([8] * 6), batch_size=2, collate_fn=padded), 2)["attention_mask"].all()
    assert not largest_batch(DataLoader(Lengths([8, 8, 8, 5]), batch_size=2, collate_fn=padded), 2)[
        "attention_mask"
    ].all()


def test_large_data_are_not_copied(monkeypatch):
    copied = []
    monkeypatch.setattr(torch.Tensor, "__deepcopy__", lambda tensor, memo: copied.append(tensor) or tensor.clone())

    class Held(Lengths):
        def __init__(self):
            super().__init__([6, 8])
            self.pixels, self.small = torch.zeros(2**19), torch.zeros(2)

    largest_batch(DataLoader(Subset(Held(), [0, 1]), batch_size=2, collate_fn=padded), 2)
    sizes = [tensor.numel() for tensor in copied]
    assert 2 in sizes  # what the data hold is copied, as far as it is small
    assert max(sizes) <= 8  # the rest are rows


# ---- Frozen layers -------------------------------------------------------------------------------------------------


def frozen_gpt2():
    """Embeddings and the two lower of four layers are not trained."""
    model = gpt2()
    for module in (model.transformer.wte, model.transformer.wpe, *model.transformer.h[:2]):
        module.requires_grad_(False)
    return model


def lora_gpt2(layers=(2, 3)):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["c_attn", "c_fc"], layers_to_transform=list(layers), fan_in_fan_out=True,
        lora_dropout=0.1, task_type="CAUSAL_LM",
    )  # fmt: skip
    return peft.get_peft_model(gpt2(), config)


@cache
def ends_of(model) -> tuple[int, int]:
    """Return the least peak of a model, and its peak without recomputation."""
    planner = PlacementPlanner(model(), tokens(12, 24), CPU, memory_rewrites="none")
    return planner.floor.peak_bytes, planner.baseline.peak_bytes


@pytest.mark.parametrize(
    ("model", "share"),
    [(frozen_gpt2, 0.0), (lora_gpt2, 0.5)],
    ids=["frozen 0.0", "lora 0.5"],
)
def test_frozen_lower_layers_are_not_recomputed(tmp_path, model, share):
    floor, baseline = ends_of(model)
    budget = str(round(floor + share * (baseline - floor)))
    trainer = run(tmp_path / "placed", model=model, **SHORT, memory_budget=budget, memory_rewrites="none")
    chosen = [choice.recompute for choice in trainer.placement_plan.stages.values()]
    assert chosen[:2] == ["none", "none"]
    assert chosen[2:] != ["none", "none"]
    assert measured(trainer) == pytest.approx(1, abs=0.01)
    assert losses(trainer) == losses(run(tmp_path / "plain", model=model, **SHORT))


def test_a_model_of_which_only_the_head_is_trained(tmp_path):
    def probed():
        model = gpt2(tie_word_embeddings=False)
        model.transformer.requires_grad_(False)
        return model

    trainer = run(tmp_path, model=probed, **SHORT, memory_budget="100%", memory_rewrites="none")
    assert trainer.placement_plan.is_stock
    assert measured(trainer) == pytest.approx(1, abs=0.01)


# ---- What a plan claims --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host_s", [None, 4e-6], ids=["CPU", "either"])
def test_the_gap_holds_against_all_plans_there_are(host_s):
    """All plans of two layers, on a CPU and where now the GPU and now its host limits a step."""
    setup = CPU if host_s is None else StepSetup(device=replace(DEVICES["a100"], host_s=host_s))
    planner = PlacementPlanner(gpt2(num_layers=2), tokens(12, 24), setup, memory_rewrites="none")
    ((_, profile),) = planner.profiles.items()
    options = [list(stage.options) for stage in profile.stages]
    run_of_both = tuple(StageChoice("full", run=0) for _ in profile.stages)
    found = []
    for choices in [*itertools.product(*options), run_of_both]:
        replay = planner.replay(dict(zip(planner.stages, choices, strict=True)))
        found.append((replay.peak_bytes, max(0.0, replay.cost.seconds - planner.baseline.cost.seconds)))
    floor, baseline = planner.floor.peak_bytes, planner.baseline.peak_bytes
    assert floor == min(peak for peak, _ in found)
    for index in range(12):
        budget = round(floor + (baseline - floor) * index / 12)
        plan = planner.for_budget(budget)
        least = min(seconds for peak, seconds in found if peak <= budget) / planner.step_seconds
        assert plan.extra_time_ratio >= least - 1e-6
        if plan.optimality_gap is not None:
            assert plan.optimality_gap >= 0
            assert plan.extra_time_ratio - least <= plan.optimality_gap + 2e-6


def test_the_floor_that_an_error_names_is_enough_as_a_budget(tmp_path):
    with pytest.raises(ValueError, match="no placement needs less than") as error:
        run(tmp_path, **SHORT, memory_budget="1MiB", memory_rewrites="none")
    named = str(error.value).split("no placement needs less than ")[1].split(" (the floor")[0]
    trainer = run(tmp_path, **SHORT, memory_budget=named, memory_rewrites="none")
    floor = trainer.placement_plan.floor_peak_bytes
    assert floor <= parse_budget(named) <= 1.001 * floor


@pytest.mark.parametrize("num_bytes", [1_289_749, 12_345_678, 104_857_601, 912_680_551, 2**30 + 1, 6.333 * 2**30])
def test_sizes_rounded_up_are_enough(num_bytes):
    assert num_bytes <= parse_budget(gib(num_bytes, up=True)) <= 1.01 * num_bytes
    assert gib(num_bytes, up=True) != gib(num_bytes) or parse_budget(gib(num_bytes)) >= num_bytes


# ---- Exceptions ----------------------------------------------------------------------------------------------------


class Interrupts(TrainerCallback):
    """Raises once, in the middle of the step that is measured."""

    def __init__(self):
        self.done = False

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 1 and not self.done:
            self.done = True
            assert _get_current_dispatch_mode() is not None
            raise KeyboardInterrupt


def test_after_an_exception_training_and_measuring_work_again(tmp_path):
    set_seed(7)
    args = arguments(tmp_path, **{**SHORT, "max_steps": 3}, **EXACT)
    trainer = quiet(
        EfficientTrainer(model=gpt2(), args=args, train_dataset=Rows(48, length=24), callbacks=[Interrupts()])
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert _get_current_dispatch_mode() is None
    assert not getattr(trainer.model, f"is_{ACTIVATION_CHECKPOINTING}")
    assert trainer.placement_plan.measured_peak_bytes is None
    trainer.train()
    assert trainer.state.global_step == 3
    assert measured(trainer) == pytest.approx(1, abs=0.01)
    assert _get_current_dispatch_mode() is None


# ---- Plan files ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made():
    """A plan as in its file."""
    return plan_placement(gpt2(), tokens(12, 24), checkpoint_placement="every_n", setup=CPU).to_dict()


FAULTS = {
    "no policy": lambda plan: plan.pop("policy"),
    "no stages": lambda plan: plan.pop("stages"),
    "no format": lambda plan: plan.pop("format"),
    "half of the peaks": lambda plan: plan.pop("baseline_peak_bytes"),
    "unknown key": lambda plan: plan.update(colour=1),
    "policy is no text": lambda plan: plan.update(policy=1),
    "stages are a list": lambda plan: plan.update(stages=[]),
    "details are a list": lambda plan: plan.update(details=[]),
    "peak is a text": lambda plan: plan.update(predicted_peak_bytes="12GiB"),
    "peak is nothing": lambda plan: plan.update(baseline_peak_bytes=0),
    "ratio is a text": lambda plan: plan.update(extra_time_ratio="0.1"),
    "ratio is infinite": lambda plan: plan.update(extra_time_ratio=float("inf")),
    "rewrites are a list": lambda plan: plan.update(rewrites=["chunked_loss"]),
    "rewrite is a text": lambda plan: plan.update(rewrites={"chunked_loss": "no"}),
    "unknown rewrite": lambda plan: plan.update(rewrites={"gelu": True}),
    "stage is a text": lambda plan: plan["stages"].update({"transformer.h.0": "full"}),
    "stage without choice": lambda plan: plan["stages"].update({"transformer.h.0": {}}),
    "unknown choice": lambda plan: plan["stages"].update({"transformer.h.0": {"recompute": "some"}}),
    "choice is a list": lambda plan: plan["stages"].update({"transformer.h.0": {"recompute": ["full"]}}),
    "misspelt": lambda plan: plan["stages"].update({"transformer.h.0": {"recompute": "selective", "save_ops": [1]}}),
    "saved_ops": lambda plan: plan["stages"].update({"transformer.h.0": {"recompute": "selective", "saved_ops": 3}}),
    "run is a text": lambda plan: plan["stages"].update({"transformer.h.0": {"recompute": "full", "run": "a"}}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_plan_file_is_one_sentence_with_file_and_remedy(tmp_path, made, fault):
    values = copy.deepcopy(made)
    FAULTS[fault](values)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"plan\.json.* placement plan.*`hf-trainopt plan --output`\.$") as error:
        arguments(tmp_path, checkpoint_placement=str(path))
    assert str(error.value).count(". ") == 0
    assert "Error(" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"3", b"[]"])
def test_what_is_no_plan_at_all(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"plan\.json.* placement plan.*`hf-trainopt plan --output`\.$"):
        PlacementPlan.load(path)
    with pytest.raises(ValueError, match=r"can be read at .*plans.*`hf-trainopt plan --output`\.$"):
        PlacementPlan.load(tmp_path / "plans")


def test_a_plan_file_for_another_model_is_named(tmp_path, made):
    made = copy.deepcopy(made)
    made["stages"]["transformer.h.9"] = {"recompute": "full"}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(made))
    with pytest.raises(ValueError, match=r"plan\.json: .*GPT2LMHeadModel lacks: transformer\.h\.9; .*make one for"):
        run(tmp_path, **SHORT, checkpoint_placement=str(path))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"per_device_train_batch_size": 6}, r"made for batch \[12, 24\], not \[6, 24\]: its peaks"),
        ({"bf16": True}, r"made for precision float32, not bfloat16"),
    ],
)
def test_a_plan_file_for_another_setup_is_warned_of(tmp_path, caplog, made, changed, said):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(made))
    trainer = run(tmp_path / "run", **{**SHORT, **changed}, checkpoint_placement=str(path))
    assert trainer.state.global_step == 2
    assert ("The placement plan was made for" in caplog.text) == (said is not None)
    if said:
        assert caplog.text.count("was made for") == 1
        import re

        assert re.search(said, caplog.text)


def test_a_plan_without_figures_is_not_said_to_be_for_another_setup(tmp_path, caplog):
    plan = PlacementPlan("all", dict.fromkeys([f"transformer.h.{i}" for i in range(4)], FULL), details={"request": {}})
    plan.save(tmp_path / "plan.json")
    run(tmp_path, **SHORT, checkpoint_placement=str(tmp_path / "plan.json"))
    assert "was made for" not in caplog.text


# ---- Plans that are kept -------------------------------------------------------------------------------------------


def resumed(tmp_path, caplog, model, **options):
    """Whether a run that goes on from the first step takes the plan that it finds."""
    path = tmp_path / "run"
    options = {**SHORT, "save_strategy": "steps", "save_steps": 1, "save_only_model": True, **EXACT, **options}
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="hf_trainopt"):
        run(path, model=model, resume=str(path / "checkpoint-1"), **options)
    return "The placement is the resumed run's" in caplog.text


def test_a_kept_plan_is_for_the_same_parameters_and_setup(tmp_path, caplog):
    options = {**SHORT, "save_strategy": "steps", "save_steps": 1, "save_only_model": True, **EXACT}
    first = run(tmp_path / "run", model=frozen_gpt2, **options)
    assert first.placement_plan.details["request"]["attention"] == "sdpa"
    assert resumed(tmp_path, caplog, frozen_gpt2)
    assert not resumed(tmp_path, caplog, gpt2)  # unfrozen
    assert resumed(tmp_path, caplog, gpt2)
    assert not resumed(tmp_path, caplog, lambda: gpt2(attn_implementation="eager"))
    assert not resumed(tmp_path, caplog, gpt2, max_grad_norm=0.0)
    assert not resumed(tmp_path, caplog, lambda: gpt2().to(torch.bfloat16), max_grad_norm=0.0)


def test_a_kept_plan_that_is_broken_is_made_again(tmp_path, caplog):
    options = {**SHORT, "save_strategy": "steps", "save_steps": 1, "save_only_model": True, **EXACT}
    first = run(tmp_path / "run", **options)
    assert sorted(path.name for path in (tmp_path / "run").glob("*placement*")) == [PLAN_NAME]
    (tmp_path / "run" / PLAN_NAME).write_text('{"format": 1, "pol')
    assert resumed(tmp_path, caplog, gpt2)  # the checkpoint has it, too
    (tmp_path / "run" / PLAN_NAME).write_text('{"format": 1, "pol')
    checkpoint = tmp_path / "run" / "checkpoint-1"
    state = json.loads((checkpoint / STATE_NAME).read_text())
    del state["parts"]["placement"]
    (checkpoint / STATE_NAME).write_text(json.dumps(state))
    (checkpoint / MANIFEST_NAME).unlink()  # an older checkpoint
    assert not resumed(tmp_path, caplog, gpt2)
    assert "This plan differs from the resumed run's" in caplog.text
    assert PlacementPlan.load(tmp_path / "run" / PLAN_NAME).stages == first.placement_plan.stages


# ---- Stages that cannot be -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", r"names the whole model \(''\) as a stage; name modules inside it"),
        ("transformer.h", r"transformer\.h of the placement plan is a ModuleList, .*\(transformer\.h\.0-3\)"),
    ],
)
@pytest.mark.parametrize("choice", [FULL, STORE])
def test_what_is_no_stage_is_refused(name, message, choice):
    model = gpt2()
    with pytest.raises(ValueError, match=message):
        apply_placement(model, PlacementPlan("x", {name: choice}))
    apply_placement(model, PlacementPlan("x", {"transformer.h.0": FULL})).undo()  # nothing was left behind
