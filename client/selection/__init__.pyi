from .buffer import Buffer
from .config import SelectionConfig
from .entry import BufferEntry
from .policies import POLICIES, Policy

__all__ = ["POLICIES", "Buffer", "BufferEntry", "Policy", "SelectionConfig"]
