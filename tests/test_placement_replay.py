"""Replays against real steps, the chain against replays, and the plans that come out of them."""

import dataclasses
import random
from contextlib import contextmanager, nullcontext

import pytest
import torch
from placement_models import MODELS, gpt2, llama, pictures, timm_model, tokens, vit
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralForCausalLM

from hf_trainopt.machine.costs import FORMULAS, op_cost
from hf_trainopt.machine.devices import DEVICES
from hf_trainopt.placement.plan.budget import gib, parse_budget
from hf_trainopt.placement.plan.candidate import rank_of
from hf_trainopt.placement.plan.chain import build_chain, choices_of
from hf_trainopt.placement.plan.plan import FULL, PlacementPlan, Rewrites, StageChoice
from hf_trainopt.placement.plan.plan_model import plan_placement
from hf_trainopt.placement.plan.planner import PlacementPlanner
from hf_trainopt.placement.plan.policies import named_choices
from hf_trainopt.placement.plan.solver import solve
from hf_trainopt.placement.plan.stages import find_stages
from hf_trainopt.placement.recompute.apply import apply_placement
from hf_trainopt.placement.rewrite.allowed_rewrites import allowed_rewrites
from hf_trainopt.placement.simulate.fake import as_on, fake_copy, fake_mode
from hf_trainopt.placement.simulate.replay import StepReplayer
from hf_trainopt.placement.simulate.sharding import Sharding
from hf_trainopt.placement.simulate.step_setup import StepSetup, adamw, model_loss
from hf_trainopt.placement.simulate.tracker import StorageTracker


CPU = StepSetup(device=DEVICES["cpu"])


def allocated_peak(run) -> int:
    """Most bytes that are allocated while `run` runs, beyond those before: every event of PyTorch's allocator."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    live, peak = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def real_peak(model, batch, plan: PlacementPlan, *, accumulates: bool = False, dtype=None) -> int:
    """What PyTorch's allocator has handed out at most in the second optimizer step of a real run."""
    optimizer = adamw(model)
    model.train()

    def step():
        with torch.autocast("cpu", dtype=dtype) if dtype else nullcontext():
            loss = model(**batch).loss
        loss.backward()
        del loss
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    with apply_placement(model, plan):
        step()
        resident = [*model.parameters(), *model.buffers(), *batch.values()]
        resident += [tensor for state in optimizer.state.values() for tensor in state.values()]
        if accumulates:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            resident += [parameter.grad for parameter in model.parameters()]
        return sum(tensor.nbytes for tensor in resident) + allocated_peak(step)


# ---- Storages ------------------------------------------------------------------------------------------------------


def test_tracker_counts_storages_once_until_they_die():
    tracker = StorageTracker()
    kept = torch.zeros(256)
    tracker.count([kept], "parameters")
    with tracker:
        a = torch.ones(1024)
        view = a[10:20]
        b = a + 1
        del a
        assert tracker.current_bytes == 4 * (256 + 1024 + 1024)  # the view holds the storage
        del view
        assert tracker.current_bytes == 4 * (256 + 1024)
        b.add_(1)
        c = b.double()
        assert tracker.peak_bytes == tracker.current_bytes == 4 * (256 + 1024) + 8 * 1024
        del b, c
    assert tracker.current_bytes == 4 * 256
    assert tracker.peak_by_key[("parameters", "")] == 4 * 256


def test_tracker_agrees_with_the_profiler():
    model, batch = gpt2(), tokens()
    tracker = StorageTracker()
    model(**batch).loss.backward()
    model.zero_grad()
    with tracker:
        model(**batch).loss.backward()
    model.zero_grad()
    peak = allocated_peak(lambda: model(**batch).loss.backward())
    assert tracker.peak_bytes == pytest.approx(peak, rel=0.01)


