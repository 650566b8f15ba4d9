"""Other packages on the problem of `digits`: each method a function from a trained classifier to its scores.

Scores are (pool, target samples), positive = training on the sample lowers the loss of the target sample (or raises its
margin, for TRAK). A package is imported where it is used, and need not be there.
"""

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from influencespace.core.arrays import FloatArray

Samples = tuple[Tensor, Tensor]  # pixels (n, 64), labels (n,)
State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class TrainedClassifier:
    """A trained classifier and what it was trained on, without anything of ours."""

    make: Callable[[], nn.Module]
    state: State
    checkpoints: list[tuple[State, float]]
    """States along the path with their learning rates."""
    pool: Samples
    target: Samples
    damping: float
    """Of the Hessian of the mean loss."""
    early_stopping: float
    """A smaller one, 1 / sum of the learning rates."""
    block_damping: float
    """DataInf's, one number for all layers."""
    ridge: float
    """TRAK's, over the sum of outer products of margin gradients."""

    def module(self) -> nn.Module:
        module = self.make()
        module.load_state_dict(self.state)
        return module.eval()

    @property
    def parameters(self) -> int:
        return sum(value.numel() for value in self.state.values())


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One method of one package."""

    package: str
    """As it is imported."""
    score: Callable[[TrainedClassifier], FloatArray]
    output: str = "loss"
    """What of a target sample is explained: its `loss`, or TRAK's `margin`."""

    @property
    def installed(self) -> bool:
        return find_spec(self.package) is not None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the packages' progress bars and log lines."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def array(scores: Any) -> FloatArray:
    return np.asarray(scores.detach() if isinstance(scores, Tensor) else scores, dtype=np.float64)


def loader(samples: Samples, batch: int | None = None) -> Any:
    return DataLoader(TensorDataset(*samples), batch_size=batch or len(samples[1]), shuffle=False)


def dattri_task(
    trained: TrainedClassifier, value: Callable[[Tensor, Tensor], Tensor], states: list[State]
) -> Any:
    """An attribution task for a value of logits (n, K) and labels (n,), whatever dimensions a batch comes in."""
    from dattri.task import AttributionTask

    module = trained.module()

    def of(parameters: State, data: Samples) -> Tensor:
        x, y = data
        return value(functional_call(module, parameters, (x.reshape(-1, x.shape[-1]),)), y.reshape(-1))

    return AttributionTask(loss_func=of, model=module, checkpoints=states)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """log p - log(1 - p) of the right class, mean over samples."""
    right = torch.arange(logits.shape[-1]) == labels[:, None]
    others = torch.where(right, -torch.inf, logits).logsumexp(-1)
    return ((logits * right).sum(-1) - others).mean()


def dattri_tracin(trained: TrainedClassifier, path: bool, normalized: bool = False) -> FloatArray:
    from dattri.algorithm.tracin import TracInAttributor

    kept = trained.checkpoints if path else [(trained.state, 1.0)]
    attributor = TracInAttributor(
        task=dattri_task(trained, nn.functional.cross_entropy, [state for state, _ in kept]),
        weight_list=torch.tensor([rate for _, rate in kept]),
        normalized_grad=normalized,
    )
    attributor.projector_kwargs = None  # the constructor knows no other way to leave gradients whole
    return array(attributor.attribute(loader(trained.pool), loader(trained.target)))


def dattri_influence(trained: TrainedClassifier, solver: str, damping: str) -> FloatArray:
    from dattri.algorithm import influence_function

    option = "damping" if solver == "EKFAC" else "regularization"
    attributor = getattr(influence_function, f"IFAttributor{solver}")(
        task=dattri_task(trained, nn.functional.cross_entropy, [trained.state]),
        **{option: getattr(trained, damping)},
    )
    attributor.cache(loader(trained.pool))
    return array(attributor.attribute(loader(trained.pool), loader(trained.target)))


