"""fp16 on the CPU for the tests: Accelerate's own path, with the scaler and the autocast that it keeps for GPUs."""

import pytest
import torch
from helpers import arguments, quiet

from hf_trainopt import EfficientTrainer
from hf_trainopt.precision import DeviceAbilities
from hf_trainopt.precision import arguments as precision_arguments


def pretend(monkeypatch, device: DeviceAbilities) -> None:
    """Let the CPU pass for another device."""
    monkeypatch.setattr(precision_arguments, "device_abilities", lambda _: device)


def scales_fp16(native_bf16: bool = False) -> DeviceAbilities:
    """Return a device on which Accelerate scales the loss."""
    return DeviceAbilities("this CPU", "cpu", native_bf16=native_bf16, scales_fp16=True)


class HalfOnCPU:
    """For a `Trainer` class: does with fp16 on a CPU what Accelerate does on a GPU. There it sets the scaler alone."""

    scaler: dict = {}  # noqa: RUF012

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self.accelerator.mixed_precision == "fp16":
            self.accelerator.native_amp = True
            self.accelerator.scaler = torch.amp.GradScaler(self.args.device.type, **self.scaler)


class HalfTrainer(HalfOnCPU, EfficientTrainer):
    """`EfficientTrainer` that can do fp16 on a CPU."""


class Points(torch.utils.data.Dataset):
    """Rows of a regression; the loss of row i is multiplied by `factors[i]`."""

    def __init__(self, factors: list[float], rows: list[int] | None = None):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(len(factors), 4, generator=generator)
        self.rows = [
            {"x": x[i], "labels": x[i].sum() + 1, "factor": torch.tensor(factors[i]), "number": torch.tensor(i)}
            for i in (range(len(factors)) if rows is None else rows)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


class Network(torch.nn.Module):
    """Two layers; keeps the precision that its matrix products ran in. Large factors overflow in fp16, backwards."""

    accepts_loss_kwargs = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = torch.nn.Linear(4, 8), torch.nn.Linear(8, 1)
        self.precisions: list[torch.dtype] = []
        self.numbers: list[int] = []

    def forward(self, x, labels, factor, number):
        hidden = self.inner(x)
        if self.training:
            self.precisions.append(hidden.dtype)
            self.numbers += number.tolist()
        output = self.outer(torch.tanh(hidden)).squeeze(-1)
        return {"loss": (factor * (output.float() - labels) ** 2).mean(), "output": output}

    @torch.no_grad()
    def error(self, data: Points) -> float:
        """Mean square error in fp32."""
        x, labels = (torch.stack([row[name] for row in data.rows]) for name in ("x", "labels"))
        return ((self.outer(torch.tanh(self.inner(x))).squeeze(-1) - labels) ** 2).mean().item()


def make(output_dir, data, cls=HalfTrainer, model=None, scaler=None, callbacks=(), args=None, **kwargs):
    """A run over `data` in order; two micro-batches of two rows to a window, all of them measured, constant rate."""
    defaults = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 1,
        "train_sampling_strategy": "sequential", "lr_scheduler_type": "constant", "warmup_steps": 0,
        "accumulation_policy": "fixed", "measure_noise_scale": True, "noise_scale_interval": 1,
        "noise_scale_half_life": 1e12, "remove_unused_columns": False,
    }  # fmt: skip
    trainer_class = type(cls.__name__, (cls,), {"scaler": scaler or {}})
    args = args or arguments(output_dir, **(defaults | kwargs))
    model = Network() if model is None else model
    return quiet(
        trainer_class(model=model, args=args, train_dataset=data, eval_dataset=data, callbacks=list(callbacks))
    )


def lines(trainer) -> list[dict]:
    """The log lines of training."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def two_rank_run(output_dir, callbacks) -> HalfTrainer:
    """Only rows of the second rank overflow, from the third window on."""
    pretend(pytest.MonkeyPatch(), DeviceAbilities("this CPU", "cuda", scales_fp16=True))
    factors = [1e7 if row % 4 == 3 and row >= 16 else 1.0 for row in range(24 * 8)]
    return make(output_dir, Points(factors), scaler={"init_scale": 2.0**8}, precision="auto", callbacks=callbacks)
