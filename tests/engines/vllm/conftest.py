"""vLLM, where it is installed, is loaded before tests run: it warns, and changes the process."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.util import find_spec

if find_spec("vllm") is not None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import_module("hkvprof.engines.vllm.seams")
