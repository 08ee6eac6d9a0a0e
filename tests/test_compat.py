"""Every private name of transformers that we touch is where we expect it: fails loudly when upstream moves it."""

import ast
import importlib
import inspect
import re
import warnings
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from transformers import Trainer

import hf_trainopt
from hf_trainopt.core import versions as _versions
from hf_trainopt.core.compat import (
    PRIVATE_API,
    PRIVATE_DDP,
    PRIVATE_FSDP2,
    PRIVATE_PRECISION,
    PRIVATE_TORCH,
    VERSIONS,
)
from hf_trainopt.core.versions import TORCH, TRANSFORMERS, check_versions


PACKAGE = Path(hf_trainopt.__file__).parent
INSTALLED = {"torch": TORCH, "transformers": TRANSFORMERS}


def skip_if_not_of_this_version(name: str) -> None:
    """Skip a name that `VERSIONS` says the installed version lacks."""
    package, first, end = VERSIONS.get(name, ("torch", None, None))
    installed = INSTALLED[package]
    if first is not None and installed < Version(first):
        pytest.skip(f"{name} needs {package} >= {first}")
    if end is not None and installed >= Version(end):
        pytest.skip(f"{name} is used with {package} < {end} only")


@pytest.mark.parametrize("name", PRIVATE_API)
def test_private_names_are_there(name):
    parameters, reason = PRIVATE_API[name]
    assert reason
    skip_if_not_of_this_version(name)
    source = inspect.getsource(Trainer)
    if parameters is None:  # an attribute of instances
        assert re.search(rf"self\.{name}\b", source), f"Trainer.{name} is gone"
    else:
        found = inspect.signature(getattr(Trainer, name)).parameters
        assert set(parameters) <= set(found), f"Trainer.{name} takes {list(found)}"


