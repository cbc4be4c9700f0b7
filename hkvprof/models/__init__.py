"""The only place that knows Hugging Face: layouts, aliases, processors, the attention seam."""

from hkvprof.models.architectures import Adapter, register_adapter
from hkvprof.models.load import load_model

__all__ = ["Adapter", "load_model", "register_adapter"]
