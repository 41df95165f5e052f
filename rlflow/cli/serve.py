"""`rlflow serve`: a model behind OpenAI's API."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rlflow.cli.common import parser_of, port_number
from rlflow.cli.serving_arguments import (
    add_model_arguments,
    find_named_model,
    loading,
    read_models,
    read_named_model,
    settings_of,
)
from rlflow.data.errors import DataError

if TYPE_CHECKING:
    import socket

    from rlflow.serving.models import ServedModel, Settings

SUMMARY = "serve a run, a checkpoint or a model behind OpenAI's API, with adapters beside it"


def make_parser() -> argparse.ArgumentParser:
    example = (
        "rlflow serve runs/gsm8k --port 8000\n"
        "  rlflow serve models/base --adapters short=runs/short/final kind=runs/kind/final"
    )
    parser = parser_of("serve", SUMMARY, example)
    add_model_arguments(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; beyond this machine a token is required"
    )
    parser.add_argument("--port", type=port_number, default=8000, help="0 finds a free one (8000)")
    parser.add_argument(
        "--token",
        help="what clients send as their API key; made and printed when left out where other machines reach the host",
    )
    parser.add_argument("--name", help="what clients call the model; the run's name, or the directory's, when left out")
    parser.add_argument(
        "--adapters",
        metavar="NAME=PATH",
        nargs="+",
        default=[],
        help="adapters of the model, each a model of its own name",
    )
    return parser


def execute(arguments: argparse.Namespace) -> int:
    """The port is taken before the model is loaded: one that is in use costs no time."""
    from rlflow.serving.addresses import open_socket, token_for
    from rlflow.serving.models import open_streams
    from rlflow.serving.openai_server import OpenAIServer, run_server

    given = dict(map(_named, arguments.adapters))
    if len(given) < len(arguments.adapters):
        raise DataError("--adapters: two bear one name: name=path, each with a name of its own")
    with open_socket(arguments.host, arguments.port) as listening:
        token = token_for(arguments.host, arguments.token)
        settings = settings_of(arguments)
        model = _renamed(read_named_model(find_named_model(arguments), settings), arguments.name)
        models, adapters = read_models(model, given, settings)
        if _choose_engine(arguments.engine, model) == "vllm":
            _become_vllm(model, adapters, settings, listening, arguments.host, token)
        else:
            with loading(model, "torch"):
                streams = open_streams(model, "torch", adapters, settings)
            try:
                server = OpenAIServer(models, streams, token)
                run_server(server, listening, partial(_tell, list(models), listening, arguments.host, token))
            finally:
                streams.close()
    return 0


def _choose_engine(wanted: str, model: ServedModel) -> str:
    """
    Raises:
        DataError: vLLM's server cannot be had for this model.
    """
    from rlflow.data.chat import only_characters
    from rlflow.serving.models import choose_engine

    characters = only_characters(model.tokenizer)
    if characters is None:
        return choose_engine(wanted)
    if wanted == "vllm":
        raise DataError(
            f"--engine vllm: vLLM's server starts with texts of its own, and the tokenizer of {model.source.path} has "
            f"{len(characters)} tokens and nothing for other characters: --engine torch"
        )
    return "torch"


def _become_vllm(
    model: ServedModel,
    adapters: dict[str, Path],
    settings: Settings,
    listening: socket.socket,
    host: str,
    token: str | None,
) -> None:
    import torch

    from rlflow.serving.models import names_of
    from rlflow.serving.vllm_server import become, command

    port = listening.getsockname()[1]
    words = command(model, adapters, settings, host, port, on_cpu=not torch.cuda.is_available())
    _tell(names_of(model, adapters), listening, host, token, engine="vLLM, which is starting")
    if token is not None:
        print(
            "vLLM asks for the token under /v1 alone: keep the port from those who must not reach it", file=sys.stderr
        )
    if model.vision is not None and model.vision.max_pixels is not None:
        if model.vision.takes_max_pixels:
            said = (
                "scales pictures to max_pixels by the model's processor: a side may be a patch shorter than in training"
            )
        else:
            said = "scales pictures as the model's processor says, which knows no max_pixels"
        print(f"vLLM {said}", file=sys.stderr)
    listening.close()
    become(words, token)


def _tell(names: list[str], listening: socket.socket, host: str, token: str | None, engine: str = "torch") -> None:
    from rlflow.serving.addresses import url_of

    url = url_of(host, listening.getsockname()[1])
    print(f"serving {', '.join(names)} at {url}/v1 ({engine})", flush=True)
    if token is not None:
        print(f"token: {token}", flush=True)


def _named(adapter: str) -> tuple[str, str]:
    """
    Raises:
        DataError: It is not of the form name=path.
    """
    name, equals, path = adapter.partition("=")
    if not (name and equals and path):
        raise DataError(f"--adapters {adapter}: write name=path, the name is what clients ask for")
    return name, path


def _renamed(model: ServedModel, name: str | None) -> ServedModel:
    from dataclasses import replace

    return model if name is None else replace(model, source=replace(model.source, name=name))
