"""What is installed: one package, with actors/ and rewards/ in it under the names by which they are imported."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_wheel_holds_every_module_once_and_nothing_beside_rlflow(tmp_path: Path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    files = Counter(name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name)
    modules = {
        f"rlflow/{path.relative_to(ROOT)}" for top in ("actors", "rewards") for path in (ROOT / top).rglob("*.py")
    }
    inside = (
        path for path in (ROOT / "rlflow").rglob("*.py") if path.relative_to(ROOT).parts[1] not in ("actors", "rewards")
    )
    modules |= {str(path.relative_to(ROOT)) for path in inside}
    assert {name for name in files if name.endswith(".py")} == modules
    assert set(files.values()) == {1} and {name.partition("/")[0] for name in files} == {"rlflow"}
