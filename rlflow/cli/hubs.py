"""A directory on its way to a model hub: Hugging Face (hf:organisation/name) or ModelScope (modelscope:...).

Opening a repository makes it where it is missing and fails at once when the token may not, before anything is merged
or sent. Weights that an earlier push left and this one does not replace are removed, or they would be loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from rlflow.data.errors import DataError
from rlflow.driver.errors import RunError
from rlflow.tracking.model_card import CARD, read_front_matter
from rlflow.tracking.redact import MASK, redact_text

WEIGHTS = ["model*.safetensors", "model.safetensors.index.json", "adapter_*"]
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 20.0, 300.0
"""To be connected, and without a byte from the hub."""
MESSAGE = "Upload by rlflow export"


@dataclass(frozen=True, slots=True)
class HubTarget:
    hub: str
    """A key of HUBS."""
    repository: str
    """``organisation/name``."""

    def __str__(self) -> str:
        return f"{self.hub}:{self.repository}"


class Repository(Protocol):
    def upload(self, directory: Path) -> str:
        """Sends the files of a directory.

        Returns:
            Where they are to be seen.

        Raises:
            DataError: The hub refuses them.
            RunError: The hub cannot be reached, or failed.
        """
        ...


def hub_target(text: str) -> HubTarget:
    """What ``--push`` takes."""
    hub, _, repository = text.partition(":")
    if hub not in HUBS or not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise argparse.ArgumentTypeError(f"{text}: write hf:organisation/name or modelscope:organisation/name")
    return HubTarget(hub, repository)


def open_repository(target: HubTarget, source: Path, *, private: bool, revision: str | None) -> Repository:
    """Makes the repository where it is missing.

    Args:
        source: Of what will be uploaded; its card may name a license, which ModelScope wants with a new repository.
        private: A new repository is private; one that is there and public is an error.
        revision: The branch; Hugging Face makes it where it is missing.

    Raises:
        DataError: No token, one that may not write there, or a client library is missing; each with a remedy.
        RunError: The hub cannot be reached, or failed.
    """
    return HUBS[target.hub](target.repository, source, private, revision)


class HuggingFaceRepository:
    """Through huggingface_hub, which honours HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE and HF_HUB_DISABLE_XET."""

    def __init__(self, repository: str, source: Path, private: bool, revision: str | None) -> None:
        from huggingface_hub import HfApi, constants, get_token, set_client_factory

        token = get_token()
        if not token:
            raise DataError(f"{constants.ENDPOINT} wants a token: set HF_TOKEN, or log in with `hf auth login`")
        set_client_factory(_client_with_deadlines)
        self.repository, self.revision, self.token = repository, revision, token
        self.api = HfApi(library_name="rlflow", token=token)
        with self._explained():
            self.api.create_repo(repository, private=private or None, exist_ok=True)
            if private and not self.api.model_info(repository).private:
                raise _public(f"{self.api.endpoint}/{repository}")
            if revision is not None:
                self.api.create_branch(repository, branch=revision, exist_ok=True)

    def upload(self, directory: Path) -> str:
        with self._explained():
            self.api.upload_folder(
                repo_id=self.repository,
                folder_path=directory,
                revision=self.revision,
                commit_message=MESSAGE,
                delete_patterns=WEIGHTS,
            )
        branch = f"/tree/{self.revision}" if self.revision else ""
        return f"{self.api.endpoint}/{self.repository}{branch}"

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """The library's failures as one line each."""
        from huggingface_hub import errors

        try:
            yield
        except (DataError, RunError):
            raise
        except errors.OfflineModeIsEnabled as error:
            raise DataError("HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: unset it to push") from error
        except errors.HFValidationError as error:
            raise DataError(f"hf:{self.repository}: {_line(str(error), self.token)}") from error
        # Its HTTPError is what the HTTP library raises without an answer from the hub.
        except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:  # pyright: ignore[reportPrivateImportUsage]
            # A file's upload fails as a RuntimeError of a thread, whose cause says why.
            cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
            answer = cause if isinstance(cause, errors.HfHubHTTPError) else None
            status = answer and answer.response.status_code
            said = _line((answer and answer.server_message) or str(cause), self.token)
            if "404" in said and "/xet-write-token/" in said:
                raise DataError(f"{self.api.endpoint} has no Xet storage: set HF_HUB_DISABLE_XET=1") from error
            tokens = f"{self.api.endpoint}/settings/tokens"
            raise _failure(self.api.endpoint, self.repository, status, said, tokens) from error


