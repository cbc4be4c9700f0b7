"""Every verb refuses bad outputs, budgets, profiles, tasks and data before it loads weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import transformers

from hkvprof.calibration.recipe import MEASURED
from hkvprof.calibration.rows import CONDITIONS, Conditions
from hkvprof.cli import app, run
from hkvprof.errors import ProfileError
from hkvprof.plugins.session import Arguments, Session
from hkvprof.profile.record import load_profile
from tests.cli.runs import save_samples
from tests.models_for_tests import random_llama
from tests.plugins.checkpoints import CHAT, save_checkpoint
from tests.samples.layouts.shown import paint, write


class WeightsError(Exception):
    """Weights were asked for."""


class Place:
    """A folder with a model, its profile, samples, and what is wrong with each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = save_checkpoint(folder / "model", CHAT)
        self.profile = self.model / "profile.safetensors"
        self.data = save_samples(folder / "data.jsonl", 8)
        (folder / "folder").mkdir()
        (folder / "file").write_text("x")
        (folder / "damaged").write_bytes(self.profile.read_bytes()[:-9])
        sound = load_profile(self.profile)
        grid = replace(sound.fingerprint.grid, head_dim=sound.fingerprint.grid.head_dim * 2)
        other = replace(sound, fingerprint=replace(sound.fingerprint, grid=grid))
        other.save(folder / "other.safetensors")
        (folder / "bad.jsonl").write_text('{"id": 1}')
        conditions = Conditions.of(sound.fingerprint, "float32", MEASURED)
        (folder / "rows").mkdir()
        (folder / "rows" / CONDITIONS).write_text(conditions.to_json())
        parts = [{"type": "image", "path": "red.png"}, {"type": "text", "text": "?"}]
        line = {"id": "a", "task": "t", "messages": [{"role": "user", "content": parts}]}
        paint(folder / "pictures" / "red.png", "red")
        write(folder / "pictures" / "samples.jsonl", [{**line, "reply": "red"}])
        (folder / "answers").mkdir()
        (folder / "answers" / "conditions.json").write_text(json.dumps({"steps": 7}))

    def fill(self, line: str) -> list[str]:
        """Words of a command; names in capitals become paths."""
        names = {
            "MODEL": self.model, "PROFILE": self.profile, "DATA": self.data,
            "DAMAGED": self.folder / "damaged", "OTHER": self.folder / "other.safetensors",
            "FOLDER": self.folder / "folder", "FILE": self.folder / "file",
            "UNDER": self.folder / "file" / "out", "BAD": self.folder / "bad.jsonl",
            "NONE": self.folder / "none" / "there", "OUT": self.folder / "new" / "out",
            "ANSWERS": self.folder / "answers", "ROWS": self.folder / "rows",
            "PICTURES": self.folder / "pictures",
        }  # fmt: skip
        return [str(names.get(word, word)) for word in line.split()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever class of transformers loads weights."""

    def refuse(*_: object, **__: object) -> None:
        raise WeightsError

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("a hub was asked"))


SOUND = {
    "calibrate": "calibrate --model MODEL --data DATA -o OUT",
    "calibrate a shard": "calibrate --model MODEL --data DATA --rows OUT --shard 1/2",
    "eval": "eval --model MODEL --profile PROFILE --tasks DATA -o OUT",
    "certify": "certify PROFILE --model MODEL --data DATA -o OUT --alpha 0.5 --delta 0.2",
    "bench": "bench --model MODEL --profile PROFILE --context 100 --json OUT --budget 0.5",
    "doctor": "doctor MODEL PROFILE",
    "serve": "serve MODEL --profile PROFILE --port 0",
}
"""What each verb that loads weights goes on with, as far as them."""

OUTPUTS = {"a folder": "FOLDER", "under a file": "UNDER", "there already": "FILE",
           "no file": "/dev/null"}  # fmt: skip
PROFILES = {"missing": "NONE", "damaged": "DAMAGED", "no profile": "FILE", "another's": "OTHER"}
BUDGETS = {"words": "much", "zero": "0", "over the whole": "1.5", "nothing": ","}
DATA = {"no such path": "NONE", "a name": "mini", "unusable": "BAD", "an empty folder": "FOLDER"}


def cases() -> Iterator[tuple[str, str]]:
    """Verb with a fault, and its command line."""
    made = SOUND["calibrate"]
    for fault, word in OUTPUTS.items():
        yield f"calibrate: output {fault}", made.replace("OUT", word)
        yield f"certify: output {fault}", SOUND["certify"].replace("OUT", word)
        if fault != "there already":  # figures are written anew
            yield f"bench: output {fault}", SOUND["bench"].replace("OUT", word)
            yield f"bench: plot {fault}", f"{SOUND['bench']} --plot {word}"
    for fault, word in {"a file": "FILE", "under a file": "UNDER"}.items():
        yield f"calibrate: rows {fault}", f"{made} --rows {word}"
        yield f"calibrate a shard: rows {fault}", SOUND["calibrate a shard"].replace("OUT", word)
        yield f"eval: output {fault}", SOUND["eval"].replace("OUT", word)
        yield f"certify: answers {fault}", f"{SOUND['certify']} --answers {word}"
    yield "calibrate: rows of others", f"{made} --rows ANSWERS"
    yield "eval: answers of other conditions", SOUND["eval"].replace("OUT", "ANSWERS")
    yield "certify: answers of other conditions", f"{SOUND['certify']} --answers ANSWERS"
    for fault, word in PROFILES.items():
        for verb in ("eval", "certify", "bench"):
            yield f"{verb}: profile {fault}", SOUND[verb].replace("PROFILE", word)
        yield f"serve: profile {fault}", SOUND["serve"].replace("PROFILE", word)
        if fault != "another's":  # the doctor's finding, not an error
            yield f"doctor: profile {fault}", SOUND["doctor"].replace("PROFILE", word)
    for fault, word in BUDGETS.items():
        yield f"calibrate: budget {fault}", f"{made} --budget {word}"
        yield f"eval: budget {fault}", f"{SOUND['eval']} --budget {word}"
        yield f"certify: budget {fault}", f"{SOUND['certify']} --budgets {word}"
        yield f"bench: budget {fault}", f"{SOUND['bench']} --budget {word}"
        yield f"serve: budget {fault}", f"{SOUND['serve']} --budget {word}"
    yield "calibrate: budget of bytes", f"{made} --budget 2GiB"
    yield "bench: budget that the context is too short for", f"{SOUND['bench']} --budget 0.01"
    yield "bench: context that is too short", SOUND["bench"].replace("100", "1")
    yield "bench: context over the model's", SOUND["bench"].replace("100", "9000")
    yield "eval: budget twice", f"{SOUND['eval']} --budget 0.1,0.1"
    for fault, word in DATA.items():
        yield f"calibrate: data {fault}", made.replace("DATA", word)
        yield f"calibrate --dry-run: data {fault}", f"{made} --dry-run".replace("DATA", word)
        yield f"eval: tasks {fault}", SOUND["eval"].replace("DATA", word)
        yield f"certify: data {fault}", SOUND["certify"].replace("DATA", word)
    for fault, word in {"unknown": "odd", "without a dataset": "docvqa:NOWHERE"}.items():
        yield f"eval: tasks {fault}", SOUND["eval"].replace("DATA", word)
        yield f"certify: tasks {fault}", SOUND["certify"].replace("--data DATA", f"--tasks {word}")
    yield (
        "eval: tasks that the model cannot read",
        SOUND["eval"].replace("DATA", "longtext") + (" --tokens 10"),
    )
    yield "eval: a method", f"{SOUND['eval']} --baselines odd"
    yield "eval: a regime", f"{SOUND['eval']} --regimes odd"
    yield "certify: a regime", f"{SOUND['certify']} --regimes odd"
    yield "certify: a loss", f"{SOUND['certify']} --loss odd"
    yield "certify: alpha", f"{SOUND['certify']} --alpha 1.5"
    yield "certify: both kinds of samples", f"{SOUND['certify']} --tasks tinyvl"
    yield "calibrate: rows of another recipe", f"{made} --rows ROWS --recipe paper"
    yield "calibrate: rows of another dtype", f"{made} --rows ROWS --dtype float16"
    yield "calibrate: pictures for a model of text", made.replace("DATA", "PICTURES")
    yield "calibrate: a layout", f"{made} --data-format odd"
    yield "calibrate: folder of pictures", f"{made} --image-folder NONE"
    yield "calibrate: a shard", f"{SOUND['calibrate a shard']} --shard 3/2"
    yield "calibrate: theta", f"{made} --theta 2"
    yield "calibrate: fsdp alone", f"{made} --fsdp"
    yield "eval: a shard", f"{SOUND['eval']} --shard 0/2"
    yield "eval: pictures for a model of text", SOUND["eval"].replace("DATA", "PICTURES")
    yield "bench: a method", f"{SOUND['bench']} --methods odd"
    yield "bench: a shape and a model", f"{SOUND['bench']} --shape qwen2.5-vl-7b"
    yield "serve: budget below the floor", f"{SOUND['serve']} --budget 3"
    yield "serve: monitor", f"{SOUND['serve']} --monitor 2"
    for verb in ("calibrate", "doctor", "serve"):
        yield f"{verb}: device map", f"{SOUND[verb]} --device-map odd"
        yield f"{verb}: device and map", f"{SOUND[verb]} --device cpu --device-map auto"
    yield "certify: too few samples", SOUND["certify"].replace("0.5", "0.01")
    for verb in ("calibrate", "eval", "certify", "bench", "doctor", "serve"):
        yield f"{verb}: dtype", f"{SOUND[verb]} --dtype int4"
        yield f"{verb}: device", f"{SOUND[verb]} --device nowhere"
        yield f"{verb}: a device that is not here", f"{SOUND[verb]} --device cuda:77"
        yield f"{verb}: model", SOUND[verb].replace("MODEL", "NONE")
    for verb in ("eval", "certify", "bench", "serve"):
        yield f"{verb}: reads", f"{SOUND[verb]} --fetch much"
    yield "serve: media", f"{SOUND['serve']} --allowed-media NONE"
    yield "serve: a host", f"{SOUND['serve']} --host no.such.host.invalid"
    yield "push: profile", "push DAMAGED me/mine"
    yield "push: a name", "push PROFILE mine"
    yield "pull: a name", "pull mine"
    yield "export: profile", "export DAMAGED --format duo -o OUT"
    yield "export: a format", "export PROFILE --format odd -o OUT"
    yield "import: a format", "import FILE --format odd --model MODEL -o OUT"
    yield "import: a file", "import FILE --format duo --model MODEL -o OUT"
    yield "import: output", "import FILE --format duo --model MODEL -o FOLDER"
    yield "merge: output", "merge NONE -o FOLDER"
    yield "merge: budget", "merge NONE -o OUT --budget much"
    yield "merge: rows", "merge NONE -o OUT"
    yield "plan: budget", "plan PROFILE --budget much"
    yield "plan: profile", "plan DAMAGED"
    yield "inspect: profile", "inspect DAMAGED"
    yield "report: profile", "report DAMAGED -o OUT"
    yield "diff: profile", "diff PROFILE DAMAGED"
    yield "validate: profile", "validate DAMAGED MODEL"
    yield "validate: another's", "validate OTHER MODEL"
    yield "reproduce: data", "reproduce hybridkv NONE --model MODEL"
    yield "reproduce: nothing there", "reproduce hybridkv FOLDER --model MODEL --profile PROFILE"
    yield "doctor: a check", "doctor MODEL --only odd"


CASES = dict(cases())


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_before_weights(
    name: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.folder.rglob("*"))
    code = run(place.fill(CASES[name]))
    out, err = capsys.readouterr()
    assert "WeightsError" not in err
    if name == "validate: another's":
        assert (code, "made for another model" in out) == (3, True)
    else:
        assert code in (1, 2), (code, out, err)
        assert err.splitlines()[-1].startswith("error: "), err
        assert "unexpected" not in err
    assert sorted(place.folder.rglob("*")) == before, "something was written"


@pytest.mark.parametrize("verb", SOUND)
def test_sound_input_gets_as_far_as_the_weights(
    verb: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(place.fill(SOUND[verb])) == 1
    assert "WeightsError" in capsys.readouterr().err


def test_all_verbs_are_walked() -> None:
    named = {name.split(":")[0].split()[0] for name in CASES} | {"models", "demo"}
    assert {command.name for command in app.registered_commands} <= named


def test_the_plug_ins_refuse_another_model_s_profile(place: Place) -> None:
    for profile in (load_profile(place.folder / "other.safetensors"), place.folder / "damaged"):
        arguments = Arguments.read({"pretrained": str(place.model), "profile": profile})
        with pytest.raises(ProfileError):
            Session(arguments)


def test_the_refused_loader_is_the_one_that_loads(tmp_path: Path) -> None:
    """Else all of the above would pass for nothing."""
    random_llama().save_pretrained(tmp_path)
    load: Callable[..., object] = transformers.AutoModelForCausalLM.from_pretrained
    with pytest.raises(WeightsError):
        load(tmp_path, trust_remote_code=False)