def dattri_trak(trained: TrainedClassifier, dimension: int | None) -> FloatArray:
    """In so many dimensions without a ridge, or whole with the ridge."""
    from dattri.algorithm.trak import TRAKAttributor

    module = trained.module()

    def probability(parameters: State, data: Samples) -> Tensor:
        x, y = data
        loss = nn.functional.cross_entropy(functional_call(module, parameters, (x[None],)), y[None])
        return (-loss).exp()

    whole = dimension is None
    kind: dict[str, Any] = {"proj_type": "identity" if whole else "normal", "proj_dim": dimension or 1}
    attributor = TRAKAttributor(
        task=dattri_task(trained, margin, [trained.state]),
        correct_probability_func=probability,
        projector_kwargs=kind,
        regularization=trained.ridge / trained.parameters
        if whole
        else 0.0,  # it divides gradients by sqrt(p)
    )
    attributor.cache(loader(trained.pool))
    return array(attributor.attribute(loader(trained.target)))


def traker_trak(trained: TrainedClassifier, dimension: int | None) -> FloatArray:
    """In so many dimensions without a ridge, or whole with the ridge."""
    from trak import TRAKer
    from trak.projectors import NoOpProjector

    whole = dimension is None
    with tempfile.TemporaryDirectory() as folder:
        traker = TRAKer(
            model=trained.module(),
            task="image_classification",
            train_set_size=len(trained.pool[1]),
            save_dir=folder,
            device="cpu",
            use_half_precision=False,
            projector=NoOpProjector(device="cpu") if whole else None,
            proj_dim=dimension or 0,
            lambda_reg=trained.ridge / trained.parameters
            if whole
            else 0.0,  # it divides gradients by sqrt(p)
            logging_level=logging.ERROR,
        )
        traker.load_checkpoint(trained.state, model_id=0)
        for batch in loader(trained.pool, 100):
            traker.featurize(batch, num_samples=len(batch[1]))
        traker.finalize_features()
        traker.start_scoring_checkpoint("target", trained.state, 0, num_targets=len(trained.target[1]))
        for batch in loader(trained.target, 100):
            traker.score(batch, num_samples=len(batch[1]))
        return array(np.array(traker.finalize_scores("target")))


def kronfluence_ekfac(trained: TrainedClassifier, damping: str | None) -> FloatArray:
    """Its Fisher matrix is over labels drawn from the model, by a fixed seed; None: its own heuristic damping."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Classify(Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: Samples, model: nn.Module, sample: bool = False) -> Tensor:
            logits, labels = model(batch[0]), batch[1]
            if sample:
                labels = torch.multinomial(logits.detach().softmax(-1), 1).flatten()
            return nn.functional.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch: Samples, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    torch.manual_seed(0)
    pool, target = TensorDataset(*trained.pool), TensorDataset(*trained.target)
    with tempfile.TemporaryDirectory() as folder:
        model = prepare_model(trained.module(), Classify())
        analyzer = Analyzer(
            "digits",
            model,
            Classify(),
            cpu=True,
            disable_tqdm=True,
            output_dir=folder,
            log_level=logging.ERROR,
        )
        analyzer.fit_all_factors(
            "ekfac", pool, per_device_batch_size=250, factor_args=FactorArguments(strategy="ekfac")
        )
        analyzer.compute_pairwise_scores(
            "scores",
            "ekfac",
            query_dataset=target,
            train_dataset=pool,
            per_device_query_batch_size=100,
            per_device_train_batch_size=250,
            score_args=ScoreArguments(damping_factor=damping and getattr(trained, damping)),
        )
        return array(analyzer.load_pairwise_scores("scores")["all_modules"]).T


def captum_load(trained: TrainedClassifier, module: nn.Module, index: str) -> float:
    """Puts a checkpoint into a module; gives its learning rate. The end of training is `end`."""
    state, rate = (trained.state, 1.0) if index == "end" else trained.checkpoints[int(index)]
    module.load_state_dict(state)
    return rate


def captum_tracin(trained: TrainedClassifier) -> Any:
    from captum.influence import TracInCP

    return TracInCP(
        trained.module(),
        TensorDataset(*trained.pool),
        checkpoints=[str(index) for index in range(len(trained.checkpoints))],
        checkpoints_load_func=partial(captum_load, trained),
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=250,
        sample_wise_grads_per_batch=True,
    )


def captum_tracin_scores(trained: TrainedClassifier) -> FloatArray:
    return array(captum_tracin(trained).influence(trained.target)).T


def captum_tracin_self(trained: TrainedClassifier) -> FloatArray:
    """Minus a sample's influence on itself, which is suspicious where it is large: (N, 1)."""
    return -array(captum_tracin(trained).self_influence())[:, None]