def private_names_of_trainer(path: Path) -> set[str]:
    """Names with one leading underscore that are asked of a Trainer: `trainer`, `super()`, in trainer.py `self`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Attribute) or not re.match(r"_[a-z]", node.attr):
            continue
        owner = node.value
        name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else None
        is_super = isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "super"
        of_trainer = name in ("trainer", "_trainer", "stock") or (
            (is_super or name == "self") and path.name == "trainer.py"
        )
        if of_trainer:
            found.add(node.attr)
    return found


def test_no_other_private_names_are_touched():
    own = {"_given_args", "_group_actions"}  # the latter of argparse, in scripting/parser.py
    touched = {path: private_names_of_trainer(path) - own for path in PACKAGE.rglob("*.py")}
    listed = set(PRIVATE_API)
    assert not {str(path): names - listed for path, names in touched.items() if names - listed}
    assert listed == set().union(*touched.values()), "listed, but not used any more"


def test_the_loop_is_what_we_wrap():
    """The places in the upstream loop that windows rely on."""
    run_epoch = inspect.getsource(Trainer._run_epoch)
    for fragment in (
        "range(num_update_steps_trained, num_update_steps_per_epoch)",
        "self.get_batch_samples(epoch_iterator, num_batches, self.args.device)",
        "self.training_step(model, inputs, num_items_in_batch)",
        "self.floating_point_ops(inputs)",
        "self._track_num_input_tokens(inputs)",
        "steps_trained_in_current_epoch // self.args.gradient_accumulation_steps",
        "self.control.should_epoch_stop",
    ):
        assert fragment in run_epoch, fragment
    assert "self.set_initial_training_values(args, train_dataloader)" in inspect.getsource(
        Trainer._inner_training_loop
    )
    saving = inspect.getsource(Trainer._save_checkpoint)
    assert 'f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"' in saving
    assert "self._get_output_dir(trial=trial)" in saving


@pytest.mark.parametrize(
    ("place", "name"), [(place, name) for place, names in PRIVATE_TORCH.items() for name in names]
)
def test_private_names_of_torch_are_there(place, name):
    parameters, reason = PRIVATE_TORCH[place][name]
    assert reason
    skip_if_not_of_this_version(f"{place}.{name}")
    if place == "torch.nn.Module":
        assert name in vars(torch.nn.Linear(1, 1)) or hasattr(torch.nn.Module, name)
        return
    owner = torch.autograd.Variable if place == "torch.autograd.Variable" else importlib.import_module(place)
    thing = getattr(owner, name)
    if parameters is not None:
        found = inspect.signature(thing).parameters
        assert set(parameters) <= set(found), f"{place}.{name} takes {list(found)}"


def test_no_other_private_names_of_torch_are_imported():
    listed = {(place, name) for place, names in PRIVATE_TORCH.items() for name in names}
    found = set()
    parts = ("core", "machine", "metrics", "placement", "precision")
    for file in (path for part in parts for path in (PACKAGE / part).rglob("*.py") if path.name != "compat.py"):
        source = file.read_text()
        imports = re.findall(r"^ *from (torch[\w.]*) import (?:\(([^)]*)\)|([\w, ]+))$", source, re.MULTILINE)
        for place, several, names in imports:
            for name in re.findall(r"\w+", several or names):
                if name.startswith("_") or "._" in place:
                    found.add((place, name))
        for place in ("transformers.masking_utils", "transformers.initialization"):
            names = PRIVATE_TORCH[place]
            found |= {(place, name) for name in names if name in source}
        found |= set(re.findall(r"(torch\._\w+)\.(_?[A-Z]\w+)", source)) - {("torch._ops", "OpOverload")}
        found |= {("torch.nn.Module", name) for name in re.findall(r"module\.(_buffers|_parameters)\b", source)}
        found |= {("torch.nn.Module", name) for name in re.findall(r"\b(_compiled_call_impl|_modules)\b", source)}
        found |= {("torch", name) for name in re.findall(r"\btorch\.(_check\w+|_foreach\w+)", source)}
        found |= {("torch.utils.checkpoint", name) for name in re.findall(r"\b(_CheckpointFrame)\b", source)}
        found |= {("torch._C", name) for name in re.findall(r"torch\._C\.(_current_graph_task_id)\b", source)}
        found |= {("torch.autograd.Variable", name) for name in re.findall(r"\bVariable\.(_\w+)", source)}
    assert found == listed


def test_what_replays_read_of_tensors_and_operators():
    tensor = torch.ones(2)
    assert isinstance(tensor.untyped_storage()._cdata, int)
    assert torch.ops.aten.add.Tensor._overloadpacket is torch.ops.aten.add
    library = torch.library.Library("aten", "IMPL")
    assert "allow_override" in inspect.signature(library.impl).parameters
    library._destroy()
    with torch._subclasses.fake_tensor.FakeTensorMode():
        assert torch.ones(2).fake_device == torch.device("cpu")


def test_a_backward_pass_can_be_told_and_its_end_heard_of():
    """What FLOPs and gradient statistics read: the number of the pass, and callbacks that may add callbacks."""
    seen = []
    queue = torch.autograd.Variable._execution_engine.queue_callback
    tensor = torch.ones(2, requires_grad=True)
    tensor.register_hook(lambda _: seen.append(torch._C._current_graph_task_id()))
    tensor.register_hook(lambda _: queue(lambda: queue(lambda: seen.append(tensor.grad))))
    assert torch._C._current_graph_task_id() == -1
    tensor.sum().backward()
    assert seen[0] >= 0
    assert torch.equal(seen[1], torch.ones(2))
    assert "_orig_mod" in torch.compile(torch.nn.Linear(1, 1))._modules


@pytest.mark.parametrize("place", PRIVATE_PRECISION)
def test_what_a_change_of_precision_sets(place):
    module, _, name = place.rpartition(".")
    source = inspect.getsource(getattr(importlib.import_module(module), name))
    for attribute, reason in PRIVATE_PRECISION[place].items():
        assert reason
        assert re.search(rf"\.{attribute} = ", source), f"{place} sets no {attribute}"


def test_no_other_private_names_are_set_by_a_change_of_precision():
    source = (PACKAGE / "precision" / "switch.py").read_text()
    ours = set(re.findall(r"def (_[a-z]\w*)", source)) | set(re.findall(r"self\.(_[a-z]\w*)", source))
    used = set(re.findall(r"[\w)]\.(_[a-z]\w*)", source)) | set(re.findall(r"\"(_[a-z]\w*[a-z])\"", source))
    listed = {name for names in PRIVATE_PRECISION.values() for name in names if name.startswith("_")}
    assert used - ours == listed


def test_what_replaces_the_reduction_of_ddp():
    """Where DDP broadcasts and reduces, as `out_of_memory/ranks.py` has it."""
    ddp = torch.nn.parallel.DistributedDataParallel
    source = (PACKAGE / "out_of_memory" / "ranks.py").read_text()
    assert set(re.findall(r"self\._model\.(_\w+)", source)) == set(PRIVATE_DDP)
    assert all(hasattr(ddp, name) and reason for name, reason in PRIVATE_DDP.items())
    assert "self.require_forward_param_sync" in inspect.getsource(ddp.will_sync_module_buffers)
    assert "self.will_sync_module_buffers()" in inspect.getsource(ddp._check_sync_bufs_pre_fwd)
    # Without a reduction in its backward pass a forward pass prepares the reducer for none.
    for method in (ddp._pre_forward, ddp._post_forward):
        assert "torch.is_grad_enabled() and self.require_backward_grad_sync" in inspect.getsource(method)
    assert "self.parameters_to_ignore" in inspect.getsource(ddp.__init__)


def test_what_is_read_of_fsdp2(tmp_path):
    from accelerate.utils import fsdp_utils
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model = torch.nn.Sequential(torch.nn.Linear(2, 2))
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    finally:
        torch.distributed.destroy_process_group()
    state = model._get_fsdp_state()
    several = hasattr(state, "_fsdp_param_groups")
    group = state._fsdp_param_groups[0] if several else state._fsdp_param_group
    assert group.modules == (model,)
    assert {"post_forward_mesh_info", "mesh_info", "mp_policy", "offload_policy"} <= set(vars(group))
    assert state._auto_reshard_after_forward is True
    assert {group.fsdp_params[i]._module_info.param_name for i in range(2)} == {"weight", "bias"}
    source = (PACKAGE / "placement" / "plan" / "run_sharding.py").read_text()
    assert set(re.findall(r"(?:\.|\")(_[a-z]\w+)", source)) - {"_param_groups"} <= set(PRIVATE_FSDP2)
    assert hasattr(fsdp_utils, "_find_final_norm") or fsdp_utils.fsdp2_prepare_model


def test_accelerate_wraps_the_forward_pass_as_we_find_it():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from hf_trainopt.precision.switch import autocasts_around

    class Layer(torch.nn.Linear):
        def forward(self, x):
            output = super().forward(x)
            seen.append(output.dtype)
            return output

    seen = []
    model = Layer(2, 2)
    assert list(autocasts_around(model)) == []
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    _, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    (context,) = autocasts_around(model)
    model(torch.ones(1, 2))
    context.fast_dtype = torch.float16
    model(torch.ones(1, 2))
    context._enabled = False
    model(torch.ones(1, 2))
    assert seen == [torch.bfloat16, torch.float16, torch.float32]
    assert "_mixed_precision" in vars(AcceleratorState())
    assert optimizer.scaler is None
    assert optimizer._is_overflow is False


@pytest.mark.parametrize(("package", "name"), [("torch", "TORCH"), ("transformers", "TRANSFORMERS")])
def test_another_version_is_warned_of(monkeypatch, package, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_versions()
    monkeypatch.setattr(_versions, name, Version("99.0"))
    with pytest.warns(UserWarning, match=f"tested with {package}"):
        check_versions()


def test_what_depends_on_a_version_stands_in_one_file():
    names = [name.rpartition(".")[2] for name in VERSIONS]
    names += ["is_distributed_loading_by_transformers", "activation_checkpointing_kwargs"]
    words = re.compile(rf"\.({'|'.join(names)}|loss_is_scaled_for_ga)\b|\bTRANSFORMERS\b|\bTORCH\b|__version__ *[<>]")
    for path in PACKAGE.rglob("*.py"):
        if path.name not in ("versions.py", "compat.py"):
            for line in path.read_text().splitlines():
                assert not words.search(line.partition("#")[0]), f"{path}: {line.strip()}"
