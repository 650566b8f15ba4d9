"""Tracing back against dense gradients and a dense inverse, in float64; search against brute force; a planted cause."""

from collections.abc import Callable
from dataclasses import replace

import laws
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import embeddings
from torch import Tensor
from torch.func import functional_call, jacrev

from influencespace.errors import InputError
from influencespace.estimators.ecif import sketch_of
from influencespace.estimators.influence import CurvatureConfig, NegativeBatch
from influencespace.estimators.problem import Problem
from influencespace.estimators.proxy_problem import batch_of, proxy_problem
from influencespace.estimators.trace import (
    Candidates,
    Traced,
    both_ways,
    images_in_bank,
    index_space,
    indexed_gradients,
    largest_products,
    make_tracer,
    most_influential,
    query_directions,
    role_gradients,
)
from influencespace.models.projected import ReducedSpace, reduced_space
from influencespace.models.training import HeadsConfig

PROBLEM, BATCH = laws.SMALL.problem, laws.WHOLE[0]
QUERIES = NegativeBatch(inputs=embeddings(3, seed=9), image=np.array([-1, 4, -1]))
SURE = CurvatureConfig(tolerance=1e-12, max_iterations=200)


def roles(problem: Problem, queries: NegativeBatch, query: int, parameters: dict[str, Tensor]) -> Tensor:
    """Pos_n and Neg_n as their definitions say, one negative batch after another: (2,)."""
    images, texts = (side[query : query + 1] for side in queries.inputs)
    found = []
    for recorded in problem.bank:
        if queries.image[query] in recorded.image:
            continue
        u, t = functional_call(problem.space.proxy, parameters, (images, texts))
        cu, ct = functional_call(problem.space.proxy, parameters, recorded.inputs)
        S = problem.objective.scale * torch.cat([cu, u]) @ torch.cat([ct, t]).T  # the query comes last
        own = (S[-1].logsumexp(0) + S[:, -1].logsumexp(0)) / 2 - S[-1, -1]
        more = [s[:-1].logsumexp(1) - s[:-1, :-1].logsumexp(1) for s in (S, S.T)]
        found.append(torch.stack([own, (more[0] + more[1]).sum() / 2]))
    return torch.stack(found).mean(0)


def dense_roles(problem: Problem, queries: NegativeBatch) -> Tensor:
    """(2, Q, p) by autograd, one query at a time."""
    rows = []
    for query in range(len(queries.image)):
        tree = jacrev(lambda q, n=query: roles(problem, queries, n, q))(problem.space.parameters)
        rows.append(problem.space.flatten(tree))
    return torch.stack(rows, 1)


def dense_curvature(problem: Problem) -> Tensor:
    eye = torch.eye(problem.space.size, dtype=torch.float64)
    products = [problem.space.gauss_newton(c.inputs, eye, problem.objective) for c in problem.bank]
    return torch.stack(products).mean(0) + problem.damping * torch.diag(problem.preconditioner)


def directions_of(problem: Problem, queries: NegativeBatch, config: CurvatureConfig = SURE) -> Tensor:
    return query_directions(problem, queries, sketch_of(problem, config), config)


def traced() -> Traced:
    tracer = make_tracer(PROBLEM, directions_of(PROBLEM, QUERIES))
    return tracer(BATCH.inputs, BATCH.image)


def test_the_gradients_of_both_roles() -> None:
    torch.testing.assert_close(
        role_gradients(PROBLEM, QUERIES), dense_roles(PROBLEM, QUERIES), rtol=1e-10, atol=1e-12
    )


def test_the_score_is_the_signed_projection_by_dense_gradients_and_a_dense_inverse() -> None:
    M = torch.linalg.solve(dense_curvature(PROBLEM), dense_roles(PROBLEM, QUERIES).mT).mT  # (2, Q, p)
    direction = M.sum(0) / M.sum(0).norm(dim=-1, keepdim=True)
    truth = (direction @ laws.dense_gradients(PROBLEM, BATCH).T).numpy()
    found = traced()
    np.testing.assert_allclose(found.score, truth, rtol=1e-6, atol=1e-6 * np.abs(truth).max())
    assert (found.score < 0).any()
    assert (found.score > 0).any()


