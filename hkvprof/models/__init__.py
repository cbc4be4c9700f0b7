"""The only place that knows Hugging Face: layouts, aliases, processors, the attention seam."""

from hkvprof.models.load import load_model

__all__ = ["load_model"]
