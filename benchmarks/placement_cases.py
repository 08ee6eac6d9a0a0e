"""The models, batches and placements of the placement benchmarks, and one training step of them."""

import contextlib
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from typing import Any

import torch
import transformers
from transformers import Trainer, TrainingArguments

from hf_trainopt.machine.devices import DEVICES, DeviceSpec
from hf_trainopt.models.lora import with_lora
from hf_trainopt.models.timm_model import load_timm_model
from hf_trainopt.placement.plan.plan import PlacementPlan
from hf_trainopt.placement.plan.planner import PlacementPlanner
from hf_trainopt.placement.recompute.apply import apply_placement
from hf_trainopt.placement.show.models import TASKS, ModelRequest, build_model, load_config
from hf_trainopt.placement.show.optimizers import optimizer_maker
from hf_trainopt.placement.simulate.quantized import Quantization
from hf_trainopt.placement.simulate.step_setup import StepSetup, model_loss


NAMED = ("none", "all", "every_2", "sqrt")
BUDGETS = ("75%", "50%", "40%")


@dataclass(frozen=True)
class Case:
    """A model and the size of its batch.

    Args:
        name: Name in the records.
        title: Name on the page.
        request: What to build.
        batch_size: Samples.
        block_size: Tokens of a sample, for text.
        image_size: Height and width, for images.
        autocast_dtype: Type of mixed precision.
        device: Name of the device that the step is planned for.
        optim: Optimizer of a real step, by the name of transformers; one of another package is planned by the table.
    """

    name: str
    title: str
    request: ModelRequest
    batch_size: int
    block_size: int | None = None
    image_size: int | None = None
    autocast_dtype: torch.dtype | None = None
    device: str = "cpu"
    optim: str = "adamw_torch_fused"

    def setup(self, device: DeviceSpec | None = None) -> StepSetup:
        return StepSetup(
            device=device or DEVICES[self.device],
            make_optimizer=optimizer_maker(self.optim),
            autocast_dtype=self.autocast_dtype,
        )

    def planner(
        self, memory_rewrites: str, device: DeviceSpec | None = None, progress: Any = None, offload: bool = False
    ) -> PlacementPlanner:
        """Return a planner that has seen shapes only."""
        built = build_model(self.request, self.batch_size, self.block_size, self.image_size)
        return PlacementPlanner(
            built.model,
            built.batch,
            self.setup(device),
            memory_rewrites=memory_rewrites,
            offload=offload,
            progress=progress,
        )

    def real(self, seed: int = 0) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
        """Return the model, initialised, and a random batch."""
        torch.manual_seed(seed)
        built = build_model(self.request, self.batch_size, self.block_size, self.image_size)
        config = load_config(self.request)
        if built.task == "image-classification":
            model = load_timm_model(_with_image_size(config, built), None)
        else:
            model = getattr(transformers, TASKS[built.task]).from_config(config)
            if getattr(model, "loss_type", None) is None:
                model.loss_type = "ForCausalLM"  # as run_clm.py has it
        if self.request.quantization is not None:
            model = _quantized(model, self.request.quantization)
        if self.request.lora_r is not None:
            model = with_lora(model, self.request.lora_r, self.request.lora_target_modules, device="cpu")
        batch = {}
        for name, like in built.batch.items():
            if like.is_floating_point():
                batch[name] = torch.randn(like.shape)
            else:
                batch[name] = torch.randint(0, config.num_labels if like.dim() == 1 else config.vocab_size, like.shape)
        return model.train(), batch


def _quantized(model: torch.nn.Module, how: Quantization) -> torch.nn.Module:
    """Return the model as bitsandbytes quantizes it when it is loaded."""
    options: dict[str, Any] = {"load_in_8bit": True}
    if how.bits == 4:
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": how.double}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        settings = transformers.BitsAndBytesConfig(**options)
        loaded = type(model).from_pretrained(folder, quantization_config=settings, device_map="cpu")
    loaded.loss_type = model.loss_type
    return loaded


def _with_image_size(config: Any, built: Any) -> Any:
    """Give a config the image size that `build_model` has given the model on the meta device."""
    config.model_args = built.model.config.model_args
    return config


def _gpt2(name: str, title: str, overrides: str | None, batch_size: int, block_size: int, **kwargs: Any) -> Case:
    return Case(name, title, ModelRequest("gpt2", overrides), batch_size, block_size, **kwargs)


