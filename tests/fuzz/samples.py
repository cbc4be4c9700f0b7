"""Folders of samples: lines, image files, and paths that lead where they should not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

from hkvprof.samples.read import FILE_NAME, LoadedSamples, load_samples, open_images
from tests.fuzz import images, jsons
from tests.fuzz.raw import bytes_mutated

PATHS = [
    "..", ".", "", "/", "../secret.png", "images/../../secret.png", "/etc/hostname", "~/x.png",
    "images", "pipe", "out.png", "loop.png", "outside/secret.png", "images/grey.png/../x",
    "file:///etc/hostname", "http://example.com/x.png", "images\\grey.png", "images/grey.png\0",
    "a" * 300, "a/" * 2000, "./images/grey.png", "images//grey.png", "images/grey.png ", "\ud800",
    "images/GREY.PNG", "inner.png", "../data/images/grey.png", "\x1b]0;x\x07", "é.png",
]  # fmt: skip


def _line(number: int, *names: str, **more: Any) -> dict[str, Any]:
    parts = [{"type": "image", "path": f"images/{name}"} for name in names]
    content = [*parts, {"type": "text", "text": 'What is "this"?, [a] {b}'}]
    return {"id": f"s{number}", "task": "ocr", "messages": [{"role": "user", "content": content}],
            **more}  # fmt: skip


class Samples:
    """Sample folders of a few lines."""

    def __init__(self, home: Path) -> None:
        """Lay out the folder, links and all, that every mutant changes in places."""
        self.images = images.seeds()
        self.folder = home / "data"
        (self.folder / "images").mkdir(parents=True)
        (home / "secret.png").write_bytes(self.images["grey.png"])
        (self.folder / "out.png").symlink_to(home / "secret.png")
        (self.folder / "outside").symlink_to(home)
        (self.folder / "loop.png").symlink_to(self.folder / "loop.png")
        (self.folder / "inner.png").symlink_to(self.folder / "images" / "grey.png")
        os.mkfifo(self.folder / "pipe")
        for name, data in self.images.items():
            (self.folder / "images" / name).write_bytes(data)
        self.changed = ""
        names = list(self.images)
        context = {"type": "text", "text": "prose, more prose", "modality": "context"}
        self.lines = [
            _line(0, *names[:3], reply="a"),
            _line(1, names[6], followups=[{"question": "q", "reply": "r"}]),
            {"id": "s2", "task": "text", "messages": [
                {"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "ho"},
                {"role": "user", "content": [context]}], "reply": None},
        ]  # fmt: skip

    def mutate(self, random: Random, folder: Path) -> None:
        """Write lines and, in half of the cases, one changed image that a line shows."""
        if self.changed:
            (self.folder / "images" / self.changed).write_bytes(self.images[self.changed])
            self.changed = ""
        lines: list[Any] = json.loads(json.dumps(self.lines))
        fate = random.random()
        if fate < 0.5:
            self.changed = random.choice(list(self.images))
            data = images.mutated(random, self.changed, self.images[self.changed])
            (self.folder / "images" / self.changed).write_bytes(data)
            lines = [_line(0, self.changed), *lines]
            lines[1]["id"] = "other"
        elif fate < 0.65:
            lines[0]["messages"][0]["content"][0]["path"] = random.choice(PATHS)
        else:
            at = random.randrange(len(lines))
            lines[at] = jsons.mutated(random, lines[at])
        text = "\n".join(jsons.text_of(random, line) for line in lines)
        data = text.encode("utf-8", "surrogatepass")
        if fate >= 0.95 and data:
            data = _odd(random, data)
        (self.folder / FILE_NAME).write_bytes(data)
        self.on_error = random.choice(["raise", "skip"])
        self.most = random.choice([None, 1, 2])

    def load(self, folder: Path) -> LoadedSamples:
        """As `calibrate` does."""
        return load_samples(self.folder, on_error=self.on_error, max_samples=self.most)  # type: ignore[arg-type]

    def use(self, random: Random, loaded: Any) -> None:
        """Decode every image; none may lie outside the folder."""
        from hkvprof.errors import SampleError

        for sample in loaded.samples:
            for message in sample.messages:
                for part in message["content"] if isinstance(message["content"], list) else []:
                    inside = Path(part.get("path", self.folder)).resolve()
                    assert inside.is_relative_to(self.folder.resolve()), inside
            try:
                opened = open_images(sample)
            except SampleError:
                continue
            assert len(opened) == len(sample.messages)

    def keep(self, target: Path) -> None:
        """Copy the folder, for whoever looks into a failure."""
        (self.folder / "pipe").unlink(missing_ok=True)
        shutil.copytree(self.folder, target, symlinks=True, dirs_exist_ok=True)
        os.mkfifo(self.folder / "pipe")


def _odd(random: Random, data: bytes) -> bytes:
    """Other encodings, line ends, lengths."""
    kind = random.randrange(8)
    if kind == 0:
        return data.decode("utf-8", "replace").encode("utf-16")
    if kind == 1:
        return b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n")
    if kind == 2:
        return data + b"\n" + data
    if kind == 3:
        return b"\n" * 10_000 + data
    if kind == 4:
        pattern = random.choice(
            [b"[],", b"{},", b'"",', b"1.5,", b'{"a":1},', b"[", b'{"a":', b"9"]
        )
        return b"[" + pattern * (random.choice([100_000, 3_000_000]) // len(pattern))
    if kind == 5:
        return b"\0" * random.choice([1, 100_000])
    if kind == 6:
        keys = ",".join(f'"k{number}":0' for number in range(random.choice([10, 50_000])))
        return f'{{{keys},"k0":1}}'.encode()
    return bytes_mutated(random, data, head=len(data))
