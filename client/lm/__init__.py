"""One frozen language model with the adapters of many devices: read, generate, differentiate, train in one pass."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
