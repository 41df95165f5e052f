"""The code in a model card: how transformers, PEFT and vLLM load what is in its directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlflow.data.processor_files import PROCESSOR_FILES
from rlflow.recipe import ALGORITHMS
from rlflow.recipe.adapter_files import base_of, is_adapter, read_config
from rlflow.recipe.peft_methods import is_plain_lora, lora_kind

HERE = 'path = "."  # this directory, or its id on a hub'
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM's values of max_lora_rank."""

GENERATE = """\
{prompt}
inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
tokens = model.generate(**inputs, max_new_tokens={max_new_tokens})[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(tokens, skip_special_tokens=True))"""

MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

{here}
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
{generate}"""

GENERATE_FROM_PICTURES = """\
content = [{part}, {{"type": "text", "text": "What is this?"}}]
messages = [{{"role": "user", "content": content}}]
options = {{"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}}
inputs = processor.apply_chat_template(messages, **options)
tokens = model.generate(**inputs, max_new_tokens={max_new_tokens})[0, inputs["input_ids"].shape[1] :]
print(processor.decode(tokens, skip_special_tokens=True))"""

MODEL_OF_PICTURES = """\
{library}from transformers import {auto}, AutoProcessor

{here}
processor = AutoProcessor.from_pretrained(path)
model = {auto}.from_pretrained(path, dtype="auto")
{generate}"""

ADAPTER_OF_PICTURES = """\
from peft import PeftModel
{library}from transformers import {auto}, AutoProcessor

{here}
base = "{base}"
processor = AutoProcessor.from_pretrained(path)
model = PeftModel.from_pretrained({auto}.from_pretrained(base, dtype="auto"), path)
{generate}"""

ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

{here}
base = "{base}"
tokenizer = AutoTokenizer.from_pretrained(path)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), path)
{generate}"""

SCORE = """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

{here}
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForSequenceClassification.from_pretrained(path, dtype="auto")
{conversation}
inputs = tokenizer(conversation, return_tensors="pt", add_special_tokens=False)
print(model(**inputs).logits[0, 0].item())"""

SCORE_WITH_PICTURES = """\
{library}from transformers import AutoModelForSequenceClassification, AutoProcessor

{here}
processor = AutoProcessor.from_pretrained(path)
# {code}
model = AutoModelForSequenceClassification.from_pretrained(path, dtype="auto"{trusted})
content = [{part}, {{"type": "text", "text": "What is this?"}}]
{conversation}
inputs = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="pt")
{answer}"""
SCORED_ANSWER = """\
answer = [{"type": "text", "text": "A sign"}]
conversation = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]"""
CLASSIFIED = 'conversation = [{"role": "user", "content": content}]'
OF_PICTURES = {
    "part": '{"type": "image", "image": Image.open("picture.png")}',
    "library": "from PIL import Image\n",
    "auto": "AutoModelForImageTextToText",
}
OF_RECORDINGS = {
    "part": '{"type": "audio", "audio": "recording.wav"}',
    "library": "import librosa  # with which transformers reads sound\n",
    "auto": "AutoModelForSeq2SeqLM",
}
OWN_CODE = "transformers has no classifier of this architecture: its class is the code beside the weights"

CLASSIFY = """\
from transformers import pipeline

{here}
print(pipeline("text-classification", path)("I was charged twice."))"""

EMBED = """\
from sentence_transformers import SentenceTransformer

{here}
model = SentenceTransformer(path)
queries = model.encode(["How do I reset it?"], prompt_name="query")
documents = model.encode(["Hold the button for ten seconds."])
print(model.similarity(queries, documents))"""

RANK = """\
from sentence_transformers import CrossEncoder

{here}
print(CrossEncoder(path).rank("How do I reset it?", ["Hold the button for ten seconds.", "It is blue."]))"""

OF_SEQUENCES = {
    "classification": ("text-classification", "Classifier", CLASSIFY),
    "embedding": ("feature-extraction", "Embedding model", EMBED),
    "reranking": ("text-ranking", "Reranker", RANK),
    "yes_no": ("text-ranking", "Generative reranker", RANK),
}
"""A row's ``objective`` -> the hub's task, what the model is, and how it is used."""

MERGE_FIRST = (
    "It says something of whole sequences: merge it into its base, `rlflow export DIRECTORY OUTPUT --merge`. The card "
    "of what that writes has the code."
)
SCORE_RECIPE = """\
rewards:
  - {name: reward_model, args: {path: THIS_DIRECTORY}}"""

VLLM = """\
from vllm import LLM, SamplingParams

{here}
llm = LLM(path)
print(llm.{call}, SamplingParams(max_tokens={max_new_tokens}))[0].outputs[0].text)"""

VLLM_ADAPTER = """\
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

{here}
llm = LLM("{base}", tokenizer=path, enable_lora=True, max_lora_rank={rank})
adapter = LoRARequest("trained", 1, path)
print(llm.{call}, SamplingParams(max_tokens={max_new_tokens}), lora_request=adapter)[0].outputs[0].text)"""

PROMPT = """\
messages = [{"role": "user", "content": "Hello"}]
prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)"""

CONVERSATION = """\
messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello you"}]
conversation = tokenizer.apply_chat_template(messages, tokenize=False)"""

CHAT = 'chat([{"role": "user", "content": "Hello"}]'
CHAT_OF_PICTURES = (
    'chat([{"role": "user", "content": [{"type": "image_pil", "image_pil": Image.open("picture.png")}, '
    '{"type": "text", "text": "What is this?"}]}]'
)


def usage(directory: Path, recipe: dict[str, Any]) -> str:
    """Markdown with code for what the directory holds: a policy, an adapter or a reward model."""
    row = ALGORITHMS[recipe["algorithm"]["name"]]
    objective = row.objective
    if is_adapter(directory) and row.learning.head != "token":
        return MERGE_FIRST
    if objective in OF_SEQUENCES:
        if objective == "classification" and _reads_pictures(directory):
            logits = "print(dict(zip(model.config.id2label.values(), model(**inputs).logits[0].tolist())))"
            return _code("python", _with_pictures(directory, CLASSIFIED, logits))
        return _code("python", OF_SEQUENCES[objective][2].format(here=HERE))
    if is_reward_model(directory):
        return "\n\n".join([_code("python", _score(directory)), "In a recipe of rlflow:", _code("yaml", SCORE_RECIPE)])
    has_template = _has_chat_template(directory)
    prompt = PROMPT if has_template else 'prompt = "Hello"'
    call = CHAT if has_template else 'generate("Hello"'
    max_new_tokens = recipe["rollout"]["max_new_tokens"]
    generate = GENERATE.format(prompt=prompt, max_new_tokens=max_new_tokens)
    values: dict[str, Any] = {"here": HERE, "generate": generate, "call": call, "max_new_tokens": max_new_tokens}
    model, adapter, vllm, vllm_adapter = MODEL, ADAPTER, VLLM, VLLM_ADAPTER
    if _reads_pictures(directory):
        model, adapter = MODEL_OF_PICTURES, ADAPTER_OF_PICTURES
        vllm, vllm_adapter = (f"from PIL import Image\n{text}" for text in (VLLM, VLLM_ADAPTER))
        values |= OF_PICTURES
        values |= {"generate": GENERATE_FROM_PICTURES.format(**values), "call": CHAT_OF_PICTURES}
    elif has_template and hears_recordings(directory):
        model, adapter, vllm, vllm_adapter = MODEL_OF_PICTURES, ADAPTER_OF_PICTURES, "", ""
        values |= OF_RECORDINGS
        values["generate"] = GENERATE_FROM_PICTURES.format(**values)
    if not is_adapter(directory):
        blocks = [_code("python", model.format(**values))]
        return "\n\n".join(blocks + (["vLLM:", _code("python", vllm.format(**values))] if vllm else []))
    config = read_config(directory)
    values["base"] = base_of(config)
    blocks = [_code("python", adapter.format(**values))]
    if not is_plain_lora(config):
        blocks.append(
            f"vLLM has no {lora_kind(config)}: merge the adapter with `rlflow export DIRECTORY OUTPUT --merge`."
        )
    elif vllm_adapter:
        values["rank"] = next((rank for rank in VLLM_RANKS if rank >= config["r"]), config["r"])
        blocks += ["vLLM:", _code("python", vllm_adapter.format(**values))]
    return "\n\n".join(blocks)


def readers(directory: Path) -> str:
    """Which versions of transformers read the directory's config and tokenizer rightly, as a sentence."""
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    text = config.get("text_config", config)
    bases = {of["rope_theta"] for of in (text.get("rope_parameters") or {}).values() if isinstance(of, dict)}
    if len(bases) > 1 and "rope_local_base_freq" not in text:
        return (
            "Read by transformers 5 and newer: the bases of rotary embeddings differ between kinds of layers, and "
            "version 4's config has one."
        )
    both = "Files have the names of transformers 4.57 and those of 5: both read them, where they have the architecture."
    if text.get("attn_logit_softcapping") is None:
        return both
    return f'{both} Version 4 needs `attn_implementation="eager"`: its default leaves attention\'s logits uncapped.'


def sees_pictures(directory: Path) -> bool:
    """Whether it holds a vision-language model, or an adapter of one: both have its processor's files beside them."""
    path = directory / "config.json"
    has_tower = not path.is_file() or "vision_config" in json.loads(path.read_text(encoding="utf-8"))
    return (
        has_tower and not hears_recordings(directory) and any((directory / name).is_file() for name in PROCESSOR_FILES)
    )


def hears_recordings(directory: Path) -> bool:
    """Whether it holds a model that hears, or an adapter of one, which has its processor's files alone."""
    path = directory / "config.json"
    files = [directory / name for name in PROCESSOR_FILES if (directory / name).is_file()]
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        return "audio_config" in config and "vision_config" not in config and bool(files)
    return any("feature_extractor" in file.read_text(encoding="utf-8") for file in files)


def is_reward_model(directory: Path) -> bool:
    """Whether it holds a sequence classifier."""
    path = directory / "config.json"
    names = json.loads(path.read_text(encoding="utf-8")).get("architectures") or [] if path.is_file() else []
    return any(name.endswith("ForSequenceClassification") for name in names)


def _score(directory: Path) -> str:
    if _reads_pictures(directory):
        return _with_pictures(directory, SCORED_ANSWER, "print(model(**inputs).logits[0, 0].item())")
    plain = 'conversation = "Hello" + "Hello you"'
    return SCORE.format(here=HERE, conversation=CONVERSATION if _has_chat_template(directory) else plain)


def _with_pictures(directory: Path, conversation: str, answer: str) -> str:
    """Code for a classifier that sees."""
    path = directory / "config.json"
    is_own = path.is_file() and "auto_map" in json.loads(path.read_text(encoding="utf-8"))
    trusted, code = (", trust_remote_code=True", OWN_CODE) if is_own else ("", "as transformers has it")
    values = {"here": HERE, "trusted": trusted, "code": code, "conversation": conversation, "answer": answer}
    return SCORE_WITH_PICTURES.format(**values, **OF_PICTURES)


def _reads_pictures(directory: Path) -> bool:
    return sees_pictures(directory) and _has_chat_template(directory)


def _has_chat_template(directory: Path) -> bool:
    if (directory / "chat_template.jinja").is_file():
        return True
    config = directory / "tokenizer_config.json"
    return config.is_file() and "chat_template" in json.loads(config.read_text(encoding="utf-8"))


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"
