"""The price of scoring through the towers, in multiples of embedding the same pairs by the same model in the same run.

On a CPU the clock counts CPU seconds of one thread: the machines are shared. Each round measures everything in turn.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from benchmarks import wanted
from benchmarks.bench import Bench, Benchmark
from benchmarks.data.datasets import encoder_of
from benchmarks.speed.processes import last_line_of, peak_mb, reset_peak, tiny_world
from influencespace.data.images import decode_image
from influencespace.data.readers import list_shards, read_shard
from influencespace.data.schema import Sample
from influencespace.models.encoders import load_encoder
from influencespace.models.pixels import probe_images
from influencespace.models.space import Inputs
from influencespace.models.streamed import StreamedSpace
from influencespace.models.tower_parameters import tower_parameters
from influencespace.models.tower_tangents import TowerTangents, choose_steps
from influencespace.models.towers import TowerModel

BENCHMARK = Benchmark(seeds=(0,))
SPACES = ("towers", "last-blocks")
SCORING = "scoring, each tower by the cheaper of the next two"
ROWS = 32
"""Pairs in one pass."""
SINGLE = 8
"""Pairs whose gradients are taken each for itself: they take long or much memory, and the figure is a pair's."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of the work, or on a GPU the time until it is done."""
    clock = time.process_time if DEVICE == "cpu" else time.perf_counter
    began = clock()
    work()
    if DEVICE != "cpu":
        torch.cuda.synchronize()
    return clock() - began


def read_pairs(proxy: TowerModel, pool: Path, count: int) -> Inputs:
    """The first pairs of a folder of shards, decoded and tokenised, one caption an image."""
    samples = (sample for shard in list_shards(str(pool)) for sample in read_shard(shard))
    first = list(islice((sample for sample in samples if isinstance(sample, Sample)), count))
    pixels = proxy.encoder.preprocess_images([decode_image(sample.image) for sample in first])
    return pixels.to(DEVICE), proxy.tokenize([sample.captions[0] for sample in first]).to(DEVICE)


@torch.inference_mode()
def embed(proxy: TowerModel, inputs: Inputs) -> None:
    for pixels, tokens in zip(*(torch.split(side, ROWS) for side in inputs)):
        proxy(pixels, tokens)


def routes(
    space: StreamedSpace, inputs: Inputs, unmasked: TowerModel
) -> tuple[dict[str, Callable[[], object]], float]:
    """What is measured, by name, and how far scoring is from forward mode; `unmasked` is for vmap."""
    proxy = space.proxy
    assert isinstance(proxy, TowerModel)
    first = inputs[0][:ROWS], inputs[1][:ROWS]
    weights = torch.full((1, len(first[0])), 1 / len(first[0]), device=DEVICE)
    direction = space.loss_gradients(first, weights, proxy.encoder.objective)
    steps, disagreement = choose_steps(space, direction, (first[0][:8], first[1][:8]))
    chosen = TowerTangents(space, direction, steps)
    differences = TowerTangents(space, direction, torch.where(steps == 0, 1e-4, steps))
    cotangent = torch.randn(1, len(inputs[0]), proxy.encoder.dimension, device=DEVICE)
    one = inputs[0][:SINGLE], inputs[1][:SINGLE]

    def added(model: TowerModel) -> Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]:
        def value(parameters: dict[str, Tensor], pixels: Tensor, tokens: Tensor) -> Tensor:
            u, t = functional_call(model, parameters, (pixels[None], tokens[None]))
            total: Tensor = (u * cotangent[0, 0]).sum() + (t * cotangent[0, 0]).sum()
            return total

        return value

    def one_by_one() -> None:
        for pixels, tokens in zip(*one):
            grad(added(proxy))(space.parameters, pixels, tokens)

    return {
        "embedding": lambda: embed(proxy, inputs),
        SCORING: lambda: chosen.tangents(inputs, direction),
        "central differences": lambda: differences.tangents(inputs, direction),
        "forward mode": lambda: space.tangents(inputs, direction),
        "forward and backward": lambda: space.pullback(inputs, cotangent, cotangent),
        "per-sample gradients, one by one": one_by_one,
        "per-sample gradients, vmap": lambda: vmap(grad(added(unmasked)), (None, 0, 0))(
            space.parameters, *one
        ),
    }, disagreement


def price_part(bench: Bench, part: str, encoder: str, pool: Path, pairs: int) -> None:
    """Each route's time for a pair, over embedding's."""
    torch.set_num_threads(1)
    for name in SPACES:
        proxy = TowerModel(load_encoder(encoder, device=DEVICE))
        space = StreamedSpace(proxy, tower_parameters(proxy, name), rows=ROWS)
        unmasked = TowerModel(load_encoder(encoder, device=DEVICE))
        # vmap allows no mask whose values are looked at; a caption by itself is not padded and needs none
        unmasked.text_inputs = ("input_ids",)
        work, disagreement = routes(space, read_pairs(proxy, pool, pairs), unmasked)
        size = {route: SINGLE if "per-sample" in route else pairs for route in work}
        ratios: dict[str, list[float]] = {route: [] for route in work}
        possible(work)
        for _ in range(bench.pick(5, 2)):
            took = {route: seconds(job) / size[route] for route, job in work.items()}
            for route, spent in took.items():
                ratios[route].append(spent / took["embedding"])
        for route, result in ratios.items():
            bench.row(
                route=route,
                space=name,
                pairs=size[route],
                over_embedding=median(result) if result else None,
                interval=[min(result), max(result)] if result else None,
                disagreement=disagreement if route == SCORING else None,
            )
        promises(bench, part, name, ratios)


