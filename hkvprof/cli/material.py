"""What benchmark prompts are made of: prose, and the pictures of the embedded model's generator."""

from __future__ import annotations

from typing import Any

from hkvprof.bench.prompts import Material

_IMAGES_PER_SCENE = 16
_PIXELS = 448
"""Side of an image for other models than tinyvl, whose images have 112."""
_SCENES_PER_ROW = 10_000


def prose() -> Material:
    """Held-out paragraphs of the long-text tasks."""
    from hkvprof.evaluate.longtext import JOINT, paragraphs

    return Material(
        "Read this and answer the question after it.", JOINT.join(paragraphs("heldout"))
    )


def pictures(enlarged: bool) -> Material:
    """Images with their captions; then tinyvl's own words or, for enlarged ones, prose."""

    def images(row: int, count: int) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = []
        for number, first in enumerate(range(0, count, _IMAGES_PER_SCENE)):
            seed = row * _SCENES_PER_ROW + number
            parts += _scene(seed, min(_IMAGES_PER_SCENE, count - first), enlarged)
        return parts

    if enlarged:
        return Material(prose().opening, prose().text, images)
    question = "read row B of image #1"
    return Material(question, f"{question} " * 8, images)


def _scene(seed: int, images: int, enlarged: bool) -> list[dict[str, Any]]:
    """Images and captions of a held-out sample, without its question."""
    from hkvprof.testbed.generator import make_sample

    sample = make_sample("ocr", seed, images=images, split="heldout")
    parts = [dict(part) for part in sample.messages[0]["content"][:-1]]
    for part in parts:
        if enlarged and part["type"] == "image":
            part["image"] = part["image"].resize((_PIXELS, _PIXELS), resample=0)
    return parts
