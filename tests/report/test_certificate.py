"""A certificate in words: what is certified, what was given up, what no longer holds."""

from __future__ import annotations

from dataclasses import replace

from hkvprof.cli.output import stdout
from hkvprof.report.certainty import certificate_json, page, section
from hkvprof.report.summary import summarise
from hkvprof.report.terminal import overview
from tests.profiles import make_certificate, make_profile, with_certificate

PAGE = """\
Certificate: 20%: with 95% confidence, at most 2% of samples like these get a worse answer than \
with the full cache
  150 held-out samples of held-out, regimes inside, later, bfloat16, reads per step: unlimited; \
full cache 90.0% right
  budget  samples  degraded  p-value
     50%      150         0    0.048  accepted
     20%      150         0    0.048  accepted
      5%       75         1    >=0.2  given up: no verdict depends on the rest"""


def test_the_page() -> None:
    profile = with_certificate(make_profile())
    assert "\n".join(section(profile)) == PAGE
    assert section(make_profile()) == []


def test_nothing_certified_says_why() -> None:
    found = make_certificate(make_profile())
    level = replace(found.levels[0], degraded=1, p_value=0.196)
    failed = replace(found, levels=(level,), certified=None, reason="1 of 150 degraded")
    lines = page(failed)
    assert lines[0].startswith("Certificate: nothing certified (with 95% confidence")
    assert lines[0].endswith(": 1 of 150 degraded")
    assert not any("accepted" in line for line in lines)


def test_a_certificate_of_other_curves_is_not_shown_as_one() -> None:
    profile = with_certificate(make_profile())
    other = replace(profile, loss=profile.loss / 2)
    assert section(other) == [
        "Certificate: none; the one recorded is of other curves, budgets or tables"
    ]
    assert certificate_json(make_profile()) is None
    for one, valid in ((profile, True), (other, False)):
        shown = summarise(one, 32768)["certificate"]
        assert shown["certified"] == 0.2
        assert shown["valid"] is valid


def test_inspect_shows_it_once() -> None:
    profile = with_certificate(make_profile())
    digests = {**profile.provenance, "sample_digests": ["0123456789ab"]}
    console = stdout(ascii_only=True)
    with console.capture() as capture:
        console.print(overview(replace(profile, provenance=digests), 32768, ascii_only=True))
    text = capture.get()
    assert text.count("Certificate: 20%") == 1
    assert "0123456789ab" not in text
    assert "certificate:" not in text
