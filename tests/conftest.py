"""Settings of all tests: offline, CPU, quiet, one thread (tiny tensors gain nothing from more)."""

import gc
import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch
import transformers


# A busy machine is no reason to fail.
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()


@pytest.fixture(scope="module", autouse=True)
def _no_garbage_collection_of_libraries():
    """`Trainer.train` collects garbage: half a second each time, for what libraries made when they were imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fresh_accelerate_state():
    """Settings such as mixed precision are process-wide in Accelerate: no test inherits them from another."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture
def one_rank(tmp_path):
    """A mesh of one rank, for what `fully_shard` makes of a model."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()
