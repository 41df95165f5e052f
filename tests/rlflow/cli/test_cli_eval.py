"""`rlflow eval`: a run, its checkpoints, an adapter; what is left of it; what cannot be measured says what to do."""

from __future__ import annotations

import errno
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlflow
from rlflow.cli.main import main
from rlflow.evaluation_sets import measuring
from tests.local_actors import use_local_actors

ROWS = [
    {"prompt": "Say one.", "response": "one", "solution": "one"},
    {"prompt": "Say two.", "response": "two", "solution": "two"},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """Two words learned by heart, with a checkpoint on the way."""
    directory = tmp_path_factory.mktemp("runs")
    rows = directory / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe = {
        "run": {"output_dir": str(directory / "words"), "steps": 40, "save_every": 20, "keep_checkpoints": 3},
        "model": {"path": str(tiny_model_dir)},
        "algorithm": {"name": "sft"},
        "data": {"train": {"path": str(rows)}, "prompts_per_step": 2, "max_tokens": 64, "max_prompt_tokens": 32},
        "rollout": {"max_new_tokens": 6, "engine": "torch"},
        "evaluation": {"data": {"path": str(rows)}, "reward": {"name": "exact_match"}, "name": "words"},
        "trainer": {"learning_rate": 1.0e-2},
        "tracking": ["jsonl"],
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_local_actors(monkeypatch)
        rlflow.run(directory / "recipe.yaml")
    return directory / "words"


def evaluate(output: Path, *arguments: Any) -> list[dict[str, Any]]:
    assert main(["eval", *map(str, arguments), "--output", str(output)]) == 0
    return json.loads((output / "results.json").read_text())


def samples_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def measured_by(run: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {key: value for key, value in rows[-1].items() if key.startswith("eval/")}


def test_a_run_is_measured_as_it_measured_itself(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (found,) = evaluate(tmp_path / "out", run)
    (result,) = found["results"]
    own = measured_by(run)
    assert result["scores"]["pass@1"]["value"] == own["eval/words/pass@1"] == 1.0
    assert result["mean_tokens"] == pytest.approx(own["eval/words/mean_tokens"])
    assert (result["set"], result["problems"], result["settings"]["reward"]) == ("words", 2, "exact_match")
    kept = samples_of(tmp_path / "out" / "words.jsonl")
    assert [(row["response"], row["passed"], row["rewards"]) for row in kept] == [
        ("one", True, {"exact_match": 1.0}),
        ("two", True, {"exact_match": 1.0}),
    ]
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["model", "set", "metric", "score", "95%", "interval", "problems", "samples"]
    assert said[1].split() == ["words", "words", "pass@1", "100.0%", "34.2", "to", "100.0%", "2", "1"]


def test_every_set_of_a_recipe_that_generates_is_measured_in_its_own_way(run: Path, tmp_path: Path):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    words = recipe["evaluation"]
    often = {"name": "often", "samples": 2, "temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "max_new_tokens": 3}
    recipe["evaluation"] = [words, {**words, "name": "loss", "reward": None}, {**words, **often}]
    recipe["sampling"] = {**recipe["sampling"], "stop": ["tw"]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (found,) = evaluate(tmp_path / "out", run, "--recipe", tmp_path / "recipe.yaml")
    first, second = found["results"]
    assert (first["set"], second["set"]) == ("words", "often")
    # The run's own ends are kept in what is judged.
    assert [row["response"] for row in samples_of(tmp_path / "out" / "words.jsonl")] == ["one", "tw"]
    assert first["scores"]["pass@1"]["value"] == 0.5
    settings = {key: second["settings"][key] for key in ("temperature", "top_p", "min_p", "max_new_tokens", "stop")}
    assert settings == {"temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "max_new_tokens": 3, "stop": ["tw"]}
    assert {"pass@1", "pass@2"} <= second["scores"].keys()


def test_the_checkpoints_of_a_run_make_a_curve(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    found = evaluate(tmp_path / "out", run, "--all-checkpoints")
    assert [one["step"] for one in found] == [20, 40]
    assert found[-1]["results"][0]["scores"]["pass@1"]["value"] == 1.0
    assert (tmp_path / "out" / "step_000020" / "words.jsonl").is_file()
    assert (tmp_path / "out" / "curve.svg").read_text().startswith("<svg")
    assert "words/pass@1  " in capsys.readouterr().out


def test_several_samples_of_a_file_are_estimated_and_voted_on(run: Path, tmp_path: Path):
    rows = tmp_path / "mine.jsonl"
    rows.write_text(json.dumps({"prompt": "Say one.", "solution": "7"}) + "\n")
    sets = f"{rows},recipe"
    (found,) = evaluate(tmp_path / "out", run, "--sets", sets, "--samples", 4, "--k", "1,2,4", "--temperature", 1.0)
    mine, words = found["results"]
    assert list(mine["scores"]) == ["pass@1", "pass@2", "pass@4", "maj@2", "maj@4"]
    assert (mine["scores"]["pass@4"]["value"], mine["samples"], mine["settings"]["temperature"]) == (0.0, 4, 1.0)
    passed = [row["passed"] for row in samples_of(tmp_path / "out" / "words.jsonl")]
    assert len(passed) == 8
    assert words["scores"]["pass@1"]["value"] == pytest.approx(sum(passed) / 8)


def test_choices_and_generation_are_measured_in_one_call_with_json(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    rows = tmp_path / "even.jsonl"
    rows.write_text(json.dumps({"question": "Say one.", "choices": ["one", "0"], "answer": 0}) + "\n")
    found = evaluate(tmp_path / "out", run, "--sets", f"{rows},recipe", "--json", "--limit", 1)
    assert json.loads(capsys.readouterr().out) == found
    even, words = found[0]["results"]
    assert set(even["scores"]) == {"acc", "acc_norm"} and words["problems"] == 1
    (row,) = samples_of(tmp_path / "out" / "even.jsonl")
    assert row["chosen"] == int(row["logprobs"][1] > row["logprobs"][0])


def test_results_go_to_the_runs_own_directory(run: Path, capsys: pytest.CaptureFixture):
    assert main(["eval", str(run), "--limit", "1"]) == 0
    (path,) = (run / "evaluations").glob("final-*/results.json")
    assert str(path) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sets", "gsm9k"], r"--sets gsm9k: no set is called so, and no file; there are gsm8k, .*Nearest: gsm8k"),
        (["--sets", "gsm8k", "--data", "gsm8k"], "--data gsm8k: write NAME=FILE"),
        (["--data", "gsm8k=nowhere.jsonl"], "there is no file nowhere.jsonl"),
        (["--k", "4", "--samples", "2"], "k = 4 needs as many samples a problem: --samples 4"),
        (["--samples", "2", "--temperature", "0"], "2 greedy completions are all the same: give --temperature"),
        (["--k", "some"], "--k some: write numbers"),
        (["--checkpoint", "3"], "has no checkpoint 3: it keeps 20, 40"),
        (["--checkpoint", "20", "--all-checkpoints"], "leave one out"),
        (["--sets", "mine.jsonl"], "--sets mine.jsonl: no set is called so"),
        (["--sets", "mmlu", "--backend", "lm_eval"], "pip install lm-eval"),
        (["--backend", "lm_eval"], "needs --sets with its tasks"),
        (["--reward", "exact_mach"], "there is none; file.py:function names your own. Nearest: exact_match"),
        (["--reward", "mine:fn"], "--reward mine:fn: is not of the form file.py:function"),
    ],
)
def test_what_cannot_be_measured_is_one_line_with_a_remedy(
    run: Path,
    tmp_path: Path,
    arguments: list[str],
    says: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("rlflow.evaluation_sets.lm_eval_backend.find_spec", lambda name: None)
    assert main(["eval", str(run), "--output", str(tmp_path / "out"), *arguments]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("loading", "writes", "["))]
    assert len(said) == 1 and re.search(says, said[0]), said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sets", [1, 2])
def test_a_disk_that_gets_full_leaves_nothing_of_an_evaluation(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, sets: int
):
    """In the first set, or behind one that was measured."""
    (tmp_path / "other.jsonl").write_text((run.parent / "rows.jsonl").read_text())
    begun: list[str] = []

    def filling(value: Any, **options: Any) -> str:
        begun.append(json.dumps(value, **options))
        if len(begun) > 2 * (sets - 1):
            raise OSError(errno.ENOSPC, "No space left on device")
        return begun[-1]

    monkeypatch.setattr(measuring, "json", SimpleNamespace(dumps=filling))
    output = tmp_path / "out"
    named = f"{run.parent / 'rows.jsonl'},{tmp_path / 'other.jsonl'}"
    assert main(["eval", str(run), "--sets", named, "--reward", "exact_match", "--output", str(output)]) == 1
    assert "No space left on device; make room, or name another place" in capsys.readouterr().err
    assert len(begun) == 2 * sets - 1 and not output.exists()


def test_an_adapter_is_measured_without_being_merged(tiny_model_dir: Path, tmp_path: Path):
    adapted: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir),
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]),
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    adapted.save_pretrained(tmp_path / "adapter")
    rows = tmp_path / "even.jsonl"
    row = {"question": "Even?", "choices": ["12", "7"], "answer": 0}
    rows.write_text(json.dumps(row) + "\n")
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"prompt": "Even?", "solution": "12"}) + "\n")
    sets = f"{rows},{asked}"
    evaluate(tmp_path / "out", tmp_path / "adapter", "--sets", sets, "--max-new-tokens", 4)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)

    def logprobs_of(text: str) -> torch.Tensor:
        tokens = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = adapted.eval()(input_ids=tokens).logits[0, :-1]
        return logits.log_softmax(-1).gather(1, tokens[0, 1:, None]).squeeze(1)

    (found,) = samples_of(tmp_path / "out" / "even.jsonl")
    expected = [float(logprobs_of(f"{found['text']} {end}")[-len(end) - 1 :].sum()) for end in row["choices"]]
    assert found["logprobs"] == pytest.approx(expected, abs=1e-3)
    (answer,) = samples_of(tmp_path / "out" / "asked.jsonl")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Even?"}], add_generation_prompt=True, return_dict=False
    )
    written = adapted.generate(input_ids=torch.tensor([prompt]), max_new_tokens=4, do_sample=False)[0, len(prompt) :]
    assert answer["response"] == tokenizer.decode(written, skip_special_tokens=True)