# ---- Replays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_replayed_peak_is_that_of_a_real_step(name):
    make, make_batch = MODELS[name]
    model, batch = make(), make_batch()
    stages = find_stages(model)
    replayer = StepReplayer(model, batch, CPU, stages)
    for policy in ("none", "all", "every_2", "sqrt"):
        plan = PlacementPlan(policy, named_choices(policy, stages))
        replay = replayer.replay(plan)
        assert replay.peak_bytes == pytest.approx(real_peak(make(), batch, plan), rel=0.01), policy
        assert replay.order == stages


def test_replayed_peak_with_gradients_resident_and_rewrites_and_autocast():
    batch = tokens()
    for setup, real in (
        (StepSetup(device=DEVICES["cpu"], accumulation_steps=2), {"accumulates": True}),
        (StepSetup(device=DEVICES["cpu"], autocast_dtype=torch.bfloat16), {"dtype": torch.bfloat16}),
    ):
        model = gpt2()
        stages = find_stages(model)
        replayer = StepReplayer(model, batch, setup, stages)
        for rewrites in (Rewrites(), Rewrites(True, True)):
            plan = PlacementPlan("every_2", named_choices("every_2", stages), rewrites)
            held = sum(tensor.nbytes for tensor in batch.values()) * (setup.accumulation_steps - 1)
            found = replayer.replay(plan).peak_bytes - held
            assert found == pytest.approx(real_peak(gpt2(), batch, plan, **real), rel=0.01), (setup, rewrites)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_mixtures_of_experts_are_replayed(autocast):
    """Their products are float32 also under autocast, where PyTorch's shape function takes 16-bit numbers only."""

    def make():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = MixtralConfig(num_hidden_layers=3, vocab_size=211, num_local_experts=4, use_cache=False, **sizes)
        return MixtralForCausalLM(config)

    model, batch = make(), tokens()
    stages = find_stages(model)
    replayer = StepReplayer(model, batch, StepSetup(device=DEVICES["cpu"], autocast_dtype=autocast), stages)
    for policy in ("none", "all"):
        plan = PlacementPlan(policy, named_choices(policy, stages))
        found = replayer.replay(plan)
        assert found.peak_bytes == pytest.approx(real_peak(make(), batch, plan, dtype=autocast), rel=0.01), policy


def test_products_of_experts_have_the_shapes_and_flops_of_the_real_ones():
    """All four forms: which of the three sizes of a product is split over the groups, or none."""
    offs = torch.tensor([4, 12, 16], dtype=torch.int32)
    rows, wide, batches = torch.randn(16, 8), torch.randn(3, 8, 12), torch.randn(3, 16, 8)
    for a, b, groups in (
        (rows, wide, offs),
        (batches, torch.randn(16, 8).t(), offs),
        (rows.t(), torch.randn(16, 12), offs),
        (batches, wide, None),
    ):
        real = torch._grouped_mm(a, b, groups)
        mode = fake_mode()
        with as_on("cpu", mode):
            fake = torch._grouped_mm(*(None if x is None else mode.from_tensor(x) for x in (a, b, groups)))
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
        sizes = torch.diff(offs, prepend=torch.zeros(1, dtype=torch.int32)).tolist()
        expected = {
            (2, 3): sum(2 * size * 8 * 12 for size in sizes),
            (3, 2): sum(2 * 16 * 8 * size for size in sizes),
            (2, 2): sum(2 * 8 * size * 12 for size in sizes),
            (3, 3): 3 * 2 * 16 * 8 * 12,
        }[a.dim(), b.dim()]
        assert FORMULAS[torch.ops.aten._grouped_mm](a, b, groups, out_val=real) == expected


@pytest.mark.parametrize("kind", ["values", "batch norm"])
def test_errors_of_replays_give_the_reason(kind, caplog):
    model = vit() if kind == "values" else MODELS["resnet50"][0]()
    if kind == "values":
        model.register_forward_pre_hook(lambda module, args, kwargs: bool(kwargs["labels"][0] > 1), with_kwargs=True)
    with pytest.raises(ValueError, match="cannot be replayed without memory") as caught:
        StepReplayer(model, pictures(rows=1), CPU, find_stages(model))
    assert ("look at values" in str(caught.value)) == (kind == "values")
    assert "Traceback" not in caplog.text


