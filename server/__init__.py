"""Who is asked in a round, what of the answers is refused, what the rest becomes. Imports `privacy` alone."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
