"""What planning expects to lose more where one strategy of a profile's menu is left out.

    python -m tools.studies.menu PROFILE [--tokens 2500]

The profile is one of a larger menu than the default. `at no fetch`: no host memory is read.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkvprof.profile.record import Profile, load_profile

BUDGETS = (0.5, 0.2, 0.1, 0.05, 0.03)


def main() -> None:
    """Print a line for every strategy: percent of the whole menu's expected loss."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile")
    parser.add_argument("--tokens", type=int, default=2500)
    args = parser.parse_args()
    profile = load_profile(args.profile)
    everything = range(len(profile.strategies))
    whole = expected(of_menu(profile, list(everything)), args.tokens)
    sys.stdout.write(f"budgets {BUDGETS} by default reads, then at no fetch\n")
    for left_out in everything:
        rest = of_menu(profile, [i for i in everything if i != left_out])
        more = 100 * (expected(rest, args.tokens) / whole - 1)
        figures = "".join(f"{value:7.1f}" for value in more)
        sys.stdout.write(f"{profile.strategies[left_out].name:40}{figures}\n")


def of_menu(profile: Profile, kept: list[int]) -> Profile:
    """The profile with these strategies alone; types in doubt are not looked at."""
    count = len(profile.strategies)
    changes: dict[str, Any] = {}
    for name in (field.name for field in fields(profile)):
        value = getattr(profile, name)
        if name in ("loss", "output_error") and value is not None:
            changes[name] = np.take(value, kept, axis=value.shape.index(count))
    menu = tuple(profile.strategies[i] for i in kept)
    none = np.zeros_like(profile.strategy)
    return replace(profile, strategies=menu, strategy=none, static_margin=None, **changes)


def expected(profile: Profile, tokens: int) -> NDArray[np.float64]:
    """Expected losses at all BUDGETS, by the default fetch budget and by none."""
    plans = [
        profile.allocation(budget, tokens, fetch=fetch) for fetch in (None, 0) for budget in BUDGETS
    ]
    return np.array([plan.expected_loss for plan in plans])


if __name__ == "__main__":
    main()
