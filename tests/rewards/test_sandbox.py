"""Programs that a policy wrote do no harm, and none of them passes by leaving early."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlflow.rewards import RewardError, sandbox
from rlflow.rewards.python_tests import PythonTests, program_of
from rlflow.rewards.sandbox import Limits, require_isolation, run_python

HEAD = 'import math\n\ndef double(x):\n    """Twice x."""\n'
CHECK = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(0.5) == 1\n"


@pytest.fixture
def isolated() -> None:
    try:
        require_isolation()
    except RewardError as error:
        pytest.skip(str(error))


def test_a_program_passes_when_it_comes_to_its_end(isolated: None):
    assert run_python("import math, typing, re\nassert math.sqrt(4) == 2", Limits()).passed
    outcome = run_python("assert 1 == 2, 'one is not two'", Limits())
    assert (outcome.passed, outcome.reason) == (False, "AssertionError: one is not two")


@pytest.mark.parametrize(
    "leaves", ["import os; os._exit(0)", "raise SystemExit(0)", "import os; os.kill(os.getpid(), 9)"], ids=str
)
def test_a_program_that_leaves_early_does_not_pass(isolated: None, leaves: str):
    assert not run_python(f"{leaves}\nassert False", Limits()).passed


def test_nothing_outside_can_be_reached(isolated: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    canary = tmp_path / "canary"
    canary.write_text("here")
    os.chmod(canary, 0o666)
    program = f"""
import os, socket
assert "WANDB_API_KEY" not in os.environ
for path in ({str(canary)!r}, {str(Path.home() / ".bashrc")!r}, {__file__!r}, "/etc/passwd", "/proc/1/environ"):
    assert not os.path.exists(path), path
assert os.getpid() == 1 and os.getuid() == 65534
try:
    os.kill(-1, 9)
    raise AssertionError("there is another process")
except ProcessLookupError:
    pass
for path in ("/usr/new", "/new", "/dev/new"):
    try:
        open(path, "w")
        raise AssertionError(path)
    except OSError:
        pass
try:
    socket.create_connection(("127.0.0.1", 1), timeout=2)
    raise AssertionError("connected")
except OSError as error:
    assert "unreachable" in str(error), error
"""
    assert run_python(program, Limits()) == sandbox.Outcome(True, "")
    assert canary.read_text() == "here"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("x = bytearray(3 << 30)", "MemoryError"),
        ("open('/tmp/x', 'wb').write(bytes(200 << 20))", "File too large"),
        ("import os\nwhile True:\n    if os.fork() == 0:\n        import time\n        time.sleep(60)", "unavailable"),
        ("while True: pass", "took more than 0.5 s"),
        ("import signal\nsignal.signal(15, signal.SIG_IGN)\nwhile True: pass", "took more than 0.5 s"),
        ("import os\nwhile True: os.write(2, bytes(100000))", "took more than 0.5 s"),
    ],
    ids=["memory", "disk", "processes", "time", "signals", "output"],
)
def test_what_a_program_may_use_is_limited(isolated: None, program: str, says: str):
    outcome = run_python(program, Limits(timeout_s=0.5))
    assert not outcome.passed
    assert says in outcome.reason


def command_lines() -> Iterator[bytes]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield path.read_bytes()


def test_what_a_program_leaves_behind_ends_with_it(isolated: None):
    mark = f"left-behind-{os.getpid()}"
    program = f"import os\nif os.fork() == 0:\n    os.setsid()\n    os.execv('/bin/sleep', ['{mark}', '60'])"
    assert run_python(program, Limits()).passed
    time.sleep(0.1)
    assert mark.encode() not in b"".join(command_lines())


def test_without_isolation_nothing_is_run_unless_that_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    canary = tmp_path / "canary"
    refuse = f"import sys; print('unshare: no', file=sys.stderr); sys.exit({sandbox.NOT_ISOLATED})"
    monkeypatch.setattr(sandbox, "_command", lambda root, limits: [sys.executable, "-c", refuse])
    with pytest.raises(RewardError, match=r"does not isolate .*unshare: no.* set unsafe: true"):
        run_python(f"open({str(canary)!r}, 'w')", Limits())
    assert not canary.exists()
    assert run_python(f"open({str(canary)!r}, 'w')", Limits(), unsafe=True).passed
    assert canary.exists()


@pytest.mark.parametrize(
    ("completion", "passes"),
    [
        ("    return 2 * x\n\ndef other():\n    return undefined(\n", True),
        ("    return 2 * x\nprint(double(1", True),
        ("    return x + 2\n", False),
        ("Here it is:\n```python\ndef double(x):\n    return math.fsum([x, x])\n```\nIt adds.", True),
        ("<think>def double(x): return 0</think>```\ndef double(x):\n    return 2 * x\n```", True),
        ("<think>```python\ndef double(x):\n    return 2 * x\n```", False),
        ("```python\ndef double(x):\n    return 2 * x\n```\nUse it:\n```python\nprint(double(3))\n```", True),
        ("```python\n    return 2 * x\n```", True),
        ("I do not know.", False),
        ("", False),
    ],
)
def test_the_program_of_a_completion_is_found_and_tested(isolated: None, completion: str, passes: bool):
    reward = PythonTests(timeout_s=5)
    assert reward([completion], test=[CHECK], entry_point=["double"], code=[HEAD]) == [float(passes)]


def test_without_tests_there_is_no_verdict(isolated: None):
    assert PythonTests()(["x = 1", "x = 1"], test=[None, "assert x == 1"]) == [None, 1.0]


def test_what_stands_before_the_function_stays_with_a_whole_program():
    program = program_of("```python\ndef double(x):\n    return 2 * x\n```", HEAD, "double")
    assert program.startswith("import math\n") and program.count("def double") == 1
