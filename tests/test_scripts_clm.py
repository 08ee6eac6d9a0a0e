"""`run_clm.py` as its users run it, on a few kilobytes of text."""

import needs_scripts  # noqa: F401


# isort: split
import dataclasses
import json
import logging

import pytest
import torch
from scripts_helpers import RESULT_FILES, SHORT_RUN, assert_same_weights, flag_maker, run_script
from transformers import AutoModelForCausalLM, AutoTokenizer

import run_clm
from hf_trainopt import EfficientTrainer, EfficientTrainingArguments
from hf_trainopt.placement import PlacementError, PlacementPlan, Rewrites
from hf_trainopt.placement.plan.plan import FULL
from hf_trainopt.scripting import session


SENTENCES = [
    f"The {animal} number {n} eats {food} and sleeps {place}."
    for n in range(12)
    for animal in ("cat", "dog", "horse")
    for food, place in (("fish", "inside"), ("grass", "in the field"))
]
TINY = "n_embd=16,n_layer=1,n_head=2,n_positions=32"


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(SENTENCES) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def flags(tmp_path, text_file):
    """Flags of a run of a second; tests add to them."""
    values = {
        **SHORT_RUN,
        "train_file": text_file,
        "validation_split_percentage": 20,
        "train_tokenizer_vocab_size": 300,
        "config_overrides": TINY,
        "block_size": 16,
        "per_device_eval_batch_size": 8,
        "learning_rate": "1e-2",
        "cache_dir": tmp_path / "cache",
        "output_dir": tmp_path / "out",
    }
    return flag_maker(values)


def test_files_and_metrics(tmp_path, flags, capsys):
    metrics = run_clm.main(flags())
    out = tmp_path / "out"
    for name in (*RESULT_FILES, "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).is_file(), name
    results = json.loads((out / "all_results.json").read_text())
    assert results["train_samples"] > 0
    assert results["eval_samples"] > 0
    assert results["perplexity"] == pytest.approx(torch.tensor(results["eval_loss"]).exp().item(), rel=1e-5)
    assert 0 <= results["eval_accuracy"] <= 1
    assert metrics["train_loss"] == results["train_loss"]
    # The data budget is that of the reference: 4 steps of 2 micro-batches of 2 samples.
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["log_history"][-1]["samples_seen"] == 16
    assert "Accuracy: " in (out / "README.md").read_text()
    printed = capsys.readouterr().out
    assert "micro-batches per step (k)" in printed
    assert "perplexity" in printed
    assert "at full size" not in printed

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == len(tokenizer) == 300
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer(SENTENCES[0])["input_ids"]) == SENTENCES[0]


