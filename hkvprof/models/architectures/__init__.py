"""What differs between architectures, behind one interface: `Adapter`, one instance per family.

docs/adding-a-model.md says how to write one.
"""

from hkvprof.models.architectures.base import Adapter
from hkvprof.models.architectures.registry import adapter_for, is_registered, register_adapter

__all__ = ["Adapter", "adapter_for", "is_registered", "register_adapter"]
