"""Do types from prompts of text alone agree with types from multimodal prompts?

    python -m tools.studies.study_kinds [--samples 48]

HybridKV classifies every request anew, because heads may behave differently on other prompts. Here
tinyvl is calibrated on samples of `calibration/mini` and on as many without images: lines such as
"code black cross is 065 .", and a question for one of them. Prints what the profile records of how
far both kinds agree.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from random import Random

import hkvprof
from hkvprof.cli.progress import track
from hkvprof.report.certainty import certainty
from hkvprof.samples.read import Sample, Turn, load_samples

MINI = Path(__file__).parents[2] / "calibration" / "mini"
CODE = re.compile(r"code (\w+ \w+) is \d+ \.")
LINES = 30
"""Of a prompt without images: about as many tokens as the others have."""


def main() -> None:
    """Calibrate on both kinds, print how sure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=48, help="of each kind")
    count = parser.parse_args().samples
    seen = load_samples(str(MINI), max_samples=count, seed=0).samples
    names = sorted({name for sample in seen for name in _names(sample)})
    if len(names) < LINES:
        raise SystemExit(f"{count} samples name {len(names)} things, {LINES} are needed: take more")
    read = [_text_sample(names, number) for number in range(count)]
    model, processor = hkvprof.load_model("tinyvl", dtype="bfloat16")
    profile = hkvprof.calibrate(model, processor, [*seen, *read], track=track)
    sys.stdout.write("\n".join([f"{count} samples of each kind", *certainty(profile)]) + "\n")


def _names(sample: Sample) -> list[str]:
    """What codes are said to belong to."""
    parts = [part for message in sample.messages for part in message["content"]]
    return [name for part in parts for name in CODE.findall(part.get("text", ""))]


def _text_sample(names: list[str], number: int) -> Sample:
    """Codes of different things, and a question; the odd ones have another question later."""
    random = Random(f"kinds {number}")
    chosen = random.sample(names, LINES)
    codes = {name: f"{random.randrange(1000):03d}" for name in chosen}
    first, later = random.sample(chosen, 2)
    text = [f"code {name} is {code} ." for name, code in codes.items()]
    parts = [{"type": "text", "text": line} for line in [*text, f"code for {first}"]]
    return Sample(
        id=f"text-{number:04d}",
        task="text",
        messages=({"role": "user", "content": parts},),
        reply=codes[first],
        followups=(Turn(f"code for {later}", codes[later]),) if number % 2 else (),
    )


if __name__ == "__main__":
    main()
