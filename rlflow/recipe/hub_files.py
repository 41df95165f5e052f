"""Small files of models on the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

_TIMEOUT_S = 10.0


def hub_config(name: str, revision: str | None) -> dict[str, Any]:
    """config.json of a model.

    Raises:
        OSError: It is neither in the cache nor to be fetched.
        ValueError: No such name can be on a hub, or the file is no JSON.
    """
    return json.loads(hub_text(name, "config.json", revision))


def hub_text(name: str, file: str, revision: str | None) -> str:
    """A file of a model: from the cache where it is there, otherwise by one request, without the client's retries.

    Raises:
        OSError: It is neither there nor to be fetched.
        ValueError: No such name can be on a hub.
    """
    from huggingface_hub import constants, errors, try_to_load_from_cache
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    cached = try_to_load_from_cache(name, file, revision=revision)
    if isinstance(cached, str):
        return Path(cached).read_text(encoding="utf-8")
    if constants.HF_HUB_OFFLINE:
        raise OSError("it is not in the cache, and HF_HUB_OFFLINE is set")
    url = f"{constants.ENDPOINT}/{name}/resolve/{quote(revision or 'main', safe='')}/{file}"
    try:
        response = get_session().get(url, headers=build_hf_headers(), timeout=_TIMEOUT_S)
        hf_raise_for_status(response)
    except errors.HfHubHTTPError as error:
        raise OSError(f"{constants.ENDPOINT} says {error}") from error
    except errors.HTTPError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise OSError(f"cannot reach {constants.ENDPOINT}: {error}") from error
    return response.text
