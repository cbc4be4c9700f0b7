"""A profile as a picture, drawn by matplotlib (the extra `report`): its curves and its heads."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from hkvprof.errors import BudgetError
from hkvprof.lazy import require_extra
from hkvprof.profile.record import Profile
from hkvprof.report.plot import COLOURED, OURS_COLOUR, own_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE, _DPI = (11, 4.4), 110
_SHARES = np.geomspace(0.01, 0.7, 60)
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


def profile_plot(profile: Profile) -> bytes:
    """Expected loss over the budget, with the certified budget, and the share of every head; PNG.

    The same profile gives the same bytes. Raises UsageError where matplotlib is not installed.
    """
    with own_style():
        figure = require_extra("matplotlib.figure", "report").Figure(
            figsize=_SIZE, layout="constrained"
        )
        left, right = figure.subplots(1, 2)
        _losses(left, profile)
        image = right.pcolormesh(profile.budget, cmap="viridis", vmin=0)
        right.set(title=f"share of every head at {profile.default_budget:.0%}",
                  xlabel="KV head", ylabel="layer")  # fmt: skip
        right.grid(visible=False)
        figure.colorbar(image, ax=right)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=_DPI, metadata={"Software": None})
    return stream.getvalue()


def _losses(axes: Axes, profile: Profile) -> None:
    """A line per anchor, at most three; a mark where a budget is certified."""
    axes.set(title="expected loss over budget", xlabel="share of dense bytes", ylabel="loss")
    if not profile.has_curves:
        axes.text(0.5, 0.5, "no losses were measured", ha="center", transform=axes.transAxes)
        return
    anchors = sorted({int(profile.lengths[place]) for place in (0, len(profile.lengths) // 2, -1)})
    for colour, tokens in zip(COLOURED, anchors, strict=False):
        points = [(share, loss) for share in _SHARES if (loss := _loss(profile, share, tokens)) > 0]
        axes.plot(*zip(*points, strict=True), color=colour, label=f"{tokens:,} tokens")
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.set_xticks(_TICKS)
    axes.minorticks_off()
    record = profile.certificate
    if record is not None and record.certified is not None:
        axes.axvline(record.certified, color=OURS_COLOUR, label=f"certified: {record.certified:g}")
    axes.legend()


def _loss(profile: Profile, share: float, tokens: int) -> float:
    try:
        return profile.allocation(float(share), tokens).expected_loss
    except BudgetError:
        return 0.0
