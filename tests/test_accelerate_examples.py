"""The files for `accelerate launch` under `examples/accelerate/`."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_extend_env_parallelism_config
from helpers import free_port, skip_without_scripts
from safetensors.torch import load_file
from scripts_helpers import ENVIRONMENT, REPOSITORY, SHORT_RUN, flag_maker


FOLDER = REPOSITORY / "examples" / "accelerate"
FILES = {
    "one_gpu.yaml": ("NO", 1, 1),
    "ddp_4_gpus.yaml": ("MULTI_GPU", 4, 1),
    "ddp_multi_node.yaml": ("MULTI_GPU", 16, 4),
    "fsdp2_4_gpus.yaml": ("FSDP", 4, 1),
    "fsdp2_tp_4_gpus.yaml": ("FSDP", 4, 1),
    "deepspeed_zero2.yaml": ("DEEPSPEED", 4, 1),
    "deepspeed_zero3_offload.yaml": ("DEEPSPEED", 4, 1),
    "cpu_2_processes.yaml": ("MULTI_GPU", 2, 1),
}


def test_all_files_are_here():
    assert {path.name for path in FOLDER.glob("*.yaml")} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_it_and_knows_its_keys(name):
    """Accelerate's own class refuses unknown keys on top; those of fsdp_config must be options of the launcher."""
    config = load_config_from_file(str(FOLDER / name))
    assert (str(config.distributed_type.value), config.num_processes, config.num_machines) == FILES[name]
    parser = launch_command_parser()
    options = {action.dest for action in parser._actions}
    text = yaml.safe_load((FOLDER / name).read_text())
    sections = (text.get(f"{name}_config", {}) for name in ("fsdp", "deepspeed", "parallelism"))
    assert set().union(*sections) <= options
    args, *_ = _validate_launch_command(parser.parse_args(["--config_file", str(FOLDER / name), "script.py"]))
    assert args.use_fsdp == (FILES[name][0] == "FSDP")
    assert args.use_deepspeed == (FILES[name][0] == "DEEPSPEED")
    assert args.multi_gpu == (FILES[name][0] == "MULTI_GPU")
    if args.use_fsdp:
        assert args.fsdp_version == 2
    assert args.use_parallelism_config == ("parallelism_config" in text)
    if args.use_parallelism_config:
        environment = prepare_extend_env_parallelism_config(args, {})
        sizes = {key: int(value) for key, value in environment.items() if key.endswith("_SIZE")}
        assert math.prod(sizes.values()) == config.num_processes
        assert {key for key, size in sizes.items() if size > 1} == {
            "PARALLELISM_CONFIG_DP_SHARD_SIZE",
            "PARALLELISM_CONFIG_TP_SIZE",
        }


@pytest.mark.parametrize("name", ["deepspeed_zero2", "deepspeed_zero3_offload"])
def test_files_of_deepspeed_say_the_same_as_those_of_accelerate(name):
    """What `--deepspeed` takes, beside what `accelerate launch` takes."""
    zero = json.loads((FOLDER / f"{name}.json").read_text())["zero_optimization"]
    inline = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["deepspeed_config"]
    assert zero["stage"] == inline["zero_stage"]
    for kind in ("optimizer", "param"):
        assert zero.get(f"offload_{kind}", {}).get("device", "none") == inline[f"offload_{kind}_device"]
    saves_whole = zero.get("stage3_gather_16bit_weights_on_model_save", False)
    assert saves_whole == inline.get("zero3_save_16bit_model", False)


@pytest.mark.parametrize("name", ["cpu_2_processes.yaml", "deepspeed_zero2.yaml"])
def test_two_processes_on_the_cpu_run_the_script(name, tmp_path):
    skip_without_scripts()
    script = [str(REPOSITORY / "run_clm.py")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")} | ENVIRONMENT
    if "deepspeed" in name:
        if importlib.util.find_spec("deepspeed") is None:
            pytest.skip("deepspeed is in the extra 'deepspeed'")
        environment |= {"DS_ACCELERATOR": "cpu"}
        script.insert(0, str(REPOSITORY / "tests" / "without_builds.py"))
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"The cat number {n} eats fish and sleeps inside." for n in range(90)) + "\n")
    flags = flag_maker(
        SHORT_RUN
        | {
            "train_file": text,
            "validation_split_percentage": 20,
            "train_tokenizer_vocab_size": 300,
            "config_overrides": "n_embd=16,n_layer=1,n_head=2,n_positions=32",
            "block_size": 16,
            "cache_dir": tmp_path / "cache",
            "output_dir": tmp_path / "out",
        }
    )
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / name),
         "--num_processes", "2", "--main_process_port", str(free_port()), *script, *flags()],
        env=environment, capture_output=True, text=True, timeout=170,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())
    settings = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert settings.distributed_state.num_processes == 2
