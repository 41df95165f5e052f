"""The child processes of the reward server: what they see, what they cost, and that they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlflow.actors.reward_process import ECHO_BYTES, child_environment
from rlflow.actors.reward_server import RewardServer
from rlflow.recipe import RewardBlock
from rlflow.rewards import RewardError
from rlflow.tracking.logs import last_words
from tests.actors.reward_servers import batch, is_alive, wait_until_dead


@pytest.mark.slow
@pytest.mark.parametrize("children", [1, 2])
def test_after_one_endless_call_more_than_there_are_children_the_next_one_scores(serve: Any, children: int) -> None:
    server = serve("length", children=children, timeout_s=0.5)
    for _ in range(children + 1):
        assert server.score(*batch([["hang"]])).failed["length"].tolist() == [True]
    assert server.score(*batch([["good"]])).rewards["length"].tolist() == [4.0]


@pytest.mark.slow
def test_a_function_that_always_hangs_costs_a_bounded_time(
    serve: Any, plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two calls of 0.3 s + 1 s may be wasted: 9 calls of 0.3 s at the very most, out of 10 groups and 40 rows."""
    monkeypatch.setattr("rlflow.actors.reward_server.WASTED_CALLS", 2)
    note = tmp_path / "calls"
    block = RewardBlock(plugin=f"{plugin}:hangs_always", timeout_s=0.3, args={"note": str(note)})
    scores = serve(block, "length").score(*batch([["a"] * 4] * 10))
    assert scores.failed["hangs_always"].all()
    assert np.isnan(scores.rewards["hangs_always"]).all()
    assert scores.rewards["length"].tolist() == [1.0] * 40
    sentences = [
        error for error in map(str, scores.errors) if "was not called: its failures had already taken" in error
    ]
    assert len(sentences) == 1 and "hangs_always: it was not called" in scores.causes[39]
    assert note.stat().st_size <= 9


@pytest.mark.parametrize("how", ["", "in a session of its own", "by a child that is gone"])
def test_what_a_function_started_dies_with_it(serve: Any, plugin: Path, tmp_path: Path, how: str) -> None:
    note = tmp_path / "pid"
    plugin.write_text(
        "import os, subprocess\n"
        "def starts(completions, how, **columns):\n"
        "    child = os.fork() if how[0] == 'by a child that is gone' else 0\n"
        "    if child:\n"
        "        os.waitpid(child, 0)\n"
        "    else:\n"
        "        process = subprocess.Popen(['sleep', '600'], start_new_session=how[0] != '')\n"
        f"        open({str(note)!r}, 'w').write(str(process.pid))\n"
        "    os._exit(3)\n"
    )
    assert serve("starts").score(*batch([["a"]], how=[how])).failed["starts"].all()
    wait_until_dead([int(note.read_text())])


def test_what_a_function_left_behind_ends_with_the_server(serve: Any, plugin: Path) -> None:
    plugin.write_text(
        "import subprocess\n"
        "def starts(completions, **columns):\n"
        "    return [float(subprocess.Popen(['sleep', '600'], start_new_session=True).pid)]\n"
    )
    server = serve("starts", timeout_s=60)
    pid = int(server.score(*batch([["a"]])).rewards["starts"][0])
    assert is_alive(pid)
    server.close()
    wait_until_dead([pid])


def test_shared_memory_is_limited_too(plugin: Path) -> None:
    plugin.write_text(
        "import mmap, time\n"
        "def fills(completions, **columns):\n"
        "    if completions != ['small']:\n"
        "        memory = mmap.mmap(-1, 96 << 20)\n"
        "        for page in range(0, 96 << 20, 4096):\n"
        "            memory[page] = 1\n"
        "        time.sleep(600)\n"
        "    return [1.0]\n"
    )
    server = RewardServer([RewardBlock(plugin=f"{plugin}:fills", timeout_s=120)], 1, memory_gib=1 / 16)
    try:
        server.ready()
        scores = server.score(*batch([["large"], ["small"]]))
        assert scores.failed["fills"].tolist() == [True, False]
        assert "it took 0.0" in str(scores.errors[0]) and "GiB of shared memory, more than" in str(scores.errors[0])
    finally:
        server.close()


