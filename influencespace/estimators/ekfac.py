"""EK-FAC: the curvature of linear heads as Kronecker factors, its diagonal re-estimated in their eigenbasis.

Source: George et al. 2018, arXiv 1806.03884; for influence: Grosse et al. 2023, arXiv 2308.03296. For a head y = x W the
Gauss-Newton matrix is taken as U diag(lam) U^T, U = U_A (x) U_S from the eigenvectors of A = mean x x^T and S = mean
delta delta^T, delta the gradient by y of the loss for labels drawn from the proxy's own softmaxes. The labels of a
batch's 2 M anchors are drawn independently, so with g the gradient of their mean loss G = 2 M E[g g^T] without bias, and
lam is the mean of 2 M (U^T g)^2. The damping is the other estimators' mu D, its diagonal in the same basis.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass as options
from torch import Tensor

from influencespace.core.contrastive import info_nce_only
from influencespace.errors import STRICT, InputError
from influencespace.estimators.ecif import along
from influencespace.estimators.problem import Fit, Problem, immediately
from influencespace.models.heads import Heads
from influencespace.models.space import Inputs


@dataclass(frozen=True, kw_only=True)
class Block:
    """One head's curvature: U_A (a, a), U_S (d, d), lam (a, d), for the head's matrix (a, d)."""

    U_A: Tensor
    U_S: Tensor
    lam: Tensor

    def solve(self, g: Tensor, D: Tensor, damping: float) -> Tensor:
        """(G + mu D)^-1 g with D by its diagonal in the eigenbasis: g, D (a, d) -> (a, d)."""
        rotated_D = self.U_A.square().T @ D @ self.U_S.square()
        rotated = self.U_A.T @ g @ self.U_S / (self.lam + damping * rotated_D)
        return self.U_A @ rotated @ self.U_S.T


def label_gradients(
    outputs: Sequence[Tensor], scale: float, draws: int, generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """Gradients by both heads' outputs (M, d) of the mean loss for labels drawn from the proxy: one pair a draw."""
    y, z = (output.detach().requires_grad_() for output in outputs)
    S = scale * F.normalize(y, dim=-1) @ F.normalize(z, dim=-1).T
    gradients = []
    for _ in range(draws):
        losses = []
        for logits in (S, S.T):
            labels = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator)[:, 0]
            losses.append(F.cross_entropy(logits, labels.to(logits.device)))
        by_y, by_z = torch.autograd.grad((losses[0] + losses[1]) / 2, (y, z), retain_graph=True)
        gradients.append((by_y, by_z))
    return gradients


def kronecker_blocks(
    heads: dict[str, Tensor], batches: Sequence[Inputs], scale: float, draws: int, seed: int
) -> dict[str, Block]:
    """Curvature of the heads `image` and `text` over negative batches, in float64."""
    generator = torch.Generator().manual_seed(seed)
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {"image": [], "text": []}
    for images, texts in batches:
        outputs = images @ heads["image"], texts @ heads["text"]
        inputs = images.double(), texts.double()
        for deltas in label_gradients(outputs, scale, draws, generator):
            for name, x, delta in zip(rows, inputs, deltas):
                rows[name].append((x, delta.double()))
    return {name: _block(of_head) for name, of_head in rows.items()}


def _block(rows: Sequence[tuple[Tensor, Tensor]]) -> Block:
    (x, delta), *_ = rows
    A, S = (torch.zeros(k, k, dtype=x.dtype, device=x.device) for k in (x.shape[1], delta.shape[1]))
    for x, delta in rows:
        A += x.T @ x
        S += delta.T @ delta
    U_A, U_S = torch.linalg.eigh(A)[1], torch.linalg.eigh(S)[1]
    lam = torch.zeros(len(A), len(S), dtype=A.dtype, device=A.device)
    for x, delta in rows:
        lam += 2 * len(x) * ((x @ U_A).T @ (delta @ U_S)).square() / len(rows)
    return Block(U_A=U_A, U_S=U_S, lam=lam)


@options(frozen=True, kw_only=True, config=STRICT)
class EkFac:
    """Needs no pass over the pool: the factors come from the negative batches. For proxies that are heads."""

    draws: int = Field(default=8, ge=1)
    """Labels drawn for each anchor of each negative batch."""

    def fit(self, problem: Problem) -> Fit:
        """Raises InputError where the parameters are not those of two linear heads, or the loss is not InfoNCE."""
        space = problem.space
        if not isinstance(space.proxy, Heads) or set(space.parameters) != {"image", "text"}:
            raise InputError(
                "ekfac is for proxies that are linear heads; use ecif, which takes any parameters"
            )
        scale = info_nce_only(problem.objective, "ekfac").scale
        g, D = (
            space.unflatten(value.double()) for value in (problem.target_gradient, problem.preconditioner)
        )
        batches = [batch.inputs for batch in problem.bank]
        blocks = kronecker_blocks(space.parameters, batches, scale, self.draws, problem.seed)
        solved = {name: block.solve(g[name], D[name], problem.damping) for name, block in blocks.items()}
        return immediately(along(problem, space.flatten(solved).to(problem.preconditioner)))
