"""Which processor a checkpoint gets.

Text-only models need a tokenizer alone. Vision models get transformers' AutoProcessor, which takes
images without torchvision for most architectures; where it needs torchvision and that is missing,
Qwen-VL's images go through Pillow here, and others are refused with the reason.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hkvprof.errors import ModelError
from hkvprof.lazy import install_hint
from hkvprof.models.architectures import adapter_for
from hkvprof.models.processing import ChatProcessor, TextProcessor
from hkvprof.models.sources import needs_own_code
from hkvprof.models.vision import (
    AutoVisionProcessor,
    PillowVisionProcessor,
    hide_broken_torchvision,
    torchvision_problem,
    torchvision_works,
)


def load_processor(source: str, config: Any, local: bool) -> ChatProcessor:
    """The processor that fits a checkpoint; `local` forbids downloads.

    Raises ModelError if none can be built.
    """
    from transformers import AutoProcessor, AutoTokenizer

    if getattr(config, "vision_config", None) is None:
        return TextProcessor(
            AutoTokenizer.from_pretrained(source, local_files_only=local, trust_remote_code=False),
            config,
        )
    hide_broken_torchvision()
    if not torchvision_works() and adapter_for(config).pillow:
        image_processor = pillow_image_processor(source, adapter_for(config).pillow, local)
        tokenizer = AutoTokenizer.from_pretrained(
            source, local_files_only=local, trust_remote_code=False
        )
        return PillowVisionProcessor(image_processor, tokenizer, config)
    try:
        processor = AutoProcessor.from_pretrained(
            source, local_files_only=local, trust_remote_code=False
        )
    except Exception as error:  # for want of a video processor transformers raises nearly anything
        if torchvision_works() or needs_own_code(error):
            raise
        raise ModelError(
            f"the processor of {source} does not load without torchvision "
            f"({torchvision_problem()}): {install_hint('video')}. "
            f"transformers says: {_first_line(error)}"
        ) from error
    return AutoVisionProcessor(processor, config)


def pillow_image_processor(source: str, family: str, local: bool) -> Any:
    """The Pillow variant of a Qwen-VL image processor, from its saved settings.

    Raises ModelError for a checkpoint whose image processor's name does not begin with `family`.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    settings = _load_json(source, "processor_config.json", local).get("image_processor")
    settings = settings or _load_json(source, "preprocessor_config.json", local)
    kind = str(settings.get("image_processor_type", ""))
    if not kind.startswith(family):
        raise ModelError(
            f"{source} uses the image processor {kind or 'unknown'}, which needs torchvision "
            f"({torchvision_problem()}): {install_hint('video')}"
        )
    known = {k: v for k, v in settings.items() if k != "image_processor_type"}
    return Qwen2VLImageProcessorPil(**known)


def _load_json(source: str, name: str, local: bool) -> dict[str, Any]:
    from transformers.utils import cached_file

    path = cached_file(
        source, name, local_files_only=local, _raise_exceptions_for_missing_entries=False
    )
    return dict(json.loads(Path(path).read_text(encoding="utf-8"))) if path else {}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
