from __future__ import annotations

import pytest

from rlflow.tracking.redact import is_secret_name, redact, redact_text


@pytest.mark.parametrize(
    "name",
    [
        "api_key",
        "apiKey",
        "OPENAI_API_KEY",
        "hf_token",
        "HF_TOKEN",
        "token",
        "authToken",
        "access_tokens",
        "key",
        "secret",
        "client_secret",
        "password",
        "db_password",
        "AWS_SECRET_ACCESS_KEY",
        "credentials",
    ],
)
def test_names_of_credentials_are_secret(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "token_ids",
        "num_tokens",
        "max_new_tokens",
        "max_prompt_tokens",
        "tokens_per_micro_batch",
        "tokenizer",
        "eos_token",
        "pad_token",
        "eos_token_id",
        "stop_token_ids",
        "num_key_value_heads",
        "keep_checkpoints",
        "name",
        "_",
    ],
)
def test_names_that_only_look_like_credentials_are_not(name: str) -> None:
    assert not is_secret_name(name)


def test_redaction_reaches_every_level_and_changes_nothing_else() -> None:
    config = {
        "model": {"path": "m", "architecture": {"num_key_value_heads": 2, "eos_token_id": 1}},
        "rewards": [
            {"plugin": "judge.py:score", "args": {"api_key": "abc", "keys": ["k1", 2], "timeout": 3, "key": None}}
        ],
        "data": {"path": "https://user:pass@host/set.jsonl", "num_tokens": 7},
    }
    assert redact(config) == {
        "model": {"path": "m", "architecture": {"num_key_value_heads": 2, "eos_token_id": 1}},
        "rewards": [
            {"plugin": "judge.py:score", "args": {"api_key": "***", "keys": ["***", "***"], "timeout": 3, "key": None}}
        ],
        "data": {"path": "https://***@host/set.jsonl", "num_tokens": 7},
    }


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("GET https://me:p@ss@host/x?api_key=abcdefgh1&n=1 failed", "GET https://***@host/x?api_key=***&n=1 failed"),
        ("hub said no to hf_abcdefghijklmnop", "hub said no to hf_***"),
        ("Authorization: Bearer abc.def.ghi", "Authorization: Bearer ***"),
        ('{"password": "correct horse"}', '{"password": "***"}'),
        ("api-key = 0123456789==, n=1", "api-key = ***==, n=1"),
        ("mean tokens: 123456789, loss per token: 0.31", "mean tokens: 123456789, loss per token: 0.31"),
    ],
)
def test_free_text_loses_what_has_the_shape_of_a_secret(text: str, clean: str) -> None:
    assert redact_text(text) == clean
