"""A planted world, and all stages done on it once by the plain loop."""

import pytest
from chain import BY_NAME, Counting, World, carry, run_on, set_range
from planted import plant

from influencespace.run import Run


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A pool of 120 images with two captions each, of which a fifth is wrong; a clean target and test set, with groups."""
    folder = tmp_path_factory.mktemp("world")
    return {
        "pool": plant(folder / "pool", 120, captions=2, wrong=0.2, seed=1),
        "target": plant(folder / "target", 80, groups=("cat", "dog"), unclear=4.0, seed=2),
        "test": plant(folder / "test", 50, captions=2, groups=("cat", "dog", "tree"), seed=3),
    }


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory, world: World) -> tuple[Run, dict[str, int]]:
    run = run_on(tmp_path_factory.mktemp("truth"), world)
    tasks = {}
    for name in BY_NAME:
        engine = Counting()
        carry(run, name, engine=engine)
        tasks[name] = engine.tasks
    return run, tasks


@pytest.fixture(scope="session")
def truth(done: tuple[Run, dict[str, int]]) -> Run:
    """A run whose stages are all done; tests leave it as they found it."""
    return done[0]


@pytest.fixture(scope="session")
def tasks(done: tuple[Run, dict[str, int]]) -> dict[str, int]:
    """How many tasks each stage of it took."""
    return done[1]


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes over thin columns in three ranges of the pool."""
    set_range(monkeypatch, 100)
