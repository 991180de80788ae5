from .privacy.common.errors import FlorilegiumError
from .simulation.config import load_config
from .simulation.experiment import Experiment, run
from .simulation.results import Result, load_run
from .simulation.runs.errors import RunError
from .simulation.settings import ConfigError

__version__: str
__all__ = ["ConfigError", "Experiment", "FlorilegiumError", "Result", "RunError", "load_config", "load_run", "run"]
