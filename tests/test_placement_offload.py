"""Inputs of recomputed stages on the host: gradients to the bit, bytes as replayed, chosen only where it pays."""

import itertools
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from placement_models import gpt2, llama, timm_model, tokens
from test_placement_replay import real_peak

from hf_trainopt import EfficientTrainer, EfficientTrainingArguments, apply_placement, plan_placement
from hf_trainopt.cli import main
from hf_trainopt.machine.devices import DEVICES
from hf_trainopt.placement.plan.chain import build_chain, choices_of, path_of
from hf_trainopt.placement.plan.plan import FULL, STORE, PlacementPlan, StageChoice, runs_of
from hf_trainopt.placement.plan.planner import PlacementPlanner
from hf_trainopt.placement.recompute import offload
from hf_trainopt.placement.simulate.step_setup import StepSetup


FULL_ON_HOST = StageChoice("full", offload=True)
# A CPU with a host of its own: kernels are those of real steps here, and copies to the host count as copies.
APART = StepSetup(device=replace(DEVICES["cpu"], link=1e9))


def plan_of(model, *choices: StageChoice) -> PlacementPlan:
    names = [f"transformer.h.{index}" for index in range(len(choices))]
    return PlacementPlan("test", dict(zip(names, choices, strict=True)))


def gradients(model, batch) -> list[torch.Tensor]:
    torch.manual_seed(3)
    model.train()
    model.zero_grad()
    model(**batch).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.fixture
def copies(monkeypatch):
    """Shapes of what is copied to the host, which is NumPy's memory: PyTorch's allocator doesn't see it."""
    seen = []

    def to_host(tensor):
        host = torch.from_numpy(np.empty(tuple(tensor.shape), dtype=np.float32)).copy_(tensor)
        seen.append(tuple(tensor.shape))
        return host

    monkeypatch.setattr(offload, "to_host", to_host)
    return seen


# ---- What is computed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choices",
    [
        (FULL_ON_HOST,) * 4,
        (STORE, FULL_ON_HOST, FULL, FULL_ON_HOST),
        (FULL, StageChoice("selective", (0, 2), offload=True), StageChoice("selective", (1,), offload=True), STORE),
        (FULL, *(StageChoice("full", run=0, offload=first) for first in (True, False, False))),
    ],
    ids=["all", "some", "selective", "a run"],
)
def test_gradients_are_equal_to_the_bit(choices, copies):
    model, batch = gpt2(), tokens()
    stock = gradients(model, batch)
    with apply_placement(model, plan_of(model, *choices)):
        assert all(map(torch.equal, gradients(model, batch), stock))
    assert copies == [(3, 48, 32)] * sum(choice.offload for choice in choices)


