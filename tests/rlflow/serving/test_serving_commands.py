"""The commands around serving: addresses, vLLM's own server, what a run says at its end, what is refused."""

from __future__ import annotations

import fcntl
import json
import shlex
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlflow.cli.main import main
from rlflow.data.chat import Chat
from rlflow.data.errors import DataError
from rlflow.data.image_processor import ImageProcessor
from rlflow.data.tokenizer import build_character_tokenizer
from rlflow.driver.errors import RunError
from rlflow.recipe import Recipe
from rlflow.recipe.loading import load_recipe
from rlflow.serving.addresses import open_socket, token_for, url_of
from rlflow.serving.models import (
    ServedModel,
    Settings,
    check_adapter,
    choose_engine,
    models_by_name,
    names_of,
    read_model,
)
from rlflow.serving.next_commands import next_lines
from rlflow.serving.sampling import Sampling, defaults_of
from rlflow.serving.vllm_server import PROGRAM, command
from tests.conftest import CHARACTERS
from tests.rlflow.serving.conftest import oracle_of, source_of
from tests.seeing_models import NEEDS_TORCHVISION
from tests.vision_models import write_processor

RECIPES = Path(__file__).resolve().parents[3] / "recipes"


def test_a_port_in_use_is_one_line_with_a_remedy() -> None:
    with open_socket("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=f"^port {port} of 127.0.0.1 is in use: .*--port 0 for a free one$"):
            open_socket("127.0.0.1", port)
    with open_socket("127.0.0.1", port) as again:
        assert again.getsockname()[1] == port
    with pytest.raises(DataError, match=r"--host no\.such\.host\.invalid"):
        open_socket("no.such.host.invalid", 0)
    with pytest.raises(DataError, match=r"--host 203\.0\.113\.7: .*give an address of this machine"):
        open_socket("203.0.113.7", 0)


def test_a_port_in_use_is_said_before_a_model_is_looked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with open_socket("127.0.0.1", 0) as taken:
        assert main(["serve", "no/such/model", "--port", str(taken.getsockname()[1])]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_token_is_made_where_other_machines_reach_the_host() -> None:
    assert [token_for(host, None) for host in ("127.0.0.1", "localhost", "::1")] == [None] * 3
    assert token_for("127.0.0.1", "mine") == token_for("0.0.0.0", "mine") == "mine"
    with pytest.raises(DataError, match="--token is empty"):
        token_for("0.0.0.0", " ")
    made = [token_for("0.0.0.0", None), token_for("gpu-7", None)]
    assert len({*made}) == 2 and all(token and len(token) >= 32 for token in made)
    assert (url_of("0.0.0.0", 80), url_of("::1", 80)) == ("http://127.0.0.1:80", "http://[::1]:80")


def option(words: Sequence[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_vllms_server_gets_the_same_models_names_and_defaults(
    served: ServedModel, adapter_dirs: dict[str, Path], policy_dir: Path
) -> None:
    model = replace(served, defaults=Sampling(0.7, 0.9, 5, repetition_penalty=1.1))
    words = command(model, adapter_dirs, Settings(max_model_len=64), "127.0.0.1", 8123, on_cpu=True)
    assert words[: len(PROGRAM)] == list(PROGRAM) and option(words, "--model") == str(policy_dir)
    assert [option(words, f"--{name}") for name in ("host", "port", "served-model-name", "max-model-len")] == [
        *("127.0.0.1", "8123", "tiny", "64")
    ]
    sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.0, "repetition_penalty": 1.1}
    assert json.loads(option(words, "--override-generation-config")) == sampling
    assert [option(words, f"--{name}") for name in ("max-loras", "max-lora-rank")] == ["2", "8"]
    modules = [json.loads(word) for word in words[words.index("--lora-modules") + 1 :][:2]]
    assert modules == [{"name": name, "path": str(path)} for name, path in adapter_dirs.items()]
    assert "--enforce-eager" in words and "--api-key" not in words
    plain = command(model, {}, Settings(tensor_parallel_size=2), "::", 1, on_cpu=False)
    assert "--enable-lora" not in plain and option(plain, "--tensor-parallel-size") == "2"


@pytest.mark.slow
def test_vllms_server_takes_the_words_that_it_is_given(served: ServedModel, adapter_dirs: dict[str, Path]) -> None:
    """By its own parser."""
    pytest.importorskip("vllm")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    for on_cpu in (True, False):
        words = command(served, adapter_dirs, Settings(), "127.0.0.1", 8123, on_cpu=on_cpu)
        parsed = parser.parse_args(words[len(PROGRAM) :])
        assert parsed.model == served.base.path
        assert [module.name for module in parsed.lora_modules] == ["left", "right"]
        assert parsed.enable_lora and parsed.port == 8123


def test_an_adapter_is_served_under_its_name_beside_its_base(
    adapter_dirs: dict[str, Path], policy_dir: Path, settings: Settings
) -> None:
    model = read_model(source_of(adapter_dirs["left"], "trained"), settings)
    assert names_of(model, {"other": adapter_dirs["right"]}) == ["policy", "trained", "other"]
    words = command(model, {}, Settings(), "127.0.0.1", 1, on_cpu=True)
    assert [option(words, f"--{name}") for name in ("model", "served-model-name")] == [str(policy_dir), "policy"]
    assert json.loads(option(words, "--lora-modules"))["name"] == "trained"
    with pytest.raises(DataError, match="two models are called trained"):
        names_of(model, {"trained": adapter_dirs["right"]})


def test_what_is_no_adapter_of_the_model_is_refused(
    served: ServedModel, adapter_dirs: dict[str, Path], policy_dir: Path, tmp_path: Path
) -> None:
    check_adapter(source_of(adapter_dirs["left"]), served)
    with pytest.raises(DataError, match=r"--adapters .*: holds no adapter, a directory with adapter_config\.json"):
        check_adapter(source_of(policy_dir), served)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "other/model"}))
    with pytest.raises(DataError, match="is an adapter of other/model, and the model is"):
        check_adapter(source_of(tmp_path), served)