def test_the_relative_influence_is_the_papers() -> None:
    M = torch.linalg.solve(dense_curvature(PROBLEM), dense_roles(PROBLEM, QUERIES).mT).mT.transpose(0, 1)
    g = laws.dense_gradients(PROBLEM, BATCH)
    found = traced()
    for query, rows in enumerate(M):
        Mg = rows @ g.T  # (2, n)
        truth = (Mg * torch.linalg.solve(rows @ rows.T, Mg)).sum(0).sqrt().numpy()
        np.testing.assert_allclose(found.relative_influence[query], truth, rtol=1e-6)
    assert (found.relative_influence >= np.abs(found.score) * (1 - 1e-9)).all()


def test_parallel_roles_leave_the_projection_on_their_line() -> None:
    directions = directions_of(PROBLEM, QUERIES)
    directions[:, 1] = -0.5 * directions[:, 0]
    found = make_tracer(PROBLEM, directions)(BATCH.inputs, BATCH.image).relative_influence
    line = directions[:, 0] / directions[:, 0].norm(dim=-1, keepdim=True)
    truth = (line @ laws.dense_gradients(PROBLEM, BATCH).T).abs()
    np.testing.assert_allclose(found, truth, rtol=1e-6, atol=1e-9)


def test_queries_do_not_meet() -> None:
    whole = traced()
    for query in range(3):
        one = NegativeBatch(
            inputs=tuple(side[query : query + 1] for side in QUERIES.inputs), image=QUERIES.image[[query]]
        )
        alone = make_tracer(PROBLEM, directions_of(PROBLEM, one))(BATCH.inputs, BATCH.image)
        np.testing.assert_allclose(alone.score[0], whole.score[query], rtol=1e-7, atol=1e-12)
        np.testing.assert_allclose(alone.own[0], whole.own[query], rtol=1e-7, atol=1e-12)


def test_an_exact_index_finds_what_brute_force_finds() -> None:
    directions = directions_of(PROBLEM, QUERIES)
    reduced = index_space(PROBLEM, dimension=10_000)
    assert reduced.space is PROBLEM.space
    rows = indexed_gradients(PROBLEM, reduced)(BATCH.inputs, BATCH.image)
    vectors = reduced.project(directions.sum(1))
    found = largest_products(rows, BATCH.row, torch.cat([-vectors, vectors]), 7)
    score = traced().score
    truth = Candidates.among(both_ways(score), BATCH.row, 7)
    np.testing.assert_array_equal(found.row, truth.row)
    np.testing.assert_allclose(found.value, truth.value, rtol=1e-5)
    for query in range(3):
        np.testing.assert_array_equal(found.rows(query), np.argsort(score[query])[:7])
        np.testing.assert_array_equal(found.rows(3 + query), np.argsort(-score[query])[:7])


