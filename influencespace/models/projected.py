"""A Space of few parameters whose gradients are the projected gradients of a larger one.

Every matrix W of the proxy is moved by A Z B^T, Z (k1, k2) at zero: the gradient by Z is A^T (gradient by W) B, the
two-sided projection (LoGra, Choe et al. 2024). So all that a Space can do, curvature included, is done in the projected
space without a call to a projection, and over heads without ever forming a whole gradient.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from influencespace.core.projection import TwoSided, random_sides
from influencespace.models.heads import Heads
from influencespace.models.space import Inputs, Space

Parameters = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class ReducedSpace:
    """A projected space and how it was projected; the blocks are the proxy's parameter tensors, in order."""

    space: Space
    projections: tuple[TwoSided, ...]
    """Of each block; where all are exact, `space` is the original."""

    @property
    def sizes(self) -> list[int]:
        """Parameters of each block in the projected space."""
        return [k1 * k2 for k1, k2 in (projection.sides for projection in self.projections)]

    @property
    def original_sizes(self) -> list[int]:
        """Parameters of each block of the proxy."""
        return [a * b for a, b in (projection.shape for projection in self.projections)]

    def transpose(self, direction: Tensor) -> Tensor:
        """The direction of the original space along which its derivatives are those along one of this: (k,) -> (p,)."""
        blocks = torch.split(direction, self.sizes)
        pairs = zip(self.projections, blocks)
        return torch.cat([P.transpose(block.reshape(P.sides)).flatten() for P, block in pairs])

    def diagonal(self, D: Tensor) -> Tensor:
        """P^T diag(D) P for D (p,) over the original parameters: (k, k), block by block."""
        pairs = zip(self.projections, torch.split(D, self.original_sizes))
        blocks = [P.diagonal(block.reshape(P.shape)) for P, block in pairs]
        joined: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
        return joined

    def project(self, rows: Tensor) -> Tensor:
        """P^T x for rows x (n, p) over the original parameters: (n, k)."""
        pairs = zip(self.projections, torch.split(rows, self.original_sizes, 1))
        return torch.cat([P(block.reshape(-1, *P.shape)).flatten(1) for P, block in pairs], 1)


def reduced_space(space: Space, dimension: int, seed: int) -> ReducedSpace:
    """Project each parameter tensor to at most `dimension` numbers; those with fewer stay whole.

    Tensors of more than two axes are taken as matrices of their first axis by the rest, vectors as columns. Raises
    ValueError for a dimension below one.
    """
    projections = []
    for block, value in enumerate(space.parameters.values()):
        shape = (value.shape[0], value[0].numel()) if value.dim() else (1, 1)
        projections.append(random_sides(shape, dimension, seed=seed, stream=block))
    return projected(space, projections)


def projected(space: Space, projections: Sequence[TwoSided]) -> ReducedSpace:
    """Project each parameter tensor, as a matrix, by a projection of its own; the space itself where all are exact."""
    projections = tuple(projections)
    if all(projection.exact for projection in projections):
        return ReducedSpace(space=space, projections=projections)
    named = dict(zip(space.parameters, projections))
    whole = isinstance(space.proxy, Heads) and set(named) == {"image", "text"}
    proxy = ProjectedHeads(space, named) if whole else ProjectedProxy(space, named)
    return ReducedSpace(space=Space(proxy, [_key(name) for name in named]), projections=projections)


def _key(name: str) -> str:
    """Name of a parameter's Z: attributes of a module cannot hold dots."""
    return "moved_" + name.replace(".", "__")


class ProjectedProxy(nn.Module):
    """Any proxy, its parameters changed by A Z B^T."""

    def __init__(self, space: Space, projections: Mapping[str, TwoSided]):
        super().__init__()
        self.names = list(projections)
        self.proxy = [space.proxy]  # in a list, so that its parameters are not this module's
        for name, projection in projections.items():
            value = space.parameters[name]
            for side, matrix in (("A", projection.A), ("B", projection.B)):
                self.register_buffer(f"{_key(name)}_{side}", matrix.to(value))
            self.register_parameter(_key(name), nn.Parameter(value.new_zeros(projection.sides)))
            self.register_buffer(f"{_key(name)}_start", value)

    def matrices(self, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W, A, Z, B of one parameter."""
        key = _key(name)
        W, A, Z, B = (getattr(self, key + end) for end in ("_start", "_A", "", "_B"))
        return W, A, Z, B

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        moved = {}
        for name in self.names:
            W, A, Z, B = self.matrices(name)
            moved[name] = W + (A @ Z @ B.T).reshape(W.shape)
        u, t = functional_call(self.proxy[0], moved, (images, texts))
        return u, t


class ProjectedHeads(ProjectedProxy):
    """Heads that change through the bottleneck, x A Z B^T, so that no gradient of a head's own size is formed."""

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        sides = []
        for name, x in (("image", images), ("text", texts)):
            W, A, Z, B = self.matrices(name)
            sides.append(F.normalize(x @ W + ((x @ A) @ Z) @ B.T, dim=-1))
        return sides[0], sides[1]

    def batch_gradients(self, inputs: Inputs, C_u: Tensor, t: Tensor, C_t: Tensor, u: Tensor) -> Parameters:
        """Gradients by Z of sum_k C_u_zk <u_k, t_z> + C_t_zk <u_z, t_k> by a batch's embeddings: by name, (n, k1, k2) each.

        C (n, M); t, u (n, d) held constant; inputs two (M, D). In closed form, without the n x M x d numbers of autograd.
        """
        tree = {}
        for name, x, C, w in (("image", inputs[0], C_u, t), ("text", inputs[1], C_t, u)):
            W, A, Z, B = self.matrices(name)
            y = x @ W + ((x @ A) @ Z) @ B.T
            length = y.norm(dim=-1).clamp_min(1e-12)
            e, K, a = y / length[:, None], C / length, x @ A
            outer = (a[:, :, None] * (e @ B)[:, None, :]).flatten(1)  # (M, k1 k2)
            along_e = ((K * (w @ e.T)) @ outer).reshape(-1, *Z.shape)
            tree[_key(name)] = (K @ a)[:, :, None] * (w @ B)[:, None, :] - along_e
        return tree
