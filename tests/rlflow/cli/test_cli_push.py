"""`rlflow export --push`: files arrive as they are, at a stand-in for each hub; what a hub refuses is one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import rlflow
from rlflow.cli.main import main
from tests.rlflow.cli.hub_servers import TOKEN, HubServer, HuggingFaceHandler, ModelScopeHandler, serving

CARD = "---\nlicense: apache-2.0\nlibrary_name: transformers\n---\n\n# gsm8k\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A run whose final/ holds a model, small and large files."""
    final = tmp_path / "run" / "final"
    final.mkdir(parents=True)
    (final / "README.md").write_text(CARD)
    (final / "config.json").write_text('{"model_type": "qwen3"}')
    (final / "tokenizer.json").write_bytes(b"{}" + b" " * 100_000)
    save_file({"weight": np.frombuffer(os.urandom(300_000), np.uint8)}, final / "model.safetensors")
    return final.parent


@pytest.fixture
def hugging_face(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serving(HuggingFaceHandler) as hub:
        # What HF_ENDPOINT and its kin set when the library is imported.
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def modelscope(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    # Importing it would settle how much it tells, before rlflow does.
    if find_spec("modelscope_hub") is None:
        pytest.skip("no modelscope_hub")
    with serving(ModelScopeHandler) as hub:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
        monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "modelscope"))
        yield hub


@pytest.fixture(params=["hf", "modelscope"])
def scheme(request: pytest.FixtureRequest) -> str:
    """Of each hub in turn."""
    return request.param


@pytest.fixture
def hub(scheme: str, request: pytest.FixtureRequest) -> HubServer:
    return request.getfixturevalue({"hf": "hugging_face"}.get(scheme, scheme))


def push(*arguments: object) -> int:
    return main(["export", *map(str, arguments)])


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_files_of_a_run_arrive_at_hugging_face(model: Path, hugging_face: HubServer, capsys: pytest.CaptureFixture):
    assert push(model, "--push", "hf:org/gsm8k") == 0
    assert hugging_face.files("org/gsm8k") == contents(model / "final")
    assert not hugging_face.repos["org/gsm8k"].private
    assert capsys.readouterr().out == f"{hugging_face.url}/org/gsm8k\n"


def test_the_files_of_a_run_arrive_at_modelscope(model: Path, modelscope: HubServer, capsys: pytest.CaptureFixture):
    before = contents(model / "final")
    assert push(model, "--push", "modelscope:org/gsm8k") == 0
    assert modelscope.files("org/gsm8k") == before == contents(model / "final")
    assert not modelscope.repos["org/gsm8k"].private
    assert modelscope.repos["org/gsm8k"].license == "Apache-2.0"
    assert capsys.readouterr().out == f"{modelscope.url}/models/org/gsm8k\n"


@pytest.mark.slow
def test_a_second_push_sends_what_changed_and_removes_weights_that_are_gone(hub: HubServer, scheme: str, model: Path):
    target = f"{scheme}:org/gsm8k"
    final = model / "final"
    save_file({"weight": np.frombuffer(os.urandom(1000), np.uint8)}, final / "model-00002-of-00002.safetensors")
    (final / "adapter_config.json").write_text("{}")
    assert push(model, "--push", target) == 0
    hub.files("org/gsm8k")["LICENSE"] = b"of the hub's page"
    sent = list(hub.uploads)
    (final / "model-00002-of-00002.safetensors").unlink()
    (final / "adapter_config.json").unlink()
    (final / "README.md").write_text(CARD + "more\n")
    assert push(model, "--push", target) == 0
    assert hub.files("org/gsm8k") == {**contents(final), "LICENSE": b"of the hub's page"}
    assert hub.uploads == sent


def test_a_copy_is_written_and_pushed_to_a_private_branch(model: Path, tmp_path: Path, hugging_face: HubServer):
    arguments = [model, tmp_path / "copy", "--push", "hf:org/gsm8k", "--private", "--revision", "step-100"]
    assert push(*arguments) == 0
    assert hugging_face.repos["org/gsm8k"].private
    assert hugging_face.files("org/gsm8k") == {}
    assert hugging_face.files("org/gsm8k", "step-100") == contents(tmp_path / "copy") == contents(model / "final")


@pytest.mark.slow
def test_what_shall_be_private_is_not_sent_to_a_public_repository(
    hub: HubServer, scheme: str, model: Path, capsys: pytest.CaptureFixture
):
    target = f"{scheme}:org/gsm8k"
    assert push(model, "--push", target) == 0
    commits = hub.repos["org/gsm8k"].commits
    assert push(model, "--push", target, "--private") == 2
    assert "is there and public: leave out --private" in capsys.readouterr().err
    assert hub.repos["org/gsm8k"].commits == commits
    assert push(model, "--push", target.replace("gsm8k", "secret"), "--private") == 0
    assert hub.repos["org/secret"].private
    assert push(model, "--push", target.replace("gsm8k", "secret"), "--private") == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "status", "code", "says"),
    [
        ("", 401, 2, "refuses the token (401"),
        ("create", 403, 2, "the token may not write to org/gsm8k (403"),
        ("commit", 403, 2, "the token may not write to org/gsm8k (403"),
        ("commit", 404, 2, "has no org/gsm8k for this token (404"),
        ("commit", 422, 2, "does not take org/gsm8k (422)"),
        ("create", 503, 1, "failed at org/gsm8k (503"),
    ],
)
def test_what_a_hub_refuses_is_one_line_with_a_remedy(
    hub: HubServer,
    scheme: str,
    part: str,
    status: int,
    code: int,
    says: str,
    model: Path,
    capsys: pytest.CaptureFixture,
):
    create = "/api/repos/create" if scheme == "hf" else "/api/v1/models"
    hub.status = {create if part == "create" else part: status}
    assert push(model, "--push", f"{scheme}:org/gsm8k") == code
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith(hub.url)]
    assert says in line and f"the stand-in says {status}" in line
    assert "Traceback" not in error and "Request:" not in error and TOKEN not in error


