"""Ways to make a language model one person's: what its prompt is given, and which adapters are on."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
