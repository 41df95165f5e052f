"""The reward server with real child processes: every way in which a reward function can misbehave."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlflow.actors.reward_process import child_environment
from rlflow.actors.reward_server import MAX_ERRORS, RewardServer
from rlflow.recipe import RewardBlock
from rlflow.rewards import RewardError
from rlflow.types import Prompt, RolloutBatch

PLUGIN = """
import asyncio, math, os, signal, subprocess, sys, time

def _score(text):
    if text == "raise": raise RuntimeError("boom")
    if text == "nan": return math.nan
    if text == "inf": return math.inf
    if text == "none": return None
    if text == "str": return "1.0"
    if text == "huge": return 10**400
    if text == "too large for float32": return 1e300
    if text == "bool": return True
    if text == "hang":
        while True: pass
    if text == "exit": os._exit(3)
    if text == "sys.exit": sys.exit("bye")
    if text == "last words":
        print("the disk is on fire", flush=True)
        os._exit(4)
    if text == "print": print("x" * 100_000_000)
    if text == "allocate": return float(len(bytearray(2 * 2**30)))
    if text == "segfault": os.kill(os.getpid(), signal.SIGSEGV)
    if text == "close everything": os.closerange(3, 100)
    if text == "garbage":
        for descriptor in range(3, 100):
            try: os.write(descriptor, b"\\xff" * 64)
            except OSError: pass
    if text == "fork and hang":
        if os.fork() == 0: time.sleep(600)
        time.sleep(600)
    if text == "fork and return": os.fork()
    if text.startswith("daemon"):
        pid = subprocess.Popen(["sleep", "600"]).pid
        open(text.split()[1], "w").write(str(pid))
        time.sleep(600)
    return float(len(text))

def length(completions, **columns): return [_score(text) for text in completions]
def drops_short_ones(completions, **columns): return [_score(text) for text in completions if len(text) > 2]
def not_a_list(completions, **columns): return 1.0
async def later(completions, **columns):
    async def one(text):
        await asyncio.sleep(0.2)
        return _score(text)
    return await asyncio.gather(*map(one, completions))
def hangs_always(completions, note, **columns):
    open(note, "a").write(".")
    while True: pass
def rows_of_call(completions, note=None, **columns):
    return [float(f"{len(completions)}.{len(set(note))}") for _ in completions]
def numpy_scores(completions, **columns):
    import numpy as np
    return np.array([_score(text) for text in completions], np.float32)
def arguments(prompts, completions, completion_ids, level):
    return [100 * level[i] + 10 * len(prompts[i]) + sum(completion_ids[i]) for i in range(len(completions))]
def secrets(completions, **columns):
    return [float(any("hunter2" in value for value in os.environ.values())) for _ in completions]
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "misbehaviour.py"
    path.write_text(PLUGIN)
    return path


