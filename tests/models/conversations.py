"""Conversations for tests of processors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

Messages = list[dict[str, Any]]


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A smooth picture with some noise."""
    across = np.linspace(0, 255, width)[None, :, None]
    down = np.linspace(255, 0, height)[:, None, None]
    noise = np.random.default_rng(seed).integers(-40, 40, (height, width, 3))
    pixels = (across + down) / 2 + noise + np.array([0, 20, -20])
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def user(*parts: Any) -> dict[str, Any]:
    """A user's message of strings and pictures."""
    return {
        "role": "user",
        "content": [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image", "image": part}
            for part in parts
        ],
    }


def assistant(text: str) -> dict[str, Any]:
    """A reply."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


VISION_CASES: dict[str, Callable[[], list[Messages]]] = {
    "no image": lambda: [[user("how many disc")]],
    "one image": lambda: [[user(picture(112, 112), "how many disc")]],
    "several images": lambda: [[user(*(picture(112, 56, i) for i in range(4)), "how many disc")]],
    "two turns": lambda: [
        [user(picture(56, 56), "how many disc"), assistant("2"), user(picture(84, 56, 1), "any")]
    ],
    "a batch padded on the left": lambda: [
        [user(picture(56, 56), "any")],
        [user("how many disc")],
        [user(picture(112, 168, 1), picture(56, 56, 2), "how many disc")],
    ],
    "sizes that are no multiple of a patch": lambda: [
        [user(picture(131, 77), picture(1, 1, 1), picture(61, 230, 2), "any")]
    ],
    "other modes than RGB": lambda: [
        [user(*(picture(70, 90, i, mode) for i, mode in enumerate(("L", "RGBA", "P"))), "any")]
    ],
}
"""Batches of conversations for the embedded model."""
