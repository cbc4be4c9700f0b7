"""The report, the command line, and the approval of unlisted architectures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hkvprof import calibrate, load_profile, uniform_profile
from hkvprof.cli import run
from hkvprof.doctor import compressed
from hkvprof.doctor import examine as module
from hkvprof.doctor.conversations import Patient, probe_profile
from hkvprof.doctor.examine import Check, examine, judge
from hkvprof.doctor.recording import Seen, attend, watched_attention
from hkvprof.doctor.records import FaultError, NotApplicableError, Status
from hkvprof.doctor.residents import Asked, check_calibrated, check_static
from hkvprof.errors import ModelError, UsageError
from hkvprof.heads import KeepRule
from hkvprof.models import adapter
from hkvprof.models.adapter import view_model
from hkvprof.models.approval import approve, require_approval, under_examination
from hkvprof.report.doctor import text, verdict
from hkvprof.runtime import apply
from hkvprof.samples.read import load_samples
from hkvprof.selection.static import QueryCentres, rank_tokens, window_attention
from tests.models.tiny import build_covered
from tests.models_for_tests import random_llama
from tests.profiles import make_profile, with_queries
from tests.runtime.test_calibrated_score import profile_of as calibrated_profile

torch.set_num_threads(1)
TINYVL = "profiles/tinyvl.hkv.safetensors"


@pytest.fixture
def llama() -> Any:
    return random_llama(layers=2, max_position_embeddings=512)


def failing(patient: Any) -> str:
    raise FaultError("3 is not 4", "somebody miscounted")


def raising(patient: Any) -> str:
    raise ZeroDivisionError("nothing\nto divide")


def unfit(patient: Any) -> str:
    raise NotApplicableError("there are no wheels")


def fine(patient: Any) -> str:
    return "all is well"


CHECKS = tuple(Check(f.__name__, f) for f in (failing, raising, unfit, fine))


def test_no_check_keeps_another_from_running(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHECKS", CHECKS)
    report = examine(llama)
    failed, raised, skipped, passed = report.outcomes
    assert (failed.status, failed.detail, failed.cause) == (
        Status.FAILED, "3 is not 4", "somebody miscounted",
    )  # fmt: skip
    assert raised.status is Status.FAILED
    assert raised.detail.startswith("ZeroDivisionError in raising (test_doctor.py:")
    assert raised.detail.endswith(": nothing")
    assert (skipped.status, skipped.detail) == (Status.NOT_APPLICABLE, "there are no wheels")
    assert (passed.status, passed.detail) == (Status.PASSED, "all is well")
    assert verdict(report).startswith("1 passed, 2 failed, 1 not applicable")
    page = text(report, "mine")
    for words in ("FAILED  failing", "likely cause: somebody miscounted", "n/a     unfit",
                  "ok      fine", "architecture: LlamaForCausalLM", f"torch: {torch.__version__}",
                  "please report it"):  # fmt: skip
        assert words in page
    assert json.loads(json.dumps(report.to_json()))["passed"] is False


def test_checks_are_chosen_by_name(llama: Any) -> None:
    assert [o.name for o in examine(llama, only=["lookup", "text"]).outcomes] == ["text", "lookup"]
    with pytest.raises(UsageError, match="no check 'txt': expected some of text, image"):
        examine(llama, only=["txt"])


def test_a_model_that_is_not_finite_is_the_checkpoints_fault(llama: Any) -> None:
    llama.lm_head.weight.data.fill_(torch.nan)
    (outcome,) = examine(llama, only=["text"]).outcomes
    assert outcome.status is Status.FAILED
    assert "not finite" in outcome.detail
    assert "the checkpoint" in outcome.cause


def test_a_model_that_is_not_reproducible_is_told_from_a_broken_cache(llama: Any) -> None:
    llama.lm_head.register_forward_hook(lambda *_: _[-1] + torch.randn(()))
    (outcome,) = examine(llama, only=["turns"]).outcomes
    assert outcome.status is Status.FAILED
    assert "the unmodified model twice" in outcome.detail
    assert "nondeterministic" in outcome.cause


def test_no_two_heads_of_the_probe_are_alike() -> None:
    profile = probe_profile(random_llama(layers=6))
    assert len(np.unique(profile.budget)) == profile.grid.total
    assert {int(t) for t in profile.head_types[:, 0]} == {0, 1}
    allocation = profile.allocation(profile.default_budget, 320)
    assert np.allclose(allocation.ratio, profile.budget, atol=1e-3)


def test_the_reference_is_attention() -> None:
    """A case by hand: equal keys make the mean of what is visible, per KV head."""
    value = torch.arange(8.0).view(1, 2, 4, 1).expand(1, 2, 4, 3).contiguous()
    visible = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]], dtype=torch.bool).view(1, 2, 1, 4)
    query, key = torch.randn(1, 4, 1, 3), torch.ones(1, 2, 4, 3)
    exact = attend(query, key, value, visible, 0.5)
    assert exact.output[0, 0, :, 0].tolist() == [1.5, 1.5, 5.5, 5.5]
    found = exact.output.float()
    assert bool((exact.error(found) <= exact.tolerance(torch.float32)).all())
    found[0, 0, 2] *= 1.001
    assert bool((exact.error(found) > exact.tolerance(torch.float32))[0, 0, 2])
    found[0, 0, 1] = torch.nan
    assert bool((exact.error(found) > exact.tolerance(torch.float32))[0, 0, 1])


def test_watching_changes_nothing_and_ends() -> None:
    """transformers' table of attention functions takes a local entry, and gives it back."""
    model = random_llama(layers=2)
    view, ids = view_model(model), torch.arange(3, 20)[None]
    before, expected = ALL_ATTENTION_FUNCTIONS["sdpa"], model(ids).logits
    seen: list[Seen] = []

    def watch(call: Seen) -> Any:
        seen.append(call)
        return call.base()

    with watched_attention(view, watch):
        assert torch.equal(model(ids).logits, expected)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    assert [(call.number, call.scaling) for call in seen] == [(0, 0.25), (1, 0.25)]
    assert (seen[0].query.shape, seen[0].key.shape) == ((1, 4, 17, 16), (1, 2, 17, 16))


