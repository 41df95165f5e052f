"""Pictures and videos in a vLLM engine: what goes in with a prompt, and what is forgotten with older weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlflow.data.image_processor import ImageProcessor
from rlflow.data.images import decode
from rlflow.data.video_archive import is_video, unpack
from rlflow.types import SampleRequest

if TYPE_CHECKING:
    import vllm

_OPTIONS: dict[str, Any] = {
    # The processor that repeats placeholders needs the tokenizer.
    "skip_tokenizer_init": False,
    # GiB of pictures as the processor made them, which the samples of a group share.
    "mm_processor_cache_gb": 1,
}


def picture_options(model_dir: str, trust_remote_code: bool) -> tuple[bool, dict[str, Any]]:
    """Whether the model has a vision tower, and what vLLM's EngineArgs need for that."""
    from transformers import AutoConfig

    from rlflow.actors.vision import sees

    if not sees(AutoConfig.from_pretrained(model_dir, trust_remote_code=trust_remote_code)):
        return False, {}
    videos = {} if ImageProcessor(model_dir).takes_videos else {"video": 0}
    from vllm import EngineArgs

    # Their mean and deviation would lie in the model, where a start without weights writes random numbers over them.
    known = hasattr(EngineArgs, "mm_device_do_normalize")
    limits = {"limit_mm_per_prompt": {"audio": 0} | videos}
    return True, _OPTIONS | limits | ({"mm_device_do_normalize": False} if known else {})


def prompt_of(llm: vllm.LLM, request: SampleRequest, *, salt: str) -> Any:
    """A request's prompt as vLLM takes it.

    Args:
        salt: Of the cache of what was read: prompts of other salts share nothing.

    Raises:
        ValueError: The model reads no pictures, or vLLM writes other tokens in the place of them than training sees.
    """
    from vllm.inputs import TokensPrompt, tokens_input

    if not request.images:
        return tokens_input(request.token_ids.tolist(), cache_salt=salt)
    assert request.engine_token_ids is not None, "a request with pictures has their placeholders"
    prompt = TokensPrompt(
        prompt_token_ids=request.engine_token_ids.tolist(),
        multi_modal_data=_seen(request.images),
        # The frames are those that training sees.
        mm_processor_kwargs={"do_sample_frames": False} if any(map(is_video, request.images)) else None,
        cache_salt=salt,
    )
    made: Any
    (made,) = llm.llm_engine.renderer.render_cmpl([prompt])
    if made["prompt_token_ids"] != request.token_ids.tolist():
        raise ValueError(
            f"vLLM makes {len(made['prompt_token_ids'])} tokens of a prompt with pictures, and the model's processor "
            f"{len(request.token_ids)}: they read it otherwise. Set rollout.engine: torch"
        )
    return made


def _seen(images: Sequence[bytes]) -> dict[str, list[Any]]:
    """Pictures as PIL's; videos as frames, uint8 [frames, H, W, 3], with what is known of their times."""
    videos = [unpack(image) for image in images if is_video(image)]
    pixels = [np.stack([np.asarray(decode(frame)) for frame in video.frames]) for video in videos]
    times = [video.metadata() | {"do_sample_frames": False} for video in videos]
    pictures = [decode(image) for image in images if not is_video(image)]
    seen = {"image": pictures, "video": list(zip(pixels, times, strict=True))}
    return {modality: items for modality, items in seen.items() if items}


def forget_pictures(llm: vllm.LLM) -> None:
    """Drops the features that an older tower made: vLLM keeps them by picture, whatever its weights are."""
    llm.llm_engine.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()
