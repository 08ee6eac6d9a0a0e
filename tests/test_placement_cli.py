"""The command line `hf-trainopt plan`, end to end on tiny models, and what it says to wrong arguments."""

import importlib
import json
import re
import tomllib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, BertConfig, GPT2Config, T5Config

from hf_trainopt.cli import main
from hf_trainopt.placement.plan.budget import enough_share, parse_budget, stated_budget
from hf_trainopt.placement.plan.plan import PlacementPlan
from hf_trainopt.placement.plan.planner import PlacementPlanner
from hf_trainopt.placement.show import models
from hf_trainopt.placement.show.optimizers import optimizer_maker
from hf_trainopt.placement.show.progress import Progress


TINY = "n_layer=2,n_embd=32,n_head=2,vocab_size=64,n_positions=64"
GPT2 = ["--model_type", "gpt2", "--config_overrides", TINY]
# Without rewrites a quarter of the replays is enough.
PLAIN = [*GPT2, "--memory_rewrites", "none"]
SMALL = ["--per_device_train_batch_size", "4", "--block_size", "32"]


def plan(*arguments):
    return main(["plan", *arguments])


def figures(capsys, *arguments):
    assert plan(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Everything written by one run, and what it said."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("plan")
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("sys.stdout.write", said.append)
        code = plan(
            *GPT2, "--memory_budget", "95%", "--device", "a100", "--plot", f"{folder}/frontier.png",
            "--output", f"{folder}/plan.json",
        )  # fmt: skip
    return code, "".join(said), folder


def test_tables_are_printed(written):
    code, text, folder = written
    assert code == 0
    for expected in (
        "gpt2: GPT2LMHeadModel, 0.03 million parameters",
        f"Config {TINY}",
        "Without recomputation a step takes",
        "8 x 64 tokens",
        "transformer.h.0",
        "total under the chosen plan",
        "Named policies",
        f"--checkpoint_placement {folder}/plan.json",
        "Not counted: cuDNN",
    ):
        assert expected in " ".join(text.split())
    assert text.count("→") == 1
    assert max(map(len, text.splitlines())) <= 100 + len(str(folder))


def test_the_hint_repeats_what_was_asked(written):
    _, text, folder = written
    hint = text[text.index("Written to ") : text.index("Not counted")]
    lines = [line.strip() for line in hint.splitlines() if line.strip()]
    assert f"python run_clm.py ... --checkpoint_placement {folder}/plan.json" in lines
    assert "python run_clm.py ... --memory_budget 95%" in lines
    assert 'EfficientTrainingArguments(..., memory_budget="95%")' in lines
    assert "--memory_rewrites" not in hint
    assert "Chosen for a budget of 95% (" in text
    for line in lines:
        if line.startswith("from "):
            exec(line, {})


def test_the_hint_repeats_what_else_the_plan_depends_on(capsys):
    stages = r"transformer\.h\.\d+"
    assert plan(*PLAIN, *SMALL, "--checkpoint_placement", "all", "--placement_stages", stages) == 0
    out = capsys.readouterr().out
    assert "  python run_clm.py ... --checkpoint_placement plan.json --memory_rewrites none\n" in out
    flags = f"--checkpoint_placement all --memory_rewrites none --placement_stages '{stages}'"
    assert f"  python run_clm.py ... {flags}\n" in out


def test_a_model_of_less_than_a_mib(capsys):
    tiny = "n_layer=1,n_embd=8,n_head=1,vocab_size=16,n_positions=8"
    values = figures(
        capsys, "--model_type", "gpt2", "--config_overrides", tiny, "--per_device_train_batch_size", "1",
        "--memory_rewrites", "none", "--device", "cpu",
    )  # fmt: skip
    assert values["baseline_peak_bytes"] < 2**20


def test_plan_file_is_what_the_trainer_takes(written):
    path = written[2] / "plan.json"
    values = json.loads(path.read_text())
    assert list(values["stages"]) == ["transformer.h.0", "transformer.h.1"]
    assert values["floor_peak_bytes"] <= values["predicted_peak_bytes"] <= values["budget_bytes"]
    assert values["budget_bytes"] == int(0.95 * values["baseline_peak_bytes"])
    assert values["extra_time_ratio"] >= 0
    assert PlacementPlan.load(path).to_dict() == values


def test_plot_is_a_png(written):
    data = (written[2] / "frontier.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20]), int.from_bytes(data[20:24]) == (1200, 750)


def test_json_alone_is_on_stdout(capsys):
    values = figures(capsys, *PLAIN, *SMALL)
    assert values["plan"] is None
    peaks = [entry["predicted_peak_bytes"] for entry in values["frontier"]]
    times = [entry["extra_time_ratio"] for entry in values["frontier"]]
    assert peaks[0] == values["baseline_peak_bytes"]
    assert peaks[-1] == values["floor_peak_bytes"]
    assert peaks == sorted(peaks, reverse=True)
    assert times == sorted(times)
    assert [entry["policy"] for entry in values["named"]] == ["none", "all", "sqrt"]
    assert sum(row["total"] for row in values["memory"]) == values["baseline_peak_bytes"]


def test_named_policy_is_planned_and_every_flag_of_the_step_counts(capsys):
    stock = figures(capsys, *PLAIN, *SMALL, "--checkpoint_placement", "all")
    assert stock["plan"]["policy"] == "all"
    assert {choice["recompute"] for choice in stock["plan"]["stages"].values()} == {"full"}
    more = figures(
        capsys, *PLAIN, *SMALL, "--checkpoint_placement", "all", "--optim", "sgd",
        "--gradient_accumulation_steps", "adaptive", "--bf16", "--num_devices", "2", "--device", "h100",
    )["plan"]["details"]  # fmt: skip
    assert more["optimizer"] == "SGD"
    assert more["accumulation_steps"] == 32
    assert more["precision"] == "bfloat16"
    assert (more["sharding"], more["num_devices"], more["device"]) == ("ddp", 2, "h100")
    assert "optimizer" in stock["plan"]["details"]["baseline_by_kind"]
    assert "optimizer" not in more["baseline_by_kind"]
    assert more["baseline_by_kind"]["communication"] == 4 * more["num_parameters"]


def test_budget_below_the_floor_names_the_floor(capsys):
    assert plan(*PLAIN, *SMALL, "--memory_budget", "1%") == 2
    captured = capsys.readouterr()
    assert "Without recomputation a step takes" in captured.out  # the first answer comes before any search
    assert "Chosen" not in captured.out
    assert "per_device_train_batch_size" in captured.err
    share, size = re.search(r"memory_budget is 1% \(.* MiB\), but no placement needs less than (\S+ MiB) \(the floor, "
                            r"(\S+%) of the", captured.err).group(2, 1)  # fmt: skip
    assert f"Raise memory_budget to {size.replace(' ', '')} or {share}," in captured.err
    for enough in (share, size):
        plan_of = figures(capsys, *PLAIN, *SMALL, "--memory_budget", enough)["plan"]
        assert plan_of["predicted_peak_bytes"] == plan_of["floor_peak_bytes"]


@pytest.mark.parametrize(
    ("given", "num_bytes", "text"),
    [("8GiB", 8 * 2**30, "8GiB"), ("30%", 3 * 2**30, "30% (3.00 GiB)"), (2**31, 2**31, "2147483648 (2.00 GiB)")],
)
def test_budgets_are_said_as_they_were_given(given, num_bytes, text):
    assert stated_budget(given, num_bytes) == text


@given(st.integers(1, 2**45), st.floats(0.0, 1.0))
def test_shares_rounded_up_are_enough(baseline, ratio):
    needed = max(1, min(baseline, int(baseline * ratio)))
    share = enough_share(needed, baseline)
    assert needed <= parse_budget(share, baseline)
    assert float(share[:-1]) - 100 * needed / baseline <= 0.1 + 1e-9 or baseline < 2**12  # whole bytes


def test_folder_needs_no_weights(tmp_path, capsys):
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=48)
    config.save_pretrained(tmp_path)
    values = figures(
        capsys, "--model_name_or_path", str(tmp_path), "--checkpoint_placement", "none", "--memory_rewrites", "none"
    )
    assert values["plan"]["details"]["batch"]["input_ids"] == [8, 48]


def test_image_model(capsys):
    values = figures(
        capsys, "--timm_model", "resnet18", "--model_args", '{"in_chans": 1}', "--num_classes", "7", "--image_size",
        "32", "--per_device_train_batch_size", "2", "--checkpoint_placement", "sqrt",
    )  # fmt: skip
    details = values["plan"]["details"]
    assert details["batch"]["pixel_values"] == [2, 1, 32, 32]
    # 11 689 512 with 1000 classes and three channels (timm's table of results).
    assert details["num_parameters"] == 11_689_512 - 993 * 513 - 2 * 64 * 49
    assert list(values["plan"]["stages"])[-1] == "timm_model.layer4.1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --model_type --timm_model --model_name_or_path is required"),
        (["--model_type", "gpt2", "--timm_model", "resnet50"], "not allowed with argument"),
        (["--model_type", "gpt3"], "--model_type gpt3 is not a model type of transformers"),
        (["--model_type", "gpt2", "--config_overrides", "layers=4"], "--config_overrides layers=4 does not fit gpt2"),
        (["--timm_model", "resnet5000"], "timm has no model resnet5000"),
        (["--timm_model", "resnet18", "--model_args", "{"], "--model_args must be a JSON object"),
        (["--timm_model", "resnet18", "--model_args", '{"no": 1}'], "does not take --model_args"),
        (["--timm_model", "resnet18", "--config_overrides", "a=1"], "--config_overrides needs --model_type"),
        (["--timm_model", "resnet18", "--block_size", "8"], "--block_size is for text"),
        (["--timm_model", "resnet18", "--task", "causal-lm"], "does not fit a timm model"),
        (["--timm_model", "resnet18", "--dtype", "float32"], "--dtype is for models of transformers"),
        ([*GPT2, "--image_size", "224"], "--image_size is for images"),
        ([*GPT2, "--model_args", "{}"], "--model_args is for timm models"),
        ([*GPT2, "--task", "masked-lm"], "--task masked-lm does not fit models of type gpt2"),
        ([*GPT2, "--block_size", "65"], "--block_size 65 is more than the 64 positions"),
        ([*GPT2, "--attn_implementation", "nonsense"], "check --config_overrides and --attn_implementation"),
        (["--model_name_or_path", "./nowhere"], "--model_name_or_path ./nowhere is no folder"),
        (["--model_name_or_path", "nobody/nothing"], "neither on disk nor on the Hugging Face Hub"),
        ([*GPT2, "--per_device_train_batch_size", "0"], "'0' is not a whole number from 1 on"),
        ([*GPT2, "--gradient_accumulation_steps", "x"], "argument --gradient_accumulation_steps: 'x'"),
        ([*GPT2, "--bf16", "yes"], "'yes' is neither True nor False"),
        ([*GPT2, "--bf16", "--fp16"], "not allowed with argument"),
        ([*GPT2, "--max_grad_norm", "-1"], "--max_grad_norm is -1.0"),
        ([*GPT2, "--device", "abacus"], "'abacus' is not known; choose one of rtx3060"),
        ([*GPT2, "--device", "rtx409"], "'rtx409' is not known; did you mean rtx4090?"),
        ([*GPT2, "--find", "blocksize"], "'blocksize' is not known; did you mean block_size?"),
        ([*GPT2, "--optim", "magic"], "--optim magic is not an optimizer of transformers"),
        ([*GPT2, "--optim", "lomo"], "--optim lomo can't be planned for"),
        ([*GPT2, "--optim", "galore_adamw_layerwise"], "--optim galore_adamw_layerwise can't be planned for"),
        ([*GPT2, "--device", "custom"], "--device custom needs --device_memory and --device_bandwidth and"),
        ([*GPT2, "--device_tflops", "3"], "--device_tflops is for --device custom"),
        ([*GPT2, "--device_memory", "90%"], "--device_memory is 90%; give a size"),
        ([*GPT2, "--device_memory", "24"], "--device_memory is 24; give a size"),
        (
            [
                *GPT2,
                "--find",
                "per_device_train_batch_size",
                "--memory_budget",
                "1GiB",
                "--gradient_accumulation_steps",
                "adaptive",
            ],
            "give --gradient_accumulation_steps as a number",
        ),
        ([*GPT2, "--memory_budget", "110% of device"], "a share is at most 100%"),
        (
            [*GPT2, "--memory_budget", "device", "--device", "cpu"],
            "which needs a GPU, and the memory of this device isn't known",
        ),
        ([*GPT2, "--find", "block_size"], "--find needs --memory_budget"),
        ([*GPT2, "--find", "block_size", "--memory_budget", "75%"], "the same for all sizes"),
        ([*GPT2, "--find", "block_size", "image_size", "--memory_budget", "1GiB"], "--find takes one size"),
        (
            [*GPT2, "--find", "block_size", "--memory_budget", "1GiB", "--output", "plan.json"],
            "--output is for one size",
        ),
        ([*GPT2, "--memory_budget", "lots"], "memory_budget is 'lots'"),
        ([*GPT2, "--memory_budget", "8"], "give a unit, such as '8GiB'"),
        ([*GPT2, "--memory_budget", "1GiB", "--checkpoint_placement", "all"], "--memory_budget does not go with"),
        ([*GPT2, "--checkpoint_placement", "budget"], "needs --memory_budget"),
        ([*GPT2, "--checkpoint_placement", "half"], "checkpoint_placement is 'half'"),
        ([*GPT2, "--checkpoint_placement", "plan.json"], "is a plan already"),
        ([*GPT2, "--memory_rewrites", "tricks"], "memory_rewrites is 'tricks'"),
        ([*GPT2, "--placement_stages", "("], "--placement_stages ( isn't a regular expression"),
        ([*GPT2, "--placement_stages", "nothing"], "placement_stages='nothing' matches no module name"),
        ([*GPT2, "--output", "plan.json"], "--output needs a plan to write"),
        ([*GPT2, "--memory_budget", "50%", "--output", "no/such/plan.json"], "in a folder that does not exist"),
        ([*GPT2, "--plot", "frontier.gif"], "must end in .png"),
        ([*GPT2, "--memory_budgets", "1GiB"], "arguments: --memory_budgets; did you mean --memory_budget?"),
        (
            [*GPT2, "--memory_budge=1GiB"],
            "--memory_budge; did you mean --memory_budget? (see hf-trainopt plan --help)",
        ),
        (["--modeltype", "gpt2"], "--modeltype; did you mean --model_type? (see hf-trainopt plan --help)"),
        ([*GPT2, "1GiB"], "unrecognized arguments: 1GiB (see hf-trainopt plan --help)"),
    ],
)
def test_wrong_arguments(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plan(*arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("hf-trainopt: error: ")
    assert len(captured.err.splitlines()) == 1
    assert captured.out == "" or "memory of this device" in message  # which is known once a step has been replayed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["plann"], ["--model_type", "gpt2"]])
def test_a_missing_subcommand_is_answered_with_their_helps(arguments, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "(see hf-trainopt plan --help or hf-trainopt doctor --help or hf-trainopt compare --help" in captured.err
    assert len(captured.err.splitlines()) == 1


def test_help_says_defaults_and_when_to_change_them(capsys):
    with pytest.raises(SystemExit):
        plan("--help")
    text = " ".join(capsys.readouterr().out.split())
    for expected in (
        "auto (the default)",
        "cheaper than recomputing more",
        "default: the layers",
        "default: none, only",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("config", "task"),
    [
        (GPT2Config(), "causal-lm"),
        (BertConfig(), "masked-lm"),
        (BertConfig(architectures=["BertForSequenceClassification"]), "sequence-classification"),
        (T5Config(), "seq2seq-lm"),
        (AutoConfig.for_model("vit"), "image-classification"),
        (AutoConfig.for_model("timm_wrapper", architecture="resnet18"), "image-classification"),
    ],
)
def test_task_follows_the_config(config, task):
    assert models.task_of(config) == task


@pytest.mark.parametrize(("model_type", "positions"), [("gpt2", 1024), ("roberta", 512), ("t5", None)])
def test_positions(model_type, positions):
    assert models.max_positions_of(AutoConfig.for_model(model_type)) == positions


def test_models_take_no_memory_and_keep_their_ties():
    built = models.build_model(models.ModelRequest(model_type="gpt2"), 2, None, None)
    assert {parameter.device.type for parameter in built.model.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in built.model.parameters()) == 124_439_808
    assert built.model.lm_head.weight is built.model.transformer.wte.weight
    assert built.batch["labels"].shape == (2, 1024)
    assert built.model.config.use_cache is False


def test_a_model_of_fixed_size_gets_the_size_asked_for():
    built = models.build_model(models.ModelRequest(timm_model="vit_tiny_patch16_224"), 2, None, 64)
    assert built.model.timm_model.pos_embed.shape[1] == 1 + 16
    assert built.batch["pixel_values"].shape == (2, 3, 64, 64)
    assert built.model.num_labels == 1000


@pytest.mark.parametrize("task", ["sequence-classification", "causal-lm"])
def test_labels_are_those_of_the_task(task):
    request = models.ModelRequest(model_type="gpt2", config_overrides=TINY, task=task)
    built = models.build_model(request, 3, 16, None)
    assert built.batch["labels"].shape == ((3,) if task == "sequence-classification" else (3, 16))


@pytest.mark.parametrize(
    "name", ["adamw_torch_fused", "adamw_torch", "adafactor", "adagrad", "rmsprop", "sgd", "adamw_8bit", "lion_8bit"]
)
def test_optimizers_that_are_said_to_work_do(name):
    optimizer = optimizer_maker(name)(torch.nn.Linear(2, 2))
    assert len(optimizer.param_groups[0]["params"]) == 2


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys):
    with Progress(first_total=10, seconds=0.0) as progress:
        for _ in range(30):
            progress("work")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "planning: 1 of about 10 replays, work"
    assert all(int(line.split()[1]) <= int(line.split()[4]) for line in lines[:-1])
    assert lines[-1] == "planned in 0 s"
    with Progress(seconds=100.0) as progress:
        progress("work")
    assert capsys.readouterr().err == "planned in 0 s\n"


LLAMA = [
    "--model_type", "llama", "--config_overrides", "hidden_size=64,intermediate_size=96,num_hidden_layers=3,"
    "num_attention_heads=4,vocab_size=128", "--block_size", "32", "--per_device_train_batch_size", "2",
]  # fmt: skip


def test_adapters_are_what_is_trained(tmp_path, capsys):
    pytest.importorskip("peft")

    def planned(*words):
        assert plan(*LLAMA, *words, "--memory_budget", "9GiB", "--output", str(tmp_path / "plan.json")) == 0
        return json.loads((tmp_path / "plan.json").read_text())

    whole, lora = planned(), planned("--lora_r", "4")
    added = 3 * 2 * 4 * (64 + 64)  # q and v of each layer
    assert lora["details"]["num_parameters"] == whole["details"]["num_parameters"] + added
    states = [plan["details"]["baseline_by_kind"]["optimizer"] for plan in (whole, lora)]
    assert states[1] == pytest.approx(2 * 4 * added, rel=0.01)
    assert states[0] > 10 * states[1]
    assert plan(*LLAMA, "--lora_r", "4", "--lora_target_modules", "nothing") == 2
    assert "--lora_target_modules: Target modules" in capsys.readouterr().err
    one = planned("--lora_r", "4", "--lora_target_modules", "q_proj")
    assert one["details"]["num_parameters"] == whole["details"]["num_parameters"] + added // 2
    assert plan(*LLAMA, "--lora_target_modules", "q_proj") == 2
    assert "--lora_target_modules needs --lora_r" in capsys.readouterr().err


def test_a_step_that_fits_is_told_at_once(capsys, monkeypatch):
    monkeypatch.setattr(PlacementPlanner, "floor", property(lambda self: pytest.fail("nothing has to be searched")))
    assert plan(*GPT2, *SMALL, "--device", "rtx3060", "--memory_budget", "device") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "The budget is 10.06 GiB: 11.82 GiB of rtx3060 less 0.75 GiB for the CUDA context and room for" in out
    assert "The step fits as it is: nothing is recomputed." in out
    assert "Plans that were looked at" not in out


def test_a_budget_beyond_the_device_is_pointed_out(capsys):
    assert plan(*GPT2, *SMALL, "--device", "rtx4090", "--memory_budget", "24GiB") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "but tensors can take only 20.81 GiB of rtx4090" in out
    assert "Use --memory_budget device." in out


def test_a_device_of_ones_own(capsys):
    own = ["--device", "custom", "--device_memory", "10GiB", "--device_bandwidth", "500", "--device_tflops", "100"]
    assert plan(*GPT2, *SMALL, *own, "--memory_budget", "50% of device") == 0
    assert "The budget is 5.00 GiB; custom has 10.00 GiB." in " ".join(capsys.readouterr().out.split())


def test_an_apple_chip_keeps_scores_and_shares_its_memory(capsys):
    chip = ["--device", "apple", "--device_memory", "24GiB", "--device_bandwidth", "400", "--device_tflops", "10.4"]
    assert plan(*GPT2, *SMALL, *chip, "--memory_budget", "device") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "The budget is 16.00 GiB: 24.00 GiB of apple less the third that macOS keeps from the GPU." in text
    assert "CUDA" not in text
    assert plan(*GPT2, *SMALL, *chip, "--memory_budget", "device", "--find", "per_device_train_batch_size") == 0
    assert "CUDA" not in capsys.readouterr().out
    sizes = ["--per_device_train_batch_size", "4", "--block_size", "256", "--json"]
    small = ["--model_type", "gpt2", "--config_overrides", "n_layer=2,n_embd=64,n_head=4,vocab_size=99,attn_pdrop=0.0"]
    activations = []
    for device in (chip, ["--device", "a100"]):
        assert plan(*small, *sizes, *device) == 0
        activations.append(sum(row["activations"] for row in json.loads(capsys.readouterr().out)["memory"]))
    scores = 4 * 4 * 256 * 256 * 4  # rows, heads, T x T, float32
    assert activations[0] - activations[1] > 0.8 * scores


def found(capsys, *arguments):
    return figures(capsys, *PLAIN, "--block_size", "64", "--device", "a100", "--find", *arguments)


def test_the_largest_and_the_fastest_micro_batch(capsys):
    values = found(
        capsys, "per_device_train_batch_size", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps",
        "6", "--memory_budget", "21MiB",
    )  # fmt: skip
    budget = values["budget_bytes"]
    assert budget == 21 * 2**20
    assert values["samples_in_a_step"] == 24
    sizes = [row["per_device_train_batch_size"] for row in values["micro_batches"]]
    assert all(24 % size == 0 and size <= values["largest"] for size in sizes)
    assert all(
        row["gradient_accumulation_steps"] * row["per_device_train_batch_size"] == 24
        for row in values["micro_batches"]
    )
    assert all(row["plan"]["predicted_peak_bytes"] <= budget for row in values["micro_batches"])
    seconds = [row["seconds"] for row in values["micro_batches"]]
    assert seconds == sorted(seconds)
    # The next larger one doesn't fit; the command line without --find says the same.
    step = ["--device", "a100", "--block_size", "64", "--memory_budget", "21MiB"]
    for size, code in ((values["largest"], 0), (values["largest"] + 1, 2)):
        assert plan(*PLAIN, *step, "--per_device_train_batch_size", str(size)) == code
        capsys.readouterr()


def test_the_longest_samples(capsys):
    values = found(capsys, "block_size", "--per_device_train_batch_size", "2", "--memory_budget", "1GiB")
    assert values["largest"] == 64  # it has no more positions
    assert values["plan"]["predicted_peak_bytes"] <= 2**30


def test_a_table_of_two_sizes(capsys):
    values = figures(
        capsys, "--model_type", "gpt2", "--config_overrides", TINY.replace("n_positions=64", "n_positions=256"),
        "--memory_rewrites", "none", "--device", "a100", "--find", "per_device_train_batch_size", "block_size",
        "--block_size", "128", "--memory_budget", "40MiB", "--per_device_train_batch_size", "8",
    )  # fmt: skip
    rows = values["rows"]
    assert [row["block_size"] for row in rows] == [64, 128, 256]
    largest = [row["largest"] for row in rows]
    assert largest == sorted(largest, reverse=True)
    assert all(0 < row["largest_without_recomputation"] <= row["largest"] for row in rows)


def test_default_t5_can_be_planned(capsys):
    values = figures(
        capsys, "--model_type", "t5", "--config_overrides", "num_layers=1,num_decoder_layers=1,d_model=32,d_ff=64",
        "--block_size", "16", "--checkpoint_placement", "all",
    )  # fmt: skip
    # Its forward looks at the logits, which a chunked loss does not have.
    assert not any(entry["rewrites"]["chunked_loss"] for entry in values["frontier"])
    assert list(values["plan"]["stages"]) == ["encoder.block.0", "decoder.block.0"]


def test_entry_point_and_extra():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["hf-trainopt"].partition(":")
    assert getattr(importlib.import_module(module), function) is main
    assert any(requirement.startswith("matplotlib") for requirement in project["optional-dependencies"]["plot"])
