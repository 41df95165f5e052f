"""Who may reach a Ray that rlflow starts, and what becomes of a cluster that does not answer."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rlflow.cli.main import main
from rlflow.driver.errors import RunError
from rlflow.machine import named_cluster
from rlflow.ray_cluster import few_services, require_answer, why_not

RECIPE = """\
algorithm: {name: sft}
model: {architecture: {model_type: llama}, characters: "0123456789+="}
data: {train: {generator: arithmetic}}
run: {steps: 1}
"""


@pytest.fixture
def silent_port():
    """A port that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize(
    ("address", "cluster"), [("", None), ("local", None), ("auto", "auto"), ("ray://a:1", "ray://a:1")]
)
def test_a_cluster_is_what_ray_address_names_unless_it_names_this_machine(monkeypatch, address, cluster):
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert named_cluster() == cluster


@pytest.mark.parametrize("address", ["head", "head:", "head:port", ":6379", "head:99999", "http://head"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(RunError, match=f"RAY_ADDRESS is {address}, which is not HOST:PORT"):
        require_answer(address)


@pytest.mark.parametrize("prefix", ["", "ray://"])
def test_a_cluster_that_is_gone_is_named_with_what_to_do(closed_port, prefix):
    with pytest.raises(RunError) as raised:
        require_answer(f"{prefix}127.0.0.1:{closed_port}")
    assert f"RAY_ADDRESS is {prefix}127.0.0.1:{closed_port}, and no Ray cluster answers there" in str(raised.value)
    assert "unset it to run on this machine" in str(raised.value)


def test_a_cluster_of_another_version_is_one_line_that_names_both_and_the_remedy():
    from ray._private.utils import check_version_info

    with pytest.raises(RuntimeError) as raised:
        check_version_info({"ray_version": "2.40.1", "python_version": "3.9.1"}, "10.0.0.1")
    said = why_not(raised.value)
    assert "Ray: 2.40.1 Python: 3.9.1 This process" in said and "\n" not in said
    assert said.endswith("install the same Ray and Python on all machines, or have it run there: rlflow submit")


def test_a_head_that_takes_connections_and_says_nothing_is_waited_for_no_longer_than_the_deadline(silent_port):
    with pytest.raises(RunError, match="is no Ray head, or one that hangs"):
        require_answer(f"127.0.0.1:{silent_port}", timeout_s=0.2)


@pytest.fixture
def head():
    """Starts what speaks as a Ray head does and lets in whoever has the token; gives its port."""
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    class Head(grpc.GenericRpcHandler):
        def service(self, handler_call_details):
            allowed = ("authorization", "Bearer right") in handler_call_details.invocation_metadata

            def answer(request, context):
                return b"" if allowed else context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")

            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.server(ThreadPoolExecutor(1), handlers=[Head()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(None)


def test_a_head_lets_in_who_has_its_token_in_the_environment_or_in_a_file(head, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    with pytest.raises(RunError, match="that cluster wants another token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"):
        require_answer(f"127.0.0.1:{head}")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("right\n")
    require_answer(f"127.0.0.1:{head}")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(RunError, match="wants another token"):
        require_answer(f"127.0.0.1:{head}")
    require_answer("auto")


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_dead_cluster_is_one_line_before_anything_starts(command, closed_port, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed_port}")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    threads = threading.active_count()
    assert main([command, str(tmp_path / "recipe.yaml"), f"run.output_dir={tmp_path}/out"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"RAY_ADDRESS is 127.0.0.1:{closed_port}, and no Ray cluster answers there")
    assert threading.active_count() <= threads and not (tmp_path / "out").exists()


STARTED = """
import os, sys
from pathlib import Path
import grpc, psutil, ray
from rlflow.placement import start_ray
from rlflow.recipe import load_recipe

assert start_ray(load_recipe(sys.argv[1]))
@ray.remote
class Actor:
    def pid(self): return os.getpid()
actor = Actor.remote()
ray.get(actor.pid.remote())
processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
listening = {c.laddr.ip for p in processes for c in p.net_connections() if c.status == "LISTEN"}
print("listening", *sorted(listening))
print("running", *sorted({Path(a).name for p in processes[1:] for a in p.cmdline() if a.endswith(".py")}))
channel = grpc.insecure_channel(ray.get_runtime_context().gcs_address)
call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
for metadata in ([], [("authorization", "Bearer " + os.environ["RAY_AUTH_TOKEN"])]):
    try:
        call(b"", metadata=metadata, timeout=20)
        print("answered")
    except grpc.RpcError as error:
        print(error.code().name)
ray.shutdown()
"""


def test_what_ray_starts_is_its_own_business_again_afterwards(monkeypatch):
    from ray._private import parameter

    def switches() -> list[object]:
        return [parameter.RayParams, dict(os.environ)]

    before = switches()
    with pytest.raises(KeyError), few_services():
        assert parameter.RayParams().no_monitor and not parameter.RayParams().include_log_monitor
        assert not any(one == other for one, other in zip(before, switches(), strict=True))
        raise KeyError
    assert switches() == before
    monkeypatch.setattr(parameter, "RayParams", lambda: None)
    of_another_version = switches()
    with few_services():
        assert switches() == of_another_version


@pytest.mark.ray
def test_a_ray_that_is_started_here_listens_on_loopback_alone_and_wants_a_token_of_its_own(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", STARTED, str(tmp_path / "recipe.yaml")]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert finished.returncode == 0, finished.stderr
    said = [line for line in finished.stdout.splitlines() if line]
    assert set(said[0].split()[1:]) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"} and len(said[0].split()) > 1
    running = said[1].split()
    assert running[0] == "running" and not {"monitor.py", "log_monitor.py"} & {*running}
    assert said[2:] == ["UNAUTHENTICATED", "answered"]
    assert not (tmp_path / ".ray" / "auth_token").exists()