def _timm(name: str, title: str, architecture: str, batch_size: int, image_size: int, **kwargs: Any) -> Case:
    return Case(name, title, ModelRequest(timm_model=architecture), batch_size, image_size=image_size, **kwargs)


def _llama(name: str, title: str, overrides: str, batch_size: int, block_size: int, **kwargs: Any) -> Case:
    return Case(name, title, ModelRequest("llama", overrides), batch_size, block_size, **kwargs)


_GPT2_512 = "n_layer=6,n_embd=512,n_head=8"
_LLAMA_384 = (
    "num_hidden_layers=6,hidden_size=384,intermediate_size=1024,num_attention_heads=6,num_key_value_heads=2,"
    "vocab_size=32000"
)
_LLAMA_1B = (
    "num_hidden_layers=16,hidden_size=2048,intermediate_size=8192,num_attention_heads=32,num_key_value_heads=8,"
    "vocab_size=32000"
)

# What ran on a GPU, besides some of `FRONTIERS`. 0.5 billion parameters.
LLAMA_ON_GPU = _llama(
    "llama-bf16",
    "Llama type, 16 layers x 1536, B=4, T=2048, bf16 autocast",
    "num_hidden_layers=16,hidden_size=1536,intermediate_size=4096,num_attention_heads=12,num_key_value_heads=4,"
    "vocab_size=32000,max_position_embeddings=2048",
    4,
    2048,
    autocast_dtype=torch.bfloat16,
)

# Run for real, with the operators of the CPU.
REAL = {
    case.name: case
    for case in (
        _gpt2("gpt2-512-b4", "GPT-2, 6 layers x 512, B=4, T=128", _GPT2_512, 4, 128),
        _gpt2("gpt2-512-b16", "GPT-2, 6 layers x 512, B=16, T=128", _GPT2_512, 16, 128),
        _gpt2("gpt2-small-b1", "GPT-2 Small, B=1, T=512", None, 1, 512),
        _timm("resnet50-b8", "ResNet-50, 96², B=8", "resnet50", 8, 96),
        _timm("resnet50-b32", "ResNet-50, 96², B=32", "resnet50", 32, 96),
        _timm("vit-tiny-b48", "ViT-Ti/16, 96², B=48", "vit_tiny_patch16_224", 48, 96),
        _llama("llama-384-b4", "Llama type, 6 layers x 384, B=4, T=256", _LLAMA_384, 4, 256),
        _llama("llama-384-b8", "Llama type, 6 layers x 384, B=8, T=256", _LLAMA_384, 8, 256),
        Case(
            "llama-384-lora",
            "Llama type, 6 layers x 384, B=4, T=256, LoRA of rank 16",
            ModelRequest("llama", _LLAMA_384, lora_r=16),
            4,
            256,
        ),
        *(
            Case(
                f"llama-384-{name}",
                f"Llama type, 6 layers x 384, B=4, T=256, weights of {bits} bits, LoRA of rank 16",
                # On a CPU the products of 4-bit layers are in float32, the default.
                ModelRequest("llama", _LLAMA_384, lora_r=16, quantization=how),
                4,
                256,
            )
            for name, bits, how in (
                ("qlora", "4", Quantization(4, torch.float32, double=True)),
                ("int8", "8", Quantization(8)),
            )
        ),
        _llama(
            "llama-384-8bit",
            "Llama type, 6 layers x 384, B=4, T=256, 8-bit AdamW",
            _LLAMA_384,
            4,
            256,
            optim="adamw_8bit",
        ),
    )
}

# Planned for a GPU on shapes only.
FRONTIERS = {
    case.name: case
    for case in (
        _gpt2("gpt2-small-fp32", "GPT-2 Small, B=8, T=1024, fp32", None, 8, 1024, device="a100"),
        _gpt2(
            "gpt2-small-bf16", "GPT-2 Small, B=8, T=1024, bf16 autocast", None, 8, 1024, device="a100",
            autocast_dtype=torch.bfloat16,
        ),
        _timm("resnet50-224", "ResNet-50, 224², B=32, fp32", "resnet50", 32, 224, device="a100"),
        _timm("vit-base-224", "ViT-B/16, 224², B=32, fp32", "vit_base_patch16_224", 32, 224, device="a100"),
        _llama(
            "llama-1b-bf16", "Llama type, 16 layers x 2048, B=4, T=2048, bf16 autocast", _LLAMA_1B, 4, 2048,
            device="a100", autocast_dtype=torch.bfloat16,
        ),
    )
}  # fmt: skip