def test_a_wrong_token_is_named_by_its_place_and_never_shown(
    hub: HubServer,
    scheme: str,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    variable = "HF_TOKEN" if scheme == "hf" else "MODELSCOPE_API_TOKEN"
    target = f"{scheme}:org/gsm8k"
    monkeypatch.setenv(variable, "wrong-token")
    assert push(model, "--push", target) == 2
    error = capsys.readouterr().err
    assert "refuses the token (401" in error and f"make one that may write at {hub.url}/" in error
    assert "wrong-token" not in error
    monkeypatch.setenv(variable, "")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert push(model, "--push", target) == 2
    assert f"{hub.url} wants a token: set {variable}" in capsys.readouterr().err
    assert hub.repos == {}


def test_a_hub_that_is_not_there_fails_soon(
    hub: HubServer,
    scheme: str,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    with serving(HuggingFaceHandler) as gone:
        pass
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", gone.url)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", gone.url)
    monkeypatch.setattr("urllib3.util.retry.Retry.sleep", lambda *_: None)
    assert push(model, "--push", f"{scheme}:org/gsm8k") == 1
    assert "Check the network and the address, and push again" in capsys.readouterr().err


def test_a_hub_that_says_nothing_is_not_waited_for(
    model: Path, hugging_face: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr("rlflow.cli.hubs.READ_TIMEOUT_S", 0.2)
    hugging_face.delay_s = 1.0
    assert push(model, "--push", "hf:org/gsm8k") == 1
    assert "timed out" in capsys.readouterr().err


def test_a_push_that_failed_says_how_to_send_the_copy_again(
    model: Path, tmp_path: Path, hugging_face: HubServer, capsys: pytest.CaptureFixture
):
    hugging_face.status = {"/commit/": 403}
    output = tmp_path / "copy"
    assert push(model, output, "--push", "hf:org/gsm8k") == 2
    assert f"`rlflow export {output} --push hf:org/gsm8k` sends the same files again" in capsys.readouterr().err
    hugging_face.status = {}
    assert push(output, "--push", "hf:org/gsm8k") == 0
    assert hugging_face.files("org/gsm8k") == contents(output)


def test_a_refused_token_costs_no_copy(model: Path, tmp_path: Path, hugging_face: HubServer):
    hugging_face.status = {"/api/repos/create": 401}
    assert push(model, tmp_path / "copy", "--push", "hf:org/gsm8k") == 2
    assert not (tmp_path / "copy").exists()


def test_offline_mode_is_named(model: Path, hugging_face: HubServer, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert push(model, "--push", "hf:org/gsm8k") == 2
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err


def test_a_hub_without_xet_storage_says_how_to_do_without(
    model: Path, hugging_face: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    assert push(model, "--push", "hf:org/gsm8k") == 2
    assert f"{hugging_face.url} has no Xet storage: set HF_HUB_DISABLE_XET=1" in capsys.readouterr().err


def test_a_missing_client_says_how_to_get_it(model: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    assert push(model, "--push", "modelscope:org/gsm8k") == 2
    assert "pip install modelscope-hub" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["org/gsm8k", "hf:gsm8k", "s3:org/gsm8k", "hf:org/gsm8k/extra"])
def test_a_target_that_names_no_hub_shows_how_to_write_it(target: str, model: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stopped:
        push(model, "--push", target)
    assert stopped.value.code == 2
    assert "write hf:organisation/name or modelscope:organisation/name" in capsys.readouterr().err


def test_arguments_that_do_not_go_together_are_refused(model: Path, capsys: pytest.CaptureFixture):
    assert push(model) == 2
    assert "name OUTPUT, a new directory, or --push" in capsys.readouterr().err
    assert push(model, model.parent / "new", "--private") == 2
    assert "--private and --revision are of --push" in capsys.readouterr().err
    assert push(model.parent, "--push", "hf:org/gsm8k") == 2
    assert f"name one of the runs in it, {model}" in capsys.readouterr().err


@pytest.mark.slow
def test_the_environment_names_the_hub_and_the_token(model: Path, tmp_path: Path):
    with serving(HuggingFaceHandler) as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-m", "rlflow", "export", str(model), "--push", "hf:org/gsm8k"]
        environment = os.environ | settings | {"HF_HOME": str(tmp_path / "hf")}
        root = Path(rlflow.__file__).parents[1]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (0, f"{hub.url}/org/gsm8k\n"), done.stderr
        assert hub.files("org/gsm8k") == contents(model / "final")
