from .aggregation import RULES, KeptRows, Rule
from .config import ServerConfig
from .optimizers import OPTIMIZERS, ServerOptimizer
from .strategy import ReleaseStrategy

__all__ = [
    "OPTIMIZERS",
    "RULES",
    "KeptRows",
    "ReleaseStrategy",
    "Rule",
    "ServerConfig",
    "ServerOptimizer",
]