def test_a_model_without_a_recipe_is_measured_on_named_sets_alone(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert main(["eval", str(tiny_model_dir), "--output", str(tmp_path / "out")]) == 2
    assert "has no recipe to evaluate by: --sets gsm8k,math500" in capsys.readouterr().err


def test_what_lm_eval_found_is_reported_as_our_own(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stand-in with lm_eval's documented answer: only the way there and back is ours."""
    asked: dict[str, Any] = {}

    class Harness:
        @staticmethod
        def simple_evaluate(**options: Any) -> dict[str, Any]:
            asked.update(options)
            values = {"alias": "arc_easy", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.25}
            return {"results": {"arc_easy": values}, "n-samples": {"arc_easy": {"original": 9, "effective": 4}}}

    monkeypatch.setattr("rlflow.evaluation_sets.lm_eval_backend.find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "lm_eval", cast("ModuleType", Harness))
    (found,) = evaluate(tmp_path / "out", run, "--backend", "lm_eval", "--sets", "arc_easy", "--limit", 4)
    (result,) = found["results"]
    assert asked["tasks"] == ["arc_easy"] and asked["limit"] == 4
    assert asked["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert asked["model_args"]["pretrained"] == str(run / "final")
    assert result["problems"] == 4
    assert result["scores"]["acc"] == {
        "value": 0.5,
        "low": pytest.approx(0.304, abs=1e-3),
        "high": pytest.approx(0.696, abs=1e-3),
    }
