"""Profiles on a hub: pushed and pulled over loopback, pinned to commits, refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from hkvprof.cli import run
from hkvprof.errors import ProfileError, UsageError
from hkvprof.profile import hub
from hkvprof.profile.hub import FILE, HubAddress, fetch, on_hub, publish
from hkvprof.profile.record import load_profile
from tests.models_for_tests import apply, random_llama, token_ids
from tests.profile.loopback_hub import TOKEN, LoopbackHub, asked_hub
from tests.profiles import make_profile

TINYVL = Path("profiles/tinyvl.hkv.safetensors")


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    """A hub that is asked, with an empty cache and a token."""
    with asked_hub(monkeypatch, tmp_path / "cache") as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.mark.parametrize("text", ["hf:a/b", "a/b", "hf:some.one/a-b_c.d"])
def test_addresses(text: str) -> None:
    assert HubAddress.parse(text) == HubAddress(text.removeprefix("hf:"), "main")
    assert HubAddress.parse(f"{text}@refs/pr/1").revision == "refs/pr/1"
    assert str(HubAddress.parse(f"{text}@v1")) == f"hf:{text.removeprefix('hf:')}@v1"


@pytest.mark.parametrize("text", ["hf:", "name", "a/b/c", "a/b@", "../b", "a/b@-x", "a b/c"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected owner/name"):
        HubAddress.parse(text)


def test_only_what_says_so_is_on_the_hub() -> None:
    assert on_hub("hf:a/b")
    assert not on_hub("a/b")
    assert not on_hub(Path("hf:a/b"))


def test_a_profile_comes_back_as_it_was_pushed(loopback: LoopbackHub) -> None:
    made = publish("me/mine", {FILE: TINYVL.read_bytes(), "README.md": b"# Mine\n"}, "Add", False)
    assert loopback.tree("me/mine", made.revision) is not None
    fetched = fetch("hf:me/mine")
    assert fetched.address == made
    assert str(fetched) == f"hf:me/mine@{made.revision}/{FILE}"
    assert fetched.path.read_bytes() == TINYVL.read_bytes()


def test_a_revision_stays_what_it_was(loopback: LoopbackHub) -> None:
    first = publish("me/mine", {FILE: b"one"}, "Add", False)
    second = publish("me/mine", {FILE: b"two"}, "Change", False)
    assert first != second
    assert fetch(str(first)).path.read_bytes() == b"one"
    assert fetch("hf:me/mine").path.read_bytes() == b"two"
    assert fetch("hf:me/mine").address == second


def test_what_is_in_the_cache_needs_no_hub(
    loopback: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = publish("me/mine", {FILE: b"one"}, "Add", False)
    fetch("hf:me/mine")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(loopback.asked)
    assert fetch("hf:me/mine").address == made
    assert len(loopback.asked) == asked
    with pytest.raises(ProfileError, match="not in the cache, and the hub cannot be asked"):
        fetch("hf:me/other")


def test_why_a_profile_cannot_be_had(
    loopback: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    loopback.create("me/empty")
    with pytest.raises(ProfileError, match=f"hf:me/empty@main: it holds no {FILE}"):
        fetch("hf:me/empty")
    with pytest.raises(ProfileError, match="hf:me/none@main: there is no such repository"):
        fetch("hf:me/none")
    with pytest.raises(ProfileError, match="no such revision"):
        fetch("hf:me/empty@v9")
    publish("me/closed", {FILE: b"x"}, "Add", True)
    assert loopback.private == {"me/closed"}
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(ProfileError, match="or it is private"):
        fetch("hf:me/closed")
    with pytest.raises(ProfileError, match="the hub refuses"):
        publish("me/closed", {FILE: b"y"}, "Change", False)


def test_a_hub_that_names_no_commits_is_refused(loopback: LoopbackHub) -> None:
    publish("me/mine", {FILE: b"one"}, "Add", False)
    loopback.names_commits = False
    with pytest.raises(ProfileError, match="me/mine"):
        fetch("hf:me/mine")


@pytest.mark.parametrize("name", ["me/mine@v1", "hf:me/mine"])
def test_one_pushes_to_a_name_alone(name: str, loopback: LoopbackHub) -> None:
    with pytest.raises(UsageError, match="owner/name alone"):
        publish(name, {FILE: b"x"}, "Add", False)
    assert not loopback.repositories


def test_the_receipt_names_the_commit(loopback: LoopbackHub, tmp_path: Path) -> None:
    from hkvprof.calibration.uniform import uniform_profile

    model = random_llama()
    path = uniform_profile(model, "static").save(tmp_path / "mine.safetensors")
    made = publish("me/mine", {FILE: path.read_bytes()}, "Add", False)
    ids = token_ids(1, 200)
    for profile, named in (
        ("hf:me/mine", f"{made}/{FILE}"),
        (path, "mine.safetensors"),
        (load_profile(path), ""),
    ):
        with apply(model, profile, budget=0.3) as handle:
            model.generate(ids, max_new_tokens=2, do_sample=False)
            assert handle.receipt().profile == named
            assert handle.receipt().to_json()["profile"] == named


def test_apply_checks_what_it_fetches(loopback: LoopbackHub) -> None:
    publish("me/other", {FILE: make_profile().to_bytes()}, "Add", False)
    publish("me/broken", {FILE: b"no profile"}, "Add", False)
    model = random_llama()
    with pytest.raises(ProfileError, match="another model"):
        apply(model, "hf:me/other")
    with pytest.raises(ProfileError, match="not a readable profile"):
        apply(model, "hf:me/broken")


def test_push_and_pull(
    loopback: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["push", str(TINYVL), "me/tinyvl", "--license", "apache-2.0"]) == 0
    pinned = capsys.readouterr().out.strip()
    commit, tree = loopback.repositories["me/tinyvl"][-1]
    assert pinned == f"hf:me/tinyvl@{commit}"
    assert sorted(tree) == ["README.md", "curves.png", FILE]
    assert loopback.cards == [tree["README.md"].decode()]
    assert tree["curves.png"].startswith(b"\x89PNG")
    target = tmp_path / "got.safetensors"
    assert run(["pull", "me/tinyvl", "-o", str(target)]) == 0
    assert capsys.readouterr().out.strip() == pinned
    assert target.read_bytes() == TINYVL.read_bytes()
    assert run(["pull", pinned, "-o", str(target)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert run(["pull", pinned, "-o", str(target), "--force"]) == 0


def test_nothing_unsound_is_pushed_or_written(
    loopback: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad"
    bad.write_bytes(b"no profile")
    assert run(["push", str(bad), "me/bad"]) == 1
    assert run(["push", str(TINYVL), "me/bad", "--license", "Very Own"]) == 2
    assert "expected an identifier" in capsys.readouterr().err
    assert not loopback.repositories
    publish("me/bad", {FILE: b"no profile"}, "Add", False)
    assert run(["pull", "me/bad", "-o", str(tmp_path / "got")]) == 1
    assert not (tmp_path / "got").exists()


def test_an_unknown_error_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(ProfileError, match=r"\(RuntimeError: first line\)") as caught:
        hub.fetch("hf:a/b")
    assert "second" not in str(caught.value)
