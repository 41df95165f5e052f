from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from urllib.parse import quote

import pytest

from rlflow.tracking import redact as module
from rlflow.tracking.redact import holds_secret, is_secret_name, redact, redact_text, remember_secrets


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
        "Authorization",
        "proxy-authorization",
        "Set-Cookie",
        "headers",
        "auth",
        "db_pwd",
        "SMTP_PASS",
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
        "prompt_key",
        "answer_key",
        "PWD",
        "pass",
        "author",
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


def test_everything_below_a_secret_key_is_secret_at_any_depth() -> None:
    config = {
        "credentials": {"user": "ann", "keys": [{"id": 17, "value": ["a", {"b": "c"}]}], "on": True, "no": None},
        "headers": {"X-Mine": "abc", "Accept": ["json"]},
        "other": {"user": "ann"},
    }
    assert redact(config) == {
        "credentials": {
            "user": "***",
            "keys": [{"id": "***", "value": ["***", {"b": "***"}]}],
            "on": True,
            "no": None,
        },
        "headers": {"X-Mine": "***", "Accept": ["***"]},
        "other": {"user": "ann"},
    }


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("GET https://me:p@ss@host/x?api_key=abcdefgh1&n=1 failed", "GET https://***@host/x?api_key=***&n=1 failed"),
        ("hub said no to hf_abcdefghijklmnop", "hub said no to hf_***"),
        ("Authorization: Bearer abc.def.ghi", "Authorization: Bearer ***"),
        ("{'authorization': 'Basic dXNlcjpw'}, n=1", "{'authorization': '***'}, n=1"),
        ("GET //h/x?sig=ab&n=1;X-Amz-Signature=c#d", "GET //h/x?sig=***&n=1;X-Amz-Signature=***#d"),
        ("jwt eyJhbGciOiJIUzI1NiJ9.e30.abc", "jwt eyJ***"),
        ('{"password": "correct horse"}', '{"password": "***"}'),
        ("api-key = 0123456789==, n=1", "api-key = ***==, n=1"),
        ("mean tokens: 123456789, loss per token: 0.31", "mean tokens: 123456789, loss per token: 0.31"),
    ],
)
def test_free_text_loses_what_has_the_shape_of_a_secret(text: str, clean: str) -> None:
    assert redact_text(text) == clean


@pytest.fixture
def nothing_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_met", set())


def test_a_secret_that_was_met_is_replaced_wherever_it_turns_up(nothing_met: None) -> None:
    args = {"api_key": "plain words", "nested": {"token": {"a": ["0123456"]}}, "headers": {"X": "Bearer zyxwvu"}}
    remember_secrets([{"args": {**args, "url": "https://ann:pa55word@host/x?sig=s1gnature&n=12345678"}}])
    said = "no plain words, 0123456 or zyxwvu; pa55word, s1gnature, 12345678 at host"
    assert redact_text(said) == "no ***, *** or ***; ***, ***, 12345678 at host"


def test_a_secret_of_several_lines_or_with_quotes_is_replaced_in_every_spelling(nothing_met: None) -> None:
    key, password = "-----BEGIN KEY-----\nc2VjcmV0IGtleSBvZiBhbm4=\n-----END KEY-----", "pa\"55'w\\rd/é"
    remember_secrets({"private_key": key, "password": password})
    spellings = [f(secret) for secret in (key, password) for f in (str, repr, json.dumps, partial(quote, safe=""))]
    assert [redact_text(text).strip("\"'") for text in spellings] == ["***"] * 8
    assert redact_text("line 2: c2VjcmV0IGtleSBvZiBhbm4= is no key") == "line 2: *** is no key"


def test_short_values_are_no_secrets_that_could_be_told_from_words(nothing_met: None) -> None:
    remember_secrets({"key": "a", "password": "short", "token": True})
    assert redact_text("a short True") == "a short True"


def test_values_of_secret_variables_are_replaced_as_the_environment_is_now(
    nothing_met: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "hunter2")
    monkeypatch.setenv("SOME_PROXY", "http://ann:pa55word@proxy:80/")
    monkeypatch.setenv("MY_SETTING", "blue sky")
    monkeypatch.setenv("SECRETS_DIRECTORY", "/usr/bin")
    assert redact_text("hunter2 pa55word blue sky /usr/bin/env") == "*** *** blue sky /usr/bin/env"
    monkeypatch.delenv("MY_SERVICE_TOKEN")
    assert redact_text("hunter2") == "hunter2"


def test_urls_hold_secrets_by_password_or_query() -> None:
    assert holds_secret("http://ann:x@host") and holds_secret("https://host/?token=abc")
    assert not holds_secret("http://host:80/?n=1") and not holds_secret("/usr/bin:/bin")


@pytest.mark.slow
def test_a_traceback_that_ends_a_process_has_no_secrets() -> None:
    program = (
        "import os; from rlflow.tracking.redact import redact_tracebacks; redact_tracebacks()\n"
        "raise RuntimeError('the key is ' + os.environ['MY_API_KEY'])\n"
    )
    environment = {"MY_API_KEY": "hunter2", "PYTHONPATH": ":".join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr and "RuntimeError: the key is ***" in ended.stderr
    assert "hunter2" not in ended.stderr