def test_loss_is_that_of_the_model(tmp_path, flags):
    """GPT-2 declares no loss type: without one, Trainer would report (T-1)/T of the loss."""
    metrics = run_clm.main(flags(max_eval_samples=8))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    num_validation = round(len(SENTENCES) * 0.2)
    ids = tokenizer([line + "\n" for line in SENTENCES[:num_validation]])["input_ids"]
    ids = torch.tensor([token for row in ids for token in row][: 8 * 16]).view(8, 16)
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids)
    assert metrics["eval_samples"] == 8
    assert metrics["eval_loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    accuracy = (output.logits[:, :-1].argmax(-1) == ids[:, 1:]).float().mean().item()
    assert metrics["eval_accuracy"] == pytest.approx(accuracy, abs=1e-6)


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
def test_file_formats(tmp_path, flags, suffix):
    import pandas

    table = pandas.DataFrame({"number": range(len(SENTENCES)), "text": SENTENCES})
    path = tmp_path / f"text.{suffix}"
    if suffix == "csv":
        table.to_csv(path, index=False)
    elif suffix == "parquet":
        table.to_parquet(path)
    else:
        table.to_json(path, orient="records", lines=True)
    metrics = run_clm.main(flags(train_file=path, max_steps=1, do_eval=False, max_train_samples=6))
    assert metrics["train_samples"] == 6


def test_streaming(flags):
    metrics = run_clm.main(flags(streaming=True, max_eval_samples=4, max_train_samples=40))
    assert "train_samples" not in metrics
    assert metrics["perplexity"] > 1
    with pytest.raises(ValueError, match="--streaming needs --max_steps"):
        run_clm.main(flags(streaming=True, without=["max_steps"]))


def test_llama_and_its_overrides(tmp_path, flags):
    overrides = "hidden_size=16,intermediate_size=32,num_hidden_layers=1,num_attention_heads=2,num_key_value_heads=1"
    overrides += ",max_position_embeddings=32"
    run_clm.main(flags(model_type="llama", config_overrides=overrides, max_steps=2, dtype="float32"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["hidden_size"], config["vocab_size"]) == ("llama", 16, 300)


def test_tokenizer_from_bare_vocabulary_files(tmp_path, flags):
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(SENTENCES, vocab_size=290, special_tokens=["<|endoftext|>"], show_progress=False)
    (tmp_path / "vocabulary").mkdir()
    tokenizer.save_model(str(tmp_path / "vocabulary"))
    run_clm.main(flags(without=["train_tokenizer_vocab_size"], tokenizer_name=tmp_path / "vocabulary", max_steps=1))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"]) == ("gpt2", 290)


def test_evaluate_a_saved_model(tmp_path, flags):
    trained = run_clm.main(flags())
    untouched = ("train_file", "train_tokenizer_vocab_size", "config_overrides", "do_train")
    again = run_clm.main(
        flags(
            without=[*untouched, "validation_split_percentage"],
            validation_file=tmp_path / "text.txt",
            model_name_or_path=tmp_path / "out",
            output_dir=tmp_path / "evaluated",
        )
    )
    assert again["eval_loss"] == pytest.approx(trained["eval_loss"], rel=0.2)
    assert not (tmp_path / "evaluated" / "train_results.json").exists()
    assert (tmp_path / "evaluated" / "eval_results.json").is_file()


@pytest.mark.parametrize("policy", ["goodput", "fixed"])
def test_resume_is_exact_and_never_silent(tmp_path, flags, policy):
    setting = {"accumulation_policy": policy, "max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    if policy == "fixed":
        setting["optimizer_step_cost"] = 0.5
    run_clm.main(flags(**setting, output_dir=tmp_path / "whole", do_eval=False))
    checkpoints = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert len(checkpoints) >= 2

    resumed = flags(**setting, output_dir=tmp_path / "resumed", do_eval=False)
    run_clm.main([*resumed, f"--resume_from_checkpoint={checkpoints[0]}"])
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed")

    again = flags(**setting, output_dir=tmp_path / "whole", do_eval=False)
    with pytest.raises(ValueError, match="already holds checkpoint-"):
        run_clm.main(again)
    run_clm.main([*again, "--resume_from_checkpoint=True"])
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed")


def last_log(output_dir):
    return json.loads((output_dir / "trainer_state.json").read_text(encoding="utf-8"))["log_history"][-1]


def test_config_file_with_flags_over_it(tmp_path, flags):
    import yaml

    values = dict(flag.removeprefix("--").split("=", 1) for flag in flags())
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    for argv, samples in (([str(path)], 16), (["--config", str(path), "--max_steps", "2"], 8)):
        run_clm.main(argv)
        assert last_log(tmp_path / "out")["samples_seen"] == samples


@pytest.mark.parametrize(
    ("changes", "without", "message"),
    [
        ({}, ["do_train", "do_eval"], "pass --do_train, --do_eval or both"),
        ({}, ["train_file"], "There are no data: pass --dataset_name"),
        ({}, ["train_tokenizer_vocab_size"], "There is no tokenizer: pass --tokenizer_name"),
        ({"train_file": "none.txt"}, [], "none.txt does not exist"),
        ({"train_file": "text.docx"}, [], "must end in one of: .txt, .csv"),
        ({"block_size": 33}, [], "--block_size 33 is more than the 32 positions"),
        ({"block_size": 1}, [], "--block_size must be at least 2"),
        ({"train_tokenizer_vocab_size": 200}, [], "must be above 256"),
        ({"config_overrides": "n_embed=16"}, [], "--config_overrides .*n_embed"),
        ({"model_type": "gtp2"}, [], "--model_type gtp2"),
        ({"tokenizer_name": "x"}, [], "--train_tokenizer_vocab_size cannot be used"),
        ({"validation_split_percentage": 100}, [], "must lie between 0 and 100"),
        ({"resume_from_checkpoint": "nowhere"}, [], "nowhere of --resume_from_checkpoint does not exist"),
        ({"resume_from_checkpoint": "True"}, [], "No valid checkpoint found in output directory"),
        ({"accumulation_policy": "ramp"}, [], "needs accumulation_ramp"),
    ],
)
def test_mistakes_are_answered_before_training(flags, changes, without, message):
    with pytest.raises(ValueError, match=message):
        run_clm.main(flags(without=without, **changes))


def test_hub_names_while_offline(flags, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"The dataset nobody/nothing .* was found neither.*--train_file"):
        run_clm.main(flags(dataset_name="nobody/nothing", without=["train_file"]))
    with pytest.raises(ValueError, match=r"nobody/nothing .* was found neither.*pass a local folder"):
        run_clm.main(
            flags(
                model_name_or_path="nobody/nothing",
                without=["train_tokenizer_vocab_size", "config_overrides"],
            )
        )


def test_demo_flags_give_way():
    assert run_clm.demo_defaults({})["do_train"]
    assert run_clm.demo_defaults({"max_steps": 3})["dataset_name"] == "python-docs"
    assert run_clm.demo_defaults({"train_file": "a.txt"}) == {}


def test_subprocess_demo_and_error(tmp_path):
    out = tmp_path / "demo"
    tiny = ("--max_steps=2", f"--config_overrides={TINY}", "--block_size=32", "--max_eval_samples=4")
    for by_hand in (True, False):  # a second run neither fails nor resumes
        done = run_script("run_clm.py", *tiny, f"--output_dir={out}", "--use_cpu", by_hand=by_hand)
        assert done.returncode == 0, done.stderr
    assert "The same at full size:" in done.stdout
    failed = run_script("run_clm.py", "--do_train", f"--output_dir={out}", by_hand=True)
    assert failed.returncode != 0
    assert failed.stderr.strip().endswith("error: There are no data: pass --dataset_name, --train_file or "
                                          "--validation_file.")  # fmt: skip
    assert "Traceback" not in failed.stderr


def test_a_budget_that_cannot_be_met_is_one_line(flags):
    """Of planning, inside `trainer.train()`; a bug there keeps its traceback."""
    done = run_script("run_clm.py", *flags(memory_budget="5%"))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("run_clm.py: error: memory_budget is 5% (")
    assert "no placement needs less than" in last
    assert "Planning checkpoint placement for a budget of 5%" in done.stdout


def test_lines_of_datasets_are_logged_once(tmp_path, capfd, monkeypatch):
    loggers = ("", "datasets", "transformers", "__main__", "hf_trainopt")
    before = {name: (logging.getLogger(name).handlers[:], logging.getLogger(name).level) for name in loggers}
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    try:
        session.set_up_logging(EfficientTrainingArguments(output_dir=str(tmp_path), use_cpu=True))
        logging.getLogger("datasets.builder").info("a line of datasets")
    finally:
        for name, (handlers, level) in before.items():
            logging.getLogger(name).handlers[:] = handlers
            logging.getLogger(name).setLevel(level)
    assert sum(text.count("a line of datasets") for text in capfd.readouterr()) == 1


def test_two_processes_say_it_once(flags):
    done = run_script("run_clm.py", *flags(memory_budget="5%"), processes=2, by_hand=True)
    assert done.returncode != 0
    assert done.stderr.count("run_clm.py: error: memory_budget is 5%") == 1
    assert "SIGABRT" not in done.stderr
    assert "in train_and_evaluate" not in done.stderr


@pytest.mark.parametrize(
    ("error", "code"), [(PlacementError("no room\nat all"), 2), (ValueError("a bug"), None), (KeyError("a bug"), None)]
)
def test_only_errors_of_placement_lose_their_traceback_in_training(error, code, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["folder/script.py"])

    def _run_epoch():
        raise error

    with pytest.raises(type(error) if code is None else SystemExit) as raised, session.report_user_errors():
        _run_epoch()
    assert getattr(raised.value, "code", None) == code
    assert capsys.readouterr().err == ("script.py: error: no room at all\n" if code else "")


def test_the_loops_of_training_are_known_by_their_names():
    """Upstream ones: renamed, a bug in training would lose its traceback."""
    assert all(callable(getattr(EfficientTrainer, name)) for name in session.LOOPS)


def test_what_train_refuses_before_its_loop_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["folder/script.py"])

    def train_and_evaluate():
        raise ValueError("max_steps is 0; raise it.")

    with pytest.raises(SystemExit) as raised, session.report_user_errors():
        train_and_evaluate()
    assert raised.value.code == 2
    assert capsys.readouterr().err == "script.py: error: max_steps is 0; raise it.\n"


def test_plan_files(tmp_path, flags, caplog):
    """A plan with rewrites contradicts memory_rewrites="none"; one for another accumulation is told apart."""
    overrides = {"config_overrides": TINY.replace("n_layer=1", "n_layer=2")}
    path = tmp_path / "plan.json"
    plan = PlacementPlan("budget", {"transformer.h.0": FULL}, details={"accumulation_steps": 1})
    plan.save(path)
    run_clm.main(flags(**overrides, max_steps=1, do_eval=False, checkpoint_placement=path))
    assert "made for accumulation_steps 1, not 32: its peaks" in caplog.text
    caplog.clear()
    dataclasses.replace(plan, rewrites=Rewrites(fused_activations=True), details={"accumulation_steps": 3}).save(path)
    rewritten = flags(**overrides, max_steps=1, do_eval=False, checkpoint_placement=path)
    run_clm.main([*rewritten, "--resume_from_checkpoint=False"])
    assert "was made for" not in caplog.text
    assert "the plan uses fused_activations" in caplog.text
    with pytest.raises(ValueError, match=r"memory_rewrites is 'none', but the plan .* has fused_activations"):
        run_clm.main([*rewritten, "--memory_rewrites=none"])


def test_two_processes(tmp_path, flags):
    done = run_script("run_clm.py", *flags(max_steps=3), processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("micro-batches per step (k)") == 1
    assert last_log(tmp_path / "out")["samples_seen"] == 3 * 2 * 2 * 2
