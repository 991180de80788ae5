"""Florilegium: language models that become their users' own, on their users' devices.

    from florilegium import Experiment, load_config

    result = Experiment(load_config("quickstart", ["data.users=16", "rounds=2"]), "runs/notebook").run()
    result.summary.epsilon, result.frame("evaluation")

`florilegium.client`, `.server`, `.privacy` and `.simulation` say in their `__all__` what else is promised.
"""

import lazy_loader

from florilegium.privacy.common.environment import prepare_process

prepare_process()
_exported, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    if name == "__version__":  # only then: the package's metadata take a while to read
        from importlib.metadata import version

        return version("florilegium")
    return _exported(name)