def test_replays_leave_no_trace():
    model, batch = gpt2(), tokens()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    model.eval()
    plan_placement(model, batch, memory_budget="60%", setup=CPU)
    assert not model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert F.dropout.__module__ == "torch.nn.functional"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("policy", ["none", "all", "every_2", "every_3", "sqrt"])
def test_flops_of_named_policies_are_exact(policy):
    """Recomputed FLOPs of the replay and of a real step, counted by PyTorch."""
    model, batch = gpt2(num_layers=4), tokens()
    stages = find_stages(model)
    plan = PlacementPlan(policy, named_choices(policy, stages))
    replay = StepReplayer(model, batch, CPU, stages).replay(plan)
    model.train()
    with apply_placement(model, plan), FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    assert replay.cost.flops == counter.get_total_flops()
    if policy == "all":  # dropout after the last product of a block: all of it runs again
        products = 3 * 48 * 2 * (12 * 32 * 32)
        attention = 2 * 2 * 3 * 4 * 48 * 48 * 8  # two products for each of 4 heads
        stock = StepReplayer(model, batch, CPU, stages).replay_choices({}).cost.flops
        assert replay.cost.flops - stock == 4 * (products + attention)


def test_kinds_and_stages_add_up_to_the_peak():
    model, batch = gpt2(), tokens()
    stages = find_stages(model)
    replay = StepReplayer(model, batch, CPU, stages).replay_choices({})
    assert sum(replay.peak_by_key.values()) == replay.peak_bytes
    kinds = replay.peak_by_kind()
    trained = sum(parameter.nbytes for parameter in model.parameters())
    assert kinds["parameters"] == trained
    assert kinds["optimizer"] == pytest.approx(2 * trained, rel=0.01)
    assert {key[1] for key in replay.peak_by_key if key[0] == "activations"} >= set(stages)


@contextmanager
def autocast_on_fake_cuda(dtype):
    """CUDA's own rules; `torch.autocast("cuda")` wants a device."""
    if dtype is not None:
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", dtype)
        torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if dtype is not None:
            torch.autocast_decrement_nesting()
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [gpt2, llama, vit])
def test_cpu_as_cuda_saves_what_fake_cuda_saves(make, dtype):
    """The forward pass runs on fake CUDA tensors (the backward pass does not, pytorch#92627): the same bytes."""
    batch = pictures() if make is vit else tokens()
    with as_on("cuda", fake_mode()):  # what transformers and timm call, for both
        attention = F.scaled_dot_product_attention

    def saved(model, inputs, autocast):
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.train()
            model(**inputs)
        own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        return sum(tensor.untyped_storage().nbytes() for key, tensor in storages.items() if key not in own)

    mode = fake_mode()
    model = fake_copy(make(), mode)
    with as_on("cuda", mode):
        inputs = {name: torch.empty_like(tensor) for name, tensor in batch.items()}
        found = saved(model, inputs, torch.autocast("cpu", dtype=dtype) if dtype else nullcontext())
    mode = fake_mode()
    model = fake_copy(make(), mode)
    with mode:
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        table[name] = _on_cuda(tensor)
        if model.get_output_embeddings() is not None and make is gpt2:
            model.tie_weights()
        inputs = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda") for name, tensor in batch.items()}
        stock = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = lambda q, k, v, **kw: attention(
            *((t.to(dtype) for t in (q, k, v)) if dtype else (q, k, v)), **kw
        )
        try:
            truth = saved(model, inputs, autocast_on_fake_cuda(dtype))
        finally:
            F.scaled_dot_product_attention = stock
    assert found == pytest.approx(truth, rel=1e-3)  # the last few scores of the loss may be cast once more


