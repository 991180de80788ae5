from .method import Method, MethodContext
from .registry import METHODS

__all__ = ["METHODS", "Method", "MethodContext"]
