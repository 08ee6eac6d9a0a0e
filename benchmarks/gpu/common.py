"""What the stages of `run.py` share: device, clock, peaks of memory, and records that keep what there is."""

import contextlib
import dataclasses
import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from placement_cases import Case, TrainingStep
from placement_measure import tracker_peak
from run import REPOSITORY, write_json

from hf_trainopt.machine.devices import DEVICES, DeviceSpec, named_spec
from hf_trainopt.placement.simulate.step_setup import model_loss


PACKAGES = ("torch", "transformers", "accelerate", "timm", "peft", "numpy", "triton", "tokenizers", "pyarrow")


@dataclass
class Context:
    """What a stage is told.

    Args:
        name: Of the stage.
        output: Folder of the records.
        folder: Folder that the stages share, for plans.
        rehearse: Whether all is done on the CPU at toy size.
        checks: Exactness makes only the checks whose names contain one of these; empty: all.
        arms: Number, name or label of the arms to run; empty: all.
    """

    name: str
    output: Path
    folder: Path
    rehearse: bool
    checks: tuple[str, ...] = ()
    arms: tuple[str, ...] = ()
    prepared_s: float = 0.0
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    def wants(self, name: str) -> bool:
        """Return whether a check is asked for."""
        return not self.checks or any(text in name for text in self.checks)

    def begin(self, seconds: float) -> None:
        """Start the clock."""
        self.started, self.seconds = time.monotonic(), seconds

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (time.monotonic() - self.started)

    @property
    def device(self) -> torch.device:
        """Where the stage computes. The first call may take seconds: it starts CUDA.

        Raises:
            RuntimeError: At full size there is no GPU.
        """
        if self.rehearse:
            return torch.device("cpu")
        if not torch.cuda.is_available():
            raise RuntimeError("torch.cuda.is_available() is false: nothing can be measured without a GPU.")
        return torch.device("cuda", 0)

    @property
    def on_gpu(self) -> bool:
        """Whether the stage computes on a GPU."""
        return not self.rehearse

    @property
    def spec(self) -> DeviceSpec:
        """What plans are made for, told from the name that nvidia-smi gives: CUDA is not started."""
        if self.rehearse:
            return DEVICES["cpu"]
        return named_spec(card().get("name", ""), default="h100")

    def pick(self, full: Any, toy: Any) -> Any:
        """Return what belongs to the size of this run."""
        return toy if self.rehearse else full


def card() -> dict[str, str]:
    """Return what nvidia-smi says of the GPU, as `run.py` has found it."""
    return json.loads(os.environ.get("HF_TRAINOPT_CARD", "{}"))


def versions() -> dict[str, str]:
    """Return the versions of what runs."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    found["cuda"] = str(torch.version.cuda)
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found["commit"] = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.strip()
    return found


def processor() -> str:
    """Return the name of this machine's processor."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def describe_device(device: torch.device) -> dict[str, Any]:
    """Return what a record says about the device."""
    found: dict[str, Any] = {
        "type": device.type, "processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()
    }  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "name": properties.name, "driver": card().get("driver"), "total_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}", "cudnn": torch.backends.cudnn.version(),
        }  # fmt: skip
    return found


class Record:
    """The record of a stage, written anew after each part.

    Args:
        context: Of the stage.

    Attributes:
        values: What is written: `status` is "ok" if nothing has raised and no check is false.
    """

    def __init__(self, context: Context):
        self.context = context
        self.values: dict[str, Any] = {
            "stage": context.name, "rehearsal": context.rehearse, "status": "running",
            "date": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
            "seconds_given": round(context.seconds, 1), "prepared_s": round(context.prepared_s, 2), "device": None,
            "versions": versions(), "checks": {}, "errors": {}, "skipped": [], "parts": {},
        }  # fmt: skip
        self.save()

    def describe_device(self) -> None:
        """Add the device."""
        if self.context.name == "plans":
            self.values["device"] = {"type": "cpu", "processor": processor(), "cores": os.cpu_count()}
        else:
            self.values["device"] = describe_device(self.context.device)
        self.save()

    def save(self) -> None:
        """Write it as it is."""
        write_json(self.context.output / f"{self.context.name}.json", self.values)

    def check(self, name: str, passed: bool) -> None:
        """Note whether something is as it should be; a stage with a check that is false has failed."""
        self.values["checks"][name] = bool(passed)

    def skip(self, what: str, why: str) -> None:
        """Note that something was left out."""
        self.values["skipped"].append(f"{what}: {why}")
        print(f"skipped {what}: {why}", flush=True)
        self.save()

    def fail(self, name: str, error: str) -> None:
        """Note an error."""
        self.values["errors"][name] = error
        print(f"{name}: {error}", flush=True)
        self.save()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[dict[str, Any]]:
        """Context of one part: what it puts into its dictionary is kept, also if it raises; the next one goes on."""
        entry = self.values["parts"].setdefault(name, {})
        started = time.monotonic()
        try:
            yield entry
        except Exception:
            self.fail(name, traceback.format_exc())
        finally:
            entry["part_s"] = round(time.monotonic() - started, 2)
            release(self.context.device)
            self.save()

    def close(self) -> None:
        """Decide on the status and write it."""
        good = not self.values["errors"] and all(self.values["checks"].values())
        self.values["status"] = "ok" if good else "failed"
        self.values["seconds"] = round(self.context.seconds - self.context.left, 1)
        self.save()


# ---- Device --------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give back what nobody holds. A device whose context is broken cannot; the next part says so by itself."""
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()


def timed(run: Callable[[], Any], repeats: int, device: torch.device) -> list[float]:
    """Return the seconds of each of several runs, by events on a GPU."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(repeats):
            run()
            marks.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    synchronize(device)
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    synchronize(device)
    return [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(events)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, least and largest."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "number": len(values)}


# ---- Training steps ------------------------------------------------------------------------------------------------


class DeviceStep(TrainingStep):
    """A `TrainingStep` on a device and in the precision of its case; without waiting for the device in between.

    Args:
        case: What is trained.
        device: Where.
    """

    def __init__(self, case: Case, device: torch.device):
        self.device = device
        with device:  # parameters are made and initialised there: on a CPU that takes seconds
            super().__init__(case)
        self.model.to(device)
        self.batch = {name: values.to(device) for name, values in self.batch.items()}

    def __call__(self) -> torch.Tensor:
        dtype = self.case.autocast_dtype
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            loss = model_loss(self.model, self.batch)
        loss.backward()
        value = loss.detach()
        del loss
        torch.nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value


def peak_of(step: DeviceStep) -> dict[str, int]:
    """Return what a step takes: the allocator's marks on a GPU, live tensors on a CPU; a first step warms up."""
    device = step.device
    if device.type != "cuda":
        return {"peak_bytes": tracker_peak(step)}
    release(device)
    step()
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    stats = torch.cuda.memory_stats(device)
    reserved = torch.cuda.memory_reserved(device)
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
        "requested_bytes": stats.get("requested_bytes.all.peak", 0),
        "outside_bytes": total - free - reserved,  # the context, kernels, what libraries take past the allocator
        "retries": stats.get("num_alloc_retries", 0),
    }


def with_device(case: Case, spec: DeviceSpec) -> Case:
    """Return a case that is planned for another device."""
    return dataclasses.replace(case, device=spec.name)
