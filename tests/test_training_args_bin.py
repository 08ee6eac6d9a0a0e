"""What the docs say of checkpoints without this package: `training_args.bin` needs it, and nothing else does."""

import subprocess
import sys

from helpers import Rows, arguments, quiet, tiny_gpt2

from hf_trainopt import EfficientTrainer


WITHOUT_US = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_trainopt":
            raise ModuleNotFoundError("No module named 'hf_trainopt'")

sys.meta_path.insert(0, Missing())

import torch
from transformers import AutoModelForCausalLM
from transformers.trainer_callback import TrainerState

folder = sys.argv[1]
AutoModelForCausalLM.from_pretrained(folder)
assert TrainerState.load_from_json(folder + "/trainer_state.json").global_step
for name in ("optimizer.pt", "scheduler.pt"):
    torch.load(folder + "/" + name, weights_only=True)
try:
    torch.load(folder + "/training_args.bin", weights_only=False)
except ModuleNotFoundError as error:
    print(error)
"""


def test_a_checkpoint_without_this_package(tmp_path):
    args = arguments(tmp_path, save_strategy="epoch", num_train_epochs=1)
    trainer = quiet(EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows()))
    trainer.train()
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    command = [sys.executable, "-c", WITHOUT_US, str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "No module named 'hf_trainopt'"
