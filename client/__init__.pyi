from .config import DeviceConfig
from .context import CohortContext
from .dialogue import Dialogue
from .round import adopt, contribute, stay
from .state import DeviceState

__all__ = ["CohortContext", "DeviceConfig", "DeviceState", "Dialogue", "adopt", "contribute", "stay"]
