from .config import load_config
from .engines.in_memory import federate_in_memory
from .experiment import Experiment, run
from .results import Result, load_run
from .runs.callbacks import Callback, RunFacts
from .runs.errors import RunError
from .settings import ConfigError

__all__ = [
    "Callback",
    "ConfigError",
    "Experiment",
    "Result",
    "RunError",
    "RunFacts",
    "federate_in_memory",
    "load_config",
    "load_run",
    "run",
]
