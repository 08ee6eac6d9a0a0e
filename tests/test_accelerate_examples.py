"""The files for `accelerate launch` under `examples/accelerate/`."""

import os
import subprocess
import sys

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from helpers import free_port, skip_without_scripts
from safetensors.torch import load_file
from scripts_helpers import ENVIRONMENT, REPOSITORY, SHORT_RUN, flag_maker


FOLDER = REPOSITORY / "examples" / "accelerate"
FILES = {
    "one_gpu.yaml": ("NO", 1, 1),
    "ddp_4_gpus.yaml": ("MULTI_GPU", 4, 1),
    "ddp_multi_node.yaml": ("MULTI_GPU", 16, 4),
    "fsdp2_4_gpus.yaml": ("FSDP", 4, 1),
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
    fsdp = yaml.safe_load((FOLDER / name).read_text()).get("fsdp_config", {})
    assert set(fsdp) <= options
    args, *_ = _validate_launch_command(parser.parse_args(["--config_file", str(FOLDER / name), "script.py"]))
    assert args.use_fsdp == (FILES[name][0] == "FSDP")
    assert args.multi_gpu == (FILES[name][0] == "MULTI_GPU")
    if args.use_fsdp:
        assert args.fsdp_version == 2


def test_two_processes_on_the_cpu_run_the_script(tmp_path):
    skip_without_scripts()
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
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / "cpu_2_processes.yaml"),
         "--main_process_port", str(free_port()), str(REPOSITORY / "run_clm.py"), *flags()],
        env=environment | ENVIRONMENT, capture_output=True, text=True, timeout=170,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())
    settings = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert settings.distributed_state.num_processes == 2
