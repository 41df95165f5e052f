"""The policy's starting point, and the adapter that is trained in its stead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from rlflow.recipe.block import Block, Conflict, NonNegativeFloat, PositiveFloat, PositiveInt
from rlflow.recipe.expand_block import ExpandBlock
from rlflow.recipe.peft_methods import TYPE, completed, drops_out, peft_problems
from rlflow.recipe.prepared_starts import PreparedStart, prepared_start


def _all(given: Any) -> Any:
    if given != "all-linear":
        raise ValueError(f"must be all-linear, or a list of names such as [q_proj, v_proj]; is {given}")
    return given


AllOrSome = Annotated[
    Annotated[Literal["all-linear"], BeforeValidator(_all), Tag("<all>")] | Annotated[list[str], Tag("<some>")],
    Discriminator(lambda given: "<some>" if isinstance(given, list) else "<all>"),
]

Part = Literal["language", "projector", "vision", "audio"]
"""Of a model: the language model, the tower that reads pictures, and what stands between them."""

OF_THE_ADAPTER = ("kind", "rank", "alpha", "target_modules", "rslora", "peft")
"""What an adapter on disk has settled already."""


@dataclass(frozen=True, slots=True)
class QuantizedBase:
    """A way to hold a base in few bits."""

    package: str
    needs_gpu: bool
    bytes: float
    """Of a weight, with its share of the scales."""


QUANTIZED_BASES = {
    # arXiv 2305.14314, section 3: scales take 0.127 bits.
    "nf4": QuantizedBase("bitsandbytes", needs_gpu=True, bytes=0.52),
    "int8": QuantizedBase("bitsandbytes", needs_gpu=True, bytes=1.01),
    "torchao_int8": QuantizedBase("torchao", needs_gpu=False, bytes=1.01),
}
"""By ``model.adapter.quantize``."""


class AdapterBlock(Block):
    kind: Literal["lora", "dora"] = "lora"
    """lora: W + scale B A (arXiv 2106.09685); dora: also a trained length of each row (arXiv 2402.09353)."""
    rank: PositiveInt = 16
    """Rows of A and columns of B."""
    alpha: PositiveFloat = 32.0
    """scale = alpha / rank."""
    dropout: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0
    """Of the adapter's input while it is trained; sft and pretrain only."""
    target_modules: AllOrSome = "all-linear"
    """Linear layers that get one: all but the head, or names such as [q_proj, v_proj]."""
    rslora: bool = False
    """scale = alpha / sqrt(rank) (arXiv 2312.03732)."""
    lora_plus_ratio: Annotated[float, Field(strict=True, ge=1)] | None = None
    """LoRA+: learning rate of B over that of A, e.g. 16 (arXiv 2402.12354)."""
    path: str | None = None
    """A PEFT directory or hub id to go on from: kind, rank, alpha, target_modules and rslora are its own."""
    peft: dict[str, Any] | None = None
    """Any of PEFT's methods in the place of kind, rank, alpha, target_modules, rslora and dropout: `peft_type` and
    fields of its config, e.g. {peft_type: LOKR, r: 16, alpha: 32}. docs/adapters.md has the list."""
    quantize: Literal["none", "nf4", "int8", "torchao_int8"] = "none"
    """The base in few bits, for LoRA and DoRA (QLoRA, arXiv 2305.14314). nf4: 4 bits by bitsandbytes; int8: 8 bits of
    weights and activations by bitsandbytes; torchao_int8: 8 bits of weights. bitsandbytes' are on GPUs."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.target_modules == []:
            yield Conflict(("target_modules",), "is empty: name layers, or write all-linear")
        if self.peft is None and self.path is None:
            return
        neutral = AdapterBlock()
        if self.peft is not None:
            for field, problem in peft_problems(self.peft):
                yield Conflict((f"peft.{field}",), problem)
            for key in (*OF_THE_ADAPTER[:-1], "dropout"):
                if getattr(self, key) != getattr(neutral, key):
                    yield Conflict((key, "peft"), "is a LoRA's without peft: give peft PEFT's own field, or remove it")
            if self.lora_plus_ratio is not None and str(self.peft.get(TYPE)).upper() != "LORA":
                yield Conflict(("lora_plus_ratio", "peft"), "is of LoRA's A and B: remove it")
        if self.path is None:
            return
        for key in OF_THE_ADAPTER:
            if getattr(self, key) != getattr(neutral, key):
                yield Conflict((key, "path"), "is settled by the adapter at path: remove one of the two")

    @property
    def config(self) -> dict[str, Any]:
        """What PEFT's config of a new adapter holds: the method and its fields."""
        if self.peft is not None:
            return completed(self.peft)
        alpha = int(self.alpha) if self.alpha.is_integer() else self.alpha
        own = {"r": self.rank, "lora_alpha": alpha, "lora_dropout": self.dropout, "use_rslora": self.rslora}
        return {TYPE: "LORA", **own, "target_modules": self.target_modules, "use_dora": self.kind == "dora"}

    @property
    def prepared_start(self) -> PreparedStart | None:
        """How the adapter starts, where that is computed before training; ``path`` is then where it lies."""
        return None if self.peft is None else prepared_start(self.config)

    @property
    def subtracts_start(self) -> bool:
        """Whether the model computes W + s (B A - B0 A0): what it starts from is taken away from what it adds."""
        start = self.prepared_start
        return start is not None and start.is_subtracted

    @property
    def drops_out(self) -> bool:
        """Whether parts of it are left out at random while it is trained."""
        return bool(self.dropout) or (self.peft is not None and drops_out(self.peft) is not None)


