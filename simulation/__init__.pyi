from .config import ConfigError, load_config
from .experiment import Experiment, run
from .results import Result, load_run
from .runs.folder import RunError

__all__ = ["ConfigError", "Experiment", "Result", "RunError", "load_config", "load_run", "run"]
