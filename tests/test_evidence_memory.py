"""Peaks by phase: readers of one counter, a fake allocator in place of CUDA's, and the real memory of this process."""

import gc
import logging
from types import SimpleNamespace

import pytest
import torch
from helpers import Rows, arguments, quiet, tiny_gpt2, touch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments

from hf_trainopt import EfficientTrainer
from hf_trainopt.machine import peak_memory
from hf_trainopt.machine.peak_memory import PeakCounter, accelerator_counter, process_counter, process_peak
from hf_trainopt.metrics import MemoryCallback, memory
from hf_trainopt.metrics.memory import PHASES
from hf_trainopt.placement.measure import PeakMeasurement
from hf_trainopt.scripting.summary import summary_rows


MIB = 2**20


class Allocator:
    """Bytes in use and their peak, as an accelerator keeps them; `use` allocates and frees."""

    def __init__(self):
        self.bytes = self.highest = 100 * MIB

    def use(self, num_bytes: int) -> None:
        self.highest = max(self.highest, self.bytes + num_bytes)

    def reset(self) -> None:
        self.highest = self.bytes


@pytest.fixture
def allocators(monkeypatch):
    """Two fake accelerators."""
    made = [Allocator(), Allocator()]
    monkeypatch.setattr(peak_memory, "_accelerator_peak", lambda index: made[index or 0].highest)
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", lambda index=None: made[index or 0].reset())
    accelerator_counter.cache_clear()
    yield made
    accelerator_counter.cache_clear()


def fake_args(**kwargs):
    return SimpleNamespace(**({"device": torch.device("cuda", 0), "n_gpu": 1, "world_size": 1} | kwargs))


STATE = SimpleNamespace(global_step=0, max_steps=9, log_history=[], stateful_callbacks={})


def a_step(callbacks, args, allocator, forward=0, optimizer=0, between=0, control=None):
    """One step as the loop has it, with that much memory in each phase (MiB)."""
    control = control or TrainerControl(should_log=True)
    allocator.use(between * MIB)
    for event, size in (("on_step_begin", forward), ("on_pre_optimizer_step", optimizer), ("on_step_end", 0)):
        for callback in callbacks:
            getattr(callback, event)(args, STATE, control, model=None)
        allocator.use(size * MIB)


def gib(callback):
    return {
        key.removeprefix("peak_memory_").removesuffix("_gib"): round(value * 1024)
        for key, value in callback.values(None, None, {}).items()
    }


# ---- One counter, several readers -----------------------------------------------------------------------------------


def test_readers_do_not_lose_each_other_s_peaks():
    allocator = Allocator()
    counter = PeakCounter(lambda: allocator.highest, allocator.reset)
    allocator.use(900 * MIB)
    whole, phase = counter.reader(), counter.reader()
    assert whole.peak() == phase.peak() == 100 * MIB  # what was before is not theirs
    allocator.use(50 * MIB)
    assert phase.take() == 150 * MIB
    allocator.use(20 * MIB)
    assert phase.take() == 120 * MIB
    assert whole.peak() == 150 * MIB
    assert whole.peak() == whole.take() == 150 * MIB
    assert phase.take() == whole.take() == 100 * MIB
    del whole
    assert len(counter._readers) == 1


def test_phases_on_an_accelerator(allocators):
    allocator, callback, args = allocators[0], MemoryCallback(), fake_args()
    callback.begin(args, STATE, None)
    a_step([callback], args, allocator, forward=200, optimizer=50)
    assert gib(callback) == {"gib": 300, "forward_backward": 300, "optimizer": 150}
    a_step([callback], args, allocator, forward=100, optimizer=70, between=400)
    assert gib(callback) == {"gib": 500, "forward_backward": 300, "optimizer": 170}
    allocator.use(30 * MIB)
    callback.on_evaluate(args, STATE, TrainerControl())
    allocator.use(10 * MIB)
    callback.on_save(args, STATE, TrainerControl())
    expected = {"gib": 500, "forward_backward": 300, "optimizer": 170, "evaluation": 130, "save": 110}
    assert gib(callback) == expected
    # A run that is resumed goes on from there.
    saved, other = callback.attributes(), MemoryCallback()
    other.begin(args, STATE, saved)
    a_step([other], args, allocator, forward=1, optimizer=600)
    assert gib(other) == expected | {"gib": 700, "optimizer": 700}