def _on_cuda(tensor):
    made = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
    return torch.nn.Parameter(made) if isinstance(tensor, torch.nn.Parameter) else made


# ---- The chain -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_chain_predicts_replays_of_mixed_choices(name):
    """Random choices, runs among them: the sum of the stages is what the whole step takes."""
    make, make_batch = MODELS[name]
    planner = PlacementPlanner(make(), make_batch(rows=8), CPU, memory_rewrites="none")
    ((rewrites, profile),) = planner.profiles.items()
    chain = build_chain(profile)
    rng = random.Random(0)
    for _ in range(12):
        path, start = [], 0
        while start < chain.num_stages:
            segment = rng.choice([s for s in chain.segments if s.start == start and s.stop <= start + 4])
            path.append(segment)
            start = segment.stop
        found = planner.replay(choices_of(profile, path), rewrites)
        assert chain.peak(tuple(path)) == pytest.approx(found.peak_bytes, rel=0.02), path


@pytest.mark.parametrize("name", MODELS)
def test_plans_fit_are_monotone_and_beat_every_n(name):
    make, make_batch = MODELS[name]
    planner = PlacementPlanner(make(), make_batch(rows=8), CPU)
    baseline, floor = planner.baseline.peak_bytes, planner.floor.peak_bytes
    assert floor < baseline
    named = [planner.named(f"every_{n}") for n in (1, 2, 3)] + [planner.named("all"), planner.named("sqrt")]
    budgets = sorted({*(round(floor + (baseline - floor) * i / 7) for i in range(8))})
    budgets += [plan.predicted_peak_bytes for plan in named if plan.predicted_peak_bytes >= floor]
    times = {}
    for budget in budgets:
        plan = planner.for_budget(max(budget, 2**20))
        assert plan.predicted_peak_bytes <= budget
        assert plan.budget_bytes == budget
        assert plan.optimality_gap < 0.02
        times[budget] = max(0.0, plan.extra_time_ratio + plan.details["rewritten_time_ratio"])
        assert planner.replay(plan.stages, plan.rewrites).peak_bytes == plan.predicted_peak_bytes
    ordered = [times[budget] for budget in sorted(times)]
    assert ordered == sorted(ordered, reverse=True)
    assert ordered[-1] == 0
    for plan in named:
        if plan.predicted_peak_bytes in times:
            assert times[plan.predicted_peak_bytes] <= plan.extra_time_ratio
    for plan in planner.frontier(5):
        assert floor <= plan.predicted_peak_bytes <= baseline


def test_a_budget_below_the_floor_is_an_error_that_names_it():
    planner = PlacementPlanner(gpt2(width=64), tokens(), CPU, memory_rewrites="none")
    floor = planner.floor.peak_bytes
    with pytest.raises(ValueError, match=r"no placement needs less than .*floor") as error:
        planner.for_budget(floor - 1)
    assert gib(floor, up=True) in str(error.value)
    assert "memory_rewrites='auto' (fused_activations, chunked_loss)" in str(error.value)
    assert "per_device_train_batch_size" in str(error.value)
    assert planner.for_budget(floor).predicted_peak_bytes == floor


def test_rewrites_are_used_only_where_they_save_recomputation():
    batch = tokens(rows=16)
    planner = PlacementPlanner(gpt2(num_layers=2), batch, CPU)
    assert planner.for_budget("100%").is_stock
    tight = planner.for_budget("65%")
    assert tight.rewrites.names()
    without = PlacementPlanner(gpt2(num_layers=2), batch, CPU, memory_rewrites="none").for_budget("65%")
    assert without.rewrites == Rewrites()
    assert tight.extra_time_ratio < without.extra_time_ratio
    forced = PlacementPlanner(gpt2(num_layers=2), batch, CPU, memory_rewrites="fused_activations")
    assert forced.for_budget("100%").rewrites == Rewrites(fused_activations=True)
    assert forced.named("all").rewrites == Rewrites(fused_activations=True)


