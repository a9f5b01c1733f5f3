"""What is learned, one file a method."""

from . import coop as _coop  # noqa: F401 (methods register themselves)
from .base import ADAPTERS, Adapter, Prompts, get_adapter_class


__all__ = ["ADAPTERS", "Adapter", "Prompts", "get_adapter_class"]