@pytest.fixture
def serve(plugin: Path) -> Iterator[Any]:
    servers: list[RewardServer] = []

    def start(*functions: str | RewardBlock, children: int = 1, timeout_s: float = 1.0) -> RewardServer:
        blocks = [
            function
            if isinstance(function, RewardBlock)
            else RewardBlock(plugin=f"{plugin}:{function}", timeout_s=timeout_s)
            for function in functions
        ]
        servers.append(RewardServer(blocks, children))
        servers[-1].ready()
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def batch(groups: list[list[str]], **columns: Any) -> tuple[RolloutBatch, tuple[Prompt, ...]]:
    """Rollout r has the token ids r, r, r."""
    texts = tuple(text for group in groups for text in group)
    token_ids = np.repeat(np.arange(len(texts), dtype=np.int32), 3)
    prompts = tuple(
        Prompt(
            id=f"set:{index}",
            token_ids=np.zeros(2, np.int32),
            messages=[{"role": "user", "content": "?"}],
            columns={name: values[index] for name, values in columns.items()},
        )
        for index in range(len(groups))
    )
    rollouts = RolloutBatch(
        token_ids=token_ids,
        logprobs=np.zeros(len(token_ids), np.float32),
        offsets=np.arange(0, len(token_ids) + 1, 3, dtype=np.int64),
        finish_reasons=("stop",) * len(texts),
        texts=texts,
        policy_version=0,
        seconds=0.0,
    )
    return rollouts, prompts


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until_dead(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"{pids} live on"
        time.sleep(0.02)


def test_scores_come_back_in_row_order_from_several_children(serve: Any) -> None:
    server = serve("length", "numpy_scores", "later", children=2)
    scores = server.score(*batch([["a", "bb"], ["ccc", "dddd"], ["eeeee", "ffffff"]]))
    for label in ("length", "numpy_scores", "later"):
        assert scores.rewards[label].tolist() == [1, 2, 3, 4, 5, 6]
        assert scores.rewards[label].dtype == np.float32
        assert not scores.failed[label].any()
    assert scores.errors == ()


def test_a_function_receives_messages_token_ids_and_columns_of_its_rows(serve: Any) -> None:
    scores = serve("arguments").score(*batch([["a", "b"], ["c", "d"]], level=[1, 2]))
    assert scores.rewards["arguments"].tolist() == [110.0, 113.0, 216.0, 219.0]


def test_a_call_holds_as_many_prompts_as_the_recipe_says(serve: Any, plugin: Path) -> None:
    block = RewardBlock(plugin=f"{plugin}:rows_of_call", prompts_per_call=2)
    groups, notes = [["a", "b"], ["c", "d"], ["e", "f"]], ["x", "y", "z"]
    scores = serve(block, children=2).score(*batch(groups, note=notes))
    assert scores.rewards["rows_of_call"].tolist() == pytest.approx([4.2, 4.2, 4.2, 4.2, 2.1, 2.1])
    block = RewardBlock(plugin=f"{plugin}:length", prompts_per_call=2)
    scores = serve(block).score(*batch([["a", "bb"], ["raise", "dddd"], ["eeeee", "ffffff"]]))
    assert scores.failed["length"].tolist() == [False, False, True, False, False, False]
    assert scores.rewards["length"][[0, 1, 3, 4, 5]].tolist() == [1, 2, 4, 5, 6]


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("raise", "raised RuntimeError: boom (misbehaviour.py:5)"),
        ("nan", "returned nan"),
        ("inf", "returned inf"),
        ("str", "returned a str"),
        ("huge", "returned a int that is no float"),
        ("too large for float32", "returned 1e+300"),
        ("hang", "gave no answer within 1 s"),
        ("exit", "ended its process (exit code 3)"),
        ("sys.exit", "raised SystemExit: bye"),
        ("last words", "last words: the disk is on fire"),
        ("segfault", "SIGSEGV"),
        ("allocate", "raised MemoryError"),
        ("fork and hang", "gave no answer within 1 s"),
        ("close everything", "ended its process"),
        ("garbage", "ended its process"),
    ],
)
def test_one_bad_row_is_masked_and_named_and_its_group_keeps_its_scores(serve: Any, text: str, cause: str) -> None:
    server = serve("length")
    scores = server.score(*batch([["a", text, "ccc"], ["a", "bb", "ccc"]]))
    np.testing.assert_array_equal(scores.rewards["length"], np.array([1, math.nan, 3, 1, 2, 3], np.float32))
    assert scores.failed["length"].tolist() == [False, True, False, False, False, False]
    assert len(scores.errors) == 1
    assert scores.errors[0].startswith("reward 'length', prompt 'set:0', row 1: it ")
    assert cause in scores.errors[0]
    assert server.score(*batch([["a"]])).rewards["length"].tolist() == [1.0]


@pytest.mark.parametrize("text", ["bool", "print", "fork and return"])
def test_odd_but_harmless_rows_are_scored(serve: Any, text: str) -> None:
    server = serve("length", timeout_s=10)
    scores = server.score(*batch([["a", text]]))
    assert scores.rewards["length"].tolist() == [1.0, 1.0 if text == "bool" else len(text)]
    assert server.score(*batch([["a", "bb"]])).rewards["length"].tolist() == [1.0, 2.0]
    assert scores.errors == ()


def test_an_abstention_is_no_failure(serve: Any) -> None:
    scores = serve("length").score(*batch([["none", "a"]]))
    assert np.isnan(scores.rewards["length"]).tolist() == [True, False]
    assert not scores.failed["length"].any()


def test_too_few_scores_are_traced_to_the_rows_that_lack_one(serve: Any) -> None:
    scores = serve("drops_short_ones").score(*batch([["abc", "a", "abcd"]]))
    np.testing.assert_array_equal(scores.rewards["drops_short_ones"], np.array([3, math.nan, 4], np.float32))
    assert scores.failed["drops_short_ones"].tolist() == [False, True, False]
    assert "returned 0 scores for 1 completions" in scores.errors[0]


def test_a_bare_number_is_no_list_of_scores(serve: Any) -> None:
    scores = serve("not_a_list").score(*batch([["a", "b"]]))
    assert scores.failed["not_a_list"].all()
    assert "returned a float, not a list of numbers" in scores.errors[0]


