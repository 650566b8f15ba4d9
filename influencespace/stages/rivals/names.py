"""The methods that a run can train beside its own, and what each needs to be known of the pairs."""

from collections.abc import Sequence

CURATED, EVERYTHING, RANDOM, DYNAMIC = "curated", "everything", "random", "dynamic"
DEFAULT = (CURATED, EVERYTHING, RANDOM, "clip_score", "neg_clip_loss")
"""What is trained where nothing else is asked for."""
POINTWISE = ("neg_clip_loss", "norm_sim", "norm_sim_2", "dfn")
"""Scores of each pair by itself, beside its CLIP score."""
LIKENESS = ("d2", "semdedup", "diversity", "coreset")
"""Orders within each cluster."""
GIVEN = ("clip_score", *POINTWISE, "datainf")
"""Scores that `m_flyt` mixes."""
RANKED = (RANDOM, *GIVEN, *LIKENESS, "m_flyt", "mgd")
"""Methods that train on the first pairs of an order."""
TARGET_ALONE, POOL_AND_TARGET = "target_alone", "pool_and_target"
SETS = (TARGET_ALONE, POOL_AND_TARGET)
"""Methods that train on other pairs than the pool's."""
WHOLE = (EVERYTHING, *SETS)
"""Methods that train on all of a set: the steps are all that there is to choose."""
SUFFIX = "_validated"
"""Of a method whose fraction, temperature and steps are chosen by retraining."""
VALIDATED = tuple(f"{name}{SUFFIX}" for name in (*RANKED[1:], *WHOLE))
METHODS = (CURATED, EVERYTHING, *RANKED, *SETS, *VALIDATED)
ALL = "rivals"
"""In place of all of them."""


def named(methods: Sequence[str]) -> tuple[str, ...]:
    """The methods, with all rivals in place of `rivals`, each once."""
    every = ((name,) if name != ALL else METHODS for name in methods)
    return tuple(dict.fromkeys(name for names in every for name in names))


def label(method: str) -> str:
    """The name of a method: of `name=path`, which trains on the list in a file, what stands first."""
    return method.partition("=")[0]


def list_of(method: str) -> str | None:
    """The file that a method trains on; None where it is none of the user's."""
    return method.partition("=")[2] or None


def plain(method: str) -> str:
    """A method without its suffix."""
    return method.removesuffix(SUFFIX)


def orders_of(methods: Sequence[str]) -> tuple[str, ...]:
    """The orders that methods train on the first pairs of, in the order of RANKED."""
    wanted = set(map(plain, methods))
    return tuple(name for name in RANKED if name in wanted)


def scores_of(orders: Sequence[str]) -> tuple[str, ...]:
    """The pointwise scores that orders are made of."""
    wanted = set(orders) | (set(GIVEN) if "m_flyt" in orders else set())
    if wanted & {"norm_sim", "norm_sim_2"}:
        wanted.add("neg_clip_loss")  # which is their first filter
    return tuple(name for name in POINTWISE if name in wanted)