# Seconds on any machine: what the smoke test runs.
TINY = {
    case.name: case
    for case in (
        _gpt2("tiny-gpt2", "tiny GPT-2", "n_layer=1,n_embd=32,n_head=2,vocab_size=300,n_positions=64", 2, 32),
        _timm("tiny-resnet", "tiny ResNet", "resnet10t", 2, 32),
    )
}
# Without dropout, and with a loss that is small beside the blocks: what torch's knob can move.
_KNOB = "n_layer=4,n_embd=256,n_head=4,vocab_size=5000,n_positions=256,resid_pdrop=0.0,embd_pdrop=0.0,attn_pdrop=0.0"
KNOB = {
    "knob-gpt2": _gpt2("knob-gpt2", "GPT-2, 4 layers x 256, vocabulary 5000, B=4, T=256, no dropout", _KNOB, 4, 256)
}
# Batches of a step, to be divided into micro-batches.
FASTEST = {
    "fastest-gpt2": _gpt2("fastest-gpt2", "GPT-2, 4 layers x 256, 16 samples of T=256", _KNOB, 16, 256),
    "fastest-vit": _timm("fastest-vit", "ViT-Ti/16, 96², 48 samples", "vit_tiny_patch16_224", 48, 96),
}
# Where inputs of layers are much of what recomputation leaves: few gradients, long samples.
OFFLOADED = {
    case.name: case
    for case in (
        Case(
            "offload-llama",
            "Llama type, 16 layers x 256, vocabulary 2000, B=4, T=1024, LoRA of rank 8",
            ModelRequest(
                "llama",
                "num_hidden_layers=16,hidden_size=256,intermediate_size=688,num_attention_heads=4,"
                "num_key_value_heads=2,vocab_size=2000",
                lora_r=8,
            ),
            4,
            1024,
        ),
        _timm("offload-vit", "ViT-Ti/16, 224², B=32", "vit_tiny_patch16_224", 32, 224),
    )
}
CASES = {**REAL, **FRONTIERS, **KNOB, **FASTEST, **OFFLOADED, **TINY}


@dataclass
class TrainingStep:
    """A model in the middle of training: one call is one step, of the same parts as `StepReplayer`'s.

    Args:
        case: What is trained.
    """

    case: Case
    model: torch.nn.Module = field(init=False)
    batch: dict[str, torch.Tensor] = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self):
        self.model, self.batch = self.case.real()
        settings = TrainingArguments("unused", optim=self.case.optim, use_cpu=True, report_to="none")
        self.optimizer = Trainer(self.model, settings).create_optimizer()

    def __call__(self) -> float:
        loss = model_loss(self.model, self.batch)
        loss.backward()
        value = float(loss.detach())
        del loss
        self.finish()
        return value

    def finish(self) -> None:
        """Clip the gradients and step."""
        torch.nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def make_states(self) -> None:
        """Take a step on two samples, which makes the optimizer's state in less time than a whole one."""
        batch = self.batch
        self.batch = {name: values[:2] for name, values in batch.items()}
        self()
        self.batch = batch

    @contextlib.contextmanager
    def under(self, plan: PlacementPlan) -> Iterator["TrainingStep"]:
        """Context in which steps follow a plan."""
        with apply_placement(self.model, plan):
            yield self

    def resident(self) -> list[torch.Tensor]:
        """Return every tensor that is there between steps."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*self.model.parameters(), *self.model.buffers(), *self.batch.values(), *states]
        return [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]

    def resident_bytes(self) -> int:
        """Return the bytes of these tensors' storages."""
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in self.resident()}
        return sum(storage.nbytes() for storage in storages.values())


def provenance(seed: int | None = 0) -> dict[str, Any]:
    """Return what a record says about where it comes from."""
    model_name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        model_name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model_name)
    return {
        "command": " ".join(["python", "benchmarks/placement.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": {"processor": model_name, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
                    "load_average": [round(load, 2) for load in os.getloadavg()]},
        "versions": {name: version(name) for name in ("torch", "transformers", "timm", "hf-trainopt")},
        "seed": seed,
    }  # fmt: skip
