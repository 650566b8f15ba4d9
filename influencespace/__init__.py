"""InfluenceSpace: which image-text pairs make a model better, by influence functions.

    import influencespace

    run = influencespace.curate(data="pairs", target="target", test="test", encoder="my-clip", out="runs/mine")
    kept = run.curated()

The names below are the public API. Each is imported when it is first asked for: `import influencespace` is quick.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from influencespace.api import curate, plan, score
    from influencespace.config import RunConfig, load_config
    from influencespace.data.sampler import WeightedSampler
    from influencespace.errors import InputError
    from influencespace.estimators.problem import Estimator
    from influencespace.pipeline import load_run
    from influencespace.run import Run

__version__ = "0.2.0"
__all__ = [
    "Estimator",
    "InputError",
    "Run",
    "RunConfig",
    "WeightedSampler",
    "curate",
    "load_config",
    "load_run",
    "plan",
    "score",
]
_MODULES = {
    "Estimator": "estimators.problem",
    "InputError": "errors",
    "Run": "run",
    "RunConfig": "config",
    "WeightedSampler": "data.sampler",
    "curate": "api",
    "load_config": "config",
    "load_run": "pipeline",
    "plan": "api",
    "score": "api",
}

# Threads that wait for each other sleep instead of spinning. With spinning, a training on two threads of a busy machine took
# several times as long as on one. OpenMP reads it when torch is loaded, which for the command line and the workers of its own
# Ray is after this. Where torch comes first, or on a cluster's nodes, the environment has to say it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