class ModelScopeRepository:
    """Through modelscope_hub, which honours MODELSCOPE_API_TOKEN and MODELSCOPE_ENDPOINT."""

    def __init__(self, repository: str, source: Path, private: bool, revision: str | None) -> None:
        # Both are read when the library is imported: how long it waits for a byte, and how much it tells.
        os.environ.setdefault("MODELSCOPE_UPLOAD_BLOB_READ_TIMEOUT_SECONDS", f"{READ_TIMEOUT_S:.0f}")
        os.environ.setdefault("MODELSCOPE_LOG_LEVEL", "CRITICAL")
        try:
            library: Any = importlib.import_module("modelscope_hub")
            self.errors: Any = importlib.import_module("modelscope_hub.errors")
        except ImportError as error:
            raise DataError("--push modelscope:... needs its client: pip install modelscope-hub") from error
        config = library.HubConfig()
        self.repository, self.revision = repository, revision
        self.endpoint, self.token = config.endpoint, config.token
        self.tokens = f"{self.endpoint}/my/myaccesstoken"
        if not self.token:
            raise DataError(f"{self.endpoint} wants a token: set MODELSCOPE_API_TOKEN to one from {self.tokens}")
        self.api = library.HubApi(config)
        self.refused = ""
        license_name = _license_of(source, list(library.License))
        with self._explained():
            try:
                visibility = "private" if private else "public"
                self.api.create_repo(repository, "model", visibility=visibility, license=license_name)
            except self.errors.AlreadyExistsError:
                if private and self.api.get_repo(repository, "model").visibility != library.Visibility.PRIVATE:
                    raise _public(f"{self.endpoint}/models/{repository}") from None

    def upload(self, directory: Path) -> str:
        # It prints a report; this command's output is the address.
        with self._explained(), contextlib.redirect_stdout(sys.stderr):
            self.api.upload_folder(
                self.repository,
                "model",
                directory,
                commit_message=MESSAGE,
                revision=self.revision,
                # Its record would be a file among ours; what the hub has is not sent again either way.
                use_cache=False,
                progress_callback=self._watch,
            )
            files = self.api.list_repo_files(self.repository, "model", revision=self.revision)
            stale = [file.path for file in files if _is_weights(file.path) and not (directory / file.path).exists()]
            if stale:
                self.api.delete_files(self.repository, "model", stale, revision=self.revision)
        return f"{self.endpoint}/models/{self.repository}"

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """The library's failures as one line each."""
        meanings = {
            self.errors.AuthenticationError: 401,
            self.errors.PermissionDeniedError: 403,
            self.errors.NotExistError: 404,
        }
        try:
            yield
        except (DataError, RunError):
            raise
        except (self.errors.HubError, OSError, RuntimeError) as error:
            failure: Any = error
            status = failure.status_code if isinstance(error, self.errors.APIError) else None
            status = next((code for kind, code in meanings.items() if isinstance(error, kind)), status)
            said = failure.message if isinstance(error, self.errors.HubError) else str(error)
            if answer := re.match(r"(?:\[E\d+\] )?\[(\d{3})\] ([^|\n]*)", self.refused):
                status, said = int(answer[1]), answer[2]
            raise _failure(self.endpoint, self.repository, status, _line(said, self.token), self.tokens) from error

    def _watch(self, event: dict[str, Any]) -> None:
        """Keeps what the hub answered to a commit: the error that ends the upload only counts files."""
        self.refused = event["error"] or self.refused


HUBS: dict[str, Callable[[str, Path, bool, str | None], Repository]] = {
    "hf": HuggingFaceRepository,
    "modelscope": ModelScopeRepository,
}


def _client_with_deadlines() -> Any:
    """huggingface_hub's own HTTP client, which waits for ever unless told otherwise."""
    from huggingface_hub.utils._http import default_client_factory

    client: Any = default_client_factory()
    client.timeout = type(client.timeout)(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    return client


def _failure(endpoint: str, repository: str, status: int | None, said: str, tokens: str) -> DataError | RunError:
    """What a hub's answer, or its silence, means to the user."""
    match status:
        case None:
            return RunError(f"{endpoint}, {repository}: {said}. Check the network and the address, and push again")
        case 401:
            return DataError(f"{endpoint} refuses the token (401: {said}): make one that may write at {tokens}")
        case 403:
            return DataError(
                f"{endpoint}: the token may not write to {repository} (403: {said}): use a repository of yours, or a "
                f"token with write access from {tokens}"
            )
        case 404:
            return DataError(f"{endpoint} has no {repository} for this token (404: {said}): check the name")
        case 408 | 429:
            return RunError(f"{endpoint}, {repository}: {said} ({status}). Push again later")
        case _ if status < 500:
            return DataError(f"{endpoint} does not take {repository} ({status}): {said}")
    return RunError(f"{endpoint} failed at {repository} ({status}: {said}). Push again later")


def _public(address: str) -> DataError:
    return DataError(f"{address} is there and public: leave out --private, or name another repository")


def _line(text: str, token: str) -> str:
    """As one line of moderate length, without secrets."""
    line = " ".join(redact_text(text.replace(token, MASK)).split())
    return (f"{line[:300]}..." if len(line) > 300 else line).rstrip(".")


def _is_weights(path: str) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in WEIGHTS)


def _license_of(directory: Path, known: list[str]) -> str:
    """What a model card names, as ModelScope writes it."""
    named = str(read_front_matter(directory / CARD).get("license", "")).lower()
    return next((str(name) for name in known if str(name).lower() == named), "Other")
