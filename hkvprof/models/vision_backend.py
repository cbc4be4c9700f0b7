"""torchvision: whether it works here, and how transformers is told that it does not."""

from __future__ import annotations

import sys
from functools import cache


@cache
def torchvision_problem() -> str:
    """Why torchvision cannot be used; empty if it loads beside this torch."""
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError as error:
        return "it is not installed" if error.name == "torchvision" else str(error)
    except Exception as error:  # a build for another torch raises nearly anything
        return f"it does not load: {str(error).splitlines()[0]}"
    return ""


def torchvision_works() -> bool:
    """Whether torchvision is installed and loads beside this torch."""
    return not torchvision_problem()


def hide_broken_torchvision() -> None:
    """Let transformers see a torchvision that cannot be imported as one that is not installed.

    transformers looks for the package without importing it; its vision models then die with
    "operator torchvision::nms does not exist". In sys.modules, None is Python's own mark for a
    module that must not be imported.
    """
    from transformers.utils import import_utils

    if torchvision_works() or not import_utils.is_torchvision_available():
        return
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    for name in ("", "_v2"):
        getattr(import_utils, f"is_torchvision{name}_available").cache_clear()
