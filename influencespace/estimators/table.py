"""The table of estimators: a new one is a file and a line here, and every law of the tests then covers it."""

from collections.abc import Callable
from functools import partial

from influencespace.estimators.datainf import DataInf
from influencespace.estimators.diff_in import DiffIn
from influencespace.estimators.ecif import Ecif
from influencespace.estimators.ekfac import EkFac
from influencespace.estimators.el2n import El2n
from influencespace.estimators.filters import ClipScore, NegClipLoss, Random
from influencespace.estimators.grad_dot import GradDot
from influencespace.estimators.less import Less
from influencespace.estimators.norm_sim import NormSim
from influencespace.estimators.problem import Estimator
from influencespace.estimators.self_influence import SelfInfluence
from influencespace.estimators.tracin import TracIn
from influencespace.estimators.trak import Trak
from influencespace.estimators.unrolled import Unrolled

TABLE: dict[str, Callable[..., Estimator]] = {
    "nystrom": partial(Ecif, solver="woodbury"),
    "ecif": Ecif,
    "ekfac": EkFac,
    "grad_dot": GradDot,
    "unrolled": Unrolled,
    "tracin": TracIn,
    "diff_in": DiffIn,
    "datainf": DataInf,
    "trak": Trak,
    "less": Less,
    "self_influence": SelfInfluence,
    "el2n": El2n,
    "clip_score": ClipScore,
    "neg_clip_loss": NegClipLoss,
    "norm_sim": NormSim,
    "random": Random,
}
BY_TANGENTS = ("ecif", "nystrom", "grad_dot")
"""Those that see pairs through tangents alone, and so score in any Space: no optimiser, path or per-sample gradient."""
