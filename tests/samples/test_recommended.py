"""`--data recommended:KIND` against a hub on loopback that has the public sets' files."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from hkvprof.errors import SampleError, UsageError
from hkvprof.samples import recommended
from hkvprof.samples.read import load_samples
from hkvprof.samples.recommended import SETS
from tests.profile.loopback_hub import LoopbackHub, asked_hub
from tests.samples.layouts.shown import encoded, load, shown


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    with asked_hub(monkeypatch, tmp_path / "cache") as hub:
        monkeypatch.chdir(tmp_path)
        yield hub


def parquet(rows: list[dict[str, Any]]) -> bytes:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), stream)
    return stream.getvalue()


def cauldron(count: int, colour: str = "red") -> bytes:
    """As the published files: `images` of bytes and path, `texts` of user, assistant, source."""
    shown = [{"bytes": encoded(colour), "path": None}]
    return parquet([
        {"images": shown, "texts": [{"user": f"{i}?", "assistant": "y", "source": "x"}]}
        for i in range(count)
    ])  # fmt: skip


def publish(hub: LoopbackHub) -> None:
    """The sets of two kinds; of some there are several files, and a split for tests."""
    files = {}
    for number, one in enumerate(SETS["documents"]):
        files[f"{one.folder}/train-00000-of-00002-abc.parquet"] = cauldron(6 + number)
        files[f"{one.folder}/train-00001-of-00002-abc.parquet"] = cauldron(9, "blue")
    hub.create("HuggingFaceM4/the_cauldron")
    hub.commit("HuggingFaceM4/the_cauldron", {**files, "README.md": b"x"})
    said = [{"role": "user", "content": "q?"}, {"role": "assistant", "content": "a."}]
    rows = [{"prompt": "q?", "prompt_id": str(i), "messages": said} for i in range(3)]
    (chats,) = SETS["text"]
    hub.create(chats.repository)
    names = ("test_gen-0", "train_gen-00000-of-00001", "train_sft-00000-of-00001")
    hub.commit(chats.repository, {f"data/{name}.parquet": parquet(rows) for name in names})


def test_a_kind_is_a_list_of_samples(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(hub)
    loaded = load_samples("recommended:documents,text", max_samples=8)
    assert loaded.tasks == {"docvqa": 2, "infographic_vqa": 2, "ultrachat_200k": 2, "visualmrc": 2}
    texts = {sample.task: shown(sample) for sample in loaded.samples}
    assert texts["docvqa"].startswith("user: [red]")
    assert texts["docvqa"].endswith("?\n= y")
    assert texts["ultrachat_200k"] == "user: q?\n= a."
    assert loaded.recognised.lines()[0] == (
        "recommended: documents: HuggingFaceM4/the_cauldron docvqa (scanned pages), 6 rows"
    )
    fetched = [asked for asked in hub.asked if asked.startswith("GET ") and "parquet" in asked]
    assert len(fetched) == 4, "one file of each set"
    assert not any("00001-of-00002" in asked or "_gen" in asked for asked in fetched)

    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = load_samples("recommended:documents,text", max_samples=8)
    assert again.digest == loaded.digest
    assert hub.asked == [], "what is in the cache is not asked for"
    monkeypatch.setattr(recommended, "DEFAULT_SAMPLES", 5)
    assert len(load_samples("recommended:documents").samples) == 5, "not all of thousands"


@pytest.mark.parametrize("source", ["recommended", "recommended:", "recommended:odd,text"])
def test_kinds_are_named_with_their_sets(source: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--data {source}: expected recommended:KIND") as caught:
        load_samples(source)
    for kind, sets in SETS.items():
        assert f"{kind} (" in str(caught.value)
        assert all(one.about in str(caught.value) for one in sets)


def test_what_is_here_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recommended").mkdir()
    (tmp_path / "recommended" / "a.txt").write_text("Some words.")
    monkeypatch.chdir(tmp_path)
    assert len(load_samples("recommended").samples) == 1


def test_what_the_hub_does_not_have_says_what_to_do(hub: LoopbackHub) -> None:
    with pytest.raises(SampleError, match=r"the_cauldron \(ai2d\) cannot be had from the hub"):
        load_samples("recommended:science")
    hub.create("HuggingFaceM4/the_cauldron")
    with pytest.raises(SampleError, match=r"no train-\*.parquet in ai2d"):
        load_samples("recommended:science")
    with pytest.raises(UsageError, match="--question is for pictures and texts without questions"):
        load("recommended:science", question="What?")
