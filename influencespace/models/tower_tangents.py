"""Tangents of towers by the cheaper of two routes: two forward passes at theta +- eps v, or one pass with dual numbers.

Symbols: theta (p,) the parameters of a Space, v (p,) a direction, eps its step, x (n, d) the embeddings of one tower.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from influencespace.core.contrastive_influence import Tangents
from influencespace.errors import InputError
from influencespace.models.dual_encoder import unit
from influencespace.models.space import Inputs
from influencespace.models.streamed import StreamedSpace
from influencespace.models.towers import TowerModel

MAX_DISAGREEMENT = 5e-2
"""Relative. In float32 transformers reach 1e-4; MobileNetV2, whose ReLU6 has kinks, 2e-2."""
TRIED = (16, 4, 1, 1 / 4, 1 / 16)
"""Movements of the embeddings that are tried, as multiples of the cube root of the precision, the optimum of smooth functions."""

CHEAP = 1.5
"""Forward mode's operations over embedding's below which it is taken: it also has more to store."""

Embed = Callable[[Tensor], Tensor]
Moves = list[tuple[nn.Module, dict[str, Tensor]]]
"""The modules that own parameters of a Space, and along what each of these moves."""


class TowerTangents(StreamedSpace):
    """A Space of towers whose tangents along V directions take about two forward passes for each, or less.

    theta is changed tensor by tensor as the passes read it and is itself never touched: memory holds theta and v,
    whatever the number of pairs.
    """

    def __init__(self, space: StreamedSpace, directions: Tensor, steps: Tensor):
        """directions (V, p); steps (V, 2) of the image and the text tower as `choose_steps` chose them."""
        super().__init__(space.proxy, list(space.parameters), rows=space.rows)
        assert isinstance(space.proxy, TowerModel)
        self.towers = space.proxy
        self.directions = directions
        self.moves = [moves_along(self.towers, self.unflatten(direction)) for direction in directions]
        self.steps = steps.tolist()

    def tangents(self, inputs: Inputs, directions: Tensor) -> Tangents:
        """Raises ValueError for other directions than those whose steps are known."""
        if directions is not self.directions:
            raise ValueError("the steps of these tangents are of other directions")
        (u, du), (t, dt) = self.images(inputs[0]), self.texts(inputs[1])
        return Tangents(u=u, t=t, du=du, dt=dt)

    def images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of preprocessed images (n, 3, H, W) and their derivatives: (n, d), (V, n, d)."""
        return self._by_rows(self.towers.embed_images, pixels, 0)

    def texts(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of packed tokens (n, k, L) and their derivatives: (n, d), (V, n, d)."""
        return self._by_rows(self.towers.embed_texts, tokens, 1)

    def _by_rows(self, embed: Embed, inputs: Tensor, tower: int) -> tuple[Tensor, Tensor]:
        chunks = [
            [derivative(embed, rows, moves, step[tower]) for moves, step in zip(self.moves, self.steps)]
            for rows in torch.split(inputs, self.rows)
        ]
        x = torch.cat([chunk[0][0] for chunk in chunks])
        return x, torch.cat([torch.stack([dx for _, dx in chunk]) for chunk in chunks], 1)


def derivative(embed: Embed, inputs: Tensor, moves: Moves, step: float) -> tuple[Tensor, Tensor]:
    """Unit embeddings of n rows and their derivatives along a direction, two (n, d); a step of zero is forward mode."""
    return central_difference(embed, inputs, moves, step) if step else forward_mode(embed, inputs, moves)


@torch.no_grad()
def central_difference(embed: Embed, inputs: Tensor, moves: Moves, step: float) -> tuple[Tensor, Tensor]:
    """(x(theta + eps v) - x(theta - eps v)) / 2 eps, and the mean of both as x."""
    with read_as(moves, partial(torch.add, alpha=step)):
        plus = embed(inputs)
    with read_as(moves, partial(torch.add, alpha=-step)):
        minus = embed(inputs)
    return unit(plus + minus), (plus - minus) / (2 * step)


@torch.no_grad()
def forward_mode(embed: Embed, inputs: Tensor, moves: Moves) -> tuple[Tensor, Tensor]:
    """The derivative by dual numbers."""
    # Of the kernels of attention only this one has forward-mode derivatives.
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), read_as(moves, forward_ad.make_dual):
        x, dx = forward_ad.unpack_dual(embed(inputs))  # type: ignore[no-untyped-call]
    return x, torch.zeros_like(x) if dx is None else dx


def moves_along(proxy: nn.Module, direction: dict[str, Tensor]) -> Moves:
    """Sorts a direction by the modules that own its parameters; tied weights move in each of their places."""
    parameters = dict(proxy.named_parameters())
    by_value = {id(parameters[name]): change for name, change in direction.items()}
    owned = [
        (
            module,
            {
                name: by_value[id(value)]
                for name, value in module._parameters.items()
                if id(value) in by_value
            },
        )
        for module in proxy.modules()
    ]
    return [(module, changes) for module, changes in owned if changes]


@contextmanager
def read_as(moves: Moves, rule: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Within the block every parameter is read as rule(value, change); its value stays as it is.

    Changed values are computed where they are read and not kept, so that there is no second set of parameters, and no
    rounding is left when the block ends.
    """
    before = [module._parameters for module, _ in moves]
    try:
        for module, changes in moves:
            module._parameters = _ReadAs(module._parameters, changes, rule)
        yield
    finally:
        for (module, _), values in zip(moves, before):
            module._parameters = values


class _ReadAs(dict[str, nn.Parameter | None]):
    """A module's own parameters, changed when read by name."""

    def __init__(
        self,
        values: dict[str, nn.Parameter | None],
        changes: dict[str, Tensor],
        rule: Callable[[Tensor, Tensor], Tensor],
    ):
        super().__init__(values)
        self.changes, self.rule = changes, rule

    def __getitem__(self, name: str) -> nn.Parameter | None:
        value, change = super().__getitem__(name), self.changes.get(name)
        return value if value is None or change is None else self.rule(value, change)  # type: ignore[return-value]


def choose_steps(space: StreamedSpace, directions: Tensor, sample: Inputs) -> tuple[Tensor, float]:
    """Steps (V, 2) for the image and the text tower, and the relative disagreement with forward mode on a sample.

    A step moves the embeddings by about the cube root of the precision, which balances rounding and the neglected third
    derivative; among a few multiples of it, for towers with kinks, the one nearest to forward mode is taken. It is zero where
    forward mode itself is cheap: where the direction moves only the end of a tower. Raises InputError where no step is
    near, or where the weights have less than float32's precision.
    """
    towers = space.proxy
    assert isinstance(towers, TowerModel)
    dtype = next(towers.parameters()).dtype
    if torch.finfo(dtype).eps > torch.finfo(torch.float32).eps:
        raise InputError(
            f"central differences of towers in {dtype} are mostly rounding; load the encoder in float32"
        )
    exact = space.tangents(sample, directions)
    steps = torch.zeros(len(directions), 2, dtype=torch.float64)
    missed = 0.0
    for row, direction in enumerate(directions):
        moves = moves_along(towers, space.unflatten(direction))
        sides = ((towers.embed_images, exact.du[row]), (towers.embed_texts, exact.dt[row]))
        for tower, (embed, exactly) in enumerate(sides):
            if forward_cost(embed, sample[tower], moves) > CHEAP:
                steps[row, tower], error = _best_step(embed, sample[tower], moves, exactly)
                missed += error
    squared = float(exact.du.double().square().sum() + exact.dt.double().square().sum())
    disagreement = (missed / max(squared, torch.finfo(torch.float64).tiny)) ** 0.5
    if not disagreement <= MAX_DISAGREEMENT:
        raise InputError(
            f"central differences and forward mode disagree by {disagreement:.1%} on {len(sample[0])} pairs (at most "
            f"{MAX_DISAGREEMENT:.0%}); likely weights or derivatives that are not finite, or towers that are far from smooth: "
            "take fewer of their blocks"
        )
    return steps, disagreement


def forward_cost(embed: Embed, inputs: Tensor, moves: Moves) -> float:
    """Operations of forward mode over those of embedding; counted, not timed, so that every run decides alike."""
    with torch.no_grad(), FlopCounterMode(display=False) as plain:
        embed(inputs)
    with FlopCounterMode(display=False) as dual:
        forward_mode(embed, inputs, moves)
    return float(dual.get_total_flops() / plain.get_total_flops())


def _best_step(embed: Embed, inputs: Tensor, moves: Moves, exactly: Tensor) -> tuple[float, float]:
    """The step nearest to the exact derivative (n, d), and the squared error that it leaves."""
    speed = float(exactly.double().square().sum(-1).mean().sqrt())
    if speed == 0:
        return 0.0, 0.0
    precision = torch.finfo(exactly.dtype).eps ** (1 / 3)
    tried = {}
    for multiple in TRIED:
        step = multiple * precision / speed
        dx = central_difference(embed, inputs, moves, step)[1]
        tried[step] = float((dx - exactly).double().square().sum())
    step = min(tried, key=lambda step: tried[step])
    return step, tried[step]
