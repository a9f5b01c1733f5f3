"""What is learned, one file a method."""

from . import cocoop as _cocoop  # noqa: F401 (methods register themselves)
from . import deep as _deep  # noqa: F401
from . import heads as _heads  # noqa: F401
from . import linear_heads as _linear_heads  # noqa: F401
from . import tcp as _tcp  # noqa: F401
from .base import ADAPTERS, Adapter, Prompts, get_adapter_class


__all__ = ["ADAPTERS", "Adapter", "Prompts", "get_adapter_class"]