@pytest.mark.parametrize("pool", [1, 7, 31])
def test_static_selection_is_judged_to_the_token(pool: int) -> None:
    """The policy's own choice passes; each exchange of a kept token for a dropped one fails."""
    torch.manual_seed(pool)
    query, key, keep = torch.randn(2, 16, 8), torch.randn(90, 8), KeepRule(4, 8, 16)
    ranking = rank_tokens(window_attention(query, key[None], 0.35), pool, keep)[0].tolist()
    kept, dropped = set(ranking[:40]), ranking[40:]
    check_static(kept, query, key, 0.35, pool, keep)
    for place in ranking[:30]:
        with pytest.raises(FaultError):
            check_static(kept - {place} | {dropped[-1]}, query, key, 0.35, pool, keep)


@pytest.mark.parametrize("pool", [1, 7])
def test_calibrated_selection_is_judged_to_the_token(pool: int) -> None:
    """The same of a score that asks the profile's queries; from another position others win."""
    profile, keep = with_queries(make_profile()), KeepRule(4, 8, 16)
    queries = profile.queries
    assert queries is not None
    torch.manual_seed(pool)
    key, group = torch.randn(90, 8), slice(2, 4)
    centres = QueryCentres.load(queries, 1, group, torch.device("cpu"))
    ranking = rank_tokens(centres.attention(key[None], 90, 0.35), pool, keep)[0].tolist()
    asked = Asked.of(queries, 1, group, 90)
    kept, dropped = set(ranking[:40]), ranking[40:]
    check_calibrated(kept, asked, key, 0.35, pool, keep)
    for place in ranking[:30]:
        with pytest.raises(FaultError):
            check_calibrated(kept - {place} | {dropped[-1]}, asked, key, 0.35, pool, keep)
    for other in (replace(asked, position=70), Asked.of(queries, 1, slice(0, 2), 90)):
        with pytest.raises(FaultError):
            check_calibrated(kept, other, key, 0.35, pool, keep)


def test_a_given_profile_with_calibrated_scores_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_covered("llama").eval()
    patient = Patient(model, view_model(model), None, calibrated_profile(model))
    assert "given profile" in compressed.logits(patient)
    own = QueryCentres.attention

    def without_turning(self: QueryCentres, key: Any, position: int, *others: Any) -> Any:
        return own(self, key, 0, *others)

    monkeypatch.setattr(QueryCentres, "attention", without_turning)
    with pytest.raises(FaultError, match="was left out"):
        compressed.logits(patient)


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = run(["doctor", *arguments])
    return code, capsys.readouterr().out


