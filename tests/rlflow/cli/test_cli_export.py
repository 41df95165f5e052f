"""`rlflow export`: merged weights compute what base plus adapter computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlflow.actors import adapters
from rlflow.cli.main import main
from rlflow.recipe import AdapterBlock, ModelBlock


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(2, 50)[None]).logits[0].float()


def write_run(directory: Path, base: Path, **adapter: Any) -> Path:
    """A finished run with an adapter that has learned something."""
    block = ModelBlock(path=str(base), adapter=AdapterBlock(**{"rank": 4, "alpha": 6, **adapter}))
    model = adapters.load_adapted(block, seed=0, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapters.adapter_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    final = directory / "final"
    final.mkdir(parents=True)
    adapters.write(final, model, adapters.adapter_parameters(model).items())
    AutoTokenizer.from_pretrained(base).save_pretrained(final)
    return directory


@pytest.mark.parametrize("adapter", [{}, {"rslora": True}, {"kind": "dora"}, {"target_modules": ["o_proj"]}], ids=str)
def test_a_merged_model_has_the_logits_of_base_plus_adapter(tiny_model_dir: Path, tmp_path: Path, adapter: dict):
    run, output = write_run(tmp_path / "run", tiny_model_dir, **adapter), tmp_path / "deep" / "merged"
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    plain = logits_of(base)
    expected = logits_of(PeftModel.from_pretrained(base, str(run / "final")))
    assert main(["export", str(run), str(output), "--merge"]) == 0
    merged = logits_of(AutoModelForCausalLM.from_pretrained(output))
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)
    assert (merged - plain).abs().max() > 0.1
    assert not (output / "adapter_config.json").exists()
    assert (
        AutoTokenizer.from_pretrained(output).chat_template
        == AutoTokenizer.from_pretrained(run / "final").chat_template
    )


def test_an_adapter_without_a_tokenizer_is_merged_with_that_of_its_base(tiny_model_dir: Path, tmp_path: Path, capsys):
    adapter = write_run(tmp_path / "run", tiny_model_dir) / "final"
    for file in [*adapter.glob("tokenizer*"), *adapter.glob("chat_template*")]:
        file.unlink()
    assert main(["export", str(adapter), str(tmp_path / "merged"), "--merge"]) == 0
    merged, base = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "merged", tiny_model_dir))
    assert merged.get_vocab() == base.get_vocab() and merged.chat_template == base.chat_template
    assert "model card" not in capsys.readouterr().err


def test_merged_weights_have_the_dtype_that_is_asked_for(tiny_model_dir: Path, tmp_path: Path):
    run = write_run(tmp_path / "run", tiny_model_dir)
    assert main(["export", str(run), str(tmp_path / "half"), "--merge", "--dtype", "bfloat16"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16


def test_without_merge_the_directory_is_copied(tiny_model_dir: Path, tmp_path: Path):
    run, output = write_run(tmp_path / "run", tiny_model_dir), tmp_path / "copy"
    assert main(["export", str(run), str(output)]) == 0
    assert {path.name: path.read_bytes() for path in output.iterdir()} == {
        path.name: path.read_bytes() for path in (run / "final").iterdir()
    }


def other_base(directory: Path, base: Path, **changes: Any) -> Path:
    """A model of another size, under the name of the adapter's own: names do not tell them apart."""
    path = directory / base.name
    config = AutoConfig.from_pretrained(base, **changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 1, "layer_types": ["full_attention"]}, "no place for model.layers.1."),
        ({"num_hidden_layers": 3, "layer_types": 3 * ["full_attention"]}, "the adapter lacks model.layers.2."),
        ({"intermediate_size": 80}, "size mismatch"),
    ],
    ids=str,
)
def test_an_adapter_is_merged_into_no_other_model(
    tiny_model_dir: Path, tmp_path: Path, changes: dict, says: str, capsys: pytest.CaptureFixture
):
    run = write_run(tmp_path / "run", tiny_model_dir)
    wrong = other_base(tmp_path / "other", tiny_model_dir, **changes)
    config = run / "final" / "adapter_config.json"
    # The base is no longer where it was.
    config.write_text(config.read_text().replace(str(tiny_model_dir), f"/gone/{tiny_model_dir.name}"))
    assert main(["export", str(run), str(tmp_path / "merged"), "--merge", "--base", str(wrong)]) == 2
    said = capsys.readouterr().err
    assert f"cannot be merged into {wrong}: " in said
    assert says in said
    assert "Give the model it was trained on with --base" in said
    assert not (tmp_path / "merged").exists()
    assert main(["export", str(run), str(tmp_path / "merged"), "--merge", "--base", str(tiny_model_dir)]) == 0