def captum_influence(trained: TrainedClassifier, damping: str) -> FloatArray:
    """All eigenvectors of the Hessian of the summed loss whose damped eigenvalue is positive."""
    from captum.influence._core.influence_function import NaiveInfluenceFunction

    result = NaiveInfluenceFunction(
        trained.module(),
        TensorDataset(*trained.pool),
        checkpoint="end",
        checkpoints_load_func=partial(captum_load, trained),
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=len(trained.pool[1]),
        sample_wise_grads_per_batch=True,
        projection_dim=trained.parameters,
        hessian_reg=getattr(trained, damping) * len(trained.pool[1]),
    )
    return array(result.influence(trained.target)).T


PROJECTED = 256  # dimensions of TRAK's features, fewer than samples, as its kernel has no ridge


def _peer(package: str, score: Callable[..., FloatArray], output: str = "loss", **options: Any) -> Peer:
    return Peer(package=package, score=partial(score, **options), output=output)


PEERS: dict[str, Peer] = {
    "dattri Grad-Dot": _peer("dattri", dattri_tracin, path=False),
    "dattri Grad-Cos": _peer("dattri", dattri_tracin, path=False, normalized=True),
    "dattri TracIn": _peer("dattri", dattri_tracin, path=True),
    "dattri influence, explicit": _peer("dattri", dattri_influence, solver="Explicit", damping="damping"),
    "dattri influence, explicit, early stopping": _peer(
        "dattri", dattri_influence, solver="Explicit", damping="early_stopping"
    ),
    "dattri influence, CG": _peer("dattri", dattri_influence, solver="CG", damping="damping"),
    "dattri DataInf": _peer("dattri", dattri_influence, solver="DataInf", damping="block_damping"),
    "dattri EK-FAC": _peer("dattri", dattri_influence, solver="EKFAC", damping="damping"),
    "dattri EK-FAC, early stopping": _peer(
        "dattri", dattri_influence, solver="EKFAC", damping="early_stopping"
    ),
    "dattri TRAK, whole": _peer("dattri", dattri_trak, "margin", dimension=None),
    "dattri TRAK, projected": _peer("dattri", dattri_trak, "margin", dimension=PROJECTED),
    "traker TRAK, whole": _peer("trak", traker_trak, "margin", dimension=None),
    "traker TRAK, projected": _peer("trak", traker_trak, "margin", dimension=PROJECTED),
    "kronfluence EK-FAC": _peer("kronfluence", kronfluence_ekfac, damping="damping"),
    "kronfluence EK-FAC, early stopping": _peer("kronfluence", kronfluence_ekfac, damping="early_stopping"),
    "kronfluence EK-FAC, own damping": _peer("kronfluence", kronfluence_ekfac, damping=None),
    "captum TracInCP": _peer("captum", captum_tracin_scores),
    "captum influence": _peer("captum", captum_influence, damping="damping"),
    "captum influence, early stopping": _peer("captum", captum_influence, damping="early_stopping"),
}
SELF_INFLUENCE: dict[str, Peer] = {"captum TracInCP, self-influence": _peer("captum", captum_tracin_self)}
"""What knows no target, for detection alone."""
