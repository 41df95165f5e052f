"""What a scheme is fitted to and measured on, and the loss that is made of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlflow.data.errors import DataError
from rlflow.data.tokenizer import build_character_tokenizer
from rlflow.model_source import ModelSource
from rlflow.quantization.card import Outcome, section
from rlflow.quantization.likelihood import Loss
from rlflow.quantization.rounding import rows_of
from rlflow.quantization.schemes import SCHEMES
from rlflow.quantization.texts import Texts, choose_texts
from rlflow.tracking.rollouts import rollouts_path, write_rollouts
from rlflow.types import Group, Prompt
from tests.flat_rollouts import flat

TOKENIZER = build_character_tokenizer("0123456789 ")


def write_rows(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"text": f"{row:03d}"}) + "\n" for row in range(count)))
    return path


def choose(name: str, source: Any = None, **files: Path | None) -> tuple[Texts | None, Texts | None]:
    source = source or ModelSource(Path("m"), None, "m", None, None)
    given = {"calibration": None, "held_out": None, **files}
    return choose_texts(source, SCHEMES[name], TOKENIZER, tell=pytest.fail, **given)


def rows_in(texts: Texts | None) -> set[str]:
    assert texts is not None
    return {TOKENIZER.decode(ids[:3]) for ids in texts.token_ids}


def test_an_eighth_of_the_calibration_rows_is_held_out_of_a_scheme_that_is_fitted(tmp_path: Path):
    fitted, measured = choose("gptq", calibration=write_rows(tmp_path / "rows.jsonl", 80))
    assert len(rows_in(measured)) == 10
    assert len(rows_in(fitted)) == 70
    assert rows_in(fitted) | rows_in(measured) == {f"{row:03d}" for row in range(80)}


def test_rows_of_a_file_of_their_own_are_all_measured_on(tmp_path: Path):
    held_out = write_rows(tmp_path / "held_out.jsonl", 3)
    fitted, measured = choose("awq", calibration=write_rows(tmp_path / "rows.jsonl", 80), held_out=held_out)
    assert rows_in(measured) == {"000", "001", "002"}
    assert len(rows_in(fitted)) == 80


def test_a_scheme_that_is_not_fitted_is_measured_on_any_row(tmp_path: Path):
    fitted, measured = choose("fp8", calibration=write_rows(tmp_path / "rows.jsonl", 40))
    assert fitted is None
    assert len(rows_in(measured)) == 40


def test_of_a_run_its_newest_rollouts_are_taken(tmp_path: Path):
    (tmp_path / "rollouts").mkdir()
    for step, answer in ((1, "111"), (2, "222")):
        prompt = Prompt("p:1", np.array(TOKENIZER("12").input_ids), [{"role": "user", "content": "12"}], {})
        rollouts = [flat(prompt.token_ids, TOKENIZER(answer).input_ids, 1.0) for _ in range(200)]
        path = rollouts_path(tmp_path, step)
        write_rollouts(path, [Group(prompt=prompt, rollouts=rollouts, epoch=0)], [np.zeros(200)], 200 * ["trained"])
    fitted, measured = choose("gptq", ModelSource(Path("m"), None, "m", tmp_path, None))
    for texts in (fitted, measured):
        assert texts is not None
        assert {TOKENIZER.decode(ids) for ids in texts.token_ids} == {"12222"}
        assert texts.origin == "the run's rollouts"


@pytest.mark.parametrize("rows", [None, 1], ids=str)
def test_without_texts_a_scheme_that_is_fitted_is_refused(rows: int | None, tmp_path: Path):
    calibration = None if rows is None else write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"give --calibration FILE|more rows, or --held-out FILE"):
        choose("awq", calibration=calibration)


def test_without_texts_others_are_not_measured():
    assert choose("w4a16") == (None, None)


def test_a_loss_and_its_standard_error_are_as_by_hand():
    # Lost: 1 and 2 nats, of 2 tokens each: 0.75 a token. Left over: -0.5 and 0.5; sqrt(0.5 * 2 / 1) / 4 = 0.25.
    loss = Loss([2.0, 4.0], [3.0, 6.0], [2, 2])
    assert (loss.mean_before, loss.mean_after, loss.mean, loss.standard_error) == (1.5, 2.25, 0.75, 0.25)
    assert math.isnan(Loss([2.0], [3.0], [2]).standard_error)


@pytest.mark.parametrize(("after", "is_warned"), [(10.9, False), (11.2, True)], ids=str)
def test_a_loss_beyond_the_bound_is_a_warning_in_the_card(after: float, is_warned: bool):
    texts = Texts([list(range(11))], "rows.jsonl")
    outcome = Outcome(SCHEMES["w4a16"], 64, None, texts, Loss([10.0], [after], [10]), 4_000_000, 1_000_000, 1.0)
    written = section(outcome)
    assert ("more than 0.1: measure it on your task" in written) == is_warned
    assert f"| after | {after / 10:.4f} | {math.exp(after / 10):.3f} |" in written
    assert "4.0 MB before, 1.0 MB after" in written


def test_texts_are_joined_and_cut_into_rows_of_one_length():
    assert rows_of([[1, 2, 3], [4, 5], [6, 7]], 3) == [[1, 2, 3], [4, 5, 6]]
    assert rows_of([[1, 2]], 3) == [[1, 2]]
