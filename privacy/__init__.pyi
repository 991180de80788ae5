from .accounting import calibrate, epsilon
from .common.errors import FlorilegiumError
from .ledger import Ledger
from .modes import PrivacyConfig
from .release import Release, Schema

__all__ = ["FlorilegiumError", "Ledger", "PrivacyConfig", "Release", "Schema", "calibrate", "epsilon"]
