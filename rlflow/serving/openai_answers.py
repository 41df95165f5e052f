"""An answer in OpenAI's words: choices, chunks, logprobs, usage."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlflow.data.answer_text import AnswerText
from rlflow.serving.conversation import AskedPrompt
from rlflow.serving.models import ServedModel
from rlflow.serving.openai_requests import Wanted
from rlflow.serving.streams import Piece

if TYPE_CHECKING:
    from rlflow.actors.rollout_engines.prompt_logprobs import PromptLogprobs

LEAST_LOGPROB = -9999.0
"""What vLLM says of a token that cannot be."""


@dataclass(slots=True)
class Choice:
    """One answer on its way."""

    index: int
    decoder: AnswerText
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    is_begun: bool = False
    """Something of it was sent."""
    tokens: list[tuple[int, float]] = field(default_factory=list)
    """Ids and logprobs that were not sent yet, where they are wanted."""

    def take(self, piece: Piece, *, with_logprobs: bool) -> str:
        """Takes a piece. Returns the text that can be shown now."""
        self.token_ids += piece.written.token_ids
        if with_logprobs:
            self.tokens += zip(piece.written.token_ids, piece.written.logprobs, strict=True)
        new = self.decoder.push(piece.written.token_ids)
        if self.decoder.is_stopped:
            self.finish_reason = "stop"
        elif piece.finish_reason is not None:
            new += self.decoder.finish()
            self.finish_reason = piece.finish_reason
        self.text += new
        return new


class Answers:
    """All answers to one request."""

    def __init__(self, model: ServedModel, wanted: Wanted, *, is_chat: bool) -> None:
        self.model, self.wanted, self.is_chat = model, wanted, is_chat
        self.id = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.choices = [
            Choice(p * wanted.n + i, self._decoder(prompt))
            for p, prompt in enumerate(wanted.prompts)
            for i in range(wanted.n)
        ]
        self.of_prompts: list[PromptLogprobs] = []
        """Of each prompt, where they are wanted."""
        self._decode = model.tokenizer.backend_tokenizer.decode

    @property
    def is_done(self) -> bool:
        return all(choice.finish_reason for choice in self.choices)

    def whole(self) -> dict[str, Any]:
        """The answer to a client that waits for all of it."""
        return self._object([self._whole_choice(choice) for choice in self.choices]) | {"usage": self._usage()}

    def chunk(self, choice: Choice, new: str) -> dict[str, Any]:
        """A piece of one answer for a client that reads along."""
        body: dict[str, Any] = {"index": choice.index, "finish_reason": choice.finish_reason or None}
        body["logprobs"] = self._logprobs(choice, len(choice.text) - len(new))
        if self.is_chat:
            body["delta"] = ({} if choice.is_begun else {"role": "assistant"}) | {"content": new}
        else:
            body["text"] = new
        choice.is_begun, choice.tokens = True, []
        # Clients that asked for the usage get it in a chunk of its own, and null in the others.
        return self._object([body], is_chunk=True) | ({"usage": None} if self.wanted.include_usage else {})

    def usage_chunk(self) -> dict[str, Any]:
        return self._object([], is_chunk=True) | {"usage": self._usage()}

    def _decoder(self, prompt: AskedPrompt) -> AnswerText:
        context = () if self.is_chat else prompt.token_ids.tolist()
        return AnswerText(self.model.tokenizer, self.model.hidden, self.wanted.stop, context)

    def _object(self, choices: list[dict[str, Any]], *, is_chunk: bool = False) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if is_chunk else "chat.completion") if self.is_chat else "text_completion"
        fields = {"id": self.id, "object": kind, "created": self.created, "model": self.wanted.model}
        return {**fields, "choices": choices}

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        body = {"index": choice.index, "finish_reason": choice.finish_reason, "logprobs": self._logprobs(choice, 0)}
        if self.is_chat:
            return body | {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        return body | {"text": choice.text} | self._of_prompt(choice)

    def _of_prompt(self, choice: Choice) -> dict[str, Any]:
        """vLLM's fields: ids, and of each of the prompt's tokens but the first what the model gives it."""
        index, fields = choice.index // self.wanted.n, {}
        if self.wanted.returns_token_ids:
            ids = self.wanted.prompts[index].token_ids.tolist()
            fields = {"prompt_token_ids": ids, "token_ids": choice.token_ids}
        if self.of_prompts:
            rows = zip(*(each.tolist() for each in self.of_prompts[index]), strict=True)
            places = [
                {str(id_): self._prompt_token(id_, *said) for id_, *said in zip(*row, strict=True)} for row in rows
            ]
            fields |= {"prompt_logprobs": [None, *places]}
        return fields

    def _prompt_token(self, id_: int, logprob: float, rank: int) -> dict[str, Any]:
        # JSON has no infinity.
        text = self._decode([id_], skip_special_tokens=False)
        return {"logprob": max(logprob, LEAST_LOGPROB), "rank": rank, "decoded_token": text}

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(prompt.token_ids) for prompt in self.wanted.prompts)
        written = sum(len(choice.token_ids) for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def _logprobs(self, choice: Choice, start: int) -> dict[str, Any] | None:
        """Of the tokens that were not sent yet: as they are, special tokens too.

        Args:
            start: Where their text begins in the answer.
        """
        if not self.wanted.logprobs:
            return None
        texts = [self._decode([id_], skip_special_tokens=False) for id_, _ in choice.tokens]
        logprobs = [logprob for _, logprob in choice.tokens]
        if self.is_chat:
            named = zip(texts, logprobs, strict=True)
            return {"content": [_token(text, logprob) for text, logprob in named], "refusal": None}
        offsets = [start + sum(map(len, texts[:i])) for i in range(len(texts))]
        top = [{text: logprob} for text, logprob in zip(texts, logprobs, strict=True)]
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets}


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}


def models_object(served: Sequence[tuple[str, ServedModel]], created: int) -> dict[str, Any]:
    """What /v1/models answers."""
    return {
        "object": "list",
        "data": [
            {"id": name, "object": "model", "created": created, "owned_by": "rlflow", "max_model_len": model.context}
            for name, model in served
        ],
    }