def test_a_base_of_another_name_is_refused_before_anything_is_loaded(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    run = write_run(tmp_path / "run", tiny_model_dir)
    assert main(["export", str(run), str(tmp_path / "merged"), "--merge", "--base", "org/else"]) == 2
    assert f"is an adapter of {tiny_model_dir}, and --base is org/else. Give the model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], {"revision": "v2", "trust_remote_code": False}),
        (["--trust-remote-code"], {"revision": "v2", "trust_remote_code": True}),
        (["--base", "other/base"], {"trust_remote_code": False}),
    ],
    ids=str,
)
def test_the_base_is_of_the_revision_it_was_trained_on(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], options: dict
):
    run = write_run(tmp_path / "run", tiny_model_dir)
    config = run / "final" / "adapter_config.json"
    given = {"base_model_name_or_path": "org/base", "revision": "v2"}
    config.write_text(json.dumps(json.loads(config.read_text()) | given))
    asked = {}

    def load(path: str, **options: Any) -> Any:
        asked.update(options, path=path)
        return AutoModelForCausalLM.from_pretrained(tiny_model_dir)

    monkeypatch.setattr("rlflow.actors.pretrained.load_language_model", load)
    assert main(["export", str(run), str(tmp_path / "merged"), "--merge", *arguments]) == 0
    assert asked == {"path": arguments[1] if "--base" in arguments else "org/base", "dtype": "auto", **options}


def test_what_cannot_be_exported_says_what_to_do(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    run = write_run(tmp_path / "run", tiny_model_dir)
    for arguments, says in [
        ([run, run], "exists already: name a new directory"),
        ([tmp_path / "run" / "logs", tmp_path / "new"], "there is no"),
        ([tiny_model_dir, tmp_path / "new", "--merge"], "no adapter to merge: leave out --merge"),
        ([run, tmp_path / "new", "--merge", "--base", tmp_path / "nowhere"], "Give the model it was trained on"),
    ]:
        assert main(["export", *map(str, arguments)]) == 2
        assert says in capsys.readouterr().err
        assert not (tmp_path / "new").exists()


def test_adapters_are_named_as_in_ms_swift_and_args_json_names_their_base(tiny_model_dir: Path, tmp_path: Path):
    run, outputs = write_run(tmp_path / "run", tiny_model_dir), [tmp_path / "expected", tmp_path / "merged"]
    assert main(["export", str(run), str(outputs[0]), "--merge"]) == 0
    # As ms-swift leaves it: the config names a cache of another machine.
    adapter = run / "final"
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/cache/model"}))
    (adapter / "args.json").write_text(json.dumps({"model": str(tiny_model_dir), "tuner_type": "lora"}))
    assert main(["export", "--adapters", str(adapter), str(outputs[1]), "--merge"]) == 0
    expected, merged = ((output / "model.safetensors").read_bytes() for output in outputs)
    assert merged == expected


def test_what_cannot_be_written_is_one_line(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "file").write_text("")
    assert main(["export", str(tiny_model_dir), str(tmp_path / "file" / "new")]) == 1
    assert "file/new cannot be written: " in capsys.readouterr().err
    assert main(["eval", str(tiny_model_dir), "--sets", "gsm8k", "--output", str(tmp_path / "file" / "new")]) == 1
    assert capsys.readouterr().err.endswith("--output DIR names another place\n")
