"""What may leave a device, and at what price. Imports nothing of the other packages."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
