"""fp16 with real overflows and a real scaler: what is skipped, what is left, what comes back after a resume."""

import logging

import pytest
import torch
from helpers import Rows, arguments, quiet, tiny_gpt2, weights_equal
from precision_helpers import HalfTrainer, Network, Points, lines, make, pretend, scales_fp16

from hf_trainopt import EfficientTrainer
from hf_trainopt.accumulation.controller import WHOLE_WINDOWS
from hf_trainopt.precision.fallback import MOST_SKIPPED_IN_A_ROW, OverflowWatch
from hf_trainopt.reliability import TrainingDivergedError


WINDOW = 4  # rows
POISON = 1e7  # a factor on the loss with which its gradient is beyond fp16 at any scale
GENTLE = {"init_scale": 2.0**8, "growth_interval": 3}


def factors(num_windows: int, poisoned=()) -> list[float]:
    """One row of each poisoned window is; the others would do."""
    return [POISON if row % WINDOW == 1 and row // WINDOW in poisoned else 1.0 for row in range(WINDOW * num_windows)]


def rows_without(num_windows: int, skipped) -> list[int]:
    return [row for row in range(WINDOW * num_windows) if row // WINDOW not in skipped]


@pytest.fixture
def half(monkeypatch):
    pretend(monkeypatch, scales_fp16())


# ---- Skipped steps --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("half")
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd"])
def test_poisoned_windows_leave_no_trace(tmp_path, optim):
    poisoned = (3, 4, 9)
    data = factors(16, poisoned)
    run = make(tmp_path, Points(data), scaler=GENTLE, precision="fp16", optim=optim)
    run.train()
    clean = make(tmp_path, Points(data, rows_without(16, poisoned)), scaler=GENTLE, precision="fp16", optim=optim)
    clean.train()
    assert set(run.model.precisions) == {torch.float16}
    assert weights_equal(run.model, clean.model)
    assert not weights_equal(run.model, Network())
    # The statistics: none of the poisoned windows is in them.
    ours, theirs = run.trainopt.accumulation.controller.tracker, clean.trainopt.accumulation.controller.tracker
    assert (ours.num_dropped, theirs.num_dropped) == (len(poisoned), 0)
    assert ours.num_windows == theirs.num_windows == 13
    for name in ("value", "trace", "gradient_square", "lower"):
        assert getattr(ours.estimate(), name) == pytest.approx(getattr(theirs.estimate(), name), rel=1e-6), name
    # Their samples are consumed, once each.
    assert run.model.numbers == list(range(16 * WINDOW))
    assert run.state.log_history[-1]["samples_seen"] == 16 * WINDOW
    assert [line["skipped_steps"] for line in lines(run)] == [0] * 3 + [1] + [2] * 5 + [3] * 7
    # The scale falls with each of them and comes back after three good steps.
    scales = [line["loss_scale"] for line in lines(run)]
    assert scales[1:12] == [2.0**e for e in (8, 9, 8, 7, 7, 7, 8, 8, 7, 7, 7)]
    assert scales[12:14] == [2.0**8, 2.0**8]


@pytest.mark.usefixtures("half")
@pytest.mark.parametrize("ramp", ["0:2", "0:2,0.3:1,0.6:3"])
def test_the_schedule_does_not_wait_for_skipped_steps(tmp_path, ramp):
    common = {"lr_scheduler_type": "cosine", "warmup_steps": 2, "num_train_epochs": 2}
    # A rule that does not go by the measured noise: skipped windows are missing in that, rightly.
    common |= {"accumulation_policy": "ramp", "accumulation_ramp": ramp, "lr_batch_scaling": "sqrt"}
    run = make(tmp_path, Points(factors(8, (0, 2, 7))), scaler=GENTLE, precision="fp16", **common)
    run.train()
    plain = make(tmp_path, Points(factors(8)), cls=EfficientTrainer, **common)
    plain.train()
    assert run.state.log_history[-2]["skipped_steps"] > 3
    rates = [(line["learning_rate"], line["epoch"], line["samples_seen"]) for line in lines(run)]
    assert rates == [(line["learning_rate"], line["epoch"], line["samples_seen"]) for line in lines(plain)]
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.usefixtures("half")
def test_the_search_for_the_first_scale_is_no_collapse(tmp_path, caplog):
    """GPT-2, in which the scale has to come down from 2^32: many steps in a row are skipped, none was taken before."""
    args = arguments(tmp_path, precision="fp16", optimizer_step_cost=1.0, noise_scale_interval=1)
    cls = type("Hot", (HalfTrainer,), {"scaler": {"init_scale": 2.0**32}})
    trainer = quiet(cls(model=tiny_gpt2(), args=args, train_dataset=Rows(60)))
    trainer.train()
    last = lines(trainer)[-1]
    assert last["skipped_steps"] > MOST_SKIPPED_IN_A_ROW
    assert 1 <= last["loss_scale"] == 2.0 ** (32 - last["skipped_steps"])
    dropped = trainer.trainopt.accumulation.controller.tracker.num_dropped
    assert dropped + WHOLE_WINDOWS == last["skipped_steps"] < trainer.state.global_step
    assert not weights_equal(trainer.model, tiny_gpt2())
    assert "is left" not in caplog.text


# ---- Leaving fp16 ---------------------------------------------------------------------------------------------------


def test_when_fp16_is_left():
    def ends(*scales):
        return [watch.step_ended(scale) for scale in scales]

    watch = OverflowWatch(2.0**40)
    assert ends(*(2.0**e for e in range(39, 19, -1))) == [None] * 20  # the search for the first scale
    assert (watch.skipped_steps, watch.calibrated) == (20, False)
    assert ends(2.0**20, 2.0**21, *(2.0**e for e in range(20, 11, -1))) == [None] * 11
    assert ends(2.0**11) == ["10 optimizer steps in a row have overflowed"]
    assert ends(2.0**11, 2.0, 1.0) == [None] * 3
    assert ends(0.5) == ["the loss scale has fallen to 0.5"]
    assert watch.skipped_steps == 20 + MOST_SKIPPED_IN_A_ROW + 3
    assert ends(0.0, 0.0) == ["the loss scale has fallen to 0"] * 2


# scaler, poisoned windows of 24, windows that are skipped, why
COLLAPSES = {
    "scale": ({"init_scale": 2.0**3}, range(24), range(4), "the loss scale has fallen to 0.5"),
    "in a row": ({"init_scale": 2.0**13}, range(5, 24), range(5, 15), "10 optimizer steps in a row have overflowed"),
}


@pytest.mark.parametrize("case", COLLAPSES)
@pytest.mark.parametrize("fallback", ["fp32", "bf16"])
def test_fp16_is_left_and_training_goes_on(tmp_path, monkeypatch, caplog, case, fallback):
    """To the bit as a run in the other precision over the data after, from the weights and moments of before."""
    pretend(monkeypatch, scales_fp16(native_bf16=fallback == "bf16"))
    scaler, poisoned, skipped, reason = COLLAPSES[case]
    data = factors(24, poisoned)
    run = make(tmp_path, Points(data), scaler=scaler, precision="fp16")
    with caplog.at_level(logging.INFO, "hf_trainopt"):
        run.train()
    assert f"Step {skipped[-1] + 1}: fp16 is left for {fallback}: {reason}." in caplog.text
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[fallback]
    before = 2 * (skipped[-1] + 1)  # micro-batches
    assert run.model.precisions == [torch.float16] * before + [dtype] * (48 - before)
    accelerator = run.accelerator
    assert (accelerator.mixed_precision, accelerator.scaler) == ({"fp32": "no"}.get(fallback, fallback), None)
    logged = lines(run)
    assert [line["skipped_steps"] for line in logged[skipped[-1] :]] == [len(skipped)] * (24 - skipped[-1])
    assert ["loss_scale" in line for line in logged] == [True] * skipped[-1] + [False] * (24 - skipped[-1])
    assert run.trainopt.accumulation.controller.tracker.num_dropped == len(skipped)

    # What happens is a run in fp16 up to the first of them, and one in the other precision from the last one on.
    first = make(tmp_path, Points(data, range(WINDOW * skipped[0])), scaler=scaler, precision="fp16")
    if skipped[0]:
        first.train()
    second = make(tmp_path, Points(data, range(WINDOW * (skipped[-1] + 1), 24 * WINDOW)), precision=fallback)
    second.model.load_state_dict(first.model.state_dict())
    if skipped[0]:
        second.create_optimizer()
        second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.train()
    assert set(second.model.precisions) == {dtype}
    assert weights_equal(run.model, second.model)
    assert run.model.error(Points(data)) < 0.8 * Network().error(Points(data))


def test_the_model_is_evaluated_in_the_precision_that_it_was_left_for(tmp_path, half):
    """Also where an evaluation came before training: that one prepares the model."""
    run = make(tmp_path, Points(factors(12, range(12))), scaler=GENTLE, precision="fp16")
    run.evaluate()
    run.train()
    assert run.model.precisions[-1] == torch.float32
    hidden = []
    run.model.inner.register_forward_hook(lambda module, args, output: hidden.append(output.dtype))
    run.evaluate()
    assert set(hidden) == {torch.float32}


def test_a_rewritten_forward_pass_is_changed_too(tmp_path, half):
    """The chunked loss goes between what an evaluation has put around the model and what training does."""

    class Steep(HalfTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return loss * 1e9 if torch.is_tensor(loss) else loss

    found = []
    model = tiny_gpt2()
    args = arguments(
        tmp_path, precision="fp16", memory_rewrites="chunked_loss", optimizer_step_cost=1.0, max_steps=16,
        per_device_eval_batch_size=3,
    )  # fmt: skip
    trainer = quiet(
        type("Hot", (Steep,), {"scaler": {"init_scale": 2.0**3}})(
            model=model, args=args, train_dataset=Rows(), eval_dataset=Rows(3)
        )
    )
    trainer.evaluate()
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda module, args, output: found.append(output.dtype))
    trainer.train()
    assert lines(trainer)[-1]["skipped_steps"] == 4
    assert found[0] == torch.float16
    assert found[-1] == torch.float32


@pytest.mark.usefixtures("half")
def test_every_call_of_train_begins_as_launched(tmp_path):
    run = make(tmp_path, Points(factors(12, range(12))), scaler=GENTLE, precision="fp16")
    for _ in range(2):
        run.model.precisions.clear()
        run.train()
        assert run.model.precisions[0] == torch.float16
        assert run.model.precisions[-1] == torch.float32
        assert lines(run)[0]["loss_scale"] == 2.0**7
        assert lines(run)[-1]["skipped_steps"] == 9
    # A new Trainer in the same process, with the same arguments: Accelerate's settings are one for the process.
    again = make(tmp_path, Points(factors(2)), args=run.args)
    assert again.accelerator.mixed_precision == "fp16"
    again.train()
    assert set(again.model.precisions) == {torch.float16}


@pytest.mark.usefixtures("half")
def test_what_cannot_be_changed_is_said_once(tmp_path, caplog):
    run = make(tmp_path, Points(factors(16, range(16))), scaler=GENTLE, precision="fp16")
    run.trainopt.precision._obstacle = lambda: "its precision is carved in stone"
    run.train()
    assert caplog.text.count("its precision is carved in stone. Steps that overflow are skipped") == 1
    assert set(run.model.precisions) == {torch.float16}
    assert lines(run)[-1]["loss_scale"] < 0.1


def test_with_precision_unset_fp16_stays(tmp_path, monkeypatch, caplog):
    """As in `Trainer`, down to a loss scale of zero; the statistics bear it."""
    pretend(monkeypatch, scales_fp16())
    scaler = {"init_scale": 2.0**-140, "backoff_factor": 2.0**-20}
    run = make(tmp_path, Points([1e38] * 6 * WINDOW), scaler=scaler, fp16=True, max_skipped_windows=0)
    run.train()
    assert set(run.model.precisions) == {torch.float16}
    assert lines(run)[-1]["loss_scale"] == 0.0
    assert caplog.text.count("and with fp16=True it stays") == 1
    assert "set precision='fp16' or 'auto'" in caplog.text


class Loud(Network):
    """Multiplies inside the forward pass: with a factor above 65504 that overflows in fp16, and in no other type."""

    def forward(self, x, labels, factor, number):
        hidden = self.inner(x)
        self.precisions.append(hidden.dtype)
        factor = factor[:, None].to(hidden.dtype)
        output = self.outer(hidden * factor / factor).squeeze(-1)
        return {"loss": ((output.float() - labels) ** 2).mean()}


@pytest.mark.parametrize(("first", "reason"), [
    (0, "the loss of 10 optimizer steps in a row was not finite"), (3, "10 optimizer steps in a row have overflowed"),
])  # fmt: skip
def test_an_overflow_of_the_forward_pass_ends_fp16_and_not_the_run(tmp_path, half, caplog, first, reason):
    """No loss scale mends it: `max_skipped_windows` is met before the scale has fallen below 1."""
    data = Points([1e6 if row >= first * WINDOW else 1.0 for row in range(20 * WINDOW)])
    run = make(tmp_path, data, model=Loud(), scaler={"init_scale": 2.0**12}, precision="fp16")
    run.train()
    assert f"Step {first + 10}: fp16 is left for fp32: {reason}." in caplog.text
    assert run.model.precisions == [torch.float16] * 2 * (first + 10) + [torch.float32] * 2 * (10 - first)
    assert run.trainopt.accumulation.controller.tracker.num_dropped == 10
    assert run.trainopt.accumulation.controller.tracker.num_windows == 10
    assert run.state.log_history[-1]["samples_seen"] == 20 * WINDOW
    assert not weights_equal(run.model, Loud())
    # fp16=True stays in fp16, and the run ends as it does in any other precision.
    with pytest.raises(TrainingDivergedError, match="max_skipped_windows"):
        make(tmp_path, data, model=Loud(), fp16=True).train()


def test_losses_that_are_not_finite_in_the_new_precision_either_end_the_run(tmp_path, half, caplog):
    data = Points([float("inf")] * 30 * WINDOW)
    run = make(tmp_path, data, precision="fp16")
    with pytest.raises(TrainingDivergedError, match="10 optimizer steps in a row"):
        run.train()
    assert "Step 10: fp16 is left for fp32" in caplog.text
    assert run.state.global_step == 20  # ten after that one; fused Adam tells one step later
    assert weights_equal(run.model, Network())


@pytest.mark.usefixtures("half")
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_an_infinite_loss_with_finite_gradients_is_in_no_statistics(tmp_path, optim, max_grad_norm):
    """Its step is skipped, though the scaler finds nothing wrong with it."""

    class Overstated(Network):
        def forward(self, x, labels, factor, number):
            outputs = super().forward(x, labels, torch.ones_like(factor), number)
            return {"loss": outputs["loss"] + torch.where(factor.max() > 1, torch.inf, 0.0)}

    options = {"scaler": GENTLE, "precision": "fp16", "optim": optim, "max_grad_norm": max_grad_norm}
    run = make(tmp_path, Points(factors(8, (2, 5))), model=Overstated(), **options)
    run.train()
    clean = make(tmp_path, Points(factors(8), rows_without(8, (2, 5))), model=Overstated(), **options)
    clean.train()
    assert (lines(run)[-1]["skipped_windows"], lines(run)[-1]["skipped_steps"]) == (2, 0)
    assert weights_equal(run.model, clean.model)
    ours, theirs = run.trainopt.accumulation.controller.tracker, clean.trainopt.accumulation.controller.tracker
    assert (ours.num_dropped, ours.num_windows) == (2, theirs.num_windows)
    for name in ("value", "trace", "gradient_square", "lower"):
        assert getattr(ours.estimate(), name) == pytest.approx(getattr(theirs.estimate(), name), rel=1e-6), name


# ---- Resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fallback", ["fp32", "bf16"])
def test_a_resumed_run_stays_where_it_was(tmp_path, monkeypatch, fallback):
    """From before fp16 was left (in the middle of the skipped steps), from the step itself and from after."""
    pretend(monkeypatch, scales_fp16(native_bf16=fallback == "bf16"))
    data = Points(factors(20, range(3, 20)))
    options = {"scaler": {"init_scale": 2.0**15}, "precision": "fp16", "save_strategy": "steps", "save_steps": 1}
    whole = make(tmp_path, data, **options)
    whole.train()
    assert whole.trainopt.precision.state_dict()["changed_at_step"] == 13
    for step in (2, 8, 12, 13, 17):
        resumed = make(tmp_path / "resumed", data, **options | {"save_strategy": "no"})
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert weights_equal(whole.model, resumed.model), step
        assert resumed.model.precisions == whole.model.precisions[2 * step :]
        assert lines(resumed) == lines(whole)
        assert (
            resumed.trainopt.accumulation.controller.tracker.state_dict()
            == whole.trainopt.accumulation.controller.tracker.state_dict()
        )
    # The same object goes back to before.
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert weights_equal(whole.model, resumed.model)
    assert lines(resumed) == lines(whole)


def test_a_checkpoint_of_fp16_can_be_resumed_in_another_precision(tmp_path, monkeypatch, caplog):
    pretend(monkeypatch, scales_fp16())
    data = Points(factors(8))
    make(tmp_path, data, precision="fp16", save_strategy="steps", save_steps=4).train()
    assert (tmp_path / "checkpoint-4" / "scaler.pt").is_file()
    for precision in ("fp32", "bf16"):
        run = make(tmp_path / "resumed", data, precision=precision)
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert len(run.model.precisions) == 8
        assert torch.float16 not in run.model.precisions


def test_a_run_that_left_fp16_can_be_resumed_in_fp16_proper(tmp_path, half, caplog):
    data = Points(factors(12, range(12)))
    make(tmp_path, data, scaler=GENTLE, precision="fp16", save_strategy="steps", save_steps=10).train()
    assert not (tmp_path / "checkpoint-10" / "scaler.pt").is_file()
    run = make(tmp_path / "resumed", data, scaler=GENTLE, fp16=True)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert set(run.model.precisions) == {torch.float16}
    assert "set precision='fp16' or 'auto' to go on as it did" in caplog.text