@pytest.mark.parametrize("make", [index_space, lambda p, k: reduced_space(p.space, k, p.seed)])
def test_projecting_a_direction_is_the_projection_matrix(
    make: Callable[[Problem, int], ReducedSpace],
) -> None:
    reduced = make(PROBLEM, 6)
    rows = torch.randn(3, PROBLEM.space.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(reduced.project(rows), rows @ laws.projection_matrix(reduced))
    gradients = indexed_gradients(PROBLEM, reduced)(BATCH.inputs, BATCH.image)
    dense = laws.dense_gradients(PROBLEM, BATCH) @ laws.projection_matrix(reduced)
    torch.testing.assert_close(gradients, dense, rtol=1e-7, atol=1e-10)


def wide_problem() -> tuple[Problem, NegativeBatch]:
    """A proxy of 2 x 24 x 12 parameters over 240 pairs, a quarter of them wrong."""
    maps = np.random.default_rng(0).normal(size=(2, 8, 24))
    generator = np.random.default_rng(1)
    meaning = generator.normal(size=(400, 8))
    sides = [
        torch.nn.functional.normalize(
            torch.from_numpy(meaning @ m + 0.5 * generator.normal(size=(400, 24))), dim=-1
        )
        for m in maps
    ]
    sides[1][:60] = sides[1][:60].roll(1, 0)
    pool, target = (
        NegativeBatch(inputs=(sides[0][rows], sides[1][rows]), image=np.arange(400)[rows])
        for rows in (slice(0, 240), slice(240, 400))
    )
    config = HeadsConfig(dimension=12, steps=60, batch_size=32, learning_rate=0.02, temperature=0.2)
    return proxy_problem(pool, target, config), pool


def test_leading_sides_find_more_of_the_right_pairs_than_random_ones() -> None:
    problem, pool = wide_problem()
    batch = batch_of(pool)
    queries = NegativeBatch(
        inputs=(problem.target[0].inputs[0][:8], problem.target[0].inputs[1][:8]), image=np.full(8, -1)
    )
    directions = directions_of(problem, queries)
    score = make_tracer(problem, directions)(batch.inputs, batch.image).score
    right = Candidates.among(-score, batch.row, 10).row

    def recall(reduced: ReducedSpace) -> float:
        rows = indexed_gradients(problem, reduced)(batch.inputs, batch.image)
        vectors = reduced.project(directions.sum(1))
        found = largest_products(rows, batch.row, -vectors, 30).row
        return float(np.mean([np.isin(a, b).mean() for a, b in zip(right, found)]))

    leading = recall(index_space(problem, 36))
    assert leading > 0.8
    assert leading > recall(reduced_space(problem.space, 36, problem.seed)) + 0.2


@given(
    values=st.lists(st.sampled_from([-1.5, 0.0, 0.5, 2.0, np.nan]), min_size=1, max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=4),
    count=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_candidates_merge_to_the_same_whatever_the_parts(
    values: list[float], cuts: list[int], count: int, seed: int
) -> None:
    value = np.array([values, values[::-1]])
    row = np.arange(len(values))
    whole = Candidates.among(value, row, count)
    order = np.random.default_rng(seed).permutation(len(values))
    parts = [Candidates.among(value[:, part], row[part], count) for part in np.split(order, sorted(cuts))]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    np.testing.assert_array_equal(merged.row, whole.row)
    np.testing.assert_array_equal(merged.value, whole.value)
    known = np.flatnonzero(~np.isnan(value[0]))
    assert whole.rows(0).tolist() == sorted(known, key=lambda i: (-value[0, i], i))[:count]


def test_the_most_influential_have_the_sign_that_is_asked_for() -> None:
    found = Traced(
        own=np.array([[-3.0, -2, -1, 0, 1, np.nan]]),
        negative=np.zeros((1, 6)),
        relative_influence=np.array([[3.0, 5, 4, 9, 2, 7]]),
    )
    assert most_influential(found, 0, -1, candidates=6, top=6).tolist() == [1, 2, 0]
    assert most_influential(found, 0, -1, candidates=2, top=1).tolist() == [1]
    assert most_influential(found, 0, 1, candidates=6, top=6).tolist() == [4]


def loss(problem: Problem, queries: NegativeBatch, query: int, theta: Tensor) -> float:
    """Pos + Neg of a query by the proxy with parameters theta (p,)."""
    return float(roles(problem, queries, query, problem.space.unflatten(theta)).sum())


def without(problem: Problem, pairs: np.ndarray) -> Tensor:
    """Parameters of the proxy really trained again without some pairs: (p,)."""
    path = problem.trajectory
    assert path is not None
    return replace(path, batches=[rows[~np.isin(rows, pairs)] for rows in path.batches]).final


@pytest.mark.parametrize("query", range(3))
def test_training_without_the_causes_lowers_the_querys_loss_and_without_the_helpers_raises_it(
    query: int,
) -> None:
    found, end = traced(), PROBLEM.space.flatten(PROBLEM.space.parameters)
    before = loss(PROBLEM, QUERIES, query, end)
    harmful, helpful = (most_influential(found, query, sign, candidates=10, top=5) for sign in (-1, 1))
    assert loss(PROBLEM, QUERIES, query, without(PROBLEM, harmful)) < before - 0.05
    assert loss(PROBLEM, QUERIES, query, without(PROBLEM, helpful)) > before + 0.05


def planted(number: int) -> tuple[float, float, bool]:
    """A pair with the query's picture and the least fitting caption, among 100 right ones.

    Its score, what training without it does to the query's loss, and whether it is among the first three causes.
    """
    images, texts = embeddings(160, seed=3)
    query = images[number : number + 1].clone(), texts[number : number + 1].clone()
    images[100], texts[100] = query[0][0], texts[(texts[:100] @ query[1][0]).argmin()]
    pool = NegativeBatch(inputs=(images[:101], texts[:101]), image=np.arange(101))
    target = NegativeBatch(inputs=embeddings(40, seed=4), image=np.arange(40))
    config = HeadsConfig(dimension=4, steps=60, batch_size=16, learning_rate=0.02, temperature=0.2)
    problem = proxy_problem(pool, target, config)
    queries = NegativeBatch(inputs=query, image=images_in_bank(problem.bank, query[0]))
    tracer = make_tracer(problem, directions_of(problem, queries, CurvatureConfig()))
    found = tracer(pool.inputs, pool.image)
    end = problem.space.flatten(problem.space.parameters)
    change = loss(problem, queries, 0, without(problem, np.array([100]))) - loss(problem, queries, 0, end)
    return found.score[0, 100], change, 100 in most_influential(found, 0, -1, candidates=30, top=3)


def test_a_planted_contradiction_is_among_the_first_causes_where_it_really_harms() -> None:
    score, change, first = map(np.array, zip(*map(planted, range(140, 150))))
    harms = change < -0.02
    assert harms.sum() >= 5
    assert first[harms].all()
    assert np.corrcoef(score, change)[0, 1] > 0.8


def test_a_picture_of_the_bank_is_known_by_its_embedding() -> None:
    recorded = PROBLEM.bank[1]
    images = torch.cat([recorded.inputs[0][3:4] + 1e-7, QUERIES.inputs[0][:1]])
    assert images_in_bank(PROBLEM.bank, images).tolist() == [recorded.image[3], -1]


def test_bad_queries_are_reported() -> None:
    everywhere = [replace(recorded, image=np.append(recorded.image, -7)) for recorded in PROBLEM.bank]
    lost = replace(QUERIES, image=np.array([-1, -7, -1]))
    with pytest.raises(InputError, match="in every negative batch"):
        role_gradients(replace(PROBLEM, bank=everywhere), lost)
    images = QUERIES.inputs[0].clone()
    images[1, 0] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        role_gradients(PROBLEM, replace(QUERIES, inputs=(images, QUERIES.inputs[1])))


def test_a_bad_pair_is_nan_and_no_candidate() -> None:
    images = BATCH.inputs[0].clone()
    images[3, 0] = torch.nan
    tracer = make_tracer(PROBLEM, directions_of(PROBLEM, QUERIES))
    found = tracer((images, BATCH.inputs[1]), BATCH.image)
    good = np.arange(len(BATCH)) != 3
    np.testing.assert_allclose(found.score[:, good], traced().score[:, good], rtol=1e-9)
    assert np.isnan(found.score[:, 3]).all()
    assert 3 not in Candidates.among(both_ways(found.score), BATCH.row, len(BATCH)).row