class RouterBlock(Block):
    balance_coef: NonNegativeFloat = 0.0
    """Weight of the sequence-wise load-balancing loss (arXiv 2412.19437, eq. 17-20), a mean over layers and trained
    sequences: 1 where all experts get as much."""
    z_coef: NonNegativeFloat = 0.0
    """Weight of the squared log-sum-exp of the router's logits (arXiv 2202.08906, eq. 5)."""

    @property
    def is_on(self) -> bool:
        """Whether there is a loss on the router."""
        return bool(self.balance_coef or self.z_coef)


class ModelBlock(Block):
    path: str | None = None
    """A Hugging Face directory or hub id. Absent: a new model of `architecture`."""
    revision: str | None = None
    """Of the hub id."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of what computes, is synced and exported. Weights that are trained, and adapters, are kept in float32."""
    architecture: dict[str, Any] | None = None
    """Fields of a transformers config, with `model_type`: the policy starts from random weights."""
    characters: str | None = None
    """Characters of the tokenizer made for a new model, a token each."""
    chat_template: str | None = None
    """A Jinja template, or a file that holds one; overrides the tokenizer's."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """What the chat template reads, e.g. {enable_thinking: false}: in all of the policy's training and evaluation, and
    from then on in `final/`."""
    trust_remote_code: bool = False
    """Run code that the repositories of the policy, `reference.path`, `teacher.path` and `algorithm.critic.path`
    bring."""
    max_pixels: PositiveInt | None = None
    """Width times height of a picture in the data; a larger one is scaled down, in its shape, where it is read. What
    the model's own image processor does with its size comes on top."""
    train: tuple[Part, ...] = ("language",)
    """Parts of a vision-language model that are trained, or have an adapter; the others stay as they are: language,
    projector (between tower and language model), vision (the tower), of a model that hears audio (its tower)."""
    learning_rates: dict[Part, PositiveFloat] = Field(default_factory=dict)
    """Peaks of parts in the place of trainer.learning_rate, e.g. {vision: 1e-6}; they take its schedule."""
    adapter: AdapterBlock | None = None
    """Train an adapter and leave the model as it is."""
    expand: ExpandBlock | None = None
    """Train new layers between those of the model, which stay as they are (LLaMA Pro, arXiv 2401.02415)."""
    router: RouterBlock = RouterBlock()
    """Mixture of experts: losses on the router, beside the algorithm's."""
    liger: bool = False
    """Liger's kernels (arXiv 2410.10989) in the policy's trainer and its reference, where they have GPUs: norms, MLPs,
    rotary embeddings, and logprobs where no entropies are wanted (sft has no metric `entropy` then)."""

    def conflicts(self) -> Iterator[Conflict]:
        if not self.train:
            yield Conflict(("train",), "is empty: name what is trained: language, projector, vision")
        for part in self.learning_rates:
            if part not in self.train:
                yield Conflict((f"learning_rates.{part}", "train"), f"{part} is not trained: add it to train")
