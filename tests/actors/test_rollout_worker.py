"""What the policy wrote, as text; what its engine prints."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from rlflow.actors.completion_texts import decode_completions
from rlflow.data.tokenizer import build_character_tokenizer
from rlflow.rewards.formats import pattern_format
from rlflow.tracking.logs import last_words

TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<end>"]


@pytest.fixture
def tokenizer():
    """As the published configurations of Llama 3 have it, it asks for spaces to be cleaned up."""
    tokenizer = build_character_tokenizer("abnt ,.?'12")
    tokenizer.add_special_tokens({"additional_special_tokens": TAGS})
    tokenizer.clean_up_tokenization_spaces = True
    return tokenizer


def written(tokenizer, text: str, stop: tuple[str, ...] = ("<eos>",)) -> str:
    token_ids = np.array(tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int32)
    return decode_completions(tokenizer, [token_ids], [tokenizer.convert_tokens_to_ids(list(stop))])[0]


def test_special_tokens_are_kept_but_those_that_end_and_fill(tokenizer):
    text = "<think>ab</think><answer>12</answer>"
    assert written(tokenizer, f"{text}<eos><pad><pad>") == text
    assert written(tokenizer, f"{text}<end>", ("<eos>", "<end>")) == text
    assert written(tokenizer, f"{text}<end>") == f"{text}<end>"
    assert pattern_format([[]], [written(tokenizer, f"{text}<eos>")], [[]]) == [1.0]


def test_no_space_is_cleaned_up(tokenizer):
    assert written(tokenizer, "a , b . 1 ? n 't") == "a , b . 1 ? n 't"


def test_a_completion_of_nothing_but_its_stop_token_is_empty(tokenizer):
    assert written(tokenizer, "<eos>") == ""


PROGRAM = """
import logging, os, sys
from pathlib import Path
from rlflow.actors.rollout_engines import vllm_start
from rlflow.actors.rollout_worker import _STANDARD_ERROR
from rlflow.tracking.logs import send_output_to
send_output_to(Path(sys.argv[1]), "rollout[0]", [])
vllm_start.importlib.util.find_spec = lambda name: object()
vllm_start.prepare_process(1, _STANDARD_ERROR)
logging.getLogger("vllm.engine").info("loading")
with vllm_start.quiet(_STANDARD_ERROR):
    os.write(2, b"from C++ while it starts\\n")
os.write(2, b"and later\\n")
"""


@pytest.mark.slow
def test_what_vllm_says_is_in_the_log_of_its_actor(tmp_path):
    path = tmp_path / "rollout-0.log"
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    last_words(path, wait_s=20)
    loading, *others = [line for line in path.read_text().splitlines() if not line.startswith("===")]
    assert loading.endswith("INFO vllm.engine: loading")
    assert others == ["from C++ while it starts", "and later"]