def test_nothing_is_read_off_between_logs(allocators):
    callback, args = MemoryCallback(), fake_args()
    callback.begin(args, STATE, None)
    a_step([callback], args, allocators[0], forward=200, control=TrainerControl())
    assert gib(callback) == {}
    a_step([callback], args, allocators[0])
    assert gib(callback)["forward_backward"] == 300


@pytest.mark.parametrize("order", [1, -1])
def test_placement_measures_the_same_counter(allocators, order):
    """Its step is the second; both have their own peaks, whichever callback is first."""
    measured, allocator, args = [], allocators[0], fake_args()
    callbacks = [MemoryCallback(), PeakMeasurement(measured.append)][::order]
    (callback,) = (c for c in callbacks if isinstance(c, MemoryCallback))
    callback.begin(args, STATE, None)
    for other in callbacks:
        if other is not callback:
            other.on_train_begin(args, SimpleNamespace(global_step=-1, max_steps=9), None)
    allocator.use(800 * MIB)
    a_step(callbacks, args, allocator, forward=200, optimizer=250)
    assert [round(peak / MIB) for peak in measured] == [350]
    assert gib(callback) == {"gib": 900, "forward_backward": 300, "optimizer": 350}


def test_later_steps_leave_the_mark_to_others(allocators):
    """Only the second step lowers it. A later step counts if it has raised it."""
    second, later, allocator, args = [], [], allocators[0], fake_args()
    callback = PeakMeasurement(second.append, later.append)
    callback.on_train_begin(args, SimpleNamespace(global_step=-1, max_steps=9), None)
    state = SimpleNamespace(global_step=0, max_steps=9)
    allocator.use(500 * MIB)  # of the first step
    for used in (200, 150, 300, 250):
        callback.on_step_begin(args, state, None)
        allocator.use(used * MIB)
        callback.on_step_end(args, state, None)
        state.global_step += 1
        assert allocator.highest >= (100 + used) * MIB
    assert [round(peak / MIB) for peak in second] == [300]
    assert [round(peak / MIB) for peak in later] == [400]
    assert round(allocator.highest / MIB) == 400


def test_the_fullest_device_counts(allocators):
    model = torch.nn.Linear(1, 1)
    spread = SimpleNamespace(parameters=lambda: [SimpleNamespace(device=torch.device("cuda", i)) for i in (0, 1)])
    assert memory._devices(fake_args(), model) == [0]
    assert memory._devices(fake_args(), spread) == [0, 1]
    assert memory._devices(fake_args(n_gpu=2), model) == [0, 1]
    assert memory._devices(fake_args(device=torch.device("cuda")), model) == [None]
    callback, args = MemoryCallback(), fake_args(n_gpu=2)
    callback.begin(args, STATE, None, model=model)
    allocators[1].use(70 * MIB)
    a_step([callback], args, allocators[0], forward=20)
    assert gib(callback)["gib"] == 170
    assert gib(callback)["forward_backward"] == 120


def test_the_peak_of_cuda_is_found_among_its_statistics(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    statistics = {"allocated_bytes": {"all": {"peak": 7, "current": 3}, "large_pool": {"peak": 5}}}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda index: statistics)
    assert peak_memory._accelerator_peak(0) == 7
    statistics.clear()  # nothing was allocated yet
    assert peak_memory._accelerator_peak(0) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_peak_of_a_real_device():
    reader = accelerator_counter(0).reader()
    tensor = torch.empty(100 * MIB, dtype=torch.uint8, device="cuda:0")
    assert reader.peak() == torch.cuda.max_memory_allocated(0)
    del tensor
    assert reader.take() - reader.take() == 100 * MIB


def test_a_device_without_a_counter_is_said(monkeypatch, caplog):
    def refuses(index):
        raise RuntimeError("Allocator for mps is not a DeviceAllocator.")

    accelerator_counter.cache_clear()
    monkeypatch.setattr(peak_memory, "_accelerator_peak", refuses)
    caplog.set_level(logging.INFO, "hf_trainopt")
    callback, args = MemoryCallback(), fake_args(device=torch.device("mps", 0))
    callback.begin(args, STATE, None)
    a_step([callback], args, Allocator())
    assert gib(callback) == {}
    assert "Allocator for mps" in caplog.text
    accelerator_counter.cache_clear()


