"""ms-swift's flags of vision-language models."""

from __future__ import annotations

from typing import Any

SFT = "swift sft --model m --dataset d.jsonl "


def kinds(conversion: Any, word: str) -> set[str]:
    return {note.kind for note in conversion.notes if word in note.text}


def test_parts_that_are_trained_their_learning_rates_and_the_size_of_pictures_are_keys(converted):
    flags = "--freeze_vit false --freeze_aligner false --vit_lr 1e-6 --aligner_lr 2e-6 --max_pixels 200704"
    recipe, conversion = converted(SFT + flags)
    assert recipe.model.train == ("language", "projector", "vision")
    assert recipe.model.learning_rates == {"vision": 1e-6, "projector": 2e-6}
    assert recipe.model.max_pixels == 200_704
    assert kinds(conversion, "not trained yet") == set()


def test_there_a_language_model_alone_is_trained_where_nothing_is_said(converted):
    assert converted(SFT)[0].model.train == ("language",)
    recipe, conversion = converted(SFT + "--freeze_llm true --freeze_aligner false --vit_lr 1e-6")
    assert recipe.model.train == ("projector",)
    assert kinds(conversion, "--vit_lr 1e-6") == {"unneeded"}