def test_children_end_with_the_server_even_when_it_is_killed(plugin: Path) -> None:
    program = (
        "import sys, time\n"
        "from rlflow.actors.reward_server import RewardServer\n"
        "from rlflow.recipe import RewardBlock\n"
        "server = RewardServer([RewardBlock(plugin=sys.argv[1])], 2)\n"
        "server.ready()\n"
        "print(*server.ping(), flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", program, f"{plugin}:length"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        children = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(children) == 2
        assert all(is_alive(pid) for pid in children)
        parent.kill()
    wait_until_dead(children)


@pytest.mark.slow
def test_what_a_function_prints_is_in_the_servers_log_as_far_as_that_goes(plugin: Path, tmp_path: Path) -> None:
    plugin.write_text(
        "def talks(completions, **columns):\n"
        "    print('scores', completions)\n"
        "    for number in range(40_000 if completions == ['b'] else 0):\n"
        "        print('and on and on and on and on and on')\n"
        "    return [1.0]\n"
    )
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from rlflow.actors.reward_server import RewardServer\n"
        "from rlflow.recipe import RewardBlock\n"
        "from rlflow.tracking.logs import send_output_to\n"
        "from tests.actors.reward_servers import batch\n"
        "send_output_to(Path(sys.argv[2]), 'rewards[0]', [])\n"
        "server = RewardServer([RewardBlock(plugin=sys.argv[1])], 1)\n"
        "for text in 'abc':\n"
        "    server.score(*batch([[text]]))\n"
        "server.close()\n"
    )
    path = tmp_path / "rewards-0.log"
    command = [sys.executable, "-c", program, f"{plugin}:talks", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    last_words(path, wait_s=20)
    lines = path.read_text().splitlines()
    assert lines[1:3] == ["scores ['a']", "scores ['b']"] and "is left out from here on" in lines[-2]
    assert ECHO_BYTES <= path.stat().st_size <= ECHO_BYTES + 200_000


def test_an_idle_child_that_dies_is_replaced(serve: Any) -> None:
    server = serve("length")
    first = server.ping()[0]
    os.kill(first, signal.SIGKILL)
    wait_until_dead([first])
    assert server.score(*batch([["a"]])).rewards["length"].tolist() == [1.0]
    assert server.ping()[0] != first


def test_close_kills_the_children_and_may_be_called_twice(serve: Any) -> None:
    server = serve("length", children=2)
    children = server.ping()
    server.close()
    server.close()
    assert not any(is_alive(pid) for pid in children)
    with pytest.raises(RewardError, match="closed"):
        server.score(*batch([["a"]]))


def test_functions_see_what_they_may_need_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_ACCESS_KEY_ID", "MY_SETTING", "CUDA_PASSWORD", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.setenv("HTTPS_PROXY", "http://user:hunter2@proxy:80")
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:80")
    monkeypatch.setenv("HF_HOME", "/cache")
    monkeypatch.setenv("PYTHONPATH", "/mine")
    kept = child_environment(os.environ)
    assert not [name for name, value in kept.items() if "hunter2" in value]
    assert (kept["HTTP_PROXY"], kept["HF_HOME"], kept["OMP_NUM_THREADS"]) == ("http://proxy:80", "/cache", "1")
    assert kept["PATH"] == os.environ["PATH"]
    assert kept["PYTHONPATH"].split(os.pathsep)[1:] == ["/mine"]


def test_a_function_gets_the_variables_that_the_recipe_names_and_its_errors_do_not_tell_them(
    plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin.write_text(
        "import os\n"
        "def score(completions, **columns):\n"
        "    assert sorted(name for name in os.environ if name.startswith('MY_')) == ['MY_KEY', 'MY_SETTING']\n"
        "    raise RuntimeError('refused:\\n\\x1b[31m ' + os.environ['MY_KEY'] + ' ' + os.environ['MY_SETTING'])\n"
    )
    for name, value in {"MY_KEY": "hunter2-a", "MY_SETTING": "hunter2-b", "MY_OTHER": "hunter2-c"}.items():
        monkeypatch.setenv(name, value)
    server = RewardServer([RewardBlock(plugin=f"{plugin}:score")], 1, environment=["MY_KEY", "MY_SETTING"])
    try:
        server.ready()
        (sentence,) = map(str, server.score(*batch([["a"]])).errors)
        assert r"raised RuntimeError: refused: \x1b[31m *** ***" in sentence
    finally:
        server.close()


def test_a_variable_that_is_not_set_is_an_error_before_training(plugin: Path) -> None:
    server = RewardServer([RewardBlock(plugin=f"{plugin}:length")], 1, environment=["NO_SUCH_VARIABLE"])
    try:
        with pytest.raises(RewardError, match="names NO_SUCH_VARIABLE, which this reward server has not"):
            server.ready()
    finally:
        server.close()


def test_a_secret_of_the_arguments_is_in_no_error_of_loading_or_of_a_death(plugin: Path) -> None:
    for text, message in (
        ("class Judge:\n    def __init__(self, api_key):\n        raise RuntimeError(f'no {api_key}')\n", r"no \*\*\*"),
        (
            "import os\nclass Judge:\n    def __init__(self, api_key):\n        print(api_key, flush=True)\n"
            "        os._exit(3)\n",
            r"last words: \*\*\*",
        ),
    ):
        plugin.write_text(text)
        server = RewardServer([RewardBlock(plugin=f"{plugin}:Judge", args={"api_key": "hunter2"})], 1)
        try:
            with pytest.raises(RewardError, match=message):
                server.ready()
        finally:
            server.close()


BOMBS = [
    "9**9**9",
    r"\boxed{9^{9^{9}}}",
    "#### 9^9^9^9",
    "The answer is $(10^8)!$",
    r"\boxed{" + "(" * 3000 + "1" + ")" * 3000 + "}",
    r"\boxed{\sum_{k=1}^{10^9} k^k}",
]


def peak_memory(pid: int) -> int:
    """Bytes the process has ever had in memory."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def cpu_seconds(pid: int) -> float:
    """What the process has used of a processor, its start included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb[:20])
def test_a_verifier_bomb_is_no_right_answer_and_costs_little(serve: Any, bomb: str) -> None:
    """The child gives up by itself, long before its deadline: it is not killed."""
    server = serve(RewardBlock(name="math_accuracy", timeout_s=120, args={"timeout_s": 1}))
    server.self_check()
    child, before = server.ping()[0], cpu_seconds(server.ping()[0])
    scores = server.score(*batch([[bomb, r"\boxed{5}"]], solution=["5"]))
    assert server.ping() == [child]
    assert cpu_seconds(child) - before < 10
    assert scores.rewards["math_accuracy"][0] != 1.0
    assert scores.rewards["math_accuracy"][1] == 1.0
    assert peak_memory(child) < 1e9


def test_a_child_starts_without_the_libraries_that_its_rewards_do_not_need() -> None:
    program = (
        "import sys, rlflow.actors.reward_child\n"
        "print(sorted({'torch', 'numpy', 'sympy', 'pydantic', 'ray', 'rlflow.recipe'} & set(sys.modules)))\n"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert said.stdout.strip() == "[]"
