"""Files for a dry run at the shape of Qwen2.5-VL-7B, without its weights (docs/calibrate-7b.md).

    python -m tools.studies.dry_run_7b out/7b
    hkvprof calibrate --model out/7b/model --data out/7b/samples --dtype bfloat16 --dry-run

The config is that of the 7B; tokenizer and image processor are tinyvl's, whose pictures cost a
token per 28 x 28 pixels, as Qwen2.5-VL's do. Samples are noise: what a dry run counts is their
size.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from hkvprof.models.sources import TINYVL_FOLDER

TEXT = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    "max_position_embeddings": 128000, "max_window_layers": 28,
    "layer_types": ["full_attention"] * 28,
    "rope_parameters": {"mrope_section": [16, 24, 24], "rope_theta": 1e6, "rope_type": "default"},
}  # fmt: skip
VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
    "out_hidden_size": 3584, "fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112,
}  # fmt: skip
"""huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct, config.json."""
WIDTH, HEIGHT = 1008, 756
"""Pixels of a picture: 36 x 27 tokens."""


def write_model(folder: Path) -> None:
    """A checkpoint without weights."""
    shutil.copytree(TINYVL_FOLDER, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= TEXT
    config["vision_config"] |= VISION
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def write_samples(folder: Path, count: int) -> None:
    """`count` samples of one to eight pictures, a question, a reply and a later question."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(8):
        noise = rng.integers(0, 256, (HEIGHT // 28, WIDTH // 28, 3), dtype=np.uint8)
        picture = Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)
        picture.save(folder / "images" / f"{number}.png")
    lines = [json.dumps(sample(number)) for number in range(count)]
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")


def sample(number: int) -> dict[str, object]:
    """One line of samples.jsonl."""
    pictures = [{"type": "image", "path": f"images/{k}.png"} for k in range(1 + number % 8)]
    cell = f"{'ABCDEF'[number // 8 % 6]}{1 + number // 48}"
    question = {"type": "text", "text": f"what is at {cell} of image #1"}
    return {
        "id": f"s{number:03d}", "task": "look", "reply": "red disc",
        "messages": [{"role": "user", "content": [*pictures, question]}],
        "followups": [{"question": "what is at A1 of image #1", "reply": "red disc"}],
    }  # fmt: skip


def main() -> None:
    """Write both folders."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    options = parser.parse_args()
    write_model(options.folder / "model")
    write_samples(options.folder / "samples", options.samples)


if __name__ == "__main__":
    main()