def test_a_failing_function_leaves_the_others_alone(serve: Any) -> None:
    scores = serve("length", "not_a_list").score(*batch([["a", "bb"]]))
    assert scores.rewards["length"].tolist() == [1.0, 2.0]
    assert not scores.failed["length"].any()


@pytest.mark.parametrize("children", [1, 2])
def test_after_one_endless_call_more_than_there_are_children_the_next_one_scores(serve: Any, children: int) -> None:
    server = serve("length", children=children, timeout_s=0.5)
    started = time.monotonic()
    for _ in range(children + 1):
        assert server.score(*batch([["hang"]])).failed["length"].tolist() == [True]
    assert time.monotonic() - started < (children + 1) * (0.5 + 5)
    assert server.score(*batch([["good"]])).rewards["length"].tolist() == [4.0]


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
    assert len(scores.errors) == MAX_ERRORS
    assert "was not called: its failures had already taken" in scores.errors[0]
    assert note.stat().st_size <= 9


def test_what_a_function_started_dies_with_it(serve: Any, tmp_path: Path) -> None:
    server = serve("length")
    note = tmp_path / "pid"
    assert server.score(*batch([[f"daemon {note}"]])).failed["length"].all()
    assert not is_alive(int(note.read_text()))


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


def test_functions_see_no_secrets(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_ACCESS_KEY_ID", "MY_SECRET_THING", "DB_PASSWORD"):
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.setenv("HTTPS_PROXY", "http://user:hunter2@proxy:80")
    assert serve("secrets").score(*batch([["a"]])).rewards["secrets"].tolist() == [0.0]


def test_an_environment_without_secrets_keeps_the_rest() -> None:
    kept = child_environment(
        {"PATH": "/bin", "HF_TOKEN": "x", "hf_home": "/h", "PYTHONPATH": "/a", "URL": "http://h/p"}
    )
    assert {name: kept[name] for name in kept if name != "PYTHONPATH"} == {
        "PATH": "/bin",
        "hf_home": "/h",
        "URL": "http://h/p",
        "OMP_NUM_THREADS": "1",
    }
    assert kept["PYTHONPATH"].split(os.pathsep)[1:] == ["/a"]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (RewardBlock(name="math_acuracy"), "did you mean 'math_accuracy'"),
        (RewardBlock(plugin="nowhere.py:f"), "no such file"),
        (RewardBlock(name="format", args={"patern": "x"}), "did you mean 'pattern'"),
    ],
)
def test_a_reward_that_cannot_be_loaded_is_an_error_before_training(block: RewardBlock, message: str) -> None:
    server = RewardServer([block], 1)
    try:
        with pytest.raises(RewardError, match=message):
            server.ready()
    finally:
        server.close()


def test_two_rewards_of_one_name_are_refused() -> None:
    with pytest.raises(RewardError, match="two rewards are called format"):
        RewardServer([RewardBlock(name="format"), RewardBlock(name="format", args={"pattern": "x"})], 1)


def test_the_self_check_passes_on_this_machine(serve: Any) -> None:
    serve(RewardBlock(name="math_accuracy"), "not_a_list").self_check()


def test_the_self_check_stops_a_run_whose_verifier_is_broken(serve: Any) -> None:
    server = serve(RewardBlock(name="math_accuracy", args={"timeout_s": "two"}))
    with pytest.raises(RewardError, match=r"math_accuracy gave a right and a wrong answer.*TypeError"):
        server.self_check()


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


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb[:20])
def test_a_verifier_bomb_is_no_right_answer_and_costs_little(serve: Any, bomb: str) -> None:
    server = serve(RewardBlock(name="math_accuracy", timeout_s=3))
    server.self_check()
    started = time.monotonic()
    scores = server.score(*batch([[bomb, r"\boxed{5}"]], solution=["5"]))
    assert time.monotonic() - started < 6
    assert scores.rewards["math_accuracy"][0] != 1.0
    assert scores.rewards["math_accuracy"][1] == 1.0
    assert peak_memory(server.ping()[0]) < 1e9


def test_a_child_starts_without_the_libraries_that_its_rewards_do_not_need() -> None:
    program = (
        "import sys, rlflow.actors.reward_child\n"
        "print(sorted({'torch', 'numpy', 'sympy', 'pydantic', 'ray', 'rlflow.recipe'} & set(sys.modules)))\n"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert said.stdout.strip() == "[]"