def test_each_adapter_is_read_with_its_own_template_stops_and_sampling(
    served: ServedModel, adapter_dirs: dict[str, Path], policy_dir: Path, tmp_path: Path, settings: Settings
) -> None:
    left = Path(shutil.copytree(adapter_dirs["left"], tmp_path / "left"))
    tokenizer = build_character_tokenizer(CHARACTERS, "{% for m in messages %}Q {{ m['content'] }} A {% endfor %}")
    tokenizer.save_pretrained(left)
    (left / "generation_config.json").write_text(json.dumps({"eos_token_id": [5], "do_sample": True, "top_k": 3}))
    sources = {"left": source_of(left, "x"), "right": source_of(adapter_dirs["right"], "y")}
    models = models_by_name(served, sources, settings)
    assert list(models) == ["tiny", "left", "right"]
    texts = [model.chat.render_prompt([{"role": "user", "content": "1"}]).text for model in models.values()]
    assert texts == ["user:1assistant:", "Q 1 A ", "user:1assistant:"]
    assert [model.stop_token_ids for model in models.values()] == [(1,), (1, 5), (1,)]
    assert models["left"].defaults == Sampling(1.0, 1.0, 3) and models["right"].defaults == served.defaults


def test_a_run_tells_the_commands_that_come_next(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("rlflow.cli.run.load_runnable", lambda *args, **kwargs: [recipe_of("quickstart.yaml")])
    monkeypatch.setattr("rlflow.cli.run.run", lambda *args, **kwargs: None)
    assert main(["run", "x.yaml"]) == 0
    assert "infer" in capsys.readouterr().out.split("next:")[1]


def test_a_reward_model_is_refused_with_a_sentence(policy_dir: Path, tmp_path: Path, settings: Settings) -> None:
    config = json.loads((policy_dir / "config.json").read_text())
    config["architectures"] = ["Qwen3ForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="is a reward model: it scores answers and writes none"):
        read_model(source_of(tmp_path), settings)


def test_a_context_beyond_the_models_is_refused(policy_dir: Path) -> None:
    with pytest.raises(DataError, match=r"--max-model-len 9999: .* reads 4096 tokens at most"):
        read_model(source_of(policy_dir), Settings(max_model_len=9999))
    assert read_model(source_of(policy_dir), Settings()).context == 4096


def test_vllm_without_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlflow.serving.models.find_spec", lambda name: None)
    with pytest.raises(DataError, match="vLLM is not installed"):
        choose_engine("vllm")
    assert choose_engine("auto") == choose_engine("torch") == "torch"


def test_vllms_server_is_not_started_for_a_tokenizer_of_characters(
    policy_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It renders texts of its own as it starts, and ends where a character has no token."""
    pytest.importorskip("vllm")
    assert main(["serve", str(policy_dir), "--port", "0", "--engine", "vllm"]) == 2
    assert "nothing for other characters: --engine torch" in capsys.readouterr().err


def test_answers_are_drawn_as_the_run_drew_them_or_as_the_generation_config_says() -> None:
    recipe = recipe_of("grpo_gsm8k_smollm2.yaml", "rollout.temperature=0.7", "rollout.top_k=9")
    assert defaults_of(recipe, {"temperature": 5.0}) == Sampling(0.7, 1.0, 9, recipe.rollout.max_new_tokens)
    recipe = recipe_of("grpo_gsm8k_smollm2.yaml", 'sampling={min_p: 0.1, repetition_penalty: 1.2, stop: ["###"]}')
    drawn = defaults_of(recipe, {}).params((2,), 10**6)
    assert (drawn.min_p, drawn.repetition_penalty, drawn.stop, drawn.stop_token_ids) == (0.1, 1.2, ("###",), (2,))
    assert defaults_of(None, {}) == Sampling(0.0)
    assert defaults_of(None, {"temperature": 0.6, "top_p": 0.9}) == Sampling(0.0)
    sampled = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 7}
    assert defaults_of(None, sampled) == Sampling(0.6, 0.9, 50, 7)


def recipe_of(name: str, *overrides: str) -> Recipe:
    return load_recipe(RECIPES / name, overrides)[-1]


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        (
            "grpo_gsm8k_smollm2.yaml",
            ["run.output_dir=my runs/it's"],
            [
                ["rlflow", "infer", "my runs/it's"],
                ["rlflow", "serve", "my runs/it's"],
                ["rlflow", "export", "my runs/it's", "models/it's"],
            ],
        ),
        (
            "grpo_gsm8k_lora_smollm2.yaml",
            ["run.output_dir=runs/a"],
            [
                ["rlflow", "infer", "runs/a"],
                ["rlflow", "serve", "runs/a"],
                ["rlflow", "export", "runs/a", "models/a", "--merge"],
            ],
        ),
        ("reward_model_hh_smollm2.yaml", ["run.output_dir=runs/r"], [["rlflow", "export", "runs/r", "models/r"]]),
    ],
    ids=["policy", "adapter", "reward-model"],
)
def test_a_run_ends_with_the_commands_that_come_next(
    name: str, overrides: list[str], expected: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["rlflow"])
    monkeypatch.chdir(tmp_path)
    lines = next_lines(recipe_of(name, *overrides))
    assert [shlex.split(line)[1:] for line in lines[1:]] == expected


def test_the_next_commands_call_this_program_as_it_was_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "rlflow"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    recipe = recipe_of("quickstart.yaml")
    for called, path, expected in (
        (str(program), "/nowhere", [str(program)]),
        (str(program), str(tmp_path), ["rlflow"]),
        ("/x/rlflow/__main__.py", "/nowhere", [sys.executable, "-m", "rlflow"]),
    ):
        monkeypatch.setattr(sys, "argv", [called])
        monkeypatch.setenv("PATH", path)
        words = shlex.split(next_lines(recipe)[1])[1:]
        assert words[: len(expected) + 1] == [*expected, "infer"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["infer", "m", "--data", "a.jsonl"], "need --output FILE.jsonl, too"),
        (["infer", "m", "--rewards", "math_accuracy"], "--rewards, --resume and --samples are of --data"),
        (["infer", "m", "--top-p", "1.5"], "--top-p 1.5: a share above 0, at most 1"),
        (["infer", "m", "--temperature=-1"], "0 is greedy, and a finite number above it draws"),
        (["infer", "m", "--data", "a", "--output", __file__], "exists already: --resume goes on with it"),
        (["infer", "m", "--data", "a", "--output", "/proc/answers.jsonl"], "name one that can be written"),
        (["serve", "m", "--port", "0", "--adapters", "a"], "--adapters a: write name=path"),
        (["serve", "m", "--port", "0", "--adapters", "a=x", "a=y"], "two bear one name"),
    ],
)
def test_arguments_that_cannot_be_meant_are_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_template_that_takes_no_system_message_is_named_with_the_option(
    policy_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template, data = tmp_path / "strict.jinja", tmp_path / "rows.jsonl"
    refusal = "{{ raise_exception('System role not supported') if messages[0]['role'] == 'system' }}"
    template.write_text(refusal + "{% for message in messages %}{{ message['content'] }}{% endfor %}")
    data.write_text(json.dumps({"prompt": "1+1="}) + "\n")
    words = ["infer", str(policy_dir), "--data", str(data), "--output", str(tmp_path / "answers.jsonl")]
    assert main([*words, "--system", "Add.", "--chat-template", str(template)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("--system: ") and "System role not supported" in error and "--chat-template" in error


@pytest.mark.slow
def test_a_command_line_answers_a_data_set_with_rewards(
    policy_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    data.write_text("".join(json.dumps({"q": f"{i}+1=", "solution": str(i + 1)}) + "\n" for i in range(5)))
    words = ["infer", str(policy_dir), "--data", str(data), "--output", str(output), "--columns", "prompt=q"]
    words += ["--max-new-tokens", "4", "--system", "Add.", "--rewards", "exact_match"]
    assert main(words) == 0
    rows: list[dict[str, Any]] = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["messages"][1]["content"] for row in rows] == [f"{i}+1=" for i in range(5)]
    assert all(row["messages"][0] == {"role": "system", "content": "Add."} for row in rows)
    assert all(row["rewards"].keys() == {"exact_match"} for row in rows)
    assert "5 answers" in capsys.readouterr().out
    half = output.read_text().splitlines(keepends=True)
    output.write_text("".join(half[:2]))
    assert main([*words, "--resume"]) == 0
    assert output.read_text() == "".join(half)


def test_an_output_that_another_process_writes_is_one_line_and_stays_as_it_is(
    policy_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    data.write_text(json.dumps({"prompt": "1+1="}) + "\n")
    words = ["infer", str(policy_dir), "--data", str(data), "--output", str(output), "--max-new-tokens", "2"]
    with output.open("x") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        capsys.readouterr()
        assert main([*words, "--resume"]) == 2
        assert main(words) == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 2 and "is being written by another" in error[0] and "exists already" in error[1]
        assert output.samefile(f"/proc/self/fd/{other.fileno()}") and not output.stat().st_size
    assert main([*words, "--resume"]) == 0
    assert len(output.read_text().splitlines()) == 1


def test_a_command_line_answers_with_an_adapter_that_is_not_merged(
    policy_dir: Path, adapter_dirs: dict[str, Path], tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "1+1="}) + "\n")
    left = str(adapter_dirs["left"])
    for index, words in enumerate(([str(policy_dir), "--adapters", left], [left])):
        output = tmp_path / f"answers-{index}.jsonl"
        assert main(["infer", *words, "--data", str(data), "--output", str(output), "--max-new-tokens", "8"]) == 0
        expected = oracle_of(policy_dir, adapter_dirs["left"]).answer([{"role": "user", "content": "1+1="}], 8)
        assert json.loads(output.read_text())["response"] == expected


def test_an_address_of_ipv6_is_listened_at() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with open_socket("::1", 0) as listening:
        assert listening.family == socket.AF_INET6


def test_a_hub_out_of_reach_is_one_line_after_one_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("the library retries"))
    assert main(["infer", "nobody/nothing"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nobody/nothing: there is no model that can be read: cannot reach http://127.0.0.1:9" in line


@pytest.mark.parametrize(
    ("family", "options"),
    [pytest.param("qwen3_vl", ['{"max_pixels": 5000}'], marks=NEEDS_TORCHVISION), ("idefics3", [])],
)
def test_vllms_server_has_a_processor_that_takes_max_pixels_scale_pictures(
    served: ServedModel, tmp_path: Path, family: str, options: list[str]
) -> None:
    tokenizer = write_processor(tmp_path, family).tokenizer
    model = replace(served, chat=Chat(tokenizer, vision=ImageProcessor(str(tmp_path), 5000)))
    words = command(model, {}, Settings(), "127.0.0.1", 1, on_cpu=True)
    assert [option(words, name) for name in words if name == "--mm-processor-kwargs"] == options
