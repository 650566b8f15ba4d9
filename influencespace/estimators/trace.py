"""Misprediction trace-back: which training pairs caused the error of the proxy on a query pair (ECIF, arXiv 2411.11667).

Symbols: Pos_n, the loss of query n as an anchor; Neg_n, what it adds to the losses of others as their negative, both the
mean over negative batches; a = H^-1 grad Pos_n, b = H^-1 grad Neg_n, M = [a; b]; g the gradient of a training pair.

    score = g . (a + b) / |a + b|          relative influence = sqrt((M g)^T (M M^T)^-1 (M g))

The score has the sign of all estimators: the predicted fall of the query's loss for more weight on the training pair. A
*negative* score means that the pair caused the error, a positive one that it opposed it. It is an inner product, which
exact search finds. The paper's relative influence, the length of g within the plane of a and b, is unsigned and at least
|score|: it orders the candidates that the score has selected.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import vjp, vmap

from influencespace.core.contrastive import InfoNce, contrastive, role_losses
from influencespace.core.nystrom import Sketch
from influencespace.core.projection import leading_sides
from influencespace.errors import InputError
from influencespace.estimators.ecif import along
from influencespace.estimators.ekfac import kronecker_blocks
from influencespace.estimators.influence import (
    CurvatureConfig,
    InfluenceScorer,
    NegativeBatch,
    solve,
)
from influencespace.estimators.problem import (
    FloatArray,
    IntArray,
    Problem,
    mean_of_known,
    per_sample_gradients,
)
from influencespace.models.gradients import Gradients
from influencespace.models.heads import Heads
from influencespace.models.projected import ReducedSpace, projected, reduced_space
from influencespace.models.space import Inputs

SAME_IMAGE = 1e-4  # distance of unit embeddings: those of one image in two batches differ by rounding alone
LABEL_DRAWS = 4  # of the Kronecker factors: more change their leading eigenvectors little


def role_gradients(problem: Problem, queries: NegativeBatch) -> Tensor:
    """grad Pos_n and grad Neg_n of each query, the mean over the negative batches without its image: (2, Q, p).

    Raises InputError for a query whose image every negative batch holds, and where a gradient is not finite.
    """
    space, count = problem.space, len(queries.image)
    objective = contrastive(problem.objective, "trace")
    strange = np.stack([~np.isin(queries.image, batch.image) for batch in problem.bank])  # (C, Q)
    if not strange.any(0).all():
        raise InputError(
            "the query's image is in every negative batch: its loss cannot be computed without it; take another query, or a run "
            "with more negative batches (proxy.negative_batches)"
        )
    shares = torch.from_numpy(strange / strange.sum(0)).to(queries.inputs[0])
    total = torch.zeros(2 * count, space.size, dtype=torch.float64)
    for batch, share in zip(problem.bank, shares):

        def losses(u: Tensor, t: Tensor, cu: Tensor, ct: Tensor, share: Tensor = share) -> Tensor:
            own, negative = role_losses(objective, u, t, cu, ct, problem.batch_size)
            return torch.cat([share * own, share * negative])

        pull = vjp(losses, *space.embed(queries.inputs), *space.embed(batch.inputs))[1]
        by_u, by_t, by_cu, by_ct = vmap(pull)(torch.eye(2 * count).to(share))
        rows = space.pullback(queries.inputs, by_u, by_t) + space.pullback(batch.inputs, by_cu, by_ct)
        total += rows.double().cpu()
    if not bool(torch.isfinite(total).all()):
        raise InputError(
            "the gradient of a query's loss is not finite: do its embeddings hold nan or infinity?"
        )
    return total.to(share).reshape(2, count, space.size)


def query_directions(
    problem: Problem, queries: NegativeBatch, sketch: Sketch, config: CurvatureConfig
) -> Tensor:
    """M / |a + b| of each query: (Q, 2, p), whose sum over the two rows is the direction of the score.

    `sketch` is that of `ecif.sketch_of`, one for any number of queries. Raises InputError as `role_gradients` does.
    """
    gradients = role_gradients(problem, queries)
    solution = solve(
        problem.curvature,
        problem.preconditioner,
        sketch,
        problem.damping,
        gradients.flatten(0, 1).to(problem.preconditioner),
        config,
    )
    M = solution.x.reshape(gradients.shape).transpose(0, 1)
    # zero where a query is predicted with such confidence that its loss has no gradient
    length: Tensor = M.sum(1).norm(dim=-1).clamp_min(torch.finfo(M.dtype).tiny)
    return M / length[:, None, None]


def images_in_bank(bank: Sequence[NegativeBatch], images: Tensor) -> IntArray:
    """Number in the bank of each query image (Q, D) that is also there, by its unit embedding; -1 where it is not: (Q,).

    A query comes from outside the pool, so that its image has no number there; a batch with the same image must
    not judge it, by the image rule.
    """
    number = np.full(len(images), -1)
    for batch in bank:
        distances = torch.cdist(
            images, batch.inputs[0], compute_mode="donot_use_mm_for_euclid_dist"
        )  # a product would round small distances away
        nearest, row = distances.min(1)
        same = (nearest < SAME_IMAGE).cpu().numpy()
        number[same] = batch.image[row.cpu().numpy()[same]]
    return number


@dataclass(frozen=True, kw_only=True)
class Traced:
    """What n training pairs did to Q queries; nan where no negative batch can judge a pair."""

    own: FloatArray
    """Score of the training pair as an anchor (Q, n)."""
    negative: FloatArray
    """Score of the training pair as a negative of others (Q, n)."""
    relative_influence: FloatArray
    """Unsigned (Q, n)."""

    @property
    def score(self) -> FloatArray:
        """Negative caused the error, positive opposed it (Q, n)."""
        return self.own + self.negative


@dataclass(frozen=True)
class Tracer:
    """Traces queries back to any training pairs by one forward-mode pass: exact, without a per-sample gradient."""

    influence: InfluenceScorer
    """Along the directions of all queries, (2 Q, p)."""
    inverse_gram: FloatArray
    """(M M^T)^+ of each query (Q, 2, 2)."""

    def __call__(self, inputs: Inputs, image: IntArray) -> Traced:
        """Pairs by their inputs (two (n, D)) and the image of each (n,)."""
        influence = self.influence(inputs, image)
        shape = len(self.inverse_gram), 2, len(image)
        own, negative = (mean_of_known(role).reshape(shape) for role in (influence.own, influence.negative))
        Mg = own + negative
        squared = np.einsum("qin,qij,qjn->qn", Mg, self.inverse_gram, Mg)
        return Traced(
            own=own.sum(1), negative=negative.sum(1), relative_influence=np.sqrt(np.maximum(squared, 0))
        )


def make_tracer(problem: Problem, directions: Tensor) -> Tracer:
    """The tracer along the directions (Q, 2, p) of `query_directions`."""
    M = directions.double()
    gram = (M @ M.mT).cpu().numpy()
    scorer = along(problem, directions.flatten(0, 1)).influence
    # the pseudo-inverse projects onto the line that is left where a and b are parallel
    return Tracer(scorer, np.linalg.pinv(gram, hermitian=True))


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The rows of the pool with the largest values of V rankings, largest first, at equal values the lower row first.

    A mergeable statistic: whatever the partition and the order, the same rows. Where there are too few, rows are -1 and
    values -inf.
    """

    value: FloatArray  # (V, c)
    row: IntArray  # (V, c)

    @classmethod
    def among(cls, value: FloatArray, row: IntArray, count: int) -> "Candidates":
        """The `count` largest of value (V, n), row (V, n) or (n,); nan is never among them."""
        value = np.where(np.isnan(value), -np.inf, value)
        row = np.broadcast_to(row, value.shape)
        missing = max(0, count - value.shape[1])
        value = np.pad(value, ((0, 0), (0, missing)), constant_values=-np.inf)
        row = np.where(np.isneginf(value), -1, np.pad(row, ((0, 0), (0, missing))))
        order = np.lexsort((row, -value))[:, :count]
        return cls(value=np.take_along_axis(value, order, 1), row=np.take_along_axis(row, order, 1))

    def merge(self, other: "Candidates") -> "Candidates":
        """The largest of both."""
        value, row = (
            np.concatenate([a, b], 1) for a, b in ((self.value, other.value), (self.row, other.row))
        )
        return self.among(value, row, self.value.shape[1])

    def rows(self, ranking: int) -> IntArray:
        """Those of one ranking, the largest first (<= c,)."""
        row = self.row[ranking]
        known: IntArray = row[row >= 0]
        return known


