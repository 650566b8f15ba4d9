"""A Space over a large proxy: a few rows and one direction at a time, so that memory grows with neither."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from influencespace.core.contrastive_influence import Tangents
from influencespace.models.space import Inputs, Space


class StreamedSpace(Space):
    """The Space of a proxy that maps every row by itself, in batches of `rows`: the same numbers as of `Space`.

    Its parameters are those that the proxy holds.
    """

    def __init__(self, proxy: nn.Module, names: Sequence[str] | None = None, *, rows: int = 32):
        super().__init__(proxy, names)
        self.rows = rows

    def batches(self, inputs: Inputs) -> Iterator[slice]:
        for start in range(0, len(inputs[0]), self.rows):
            yield slice(start, start + self.rows)

    @torch.no_grad()
    def embed(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        chunks = [self.proxy(inputs[0][rows], inputs[1][rows]) for rows in self.batches(inputs)]
        u, t = (torch.cat(side) for side in zip(*chunks))
        return u, t

    @torch.no_grad()
    def tangents(self, inputs: Inputs, directions: Tensor) -> Tangents:
        trees = [self.unflatten(direction) for direction in directions]
        chunks = [self._along((inputs[0][rows], inputs[1][rows]), trees) for rows in self.batches(inputs)]
        u, t, du, dt = zip(*chunks)
        return Tangents(u=torch.cat(u), t=torch.cat(t), du=torch.cat(du, 1), dt=torch.cat(dt, 1))

    def _along(self, inputs: Inputs, trees: Sequence[dict[str, Tensor]]) -> tuple[Tensor, ...]:
        """u, t (n, d), du, dt (V, n, d)."""
        # Of the kernels of attention only this one has forward-mode derivatives.
        with sdpa_kernel(SDPBackend.MATH):
            both = [jvp(lambda q: self.embed_at(q, inputs), (self.parameters,), (tree,)) for tree in trees]
        u, t = both[0][0]
        return u, t, *(torch.stack(side) for side in zip(*(one[1] for one in both)))

    def pullback(self, inputs: Inputs, cotangent_u: Tensor, cotangent_t: Tensor) -> Tensor:
        total = cotangent_u.new_zeros(len(cotangent_u), self.size)
        for rows in self.batches(inputs):
            chunk = inputs[0][rows], inputs[1][rows]
            pull = vjp(lambda q, chunk=chunk: self.embed_at(q, chunk), self.parameters)[1]
            for row, (by_u, by_t) in enumerate(zip(cotangent_u[:, rows], cotangent_t[:, rows])):
                total[row] += self.flatten(pull((by_u, by_t))[0])
        return total
