"""The Space: the parameters in which influence is taken, as one flat vector with tangents, pullback and curvature."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap

from influencespace.core.contrastive import Objective
from influencespace.core.contrastive_influence import Tangents, curvature

Inputs = tuple[Tensor, Tensor]


class Space:
    """Named parameters of a proxy whose forward maps inputs to unit embeddings (u, t), seen as one vector (p,)."""

    def __init__(self, proxy: nn.Module, names: Sequence[str] | None = None):
        """Takes every parameter, or those named; raises ValueError for a name the proxy does not have."""
        every = {name: value.detach() for name, value in proxy.named_parameters()}
        unknown = sorted(set(names or ()) - set(every))
        if unknown:
            raise ValueError(f"the proxy has no parameter {unknown}; it has {sorted(every)}")
        self.proxy = proxy
        self.parameters = {name: every[name] for name in (names or every)}
        self.size = sum(value.numel() for value in self.parameters.values())
        self.like = next(iter(self.parameters.values()))
        """Of the dtype and on the device of all results."""

    def flatten(self, tree: dict[str, Tensor]) -> Tensor:
        """Parameters as one vector: shapes (V, *shape) -> (V, p)."""
        rows = [
            tree[name].reshape(*tree[name].shape[: tree[name].dim() - value.dim()], -1)
            for name, value in self.parameters.items()
        ]
        return torch.cat(rows, -1)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """The inverse of `flatten`: (..., p) -> shapes (..., *shape)."""
        flat = torch.split(vector, [value.numel() for value in self.parameters.values()], -1)
        return {
            name: rows.reshape(*rows.shape[:-1], *value.shape)
            for (name, value), rows in zip(self.parameters.items(), flat)
        }

    def embed_at(self, parameters: dict[str, Tensor], inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Unit embeddings of n pairs at other parameters, by name: two (n, d)."""
        u, t = functional_call(self.proxy, parameters, inputs)
        return u, t

    def embed(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Unit embeddings of n pairs at this space's parameters, which need not be those its module holds: two (n, d)."""
        return self.embed_at(self.parameters, inputs)

    def tangents(self, inputs: Inputs, directions: Tensor) -> Tangents:
        """Embeddings of n pairs and their derivatives along directions (V, p), by forward mode."""
        u, t = self.embed(inputs)

        def along(direction: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            du, dt = jvp(lambda q: self.embed_at(q, inputs), (self.parameters,), (direction,))[1]
            return du, dt

        du, dt = vmap(along)(self.unflatten(directions))
        return Tangents(u=u, t=t, du=du, dt=dt)

    def pullback(self, inputs: Inputs, cotangent_u: Tensor, cotangent_t: Tensor) -> Tensor:
        """J^T applied to cotangents of u and t, each (V, n, d) -> (V, p)."""
        pull = vjp(lambda q: self.embed_at(q, inputs), self.parameters)[1]
        (tree,) = vmap(pull)((cotangent_u, cotangent_t))
        return self.flatten(tree)

    def gauss_newton(self, inputs: Inputs, directions: Tensor, objective: Objective) -> Tensor:
        """Gauss-Newton matrix of the loss of one batch times directions: (V, p) -> (V, p)."""
        return self.pullback(inputs, *curvature(objective, self.tangents(inputs, directions)))

    def loss_gradients(self, inputs: Inputs, weights: Tensor, objective: Objective) -> Tensor:
        """Gradients of weighted loss terms of one batch: weights (F, n) -> (F, p), the gradient of weights @ terms.

        The whole batch serves as negatives for each row of weights: weights of 1/n give the gradient of its mean loss.
        """
        u, t = self.embed(inputs)
        pull = vjp(lambda u, t: weights @ objective.terms(u, t), u, t)[1]
        cotangent_u, cotangent_t = vmap(pull)(torch.eye(weights.shape[0], dtype=u.dtype, device=u.device))
        return self.pullback(inputs, cotangent_u, cotangent_t)