# ---- This process ---------------------------------------------------------------------------------------------------


linux = pytest.mark.skipif(process_counter() is None, reason="the high-water mark of a process cannot be reset here")


class Uses(TrainerCallback):
    """200 MiB in one event, once."""

    def __init__(self, event: str):
        self.left = 1

        def use(*args, **kwargs):
            if self.left:
                self.left = 0
                touch(200)

        setattr(self, event, use)


@linux
@pytest.mark.parametrize(
    ("event", "phase"),
    [
        ("on_substep_end", "forward_backward"),
        ("on_optimizer_step", "optimizer"),
        ("on_prediction_step", "evaluation"),
        ("on_save", "save"),
        ("on_epoch_begin", None),
    ],
)
@pytest.mark.parametrize("cls", [Trainer, EfficientTrainer])
def test_memory_shows_in_its_phase_only(tmp_path, event, phase, cls):
    settings = {"gradient_accumulation_steps": 2, "max_steps": 6, "eval_strategy": "steps", "eval_steps": 2}
    settings |= {"save_strategy": "steps", "save_steps": 4, "optim": "sgd"}
    callbacks = [Uses(event)]
    if cls is Trainer:
        callbacks.append(MemoryCallback())
        args = arguments(tmp_path, TrainingArguments, **settings)
    else:
        ramp = {"accumulation_policy": "ramp", "accumulation_ramp": "0:2,0.5:3", "measurements": "memory"}
        args = arguments(tmp_path, **settings, **ramp)
    data = {"train_dataset": Rows(48), "eval_dataset": Rows(6)}
    trainer = quiet(cls(model=tiny_gpt2(), args=args, callbacks=callbacks, **data))
    trainer.train()
    last = trainer.state.log_history[-1]
    peaks = {name: last[f"peak_memory_{name}_gib"] * 1024 for name in PHASES}
    if phase is not None:
        assert last["peak_memory_gib"] * 1024 == peaks[phase]
    quietest = min(peaks.values())
    for name, peak in peaks.items():
        if name == phase:
            assert 190 < peak - quietest < 240
        else:
            assert peak - quietest < 40
    assert last["peak_memory_gib"] * 1024 - quietest > 190


@linux
def test_what_was_before_training_does_not_count():
    gc.collect()  # what is freed meanwhile would hide what is measured
    touch(300)
    before = process_peak()
    reader = process_counter().reader()
    assert before - reader.peak() > 250 * MIB
    touch(100)
    assert 90 * MIB < reader.take() - reader.take() < 150 * MIB


def test_the_summary_of_a_script_has_the_peak_though_the_mark_was_reset():
    state = SimpleNamespace(log_history=[{"loss": 1.0}, {"peak_memory_gib": 999.0}])
    trainer = SimpleNamespace(state=state, args=SimpleNamespace(device=torch.device("cpu")))
    assert summary_rows(trainer, {}, {})[-1][1] == "999.00"


def test_the_summary_of_a_script_on_the_cpu_of_a_machine_with_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    trainer = SimpleNamespace(state=SimpleNamespace(log_history=[]), args=SimpleNamespace(device=torch.device("cpu")))
    assert summary_rows(trainer, {}, {})[-1][0] == "peak memory (process), GiB"


def test_where_the_mark_cannot_be_reset_there_are_no_phases(tmp_path, monkeypatch, caplog):
    """As on macOS, which has no /proc."""
    monkeypatch.setattr(peak_memory, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(peak_memory, "_CLEAR_REFS", tmp_path / "nowhere" / "clear_refs")
    process_counter.cache_clear()
    caplog.set_level(logging.INFO, "hf_trainopt")
    args = arguments(tmp_path / "run", TrainingArguments, max_steps=3)
    trainer = quiet(Trainer(model=tiny_gpt2(), args=args, train_dataset=Rows(), callbacks=[MemoryCallback()]))
    trainer.train()
    process_counter.cache_clear()
    last = trainer.state.log_history[-1]
    assert [key for key in last if "peak" in key] == ["peak_memory_gib"]
    assert 0.1 < last["peak_memory_gib"] < 100
    assert caplog.text.count("not told by phase") == 1