def possible(work: dict[str, Callable[[], object]]) -> None:
    """Do everything once, to warm up; a route that a model does not allow is taken out, its reason printed."""
    for route, job in list(work.items()):
        try:
            job()
        except (RuntimeError, NotImplementedError) as error:
            print(f"{route} is not possible: {' '.join(str(error).split())[:200]}", flush=True)
            del work[route]


def promises(bench: Bench, part: str, space: str, ratios: dict[str, list[float]]) -> None:
    """The targets of one space, each a median over rounds with its extremes."""

    def promise(name: str, asked: wanted.Wanted, result: list[float]) -> None:
        around = (min(result), max(result)) if result else None
        bench.target(name, asked, median(result) if result else None, around)

    ours = ratios[SCORING]
    promise(f"scoring through {space} over embedding ({part}, median of rounds)", wanted.at_most(2.2), ours)
    for route, bound in (("per-sample gradients, one by one", 8.0), ("per-sample gradients, vmap", 1.5)):
        result = [theirs / mine for theirs, mine in zip(ratios[route], ours)]
        promise(f"{route}, over scoring through {space} ({part})", wanted.at_least(bound), result)


@BENCHMARK.part
def synthetic(bench: Bench) -> None:
    """The tiny CLIP."""
    with tempfile.TemporaryDirectory() as folder:
        encoder = tiny_world(Path(folder), pool=128, shard_size=128, steps=20)
        price_part(bench, "synthetic", encoder, Path(folder) / "pool", bench.pick(128, 64))


@BENCHMARK.part
def real(bench: Bench) -> None:
    """The pretrained encoder, where there are photographs."""
    if bench.data is None or not (bench.data / "flickr8k").is_dir():
        print("skipped: set INFLUENCESPACE_DATA to a folder that holds flickr8k/")
        return
    price_part(bench, "real", str(encoder_of(bench.data)), bench.data / "flickr8k" / "dev", 32)


@BENCHMARK.part
def memory(bench: Bench) -> None:
    """Peak memory of scoring through all of the towers, by number of pairs, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        tiny = tiny_world(Path(folder), pool=128, shard_size=128, steps=20)
        memory_of(bench, "tiny CLIP", tiny, bench.pick((200, 2000), (64, 320)))
    if bench.data is not None and not bench.quick:
        memory_of(bench, "MobileNetV2 and MiniLM", str(encoder_of(bench.data)), (50, 200))


def memory_of(bench: Bench, name: str, encoder: str, sizes: tuple[int, int]) -> None:
    """One encoder's peaks for two numbers of pairs."""
    result = [json.loads(last_line_of("benchmarks.speed.towers", encoder, str(pairs))) for pairs in sizes]
    for pairs, peak in zip(sizes, result):
        bench.row(encoder=name, pairs=pairs, **peak)
    peaks = [peak["scoring_peak_mb"] for peak in result]
    what = f"peak memory of scoring, {sizes[1]:,} pairs against {sizes[0]:,} ({name}, ratio)"
    bench.target(what, wanted.at_most(1.05), peaks[1] / peaks[0])
    if result[0]["model_mb"] < 50:  # an allocator's whims are larger
        return
    more = max(peak["scoring_peak_mb"] - peak["embedding_peak_mb"] for peak in result)
    twice = wanted.Wanted("at most 2, within a twentieth", lambda models, _: models <= 2.1)
    name = f"models held while scoring, beside one batch ({name})"
    bench.target(name, twice, 1 + more / result[0]["model_mb"])


def as_child(encoder: str, pairs: int) -> None:
    """Embed, then score, the same random pairs batch by batch; prints what both took at their peak."""
    torch.set_num_threads(1)
    proxy = TowerModel(load_encoder(encoder))
    space = StreamedSpace(proxy, tower_parameters(proxy, "towers"), rows=ROWS)
    _, _, height, width = proxy.encoder.preprocess_images(probe_images()).shape

    def batches() -> Iterator[Inputs]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(0, pairs, ROWS):
            pixels = torch.randint(0, 256, (ROWS, 3, height, width), dtype=torch.uint8, generator=generator)
            yield pixels, proxy.tokenize(["two dogs run over a green field"] * ROWS)

    for inputs in batches():
        embed(proxy, inputs)
    embedding = peak_mb()
    direction = torch.empty(1, space.size).normal_()
    differences = TowerTangents(space, direction, torch.full((1, 2), 1e-5))
    reset_peak()
    for inputs in batches():
        differences.tangents(inputs, direction)
    model = sum(value.numel() * value.element_size() for value in proxy.parameters()) / 2**20
    print(json.dumps({"embedding_peak_mb": embedding, "scoring_peak_mb": peak_mb(), "model_mb": model}))


if __name__ == "__main__":  # the process of one measurement of memory
    as_child(sys.argv[1], int(sys.argv[2]))
