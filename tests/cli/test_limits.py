"""Full disks, missing rights, no memory, broken downloads: one clear line each, nothing left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hkvprof.cli import run
from hkvprof.cli.errors import describe
from hkvprof.evaluate.journal import Journal
from hkvprof.models.sources import TINYVL_FOLDER
from tests.cli.limited import answer

ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux's")


def limited(limit: str, folder: Path, *prefix: str) -> dict[str, Any]:
    """What commands said under a limit (tests/cli/limited.py)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "tests.cli.limited", limit, str(folder)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def one_line(said: list[Any], code: int, *words: str) -> None:
    """The exit code, and after lines of progress one with all words."""
    assert said[0] == code, said
    lines = said[1].strip().splitlines()
    last = lines[-1]
    assert [line for line in lines if line.startswith("error: ")] == [last], said[1]
    assert "Traceback" not in said[1], said[1]
    for word in words:
        assert word in last, said[1]


@pytest.fixture(params=["limit", pytest.param("tmpfs", marks=pytest.mark.slow)])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder in which files cannot grow beyond 2 KiB, or a disk of 8 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "tmpfs":
        mount = shutil.which("mount")
        options = ["-t", "tmpfs", "-o", "size=8k", "hkvprof", str(folder)]
        done = subprocess.run([mount, *options], capture_output=True) if mount else None
        if done is None or done.returncode:
            pytest.skip("a tmpfs cannot be mounted without root")
    yield folder
    if request.param == "tmpfs":
        subprocess.run(["umount", str(folder)], check=True)


@linux
def test_a_full_disk(disk: Path) -> None:
    said = limited("full_disk", disk)
    reason = "No space left" if os.path.ismount(disk) else "File too large"
    one_line(said["merge"], 1, "cannot write", "p.safetensors", reason, "Free some space")
    one_line(said["journal"], 1, "cannot write", "answers.jsonl", reason, "goes on from")
    one_line(said["gguf"], 1, "writable cache folder", "HKVPROF_CACHE")
    assert any(word in said["compiler"] for word in ("failed", "cannot", "does not run"))
    left = [path.name for path in disk.rglob("*") if path.is_file()]
    assert sorted(left) == ["answers.jsonl", "conditions.json"], left
    elsewhere = shutil.copytree(disk / "eval", disk.parent / "copy")
    answers = Journal(elsewhere, {"a": 1}).answers
    assert len(answers) < 4
    assert all(one == answer(i) for i, one in enumerate(answers)), "half an answer is none"


def test_a_journal_cut_off_by_a_full_disk_goes_on(tmp_path: Path) -> None:
    Journal(tmp_path, {"a": 1}).add([answer(1)])
    with (tmp_path / "answers.jsonl").open("ab") as stream:
        stream.write(b'{"sample": "s2", "text": "xxx')
    again = Journal(tmp_path, {"a": 1})
    assert [one.sample for one in again.answers] == ["s1"]
    again.add([answer(2)])
    assert [one.sample for one in Journal(tmp_path, {"a": 1}).answers] == ["s1", "s2"]


@linux
def test_missing_rights(tmp_path: Path) -> None:
    prefix: tuple[str, ...] = ()
    if os.geteuid() == 0:
        powers = "-dac_override,-dac_read_search"
        prefix = ("setpriv", f"--bounding-set={powers}", f"--inh-caps={powers}")
        if shutil.which("setpriv") is None:
            pytest.skip("root, and no setpriv to give up root's rights to files")
    said = limited("no_rights", tmp_path, *prefix)
    one_line(said["inspect"], 2, "secret.safetensors", "is not readable")
    one_line(said["eval of a secret"], 2, "secret.safetensors", "is not readable")
    for verb, word in (("merge", "into"), ("eval", "into"), ("bench", "to")):
        one_line(said[verb], 2, f"cannot write {word}", "closed")
    one_line(said["gguf"], 1, "writable cache folder", "Permission denied")
    assert "Permission denied" in said["compiler"]
    assert list((tmp_path / "closed").iterdir()) == []


@linux
def test_no_memory(tmp_path: Path) -> None:
    said = limited("little_memory", tmp_path)
    one_line(said["bench"], 1, "out of memory", "--dtype bfloat16")
    one_line(said["inspect"], 1, "out of memory")


def test_no_memory_on_a_device_while_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not "the checkpoint cannot be loaded": the same words as anywhere else."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    import hkvprof

    def no_room(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    monkeypatch.setattr(Qwen2_5_VLForConditionalGeneration, "from_pretrained", no_room)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        hkvprof.load_model("tinyvl")
    text, code = describe(caught.value)
    assert code == 1
    assert text.startswith("error: out of memory")


def test_a_shard_that_was_not_downloaded_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint of two shards, the second cut off, then missing."""
    import hkvprof

    model, _ = hkvprof.load_model("tinyvl", dtype="float32", device="cpu")
    folder = tmp_path / "model"
    shutil.copytree(TINYVL_FOLDER, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(folder, max_shard_size="6MB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    profile = ROOT / "profiles" / "tinyvl.hkv.safetensors"
    capsys.readouterr()
    for damage in ("cut", "missing"):
        if damage == "cut":
            shards[-1].write_bytes(shards[-1].read_bytes()[:-1000])
        else:
            shards[-1].unlink()
        options = ["--model", str(folder), "--profile", str(profile), "--tasks", "tinyvl"]
        code = run(["eval", *options])
        errors = capsys.readouterr().err.strip().splitlines()
        assert code == 1, errors
        last = errors[-1]
        assert last.startswith(f"error: cannot load a model from {folder}"), errors
        assert not any("Traceback" in line for line in errors)
