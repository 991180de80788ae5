"""Florilegium: language models that become their users' own, on their users' devices.

    from florilegium import Experiment, load_config

    result = Experiment(load_config("quickstart", ["data.users=16", "rounds=2"]), "runs/notebook").run()
    result.summary.epsilon, result.frame("evaluation")

`florilegium.client`, `.server`, `.privacy` and `.simulation` say in their `__all__` what else is promised.
"""

from importlib.metadata import version

import lazy_loader

from florilegium.privacy.common.environment import prepare_process

prepare_process()
__version__ = version("florilegium")
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
