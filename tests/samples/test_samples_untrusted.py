"""Sample sets from strangers: where their paths lead, and what counts as a picture."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hkvprof.errors import SampleError, UsageError
from hkvprof.samples import hub as sample_hub
from hkvprof.samples import images
from hkvprof.samples.parse import MAX_PARTS
from hkvprof.samples.read import load_samples, open_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (4, 3)).save(data / "a.png")
    Image.new("RGB", (4, 3)).save(tmp_path / "secret.png")
    return data


def write(folder: Path, *paths: str, text: str = "what?") -> Path:
    parts = [{"type": "image", "path": path} for path in paths]
    content = [*parts, {"type": "text", "text": text}]
    record = {"id": "s", "task": "t", "messages": [{"role": "user", "content": content}]}
    (folder / "samples.jsonl").write_text(json.dumps(record))
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(SampleError) as caught:
        load_samples(folder)
    return str(caught.value)


# Paths


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("loop.png", "is no path"),
        ("pipe", "no image file"),
        ("a" * 300, "cannot read"),
        ("a/" * 2000, "no image file|cannot read"),
        ("away/secret.png", "leads out of"),
        ("a.png/../../secret.png", "leads out of"),
        ("a.png\0", "printable"),
        ("\x1b[2Ja.png", "printable"),
        ("\ud800.png", "half a character"),
        ("a\u202egnp.png", "printable"),
    ],
    ids=ascii,
)
def test_paths_that_are_no_image_of_the_folder(folder: Path, path: str, why: str) -> None:
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "away").symlink_to(folder.parent)
    os.mkfifo(folder / "pipe")
    message = refused(write(folder, path))
    assert any(word in message for word in why.split("|")), message
    assert message.isprintable()


def test_a_folder_whose_samples_lie_elsewhere(folder: Path, tmp_path: Path) -> None:
    """Its images would be looked for in this folder, and errors would quote the other file."""
    other = tmp_path / "other"
    other.mkdir()
    write(other)
    (folder / "samples.jsonl").symlink_to(other / "samples.jsonl")
    assert "leads out of" in refused(folder)
    assert len(load_samples(folder / "samples.jsonl").samples) == 1, "asked for by name"


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "x" * 300 + "/y"], ids=len)
def test_names_that_are_no_path(name: str) -> None:
    with pytest.raises(UsageError):
        load_samples(name)


def test_parts_are_counted_before_an_image_is_opened(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "find_image", lambda *_: pytest.fail("an image was opened"))
    message = refused(write(folder, *["a.png"] * MAX_PARTS))
    assert f"at most {MAX_PARTS} parts and frames in all, found {MAX_PARTS + 1}" in message


# Pictures


def encoded(kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (6, 4), (200, 10, 10)).save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_the_formats_of_pictures(folder: Path, kind: str) -> None:
    (folder / "picture").write_bytes(encoded(kind))
    (sample,) = load_samples(write(folder, "picture")).samples
    image = open_images(sample)[0]["content"][0]["image"]
    assert (image.mode, image.size) == ("RGB", (6, 4))
    assert image.getpixel((1, 1))[0] > 150


@pytest.mark.parametrize("kind", ["EPS", "ICO", "PCX", "TGA", "SGI", "PDF", "XBM", "JPEG2000"])
def test_other_formats_are_refused_by_the_list(folder: Path, kind: str) -> None:
    """PIL opens EPS by running Ghostscript."""
    if kind == "XBM":
        data = b"#define im_width 1\n#define im_height 1\nstatic char im_bits[] = {\n0x00\n};\n"
    else:
        data = encoded(kind)
    (folder / "picture.png").write_bytes(data)
    assert "expected one of PNG, JPEG" in refused(write(folder, "picture.png"))


def test_eps_runs_no_program(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was run"))
    with pytest.raises(SampleError, match="not a readable image"):
        images.decode(encoded("EPS"), "x.png")


def test_a_picture_of_several_frames_and_a_turned_one(folder: Path) -> None:
    frames = [Image.new("RGB", (6, 4), (c, 0, 0)) for c in (250, 0)]
    frames[0].save(folder / "two.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder / "turned.jpg").write_bytes(encoded("JPEG", exif=exif))
    (sample,) = load_samples(write(folder, "two.gif", "turned.jpg")).samples
    first, turned, _ = open_images(sample)[0]["content"]
    assert first["image"].getpixel((0, 0))[0] > 200
    assert turned["image"].size == (4, 6)


def test_a_file_that_grows_after_the_check(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (sample,) = load_samples(write(folder, "a.png")).samples
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 10)
    with pytest.raises(SampleError, match="more than 10 bytes"):
        open_images(sample)


def test_memory_that_runs_out_is_no_damaged_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "open", no_room)
    with pytest.raises(MemoryError):
        images.decode(encoded("PNG"), "x.png")


# Datasets


@pytest.mark.parametrize("written", ["{outside}", "../secret.png", "/etc/hostname", "a\0b"])
def test_rows_cannot_name_files_elsewhere(folder: Path, written: str) -> None:
    path = written.format(outside=folder.parent / "secret.png")
    with pytest.raises(SampleError, match="no image file of this dataset"):
        sample_hub._images({"image": {"bytes": None, "path": path}}, (folder,))


def test_rows_may_name_files_of_the_dataset(folder: Path) -> None:
    for path in ("a.png", str(folder / "a.png")):
        found = sample_hub._images({"image": {"bytes": None, "path": path}}, (folder,))
        assert found == [(folder / "a.png").read_bytes()]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"_data_files": 3}', '{"_data_files": [{}]}'])
def test_a_damaged_saved_dataset_is_one_error(tmp_path: Path, text: str) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "state.json").write_text(text)
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(SampleError, match="not a readable saved dataset"):
        load_samples(tmp_path)
