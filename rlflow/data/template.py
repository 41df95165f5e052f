"""A chat template as text: what it reads, what it reads by default, and the one date that it writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import date, datetime, time
from typing import Any

from rlflow.data.errors import DataError, nearest

GIVEN = {
    *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "strftime_now"),
    *("tokenize", "return_dict", "return_tensors", "chat_template", "conversation", "raise_exception"),
}
"""What rendering sets itself, by the names of ``apply_chat_template``."""
_GENERATION_MARKS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


def with_defaults(template: str | dict[str, str] | None, kwargs: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The template that reads these values where its caller gives none.

    They are part of its text, so that every rendering has them, and whoever serves the tokenizer that is saved with
    the model; a caller's own values go before them.

    Raises:
        DataError: There is no template, or it does not read one of them.
    """
    if not kwargs:
        return template
    if template is None:
        raise DataError("model.chat_template_kwargs: the tokenizer has no chat template that could read them.")
    texts = template if isinstance(template, dict) else {"": template}
    for name in kwargs:
        _check_name(name, texts)
    lines = "".join(f"{{% set {name} = {name} | default({value!r}) %}}\n" for name, value in kwargs.items())
    if isinstance(template, dict):
        return {name: lines + text for name, text in template.items()}
    return lines + template


def names_read(template: str) -> set[str]:
    """The variables that a template takes from its caller.

    Raises:
        jinja2.TemplateSyntaxError: It is no template.
    """
    from jinja2 import Environment, meta

    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    return meta.find_undeclared_variables(environment.parse(_GENERATION_MARKS.sub("", template)))


def template_text(template: str | dict[str, str] | None) -> str:
    """All of a tokenizer's templates as one text, empty where there is none."""
    return "\n".join(template.values()) if isinstance(template, dict) else template or ""


def clock_at(day: date) -> Callable[[str], str]:
    """``strftime_now`` as templates call it, with the time standing still at midnight of a day."""
    moment = datetime.combine(day, time())
    return lambda format: moment.strftime(format)


def _check_name(name: str, templates: Mapping[str, str]) -> None:
    from jinja2 import TemplateSyntaxError

    if name in GIVEN:
        raise DataError(f"model.chat_template_kwargs: {name} is given by every rendering itself: remove it.")
    try:
        read = set().union(*(names_read(text) for text in templates.values()))
    except TemplateSyntaxError as error:
        raise DataError(f"the chat template is not valid Jinja: {error}. Set model.chat_template.") from error
    if name not in read:
        known = ", ".join(sorted(read - GIVEN)) or "nothing that a recipe could set"
        raise DataError(
            f"model.chat_template_kwargs: the chat template does not read {name}; it reads {known}."
            f"{nearest(name, read - GIVEN)}"
        )
