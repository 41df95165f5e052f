from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
GROUPS = (
    "loss reward completion group staleness kl mismatch correction ratio clip preference kto value moe trainer perf "
    "time eval"
)
LITERAL = re.compile(rf'"((?:{"|".join(GROUPS.split())})/[\w{{}}@./]+)"')


def with_wildcards(key: str) -> str:
    return re.sub(r"\{[^}]*\}|<[^>]*>", "*", key)


def test_every_metric_the_code_names_is_documented() -> None:
    sources = [*ROOT.glob("rlflow/algorithms/*.py"), *ROOT.glob("rlflow/driver/*.py"), *ROOT.glob("actors/**/*.py")]
    emitted = {with_wildcards(key) for path in sources for key in LITERAL.findall(path.read_text())}
    assert len(emitted) > 30
    documented = {
        with_wildcards(key) for key in re.findall(r"`([a-z]+/[^`]+)`", (ROOT / "docs/metrics.md").read_text())
    }
    prefixes = {key.rpartition("/")[0] for key in documented}
    assert emitted - documented - prefixes == set()