def test_what_rewrites_save_is_taken_into_account_but_is_no_reason_for_them():
    model, batch = gpt2(num_layers=2, vocab_size=4000), tokens(rows=8, length=64)
    planner = PlacementPlanner(model, batch, StepSetup(device=DEVICES["a100"]))
    nothing, fused, chunked, both = (
        planner.replay({}, rewrites).cost.seconds
        for rewrites in (Rewrites(), Rewrites(True), Rewrites(False, True), Rewrites(True, True))
    )
    assert fused < nothing < both < chunked
    assert planner.for_budget("100%").is_stock  # fused activations alone would be faster
    floor, baseline = planner.floor.peak_bytes, planner.baseline.peak_bytes
    plan = planner.for_budget((floor + baseline) // 2)
    assert plan.rewrites == Rewrites(True, True)  # not the chunked loss alone, which is slower
    assert plan.extra_time_ratio == 0
    assert plan.details["rewritten_time_ratio"] == pytest.approx(both / nothing - 1, abs=2e-6)


def test_ranks_of_plans():
    ordered = [
        rank_of(0.0, Rewrites()), rank_of(-0.2, Rewrites(True, True)), rank_of(-0.1, Rewrites(True)),
        rank_of(-0.1, Rewrites(True, True)), rank_of(0.1, Rewrites()), rank_of(0.1, Rewrites(True)),
        rank_of(0.1, Rewrites(True, True)), rank_of(0.2, Rewrites()),
    ]  # fmt: skip
    assert ordered == sorted(ordered)


def test_allowed_rewrites():
    both = Rewrites(True, True)
    assert allowed_rewrites("none", both) == [Rewrites()]
    assert [r.names() for r in allowed_rewrites("auto", both)] == [
        [], ["fused_activations"], ["chunked_loss"], ["fused_activations", "chunked_loss"],
    ]  # fmt: skip
    with pytest.raises(ValueError, match="does not allow"):
        allowed_rewrites("chunked_loss", Rewrites(True, False))
    with pytest.raises(ValueError, match="memory_rewrites is 'gelu'"):
        allowed_rewrites("gelu", both)


def test_solver_uses_selective_choices():
    """Where the device limits a step, not the host, which takes longer over selective recomputation than it saves."""
    setup = StepSetup(device=dataclasses.replace(DEVICES["a100"], host_s=0.0))
    planner = PlacementPlanner(gpt2(width=64), tokens(rows=16), setup, memory_rewrites="none")
    kinds = {choice.recompute for plan in planner.frontier(8) for choice in plan.stages.values()}
    assert {"none", "selective", "full"} <= kinds
    ((_, chain),) = planner.chains().items()
    assert solve(chain, planner.floor.peak_bytes - 1) is None


# ---- What cannot be planned, and other shapes of models ------------------------------------------------------------


class LooksAtValues(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()) for _ in "ab"))

    def forward(self, x):
        return self.layers(x).sum() * (2 if x.sum().item() > 0 else 1)


def test_models_that_look_at_values_are_refused_with_a_remedy():
    with pytest.raises(ValueError, match="'sqrt', which need no replay"):
        plan_placement(LooksAtValues(), torch.zeros(2, 4), memory_budget="75%", setup=CPU)


class Chain(torch.nn.Module):
    """A plain module whose loss is its output."""

    def __init__(self, depth=6, width=64):
        super().__init__()
        self.layers = torch.nn.Sequential(
            *(torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Tanh()) for _ in range(depth))
        )

    def forward(self, x):
        return self.layers(x).square().mean()


