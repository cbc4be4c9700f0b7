"""The benchmark on a GPU: decoding steps of a whole model's shape over caches filled by hand.

    python -m hkvprof.bench.gpu --help

Needs torch, triton, transformers and this folder, nothing else and no network (docs/gpu.md).
"""

from __future__ import annotations

from hkvprof.bench.gpu.bare import names_for_annotations

names_for_annotations()
