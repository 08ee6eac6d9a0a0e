"""Wrong uses of arguments, scripts and commands, with what the error must name and what it must advise.

`{files}` in a value is the folder of `make_files`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from hf_trainopt.core.versions import ACTIVATION_CHECKPOINTING


@dataclass(frozen=True)
class Case:
    """One wrong use.

    Attributes:
        argument: What the message must name.
        remedy: What it must say to do.
        changes: Flags of a script, or arguments, that differ from a right use.
        words: More words on the command line.
        without: Flags that are left out.
        config: Text of a YAML file for `--config`.
    """

    argument: str
    remedy: str
    changes: dict[str, Any] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    config: str | None = None

    def __str__(self) -> str:
        told = [f"{name}={value}" for name, value in self.changes.items()] + list(self.words)
        told += [f"without {name}" for name in self.without] + ([repr(self.config)] if self.config is not None else [])
        return " ".join(told)


def case(argument: str, remedy: str, *words: str, without: tuple[str, ...] = (), config: str | None = None, **changes):
    return Case(argument, remedy, changes, words, without, config)


def make_files(folder: Path) -> None:
    """Write the files that cases name."""
    (folder / "text.txt").write_text("".join(f"line {i} of some text\n" for i in range(60)))
    (folder / "few.txt").write_text("ab\n" * 40)
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text("\n\n\n")
    (folder / "text.docx").write_text("x")
    (folder / "folder.txt").mkdir()
    (folder / "broken.json").write_text("{not json")
    (folder / "broken.parquet").write_text("no parquet")
    (folder / "numbers.csv").write_text("n\n" + "1\n" * 40)
    (folder / "unlabelled.csv").write_text("image\n" + "".join(f"good/a/{i}.png\n" for i in range(8)))
    for name, classes in {"good": "ab", "one": "a", "broken": "ab"}.items():
        for label in classes:
            (folder / name / label).mkdir(parents=True)
            for i in range(8):
                path = folder / name / label / f"{i}.png"
                if name == "broken":
                    path.write_text("no picture")
                else:
                    Image.new("RGB", (8, 8)).save(path)
    (folder / "no_pictures").mkdir()


# `EfficientTrainingArguments(**changes)`
ARGUMENTS = [
    # removed with transformers 4, and mistyped
    case("evaluation_strategy", "use eval_strategy", evaluation_strategy="steps"),
    case("no_cuda", "use use_cpu", no_cuda=True),
    case("warmup_ratio", "use warmup_steps with a float below 1", warmup_ratio=0.1),
    case("group_by_length", "use train_sampling_strategy", group_by_length=True),
    case("half_precision_backend", "use fp16 or bf16", half_precision_backend="apex"),
    case("eval_strateg", "did you mean eval_strategy?", eval_strateg="steps"),
    case("max_acumulation_steps", "did you mean max_accumulation_steps?", max_acumulation_steps=3),
    # wrong types
    case("learning_rate is '1e-3'", "must be a number, not text", learning_rate="1e-3"),
    case("per_device_train_batch_size is 1.5", "must be a whole number", per_device_train_batch_size=1.5),
    case("per_device_train_batch_size is None", "must be a whole number", per_device_train_batch_size=None),
    case("max_steps is True", "must be a whole number", max_steps=True),
    case("lr_scheduler_kwargs is 5", "give a JSON object", lr_scheduler_kwargs=5),
    case("lr_scheduler_kwargs is '{bad'", "give a JSON object", lr_scheduler_kwargs="{bad"),
    case("optim_args", "write name=value pairs", optim_args="foo"),
    # negative, zero, not a number
    case("per_device_train_batch_size is 0", "at least 1", per_device_train_batch_size=0),
    case("per_device_eval_batch_size is -1", "at least 1", per_device_eval_batch_size=-1),
    case("gradient_accumulation_steps is 0", "at least 1", gradient_accumulation_steps=0),
    case("gradient_accumulation_steps is -2", "at least 1", gradient_accumulation_steps=-2),
    case("eval_accumulation_steps is 0", "at least 1", eval_accumulation_steps=0),
    case("learning_rate is nan", "finite number", learning_rate=float("nan")),
    case("learning_rate is inf", "finite number", learning_rate=float("inf")),
    case("learning_rate is -0.001", "must not be negative", learning_rate=-1e-3),
    case("num_train_epochs is -1", "must not be negative", num_train_epochs=-1),
    case("weight_decay is nan", "finite number", weight_decay=float("nan")),
    case("max_grad_norm is nan", "finite number", max_grad_norm=float("nan")),
    case("adam_beta1 is 1.0", "below 1", adam_beta1=1.0),
    case("label_smoothing_factor is 1.5", "below 1", label_smoothing_factor=1.5),
    case("dataloader_num_workers is -1", "must not be negative", dataloader_num_workers=-1),
    case("logging_steps is 0", "set logging_strategy='no'", logging_steps=0),
    case("save_steps is 0", "set save_strategy='no'", save_steps=0, save_strategy="steps"),
    case("eval_steps is -1", "leave it unset", eval_steps=-1, eval_strategy="steps"),
    case("min_accumulation_steps is 0", "at least 1", min_accumulation_steps=0),
    case("max_accumulation_steps is 0", "at least 1", max_accumulation_steps=0),
    case("noise_scale_interval is 0", "at least 1", noise_scale_interval=0),
    case("noise_scale_half_life is nan", "finite number", noise_scale_half_life=float("nan")),
    case("optimizer_step_cost is nan", "finite number", optimizer_step_cost=float("nan")),
    case("adam_clock is 'epochs'", "choose one of tokens, steps", adam_clock="epochs"),
    case("noise_scale_ratio is 0", "must be positive", noise_scale_ratio=0, accumulation_policy="noise_scale"),
    case("max_skipped_windows is -1", "at least 1, or 0", max_skipped_windows=-1),
    # unknown names
    case("accumulation_policy is 'greedy'", "choose one of fixed, noise_scale", accumulation_policy="greedy"),
    case("lr_batch_scaling is 'cubic'", "none, sqrt, linear", lr_batch_scaling="cubic"),
    case("precision is 'fp8'", "choose one of auto, fp32", precision="fp8"),
    case("measurements has 'speed'", "choose out of throughput", measurements="speed"),
    case("measurements has 'none'", "'none' or 'auto' alone", measurements=["none", "memory"]),
    case("measurements is 3", "give a list out of throughput", measurements=3),
    case("checkpoint_placement is 'spiral'", "choose one of none, all", checkpoint_placement="spiral"),
    case("checkpoint_placement: every_n is 0", "at least 1", checkpoint_placement="every_0"),
    case("memory_rewrites is 'magic'", "give 'auto', 'none'", memory_rewrites="magic"),
    # budgets
    case("memory_budget is '12 parsecs'", "must be GiB", memory_budget="12 parsecs"),
    case("memory_budget is '150%'", "at most 100%", memory_budget="150%"),
    case("memory_budget is '0'", "must be positive", memory_budget="0"),
    case("memory_budget is '-3GiB'", "give '12GiB', 'device'", memory_budget="-3GiB"),
    case("memory_budget is 'plenty'", "give '12GiB', 'device'", memory_budget="plenty"),
    case("memory_budget is '8'", "give a unit, such as '8GiB'", memory_budget="8"),
    # ramps
    case("accumulation_ramp", "such as '0:1,0.25:2,0.5:4'", accumulation_policy="ramp"),
    case("accumulation_ramp: '0:1,2'", "write 'share:k' pairs", accumulation_policy="ramp", accumulation_ramp="0:1,2"),
    case("accumulation_ramp", "must ascend", accumulation_policy="ramp", accumulation_ramp="0:1,0.5:2,0.3:3"),
    case("accumulation_ramp", "must ascend", accumulation_policy="ramp", accumulation_ramp="0:1,nan:2"),
    case("accumulation_ramp", "must begin at 0", accumulation_policy="ramp", accumulation_ramp="0.5:2"),
    case("accumulation_ramp", "at least 1", accumulation_policy="ramp", accumulation_ramp="0:0"),
    case("accumulation_ramp", "set it to 'ramp'", accumulation_ramp="0:1"),
    # contradictions
    case("max_accumulation_steps (2)", "lower the other", min_accumulation_steps=4, max_accumulation_steps=2),
    case("measure_noise_scale=False", "leave it unset", measure_noise_scale=False),
    case("fp16=True", "use bf16=True with use_cpu=True, or leave it out", fp16=True),
    case("precision='fp16'", "choose precision='bf16', 'fp32' or 'auto'", precision="fp16"),
    case("precision='fp32' contradicts bf16=True", "set bf16=False", precision="fp32", bf16=True),
    case("checkpoint_placement is 'all'", "leave it unset", memory_budget="50%", checkpoint_placement="all"),
    case("checkpoint_placement='budget'", "such as '12GiB'", checkpoint_placement="budget"),
    # One name before transformers 5.23.
    *(case(name, f"{name}=False", memory_budget="50%", **{name: True})
      for name in dict.fromkeys([ACTIVATION_CHECKPOINTING, "gradient_checkpointing"])),
    case("torch_compile", "set torch_compile=False", checkpoint_placement="all", torch_compile=True),
    case("target_metric", "set both or none", target_metric="eval_loss", eval_strategy="steps"),
    case("target_metric", "set eval_strategy", target_metric="eval_loss", target_value=3.0),
    case("stop_at_target", "needs target_metric", stop_at_target=True),
    case("load_best_model_at_end", "to match", load_best_model_at_end=True, save_strategy="steps"),
    # files
    case("checkpoint_placement", "make a plan", checkpoint_placement="{files}/nowhere.json"),
]  # fmt: skip

# What stock refuses at once itself.
LEFT_TO_STOCK = [
    {"warmup_steps": -1}, {"seed": -1}, {"eval_strategy": "epochs"}, {"logging_strategy": "all"},
    {"save_strategy": "all"}, {"hub_strategy": "all"}, {"optim": "sgdd"}, {"lr_scheduler_type": "cosinus"},
    {"report_to": "wandb2"}, {"fp16": True, "bf16": True}, {"accelerator_config": "nowhere.json"},
    {"fsdp": "full_shard", "fsdp_config": "nowhere.json"}, {"deepspeed": "nowhere.json"},
]  # fmt: skip

# `run_clm.py`
CLM = [
    # flags
    case("--learning_rat", "did you mean --learning_rate?", "--learning_rat=1"),
    case("-learning_rate", "did you mean --learning_rate?", "-learning_rate=1"),
    case("--evaluation_strategy", "use eval_strategy", "--evaluation_strategy=steps"),
    case("--no_cuda", "use use_cpu", "--no_cuda"),
    case("--learning_rate is 'fast'", "must be a number", learning_rate="fast"),
    case("--max_steps is '2.5'", "must be a whole number", max_steps="2.5"),
    case("--do_eval is 'perhaps'", "true or false", do_eval="perhaps"),
    case("--accumulation_policy is 'greedy'", "choose one of fixed", accumulation_policy="greedy"),
    case("--optim is 'sgdd'", "choose one of sgd", optim="sgdd"),
    case("do_train", "pass --do_train, --do_eval or both", without=("do_train",)),
    case("--report_to wandb", "install wandb", report_to="wandb"),
    case("--push_to_hub", "leave the flag out", "--push_to_hub"),
    case("output_dir", "choose another", output_dir="{files}/empty.txt/run"),
    # --config
    case("--config", "check the path", "--config={files}/none.yaml"),
    case("--config", "must end in .json", "--config={files}/text.txt"),
    case("config file", "must hold a mapping", config="- a\n- b\n"),
    case("config file", "cannot be read", config="a: [1,\nb: }"),
    case("learning_rat in the config file", "did you mean learning_rate?", config="learning_rat: 1\n"),
    case("evaluation_strategy in the config file", "use eval_strategy", config="evaluation_strategy: steps\n"),
    case("weight_decay in the config file", "takes one value, not a list", config="weight_decay: [1, 2]\n"),
    case("weight_decay stands in it twice", "cannot be read", config="weight_decay: 1\nweight_decay: 2\n"),
    case("--weight_decay is 'heavy'", "must be a number", config="weight_decay: heavy\n"),
    case("--per_device_eval_batch_size is '4.5'", "whole number", config="per_device_eval_batch_size: 4.5\n"),
    case("weight_decay is None", "must be a number", config="weight_decay: null\n"),
    case("lr_scheduler_kwargs is '5'", "give a JSON object", config="lr_scheduler_kwargs: 5\n"),
    case("memory_budget is '150%'", "at most 100%", config="memory_budget: 150%\n"),
    # data
    case("--dataset_name", "pass --dataset_name, --train_file", without=("train_file",)),
    case("--train_file", "check the path", train_file="{files}/none.txt"),
    case("--train_file", "must end in", train_file="{files}/text.docx"),
    case("--train_file", "name a file", train_file="{files}/folder.txt"),
    case("--train_file", "name one with text", train_file="{files}/empty.txt"),
    case("--train_file", "mend it", train_file="{files}/broken.json"),
    case("--train_file", "mend it", train_file="{files}/broken.parquet"),
    case("--train_file", "a column named 'text'", train_file="{files}/numbers.csv"),
    case("--validation_split_percentage", "pass --validation_file", train_file="{files}/blank.txt"),
    case("--validation_file", "check the path", validation_file="{files}/none.txt"),
    case("--dataset_name and --train_file", "leave all but one", dataset_name="python-docs"),
    case("--dataset_name", "pass local files", dataset_name="nobody/nothing", without=("train_file",)),
    case("--block_size", "pass a smaller", train_file="{files}/few.txt", block_size=999,
         config_overrides="n_embd=16,n_layer=1,n_head=2,n_positions=999"),
    case("--block_size", "at least 2", block_size=1),
    case("--block_size 99", "lower it", block_size=99),
    case("--validation_split_percentage", "between 0 and 100", validation_split_percentage=100),
    case("--max_train_samples is 0", "at least 1", max_train_samples=0),
    case("--max_eval_samples is -5", "at least 1", max_eval_samples=-5),
    case("--streaming", "needs --max_steps", "--streaming", max_steps=-1),
    # model
    case("--model_type gpt9", "such as gpt2", model_type="gpt9"),
    case("--model_type vit", "such as gpt2", model_type="vit", without=("config_overrides",)),
    case("--model_name_or_path", "--model_type to train from scratch", model_name_or_path="nobody/nothing",
         without=("config_overrides", "train_tokenizer_vocab_size")),
    case("--model_name_or_path", "pass a local folder", model_name_or_path="{files}/no_pictures",
         without=("config_overrides", "train_tokenizer_vocab_size")),
    case("--tokenizer_name", "--train_tokenizer_vocab_size", without=("train_tokenizer_vocab_size",)),
    case("--train_tokenizer_vocab_size", "must be above 256", train_tokenizer_vocab_size=100),
    case("--config_overrides", "give pairs", config_overrides="n_embd=banana"),
    case("--config_overrides", "give pairs", config_overrides="n_embd"),
    case("--config_overrides", "give pairs", config_overrides="width=3"),
    case("--config_overrides", "check --config_overrides", config_overrides="n_embd=16,n_head=7,n_layer=1"),
    case("--config_overrides", "leave one of them out", config_name="gpt2"),
    case("--dtype is 'float8'", "choose one of auto", dtype="float8"),
    # runs
    case("--resume_from_checkpoint", "nowhere", resume_from_checkpoint="{files}/nowhere"),
    case("num_train_epochs is 0", "raise it", num_train_epochs=0, max_steps=-1),
    case("dataloader_drop_last", "set dataloader_drop_last=False", "--dataloader_drop_last",
         per_device_train_batch_size=5000),
    case("train_sampling_strategy='group_by_length'", "set it to 'random'", train_sampling_strategy="group_by_length"),
    case("auto_find_batch_size", "set it to False", "--auto_find_batch_size"),
    case("use_reentrant", "set it to False", f"--{ACTIVATION_CHECKPOINTING}",
         **{f"{ACTIVATION_CHECKPOINTING}_kwargs": '{"use_reentrant": true}'}),
    case("optim='lomo'", "choose another optimizer", optim="lomo"),
    case("placement_stages", "fix it", checkpoint_placement="all", placement_stages="(["),
    case("lr_scheduler_kwargs", "leave out the ones it doesn't take", lr_scheduler_type="cosine_with_restarts",
         lr_scheduler_kwargs='{"cycles": 3}'),
]  # fmt: skip

# `run_image.py`
IMAGE = [
    case("--train_dir", "neither a folder of images nor", train_dir="{files}/none"),
    case("--train_dir", "one folder of images per class", train_dir="{files}/no_pictures"),
    case("--label_column_name", "a folder of their own", train_dir="{files}/one"),
    case("--image_column_name", "mend or remove it", train_dir="{files}/broken"),
    case("--label_column_name", "Pass --label", train_file="{files}/unlabelled.csv", without=("train_dir",)),
    case("--train_dir and --train_file", "leave all but one", train_file="{files}/unlabelled.csv"),
    case("--train_file", "ends in one of", train_file="{files}/text.docx", without=("train_dir",)),
    case("--dataset_name", "pass local images", dataset_name="nobody/nothing", without=("train_dir",)),
    case("--image_column_name", "choose --image_column_name from", image_column_name="picture"),
    case("--label_column_name", "choose --label_column_name from", label_column_name="class"),
    case("--timm_model", "resnet50", timm_model="resnet51"),
    case("--model_name_or_path", "train from scratch", model_name_or_path="nobody/nothing", without=("timm_model",)),
    case("--model_args", "must be a JSON object", model_args="{bad"),
    case("--model_args", "leave out the ones it doesn't know", model_args='{"foo": 1}'),
    case("--drop_rate is 2.0", "below 1", drop_rate=2),
    case("--image_size", "must be positive", image_size=0),
    case("--auto_augment", "such as rand-m9-mstd0.5", auto_augment="wild"),
    case("--crop_scale", "the smaller first", "--crop_scale", "0.9", "0.1"),
    case("--train_val_split", "between 0 and 1", train_val_split=1),
    case("--max_train_samples is -1", "at least 1", max_train_samples=-1),
]  # fmt: skip

# `hf-trainopt`
COMMANDS = [
    case("--model_type", "required", "plan"),
    case("--model_typ", "did you mean --model_type?", "plan", "--model_typ", "gpt2"),
    case("--model_type gpt9", "such as gpt2", "plan", "--model_type", "gpt9"),
    case("memory_budget is '12 parsecs'", "GiB", "plan", "--model_type", "gpt2", "--memory_budget", "12 parsecs"),
    case("--block_size", "whole number from 1 on", "plan", "--model_type", "gpt2", "--block_size", "0"),
    case("--block_size 99999", "lower it", "plan", "--model_type", "gpt2", "--block_size", "99999"),
    case("--config_overrides", "give pairs", "plan", "--model_type", "gpt2", "--config_overrides", "n_embd=banana"),
    case("--optim sgdd", "choose one", "plan", "--model_type", "gpt2", "--optim", "sgdd"),
    case("--timm_model", "choose --timm_model", "plan", "--timm_model", "resnet51"),
    case("plann", "choose from 'plan'", "plann"),
    case("nowhere.py", "name a Python file", "compare", "nowhere.py"),
    case("--seeds is 0", "at least 1", "compare", "{script}", "--seeds", "0"),
    case("--target_share is nan", "at most 1", "compare", "{script}", "--target_share", "nan"),
    case("--target_value is nan", "finite number", "compare", "{script}", "--target_value", "nan"),
    case("--sweep 'a,b'", "whole numbers", "compare", "{script}", "--sweep", "a,b", "--", "--learning_rate", "1",
         "--gradient_accumulation_steps", "2"),
    case("--baseline", "none of the arms", "compare", "{script}", "--baseline", "x"),
    case("--seed", "leave it out after --", "compare", "{script}", "--", "--seed", "1"),
    case("--output_dir", "name a folder", "compare", "{script}", "--output_dir", "{files}/empty.txt"),
]  # fmt: skip