def test_any_module_with_one_positional_argument():
    model, batch = Chain(), torch.randn(512, 64)
    plan = plan_placement(model, batch, memory_budget="70%", setup=CPU)
    assert plan.predicted_peak_bytes <= 0.7 * plan.baseline_peak_bytes
    expected = torch.autograd.grad(model(batch), list(model.parameters()))
    with apply_placement(model, plan):
        found = torch.autograd.grad(model(batch), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


class Inplace(torch.nn.Module):
    """Convolutions whose outputs are modified in place: they cannot be kept for a recomputation."""

    def __init__(self):
        super().__init__()

        def block():
            return torch.nn.Sequential(
                torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.ReLU(inplace=True), torch.nn.Conv2d(8, 8, 3, padding=1),
                torch.nn.Tanh(),
            )  # fmt: skip

        self.blocks = torch.nn.Sequential(*(block() for _ in range(5)))

    def forward(self, x):
        return self.blocks(x).square().mean()


def test_choices_that_cannot_work_are_no_options():
    planner = PlacementPlanner(Inplace(), torch.randn(32, 8, 32, 32), CPU)
    budget = (planner.floor.peak_bytes + planner.baseline.peak_bytes) // 2
    plan = planner.for_budget(budget)
    assert plan.predicted_peak_bytes <= budget < plan.baseline_peak_bytes
    options = planner.profiles[Rewrites()].stages[0].options
    assert all(0 not in choice.saved_ops for choice in options)
    assert FULL in options


def test_stages_by_regular_expression():
    model = gpt2()
    assert find_stages(model, r"transformer\.h\.\d+\.mlp") == [f"transformer.h.{i}.mlp" for i in range(4)]
    plan = plan_placement(
        model, tokens(rows=16), memory_budget="80%", memory_rewrites="none",
        placement_stages=r"transformer\.h\.\d+\.mlp", setup=CPU,
    )  # fmt: skip
    assert set(plan.stages) == set(find_stages(model, r"transformer\.h\.\d+\.mlp"))
    with pytest.raises(ValueError, match="matches no module name"):
        find_stages(model, "blocks")
    with pytest.raises(ValueError, match="isn't a regular expression"):
        find_stages(model, "(")
    with pytest.raises(ValueError, match="placement_stages"):
        find_stages(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", ["layer1.0", "layer1.1", "layer2.0"]),
        ("convnext_atto", ["stem", "stages.0.blocks.0", "stages.0.blocks.1"]),
        ("swin_tiny_patch4_window7_224", ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"]),
        ("efficientnet_b0", ["blocks.0.0", "blocks.1.0", "blocks.1.1"]),
        ("regnety_040", ["s1.b1", "s1.b2", "s2.b1"]),
        ("mixer_s16_224", ["blocks.0", "blocks.1", "blocks.2"]),
        ("densenet121", ["features.denseblock1.denselayer1", "features.denseblock1.denselayer2"]),
    ],
)
def test_stages_of_timm_models(name, expected):
    import timm

    assert find_stages(timm.create_model(name))[: len(expected)] == expected


class Albert(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(2)])

    def forward(self, x):
        for _ in range(3):
            x = self.layers[0](x).tanh()
        return self.layers[1](x).sum()


def test_stages_called_again_are_left_out(caplog):
    replayer = StepReplayer(Albert(), torch.zeros(2, 4), CPU, ["layers.0", "layers.1"])
    assert replayer.stages == ["layers.1"]
    assert "Not planned: layers.0" in caplog.text
    with pytest.raises(ValueError, match="called exactly once"):
        StepReplayer(Albert(), torch.zeros(2, 4), CPU, ["layers.0"])


