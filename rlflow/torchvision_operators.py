"""torchvision beside a torch without CUDA: its operators' names are defined where its own library cannot be loaded.

PyPI's only torchvision is built for CUDA. Beside a CPU torch its compiled library does not load, and its import fails
at ``torchvision::nms``, an operator that no image processor calls: all else, resizing included, is made of torch's own
operators. Where the library does load nothing is changed.

``rlflow_torchvision.pth``, which rlflow's installation puts beside it, calls ``install`` in every process of the
environment: vLLM looks at models in a process of its own.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
"""The operators that torchvision registers more for at its import, whether its library is there or not."""
_definitions: list[object] = []
"""A library's definitions last as long as it."""


def install() -> None:
    """Has the operators defined just before torchvision is imported; nothing is imported until then."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds torchvision where Python finds it, and has the operators defined before it is executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute, directories = spec.loader.exec_module, list(spec.submodule_search_locations or ())

        def exec_module(module: ModuleType) -> None:
            _define_missing(directories)
            execute(module)

        spec.loader.exec_module = exec_module
        return spec


def _define_missing(directories: Sequence[str]) -> None:
    """Loads torchvision's library as torchvision does it, and defines ``SCHEMAS`` where it has no such operators."""
    import torch

    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    for directory in directories:
        finder = importlib.machinery.FileFinder(directory, (importlib.machinery.ExtensionFileLoader, suffixes))
        library = finder.find_spec("_C")
        if library is not None and library.origin is not None:
            try:
                torch.ops.load_library(library.origin)
            except OSError:
                continue
    missing = [schema for schema in SCHEMAS if not hasattr(torch.ops.torchvision, schema.partition("(")[0])]
    if missing:
        definitions = torch.library.Library("torchvision", "FRAGMENT")
        for schema in missing:
            definitions.define(schema)
        _definitions.append(definitions)
