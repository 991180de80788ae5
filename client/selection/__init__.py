"""What a device keeps of its stream: a bounded buffer, and the policy that decides who leaves it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