def test_optimizers_and_frozen_parameters():
    batch = tokens()

    def peak(make_optimizer, freeze=False):
        model = gpt2(width=64)
        if freeze:
            model.transformer.wte.requires_grad_(False)
            model.transformer.h[0].requires_grad_(False)
        setup = StepSetup(device=DEVICES["cpu"], make_optimizer=make_optimizer)
        return StepReplayer(model, batch, setup, find_stages(model)).replay_choices({}).peak_by_kind()

    trained = sum(parameter.nbytes for parameter in gpt2(width=64).parameters())
    sgd = peak(lambda model: torch.optim.SGD(model.parameters(), momentum=0.9))
    assert sgd["optimizer"] == trained
    assert "optimizer" not in peak(lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    assert peak(adamw, freeze=True)["optimizer"] < 2 * trained
    loop = peak(lambda model: torch.optim.AdamW(model.parameters(), fused=False))
    assert loop["optimizer"] == pytest.approx(2 * trained, rel=0.01)


def test_ddp_buckets_are_counted():
    model, batch = gpt2(), tokens()
    stages = find_stages(model)
    one = StepReplayer(model, batch, CPU, stages).replay_choices({})
    two = StepReplayer(
        model, batch, StepSetup(device=DEVICES["cpu"], sharding=Sharding("ddp", 2)), stages
    ).replay_choices({})
    assert two.peak_bytes - one.peak_bytes == sum(parameter.nbytes for parameter in model.parameters())


def test_a_padded_batch_is_planned_with_its_mask():
    model, batch = gpt2(), tokens()
    stages = find_stages(model)
    full = StepReplayer(model, {**batch, "attention_mask": torch.ones(3, 48, dtype=torch.long)}, CPU, stages)
    mask = torch.ones(3, 48, dtype=torch.long)
    mask[0, 40:] = 0
    padded = StepReplayer(model, {**batch, "attention_mask": mask}, CPU, stages)
    assert full.replay_choices({}).peak_bytes == StepReplayer(model, batch, CPU, stages).replay_choices({}).peak_bytes
    assert padded.replay_choices({}).peak_bytes > full.replay_choices({}).peak_bytes
    inputs = {**batch, "attention_mask": mask}
    truth = real_peak(gpt2(), inputs, PlacementPlan("none", {}))
    assert padded.replay_choices({}).peak_bytes == pytest.approx(truth, rel=0.01)


# ---- Budgets and plans as text -------------------------------------------------------------------------------------


def test_budgets():
    assert parse_budget("12GiB") == 12 * 2**30
    assert parse_budget("1.5 GB") == 1_500_000_000
    assert parse_budget("800mib") == 800 * 2**20
    assert parse_budget("75%", 1000) == 750
    assert parse_budget(3 * 2**30) == 3 * 2**30
    for wrong, message in (
        ("", "give '12GiB'"), ("lots", "give '12GiB'"), ("0GiB", "positive"), ("-1GiB", "give '12GiB'"),
        ("nan", "give '12GiB'"), ("120%", "at most 100%"), ("12", "give a unit"), ("12 GiBs", "unit must be"),
        ("1e400GiB", "finite"), (True, "give '12GiB'"), ("0%", "positive"),
        (0.75, r"'0.75GiB' or '75%'\."), ("75", r"'75GiB' or '75%'\."), (4096, r"such as '4096GiB'\."),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            parse_budget(wrong, 1000)
    assert gib(6.33 * 2**30) == "6.33 GiB"
    assert gib(812 * 2**20) == "812 MiB"


def test_plans_survive_a_file(tmp_path):
    plan = plan_placement(gpt2(), tokens(), memory_budget="70%", setup=CPU)
    plan.save(tmp_path / "plan.json")
    loaded = PlacementPlan.load(tmp_path / "plan.json")
    assert loaded == plan
    values = plan.to_dict()
    for key in ("baseline_peak_bytes", "predicted_peak_bytes", "floor_peak_bytes", "extra_time_ratio"):
        assert values[key] is not None
    assert set(values["stages"]) == set(find_stages(gpt2()))
    for text, message in (
        ("{", "isn't a placement plan"), ("[]", "holds a list"), ('{"format": 2}', "not a placement plan of format"),
        ('{"format": 1}', "not a placement plan"), ('{"format": 1, "policy": "x", "stages": {"a": 3}}', "not a plac"),
    ):  # fmt: skip
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            PlacementPlan.load(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="no placement plan can be read"):
        PlacementPlan.load(tmp_path / "nothing.json")


def test_choices_are_checked():
    with pytest.raises(ValueError, match="recompute is 'some'"):
        StageChoice("some")
    with pytest.raises(ValueError, match="saved_ops needs"):
        StageChoice("full", saved_ops=(1,))
    with pytest.raises(ValueError, match="run needs"):
        StageChoice("none", run=1)
    assert StageChoice("full") == FULL


def test_contradictions_of_plan_placement():
    with pytest.raises(ValueError, match="needs memory_budget"):
        plan_placement(gpt2(), tokens())
    with pytest.raises(ValueError, match="set it to 'budget'"):
        plan_placement(gpt2(), tokens(), checkpoint_placement="all", memory_budget="75%")


def test_resnet_heterogeneous_blocks_are_told_apart():
    """The early blocks free most for their time: a plan for a modest budget takes those."""
    planner = PlacementPlanner(timm_model("resnet50"), pictures(rows=16, size=64), StepSetup(), memory_rewrites="none")
    plan = planner.for_budget("93%")
    touched = [name for name, choice in plan.stages.items() if choice.recompute != "none"]
    assert touched
    assert all("layer1" in name or "layer2" in name for name in touched)
    assert plan.extra_time_ratio < 0.6 * planner.named("every_2").extra_time_ratio


def test_loss_of_models_and_tuples():
    model, batch = gpt2(), tokens()
    model.eval()
    assert torch.equal(model_loss(model, batch), model(**batch).loss)
    assert torch.equal(model_loss(model, {**batch, "return_dict": False}), model(**batch).loss)


def test_a_step_takes_the_time_of_the_device_or_of_the_host():
    """The host issues every operator and, where layers are recomputed, handles what autograd saves."""
    model, batch = gpt2(num_layers=2), tokens(rows=8, length=64)
    stages = find_stages(model)
    slow = dataclasses.replace(DEVICES["h100"], host_s=1.0, launch_s=0.0)
    replayer = StepReplayer(model, batch, StepSetup(device=slow), stages)
    stored = replayer.replay_choices({}).cost
    assert stored.seconds == stored.host_seconds > 100 > stored.device_seconds
    full = replayer.replay_choices(dict.fromkeys(stages, FULL)).cost
    selective = replayer.replay_choices(dict.fromkeys(stages, StageChoice("selective", (0, 1)))).cost
    assert stored.seconds < full.seconds < selective.seconds
    assert selective.device_seconds < full.device_seconds
    fast = StepReplayer(model, batch, StepSetup(device=dataclasses.replace(slow, host_s=0.0)), stages)
    assert fast.replay_choices({}).cost.seconds == fast.replay_choices({}).cost.device_seconds > 0


@pytest.mark.parametrize(("width", "dtype", "aligned"), [
    (50257, torch.bfloat16, False), (50304, torch.bfloat16, True), (50257, torch.float32, True),
])  # fmt: skip
def test_tensor_cores_are_slow_on_rows_that_are_not_aligned(width, dtype, aligned):
    """GPT-2's vocabulary in half precision: the logits' rows don't begin at multiples of 16 bytes."""
    spec = DEVICES["h100"]
    a, b = torch.empty(1024, 768, dtype=dtype, device="meta"), torch.empty(width, 768, dtype=dtype, device="meta").t()
    cost = op_cost(torch.ops.aten.mm.default, (a, b), {}, torch.mm(a, b), spec)
    assert cost.device_seconds == spec.seconds(cost.flops, cost.num_bytes, dtype, aligned)


def test_plans_for_gpus_count_the_workspaces_of_cublas():
    model, batch = gpt2(num_layers=2), tokens(rows=8)
    replay = StepReplayer(model, batch, StepSetup(device=DEVICES["h100"]), find_stages(model)).replay_choices({})
    assert replay.peak_by_kind()["workspace"] == 2 * 32 * 2**20  # benchmarks/gpu.md
