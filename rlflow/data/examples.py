"""Rows to Examples: whole conversations or texts for supervised fine-tuning, with the mask of what is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from rlflow.data.chat import Chat
from rlflow.data.encoding import Rendered
from rlflow.data.errors import RowError, Rows
from rlflow.data.formats import Record, with_system
from rlflow.data.image_processor import ImageProcessor
from rlflow.data.image_rows import cuts_image, expand_trained, with_images
from rlflow.data.logged import LoggedTokens
from rlflow.data.overlong import Overlong
from rlflow.data.records import Loaded, load_records
from rlflow.recipe.data_blocks import DataBlock
from rlflow.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence to learn from."""

    id: str
    token_ids: np.ndarray
    """int32 [T]."""
    loss_mask: np.ndarray
    """bool [T]; position 0 is never trained."""
    images: tuple[bytes, ...] = ()
    """Its encoded pictures, in the order of their places in ``token_ids``."""


def load_examples(
    data: DataBlock, tokenizer: PreTrainedTokenizerFast, seed: int, vision: ImageProcessor | None = None
) -> Rows[Example]:
    """The examples of ``data.train``, in the order of its sources.

    ``data.loss_on`` says which tokens of a conversation are trained; of plain text all are. A message's own ``loss``
    (true or false) goes before it.

    Returns:
        The examples; ``skipped`` names the rows that were left out, bad or overlong.

    Raises:
        DataError: a source or too many of its rows cannot be used, or rows are overlong and must not be.
    """
    chat = Chat(tokenizer, data.template_date, vision)
    rows = load_records(data.train, seed, lambda record: render_examples(record, data, chat), vision=vision)
    encoded = encode_rows(rows, lambda rendered: rendered, data, chat)
    return Rows([example for _, examples in encoded for example in examples], encoded.skipped, encoded.notes)


def encode_rows(
    rows: Rows[Loaded[T]],
    texts: Callable[[T], Sequence[Rendered]],
    data: DataBlock,
    chat: Chat,
) -> Rows[tuple[Loaded[T], list[Example]]]:
    """Each row with its ``texts`` as examples of at most ``data.max_tokens``; a row is as long as its longest text.

    Raises:
        DataError: rows are overlong and must not be.
    """
    limit = data.max_tokens
    overlong = Overlong("max_tokens", limit, data.overlong)
    encoded = iter(chat.encode_trained([text for row in rows for text in texts(row.value)]))
    kept: Rows[tuple[Loaded[T], list[Example]]] = Rows(skipped=rows.skipped)
    for row in rows:
        pieces = [(text.images, *expand_trained(*next(encoded), text.images, chat.vision)) for text in texts(row.value)]
        num_tokens = max(len(token_ids) for _, token_ids, _ in pieces)
        if num_tokens > limit and overlong.leaves_out(row, num_tokens):
            continue
        if any(cuts_image(token_ids, limit, chat.vision) for images, token_ids, _ in pieces if images):
            kept.skipped.append(row.bad(f"its pictures end behind {limit:,} tokens, and a picture is not cut"))
            continue
        examples = [
            Example(row.id, token_ids[:limit], loss_mask[:limit], images) for images, token_ids, loss_mask in pieces
        ]
        if all(example.loss_mask.any() for example in examples):
            kept.append((row, examples))
            notes = dict.fromkeys(note for text in texts(row.value) for note in text.notes)
            kept.notes.extend(map(row.bad, notes))
        else:
            kept.skipped.append(row.bad(f"nothing is trained in its first {limit:,} tokens"))
    overlong.settle(kept)
    return kept


def render_examples(record: Record, data: DataBlock, chat: Chat) -> list[Rendered]:
    """A record as text, with the parts that ``data.loss_on`` trains; several texts where the chat template rewrites
    what was said before, as of a rollout: each turn is trained in the text that the policy has before it. A rollout
    that was logged has its tokens already, where they are those of this tokenizer and template."""
    if record.logged is not None and (sequences := logged_sequences(record, record.logged, data, chat)):
        return sequences
    if record.text is not None:
        return [with_images(chat.render_text(record.text, complete=True), (), (), chat)]
    answers = [index for index, message in enumerate(record.messages) if message["role"] == "assistant"]
    if not answers:
        raise RowError("it has no assistant answer to learn")
    if data.loss_on == "all":
        messages = with_system(record.messages, data.system)
        whole = chat.render_conversation(messages, None, record.tools)
        return [with_images(whole, messages, record.images, chat)]
    # What comes behind the last answer has no influence on it.
    messages = with_system(record.messages[: answers[-1] + 1], data.system)
    turns = trained_turns(messages, last_only=data.loss_on == "last_assistant")

    def render(some: Sequence[int]) -> Rendered:
        """The conversation up to the last of some turns, these trained."""
        until = messages if some[-1] == turns[-1] else messages[: some[-1] + 1]
        text = chat.render_conversation(until, some, record.tools, ignore_empty_think=data.ignore_empty_think)
        return with_images(text, until, record.images, chat)

    return _as_the_policy_reads(turns, render)


def logged_sequences(record: Record, logged: LoggedTokens, data: DataBlock, chat: Chat) -> list[Rendered]:
    """The sequences of a rollout; none where its prompt has other tokens now, or pictures, or other tokens are to be
    trained."""
    if data.loss_on != "all_assistant" or data.ignore_empty_think or record.images:
        return []
    prompt = with_system(record.messages[: logged.num_prompt_messages], data.system)
    rendered = [chat.render_text(message["content"], complete=False) for message in prompt if len(prompt) == 1]
    if chat.has_template:
        rendered.append(chat.render_prompt(prompt, record.tools))
    if not any(np.array_equal(token_ids, logged.prompt) for token_ids in chat.encode(rendered)):
        return []
    return [Rendered("", tokens=sequence) for sequence in logged.sequences]


def _as_the_policy_reads(turns: Sequence[int], render: Callable[[Sequence[int]], Rendered]) -> list[Rendered]:
    """The fewest texts in which every turn follows what the policy has before it.

    Raises:
        RowError: A turn cannot be trained alone.
    """
    try:
        whole = render(turns)
    except RowError:
        if len(turns) == 1:
            raise
    else:
        if whole.is_as_prompted or len(turns) == 1:
            return [whole]
    texts: list[Rendered] = []
    first = 0
    while first < len(turns):
        last, text = first + 1, render(turns[first : first + 1])
        while last < len(turns) and (longer := _longer(turns[first : last + 1], render)) is not None:
            last, text = last + 1, longer
        texts.append(replace(text, notes=tuple(note for note in text.notes if not _is_of(turns, note))))
        first = last
    return texts


def _longer(turns: Sequence[int], render: Callable[[Sequence[int]], Rendered]) -> Rendered | None:
    try:
        text = render(turns)
    except RowError:
        return None
    return text if text.is_as_prompted else None


def _is_of(turns: Sequence[int], note: str) -> bool:
    """Whether a note is of a turn that is trained in another text."""
    return any(f"messages[{turn}]" in note for turn in turns)


def trained_turns(messages: Sequence[Message], *, last_only: bool) -> list[int]:
    """Indices of the assistant turns to train: those whose ``loss`` is true if any says so, else by position."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    turns = answers[-1:] if last_only else answers
    turns = [index for index in answers if messages[index].get("loss", index in turns)]
    if not turns:
        raise RowError("`loss` is false in every assistant message")
    return turns
