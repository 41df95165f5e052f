"""torchvision where its own library does not load, by a package that needs the operators as torchvision does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

STUB = """
import torch

@torch.library.register_fake("torchvision::nms")
def meta(dets, scores, iou_threshold):
    return dets
"""
CODE = """
import importlib.util, sys
from rlflow.torchvision_operators import install
install()
install()
assert importlib.util.find_spec("torchvision") is not None and "torch" not in sys.modules
import torchvision
assert torchvision.__spec__.name == "torchvision"
"""


HOOK = f"""
import site
site.addsitedir({str(Path(__file__).parent.parent / "requirements")!r})
import torchvision
"""
"""What Python does with the ``.pth`` file of rlflow's installation."""


@pytest.mark.slow
@pytest.mark.parametrize("code", [CODE, HOOK, "import torchvision"])
def test_its_import_needs_the_operators_that_are_defined_before_it(tmp_path: Path, code: str):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(STUB)
    finished = run(code, tmp_path)
    assert (finished.returncode == 0) is (code in (CODE, HOOK)), finished.stderr
    if finished.returncode:
        assert "operator torchvision::nms does not exist" in finished.stderr


def run(code: str, site: Path) -> subprocess.CompletedProcess[str]:
    added = f"import sys; sys.path.insert(0, {str(site)!r})\n"
    # Without the site's own hook.
    isolated = "sys.meta_path = [finder for finder in sys.meta_path if 'torchvision' not in type(finder).__module__]\n"
    command = [sys.executable, "-c", added + isolated + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)