def test_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, page = answer(capsys, "tinyvl", TINYVL, "--only", "image", "--json")
    found = json.loads(page)
    assert code == 0
    assert found["passed"] is True
    assert [check["name"] for check in found["checks"]] == ["image"]
    assert found["profile"] == {"mismatches": [], "notes": []}
    assert found["fingerprint"]["grid"]["layers"] == 6
    assert {"torch", "transformers", "hkvprof", "kernels", "device"} <= found["environment"].keys()

    theirs = load_profile(TINYVL)
    other = replace(theirs, fingerprint=replace(theirs.fingerprint, config_hash="0" * 16))
    other.save(tmp_path / "other.safetensors")
    code, page = answer(capsys, "tinyvl", str(tmp_path / "other.safetensors"), "--only", "image")
    assert code == 4
    assert "but its config differs" in page

    smollm2 = "profiles/smollm2.hkv.safetensors"
    code, page = answer(capsys, "tinyvl", smollm2, "--only", "masked-logits")
    assert code == 3
    assert "architecture: 'LlamaForCausalLM' != 'Qwen2_5_VLForConditionalGeneration'" in page
    assert "the doctor's profile" in page, "a foreign profile is not applied"


def test_a_failed_check_makes_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHECKS", CHECKS)
    code, page = answer(capsys, "tinyvl", TINYVL)
    assert code == 1
    assert "likely cause: somebody miscounted" in page


def test_wrong_names_are_usage_errors_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["doctor", "no/such/model", "--only", "nothing"]) == 2
    assert "no check 'nothing'" in capsys.readouterr().err
    assert run(["doctor", "./nowhere"]) == 1
    assert "no model './nowhere'" in capsys.readouterr().err


def test_profiles_are_judged_by_tier(llama: Any) -> None:
    profile = uniform_profile(llama)
    assert judge(profile, view_model(llama)) == module.Verdict()
    view_of_another = view_model(random_llama(layers=2, seed=1, max_position_embeddings=512))
    assert "weights" in judge(profile, view_of_another).notes[0]
    assert judge(profile, view_model(random_llama(layers=3))).mismatches == ("grid.layers: 2 != 3",)


@pytest.fixture
def unlisted(llama: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A model that no adapter lists, and an empty cache folder."""
    monkeypatch.setenv("HKVPROF_CACHE", str(tmp_path / "cache"))
    own = adapter.view_model
    for user in (
        "runtime.handle",
        "calibration.probe",
        "calibration.uniform",
        "doctor.examine",
    ):
        monkeypatch.setattr(
            f"hkvprof.{user}.view_model", lambda model: replace(own(model), generic=True)
        )
    return llama


REFUSAL = (
    r"LlamaForCausalLM: this architecture is not among those hkvprof was tested on, and it has not "
    r"passed the doctor .* run `hkvprof doctor MODEL` first"
)


def test_unlisted_architectures_must_pass_the_doctor_first(
    unlisted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = uniform_profile(unlisted)
    samples = load_samples("calibration/mini").samples[:1]
    with pytest.raises(ModelError, match=REFUSAL):
        apply(unlisted, profile)
    with pytest.raises(ModelError, match=REFUSAL):
        calibrate(unlisted, None, samples)
    assert not examine(unlisted, only=["text"]).approved, "one check is not enough"
    with pytest.raises(ModelError, match=REFUSAL):
        apply(unlisted, profile)

    monkeypatch.setattr(module, "CHECKS", CHECKS[2:])
    report = examine(unlisted)
    assert Path(report.approved).is_file()
    assert "may be used from now on" in verdict(report)
    apply(unlisted, profile).detach()
    with pytest.raises(Exception, match=r"^(?!.*not among those)"):
        calibrate(unlisted, None, samples)  # goes on, and finds that there is no processor

    monkeypatch.setattr(module, "CHECKS", CHECKS)
    examine(unlisted)
    with pytest.raises(ModelError, match=REFUSAL):
        apply(unlisted, profile)


@pytest.mark.parametrize("change", ["versions", "damage", "depth", "config"])
def test_approvals_hold_for_what_was_examined(
    unlisted: Any, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = replace(view_model(unlisted), generic=True)
    path = approve(view)
    require_approval(view)
    if change == "versions":
        monkeypatch.setattr("hkvprof.models.approval.transformers.__version__", "5.99.0")
    elif change == "damage":
        path.write_text(path.read_text()[:-20])
    elif change == "depth":
        path.write_text("[" * 4000)
    else:
        view = replace(view, fingerprint=replace(view.fingerprint, config_hash="f" * 16))
    with pytest.raises(ModelError, match="not among those hkvprof was tested on"):
        require_approval(view)
    with under_examination():
        require_approval(view)
    require_approval(replace(view, generic=False))


def test_listed_architectures_leave_no_record(
    llama: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HKVPROF_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "CHECKS", CHECKS[3:])
    assert not examine(llama).approved
    assert not list(tmp_path.rglob("*"))
