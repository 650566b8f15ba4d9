"""One local Ray for all tests of the stages: it starts once, and only if a test asks for it."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from chain import Chain, World
from planted import plant

from influencespace.engine.local import LocalEngine
from influencespace.engine.ray_engine import RayEngine
from influencespace.engine.session import start_ray


@pytest.fixture(scope="session")
def ray_engine() -> Iterator[RayEngine]:
    """A Ray of 8 logical CPUs with its own home and a short temporary folder."""
    with tempfile.TemporaryDirectory(prefix="is-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        settings = {"HOME": folder, "RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled"}
        # Workers unpickle the recipes of the tests by the name of their module.
        settings["PYTHONPATH"] = os.pathsep.join(
            [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        )
        before = {name: os.environ.get(name) for name in [*settings, "RAY_ADDRESS"]}
        os.environ.pop("RAY_ADDRESS", None)
        os.environ.update(settings)
        try:
            with start_ray(num_cpus=8) as engine:
                yield engine
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


@pytest.fixture
def local_engine() -> LocalEngine:
    return LocalEngine()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A pool of 120 images with two captions each, of which a fifth is wrong; a clean target and test set, with groups."""
    folder = tmp_path_factory.mktemp("world")
    return World(
        pool=plant(folder / "pool", 120, captions=2, wrong=0.2, seed=1),
        target=plant(folder / "target", 80, groups=("cat", "dog"), unclear=4.0, seed=2),
        test=plant(folder / "test", 50, captions=2, groups=("cat", "dog", "tree"), seed=3),
    )


@pytest.fixture(scope="session")
def truth(tmp_path_factory: pytest.TempPathFactory, world: World) -> Chain:
    """All stages, done by the plain loop."""
    chain = Chain(out=tmp_path_factory.mktemp("truth"), world=world)
    chain.run()
    return chain