def test_what_other_stages_need_stays():
    """Of several inputs only the one that the stage before has computed is moved: here of a decoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=2, vocab_size=211, use_cache=False,
                 decoder_start_token_id=0, pad_token_id=0)
    )  # fmt: skip
    batch = {"input_ids": tokens()["input_ids"], "labels": tokens(length=20, seed=1)["labels"]}
    stock = gradients(model, batch)
    seen = []
    stock_copy = offload.to_host
    names = [f"{part}.block.{index}" for part in ("encoder", "decoder") for index in range(2)]
    with (
        pytest.MonkeyPatch.context() as patch,
        apply_placement(model, PlacementPlan("test", dict.fromkeys(names, FULL_ON_HOST))),
    ):
        patch.setattr(offload, "to_host", lambda tensor: seen.append(tuple(tensor.shape)) or stock_copy(tensor))
        assert all(map(torch.equal, gradients(model, batch), stock))
    assert seen == [(3, 48, 32)] * 2 + [(3, 20, 32)] * 2


def test_an_input_that_is_modified_later_is_kept_as_it_was():
    """A copy is as of the call; kept on the device, autograd refuses."""

    class Doubling(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (
                torch.nn.Linear(4, 4),
                torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()),
            )

        def forward(self, x):
            hidden = self.first(x)
            out = self.second(hidden)
            with torch.no_grad():
                hidden.mul_(2)
            return out.sum()

    torch.manual_seed(0)
    model, x = Doubling(), torch.randn(2, 4)
    in_place = pytest.raises(RuntimeError, match="modified by an inplace operation")
    with apply_placement(model, PlacementPlan("test", {"second": FULL})), in_place:
        model(x).backward()
    torch.manual_seed(0)
    model = Doubling()
    hidden = model.first(x)
    wanted = torch.autograd.grad(model.second(hidden).sum(), model.second[0].weight)[0]
    with apply_placement(model, PlacementPlan("test", {"second": FULL_ON_HOST})):
        model(x).backward()
    assert torch.equal(model.second[0].weight.grad, wanted)


def test_what_stays_is_still_checked_for_changes():
    """A mask that is modified after the stage: an error, as without offload, and the user's hooks see it."""

    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(4, 4), Scaled()

        def forward(self, x, mask):
            out = self.second(self.first(x), mask)
            mask.mul_(2)
            return out.sum()

    class Scaled(torch.nn.Module):
        def forward(self, x, mask):
            return (x * mask).tanh()

    model, seen = Masked(), []
    with apply_placement(model, PlacementPlan("test", {"second": FULL_ON_HOST})):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t, lambda t: t):
            model(torch.randn(2, 4), torch.ones(7, 1, 4))
        assert torch.Size((7, 1, 4)) in seen
        loss = model(torch.randn(2, 4), torch.ones(7, 1, 4))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_budget_that_is_met_without_it_is_met_with_it():
    """The first computed input isn't the output of the stage before: moving it frees nothing of the chain."""

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))

        def forward(self, memory, x):
            return x + self.inner(x) * memory

    class Stack(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = torch.nn.Linear(64, 64)
            self.layers = torch.nn.ModuleList(Layer() for _ in range(6))

        def forward(self, x):
            memory = self.encoder(x)
            x = memory + 1
            for layer in self.layers:
                x = layer(memory, x)
            return x.square().mean()

    setup = StepSetup(device=replace(DEVICES["a100"], workspace=0))
    planners = [
        PlacementPlanner(Stack(), torch.randn(512, 64), setup, stages=r"layers\.\d+", offload=offload)
        for offload in (False, True)
    ]
    floor = planners[0].floor.peak_bytes
    assert planners[1].floor.peak_bytes <= floor
    assert planners[1].for_budget(floor).predicted_peak_bytes <= floor


def test_a_graph_that_is_retained_can_be_run_backward_again():
    model, batch = gpt2(), tokens()
    with apply_placement(model, plan_of(model, *(FULL_ON_HOST,) * 4)):
        model.train()
        loss = model(**batch).loss
        once = torch.autograd.grad(loss, model.transformer.wte.weight, retain_graph=True)[0]
        assert torch.equal(torch.autograd.grad(loss, model.transformer.wte.weight)[0], once)


# ---- What it takes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2", "llama"])
def test_the_replayed_peak_is_that_of_a_real_step(make, copies):
    model, batch = make(), tokens(16, 64)
    planner = PlacementPlanner(model, batch, APART, memory_rewrites="none", offload=True)
    plan = planner.for_budget(planner.floor.peak_bytes)
    assert plan.offloads
    found = real_peak(model, batch, plan)
    assert found == pytest.approx(plan.predicted_peak_bytes, rel=2e-3)
    moved = sum(4 * np.prod(shape) for shape in copies[: len(copies) // 2])  # of one of the two steps
    assert plan.details["host_bytes"] == moved


@pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2", "llama"])
def test_the_chain_predicts_replays(make):
    planner = PlacementPlanner(make(), tokens(8), APART, memory_rewrites="none", offload=True)
    ((rewrites, profile),) = planner.profiles.items()
    chain = build_chain(profile, link=APART.device)
    rng = random.Random(0)
    seen = 0
    for _ in range(12):
        path, start = [], 0
        while start < chain.num_stages:
            fitting = [s for s in chain.segments if s.start == start and s.choice[0].recompute != "none"]
            path.append(rng.choice([s for s in fitting if s.choice[0].offload] or fitting))
            start = path[-1].stop
        choices = choices_of(profile, path)
        seen += sum(choice.offload for choice in choices.values())
        assert path_of(chain, choices) == tuple(path)
        runs_of(choices)
        assert chain.peak(tuple(path)) == pytest.approx(planner.replay(choices, rewrites).peak_bytes, rel=0.02)
    assert seen > 12


def test_a_copy_takes_the_time_of_the_link():
    planner = PlacementPlanner(gpt2(), tokens(8), APART, memory_rewrites="none", offload=True)
    here, there = (
        planner.replay(dict(zip(planner.stages, (FULL, choice, FULL, FULL), strict=True))).cost.device_seconds
        for choice in (FULL, FULL_ON_HOST)
    )
    assert there - here == pytest.approx(2 * 4 * 8 * 48 * 32 / 1e9)


@pytest.mark.parametrize("link", [1e9, 1e12], ids=["middle", "fast"])
def test_no_plan_there_is_takes_less_time(link):
    """All plans of three layers, by brute force."""
    setup = StepSetup(device=replace(DEVICES["a100"], host_s=0.0, link=link, workspace=0))
    planner = PlacementPlanner(gpt2(num_layers=3), tokens(12, 48), setup, memory_rewrites="none", offload=True)
    ((_, profile),) = planner.profiles.items()
    plans = []
    for names in itertools.product(*(list(stage.options) for stage in profile.stages)):
        on_host = [(False, True) if choice.recompute in ("full", "selective") else (False,) for choice in names[1:]]
        plans += [
            (names[0], *(replace(c, offload=o) for c, o in zip(names[1:], flags, strict=True)))
            for flags in itertools.product(*on_host)
        ]
    plans = random.Random(0).sample(plans, min(len(plans), 40))
    for start, stop in ((0, 2), (1, 3), (0, 3)):
        for offloaded in {False, start > 0}:
            run = [StageChoice("full", run=0, offload=offloaded and index == 0) for index in range(stop - start)]
            plans.append((*([FULL] * start), *run, *([FULL] * (3 - stop))))
    found = []
    for choices in plans:
        replay = planner.replay(dict(zip(planner.stages, choices, strict=True)))
        found.append((replay.peak_bytes, max(0.0, replay.cost.seconds - planner.baseline.cost.seconds)))
    floor, baseline = planner.floor.peak_bytes, planner.baseline.peak_bytes
    assert floor <= min(peak for peak, _ in found)
    for index in range(8):
        budget = round(floor + (baseline - floor) * index / 8)
        plan = planner.for_budget(budget)
        least = min((seconds for peak, seconds in found if peak <= budget), default=np.inf) / planner.step_seconds
        assert plan.predicted_peak_bytes <= budget
        if plan.optimality_gap is not None:
            assert plan.extra_time_ratio - least <= plan.optimality_gap + 2e-6


def test_it_is_chosen_only_where_it_pays():
    def planner(link: float, **kwargs) -> PlacementPlanner:
        setup = StepSetup(device=replace(DEVICES["a100"], host_s=0.0, link=link, workspace=0))
        return PlacementPlanner(gpt2(6, 64), tokens(16, 64), setup, memory_rewrites="none", **kwargs)

    without, fast, slow = planner(1e12), planner(1e12, offload=True), planner(1e6, offload=True)
    assert fast.floor.peak_bytes < 0.99 * without.floor.peak_bytes
    # As fast a link as the memory itself is: a budget that recomputation alone meets as well.
    budget = without.floor.peak_bytes
    assert fast.for_budget(budget).offloads
    assert fast.for_budget(budget).extra_time_ratio < without.for_budget(budget).extra_time_ratio
    assert not slow.for_budget(budget).offloads
    assert slow.for_budget(fast.floor.peak_bytes).offloads  # nothing else fits


def test_an_output_that_its_own_stage_keeps_is_not_moved():
    """Blocks of a ResNet end in a ReLU, which keeps what it returns: moving that frees nothing."""
    batch = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.zeros(4, dtype=torch.long)}
    setup = StepSetup(device=DEVICES["a100"])
    planner = PlacementPlanner(timm_model("resnet10t"), batch, setup, memory_rewrites="none", offload=True)
    chain = next(iter(planner.chains().values()))
    assert not any(choice.offload for segment in chain.segments for choice in segment.choice)


# ---- How it is asked for -------------------------------------------------------------------------------------------


def test_a_plan_file_keeps_it(tmp_path):
    run = [StageChoice("full", run=0, offload=first) for first in (True, False)]
    plan = PlacementPlan("test", dict(zip("abcd", [FULL_ON_HOST, STORE, *run], strict=True)))
    plan.save(tmp_path / "plan.json")
    assert PlacementPlan.load(tmp_path / "plan.json") == plan
    assert "inputs on the host: a, c" in plan.summary()
    assert "offload" not in json.dumps(PlacementPlan("test", {"a": FULL}).to_dict())


def test_choices_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="offload needs recompute='full' or 'selective', not 'none'"):
        StageChoice("none", offload=True)
    with pytest.raises(ValueError, match="offload is 1, neither true nor false"):
        StageChoice.from_dict({"recompute": "full", "offload": 1})
    with pytest.raises(ValueError, match="b is inside run 0, which keeps no input of it to offload"):
        runs_of({"a": StageChoice("full", run=0), "b": StageChoice("full", run=0, offload=True)})


def test_it_needs_a_budget_and_a_gpu(tmp_path, capsys):
    with pytest.raises(ValueError, match="placement_offload=True needs memory_budget"):
        EfficientTrainingArguments(str(tmp_path), placement_offload=True)
    with pytest.raises(ValueError, match="placement_offload needs memory_budget"):
        plan_placement(gpt2(), tokens(), checkpoint_placement="all", placement_offload=True)
    with pytest.raises(ValueError, match="placement_offload needs a GPU with memory of its own"):
        plan_placement(gpt2(), tokens(), memory_budget="90%", placement_offload=True)
    assert main(["plan", "--model_type", "gpt2", "--placement_offload"])
    assert "--placement_offload needs --memory_budget" in capsys.readouterr().err


def test_the_error_of_a_budget_names_it():
    for offloads, words in ((False, True), (True, False)):
        with pytest.raises(ValueError, match="no placement needs less") as error:
            plan_placement(gpt2(), tokens(), memory_budget="2MiB", placement_offload=offloads,
                           setup=StepSetup(device=DEVICES["a100"]))  # fmt: skip
        assert ("placement_offload=True" in str(error.value)) == words


def test_the_command_says_what_is_on_the_host(capsys, tmp_path):
    words = ["plan", "--model_type", "gpt2", "--config_overrides", "n_layer=6,n_embd=128,n_head=2,vocab_size=211",
             "--per_device_train_batch_size", "16", "--block_size", "256", "--device", "a100", "--memory_rewrites",
             "none", "--placement_offload", "--json"]  # fmt: skip
    main([*words, "--memory_budget", "95%"])
    floor = json.loads(capsys.readouterr().out)["floor_peak_bytes"]
    main([*[word for word in words if word != "--json"], "--memory_budget", f"{floor}B"])
    text = " ".join(capsys.readouterr().out.split())
    assert "input on the host" in text or "inputs on the host" in text
    assert "are in memory of the host" in text
    assert "--placement_offload" in text
    assert "placement_offload=True" in text


def test_a_run_with_a_plan_file_trains_as_without(tmp_path, copies):
    plan = plan_of(None, FULL, FULL_ON_HOST, FULL_ON_HOST, FULL)
    plan.save(tmp_path / "plan.json")
    weights = []
    for placement in (None, str(tmp_path / "plan.json")):
        args = EfficientTrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, use_cpu=True,
            report_to="none", disable_tqdm=True, save_strategy="no", checkpoint_placement=placement,
        )  # fmt: skip
        data = [{name: value[0] for name, value in tokens(1, seed=seed).items()} for seed in range(16)]
        trainer = EfficientTrainer(gpt2(), args, train_dataset=data)
        trainer.train()
        weights.append(list(trainer.model.parameters()))
    assert all(map(torch.equal, *weights))
    assert copies
