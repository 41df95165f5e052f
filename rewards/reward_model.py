"""A trained reward model as a reward: a transformers sequence classifier of one label. No torch until it is loaded."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rlflow.data.chat import Chat
from rlflow.data.encoding import Rendered
from rlflow.data.errors import DataError, RowError
from rlflow.data.image_processor import ImageProcessor
from rlflow.data.tokenizer import load_tokenizer
from rlflow.data.vocabulary import Vocabulary, tokens_without_row
from rlflow.memory import count_stored
from rlflow.positions import position_limit
from rlflow.recipe import ModelBlock
from rlflow.rewards.resolving import RewardError
from rlflow.types import Message

LIBRARIES_BYTES = 1 << 29
"""Of a process with torch and transformers imported, before it holds a model (0.3 GiB), and of a small forward pass."""
DEFAULT_TOKENS = 1024
"""Of a conversation, at most."""
OUT_OF_MEMORY = ("allocate memory", "out of memory", "bad_alloc", "failed to map segment")
"""How allocators, loaders and CUDA say it, in lower case."""


class RewardModel:
    """The score that a reward model gives a conversation, as the forward pass of transformers computes it, in float32.

    The conversation is prompt and completion in the reward model's own chat template; without a template, their texts
    end to end.
    """

    def __init__(self, *, path: str, max_tokens: int | None = None, batch_size: int = 16) -> None:
        """Loads the model; on the GPU where torch sees one.

        Args:
            path: A Hugging Face directory, or a hub id, of a sequence classifier with one label and its tokenizer.
            max_tokens: A longer conversation loses its beginning, never its end. 1,024 when left out, or what the model
                has positions for.
            batch_size: Conversations in one forward pass.

        Raises:
            RewardError: There is no such model, it has no score head of one label, an embedding too small for its
                tokenizer or fewer positions than ``max_tokens``, or it needs more memory than
                ``reward_server.memory_gib``.
        """
        for name, value in {
            "max_tokens": DEFAULT_TOKENS if max_tokens is None else max_tokens,
            "batch_size": batch_size,
        }.items():
            if type(value) is not int or value < 1:
                raise RewardError(f"reward_model: {name} is {value!r}: give a whole number above 0")
        self._batch_size = batch_size
        if ImageProcessor(path).takes_images:
            raise RewardError(
                f"reward_model: {path} is a vision-language model, and this reward scores text alone: write a reward "
                "function with `images` that loads it as its model card says"
            )
        _require_memory(path)
        with _memory_named(f"loading {path}", "raise reward_server.memory_gib"):
            self._model = _load_model(path)
            self._chat = _load_chat(path)
        config = self._model.config.to_dict()
        if problem := ids_problem(config, self._chat.tokenizer.get_vocab(), max_tokens):
            raise RewardError(f"reward_model: {path} {problem}")
        self._max_tokens = max_tokens or min(DEFAULT_TOKENS, position_limit(config) or DEFAULT_TOKENS)
        self._pad_token_id: int | None = self._model.config.get_text_config().pad_token_id

    def __call__(
        self,
        prompts: Sequence[Sequence[Message]],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[float]:
        """One score a completion, of any size.

        Raises:
            RowError: The chat template refuses a conversation, a character tokenizer lacks one of its characters, or
                a prompt has pictures.
            RewardError: A batch needs more memory than there is.
        """
        read = [self._render(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        rows = [ids[-self._max_tokens :] for ids in self._chat.encode(read)]
        batches = [rows[first : first + self._batch_size] for first in range(0, len(rows), self._batch_size)]
        with _memory_named("scoring", "raise reward_server.memory_gib, or lower args.batch_size or args.max_tokens"):
            return [score for batch in batches for score in self._score(batch)]

    def _render(self, prompt: Sequence[Message], completion: str) -> Rendered:
        if any(message.get("images") for message in prompt):
            raise RowError("its prompt has pictures, and a reward model here reads text alone")
        if self._chat.tokenizer.chat_template is None:
            return Rendered("".join([*(str(message["content"]) for message in prompt), completion]))
        return self._chat.render_whole([*prompt, {"role": "assistant", "content": completion}])

    def _score(self, rows: Sequence[np.ndarray]) -> list[float]:
        """One forward pass. ``rows``: int32 [T] each."""
        import torch

        shape = (len(rows), max(map(len, rows)))
        token_ids, mask = np.full(shape, self._padding(rows), np.int64), np.zeros(shape, np.int64)
        for index, row in enumerate(rows):
            token_ids[index, : len(row)] = row
            mask[index, : len(row)] = 1
        device = self._model.device
        with torch.inference_mode():
            logits = self._model(
                input_ids=torch.from_numpy(token_ids).to(device), attention_mask=torch.from_numpy(mask).to(device)
            ).logits
        return logits[:, 0].tolist()

    def _padding(self, rows: Sequence[np.ndarray]) -> int:
        """The token to pad with: by it transformers' decoders find where a row ends.

        A model without one scores the last token, whatever it is, and takes no batch. Any token that ends no row does.
        """
        if self._pad_token_id is not None:
            return self._pad_token_id
        ends = {int(row[-1]) for row in rows}
        token = next(token for token in range(len(rows) + 1) if token not in ends)
        self._model.config.get_text_config().pad_token_id = token
        return token


def score_head_problem(config: Mapping[str, Any]) -> str | None:
    """What keeps the model of a config.json from being a reward model, as the rest of a sentence, or None."""
    names = config.get("architectures") or ["model of no named architecture"]
    remedy = "train one with algorithm.name: reward_model, or export it with num_labels=1"
    if not any(name.endswith("ForSequenceClassification") for name in names):
        return f"has no score head, it is a {names[0]}: {remedy}"
    # transformers writes no labels where there are two, its default.
    num_labels = config.get("num_labels") or len(config.get("id2label") or range(2))
    return None if num_labels == 1 else f"has a score head of {num_labels} labels, a reward model's has one: {remedy}"


def ids_problem(config: Mapping[str, Any], vocabulary: Vocabulary | None, max_tokens: int | None) -> str | None:
    """What the ids and positions of conversations are too many for, as the rest of a sentence, or None.

    Args:
        config: Fields of the model's config.json.
        vocabulary: Of the tokenizer beside it, where that is known.
        max_tokens: The recipe's, if it has one.
    """
    size, limit = config.get("text_config", config).get("vocab_size"), position_limit(config)
    if size is not None and vocabulary is not None and (beyond := tokens_without_row(vocabulary, size)):
        return (
            f"has an embedding of {size} rows, and its tokenizer ids up to {vocabulary[beyond[-1]]}: save it after "
            "model.resize_token_embeddings(len(tokenizer))"
        )
    if limit is not None and max_tokens is not None and max_tokens > limit:
        return f"takes {limit} tokens, and args.max_tokens is {max_tokens}: lower it to {limit}"
    return None


def _load_model(path: str) -> Any:
    if path.startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise RewardError(f"reward_model: there is no directory {path}: give one with config.json, or a hub id")
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from rlflow.actors.pretrained import load_whole
    from rlflow.actors.train_engines.probe import use_own_attention

    try:
        config = AutoConfig.from_pretrained(path)
        if problem := score_head_problem(config.to_dict()):
            raise RewardError(f"reward_model: {path} {problem}")
        model: Any = load_whole(AutoModelForSequenceClassification, path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        if isinstance(error, RewardError) or _is_out_of_memory(error):
            raise
        cause = str(error).partition("\n")[0]
        raise RewardError(
            f"reward_model: {path} cannot be loaded ({cause}): give a directory that save_pretrained wrote, or a hub "
            "id that this machine can reach"
        ) from error
    use_own_attention(model)
    model.config.use_cache = False
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _load_chat(path: str) -> Chat:
    try:
        tokenizer = load_tokenizer(ModelBlock(path=path))
        # Where there is no file, transformers makes a tokenizer that knows nothing but special tokens.
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise RewardError(f"reward_model: {path} has no tokenizer: save the one it was trained with beside it")
        return Chat(tokenizer)
    except DataError as error:
        raise RewardError(f"reward_model: {path}: {str(error).removeprefix('model.path: ')}") from error


def _require_memory(path: str) -> None:
    """Refuses at once what a reward child could not hold: libraries that run short of memory may end the process."""
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    needed = LIBRARIES_BYTES + 4 * (count_stored(Path(path)) or 0)
    if limit != resource.RLIM_INFINITY and needed > limit:
        raise RewardError(
            f"reward_model: {path} needs {needed / 2**30:.2f} GiB before it scores anything, and a reward child may "
            f"allocate {limit / 2**30:.2f} GiB: raise reward_server.memory_gib"
        )


@contextmanager
def _memory_named(doing: str, remedy: str) -> Iterator[None]:
    """Says of a failure for lack of memory what to do; others pass."""
    try:
        yield
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
        allowed = "" if limit == resource.RLIM_INFINITY else f" (a reward child may allocate {limit / 2**30:.2f} GiB)"
        raise RewardError(f"reward_model: {doing} ran out of memory{allowed}: {remedy}") from error


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in OUT_OF_MEMORY)