def both_ways(scores: FloatArray) -> FloatArray:
    """Rankings of Q queries (Q, n): first by who caused the error, then by who opposed it: (2 Q, n)."""
    return np.concatenate([-scores, scores])


def largest_products(rows: Tensor, row: IntArray, vectors: Tensor, count: int) -> Candidates:
    """Rows (n, k) of largest inner product with each vector (V, k), by exact search; `row` (n,) is their place in the pool."""
    import faiss

    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(np.ascontiguousarray(rows.numpy(), np.float32))
    value, place = index.search(
        np.ascontiguousarray(vectors.numpy(), np.float32), max(1, min(count, len(rows)))
    )
    return Candidates.among(np.where(place < 0, np.nan, value).astype(np.float64), row[place], count)


def index_space(problem: Problem, dimension: int) -> ReducedSpace:
    """The projected space of an index, of at most `dimension` numbers for each parameter tensor.

    Heads are projected onto the leading eigenvectors of their Kronecker-factored curvature, where gradients and solved
    directions mostly lie, as LoGra does (Choe et al. 2024); other proxies, and losses other than InfoNCE, at random,
    which finds fewer of the right pairs.
    """
    space = problem.space
    heads = isinstance(space.proxy, Heads) and set(space.parameters) == {"image", "text"}
    if not heads or not isinstance(problem.objective, InfoNce):
        return reduced_space(space, dimension, problem.seed)
    batches = [batch.inputs for batch in problem.bank]
    blocks = kronecker_blocks(space.parameters, batches, problem.objective.scale, LABEL_DRAWS, problem.seed)
    projections = [leading_sides(blocks[name].U_A, blocks[name].U_S, dimension) for name in space.parameters]
    return projected(space, projections)


def indexed_gradients(problem: Problem, reduced: ReducedSpace) -> Gradients:
    """Computes the rows of an index: gradients @ reduced.project(direction) is nearly the influence along the direction."""
    return per_sample_gradients(problem, reduced.space)


def most_influential(traced: Traced, query: int, sign: int, candidates: int, top: int) -> IntArray:
    """Columns of `traced` that caused the error of a query (sign -1) or opposed it (sign 1): (<= top,).

    Of the `candidates` of lowest (highest) score, those below (above) zero, in falling order of relative influence.
    """
    score = sign * traced.score[query]
    first = np.argsort(-score, kind="stable")[:candidates]  # nan comes last
    first = first[score[first] > 0]
    order = np.argsort(-traced.relative_influence[query, first], kind="stable")
    chosen: IntArray = first[order[:top]]
    return chosen
