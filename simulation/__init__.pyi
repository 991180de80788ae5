from .config import load_config
from .engines.in_memory import federate_in_memory
from .experiment import Experiment, run
from .results import Result, load_run
from .runs.errors import RunError
from .settings import ConfigError

__all__ = ["ConfigError", "Experiment", "Result", "RunError", "federate_in_memory", "load_config", "load_run", "run"]
