"""The price of scoring through the towers, in multiples of embedding the same pairs by the same model in the same run.

On a CPU the clock counts CPU seconds of one thread: the machines are shared. Each round measures everything in turn.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import Benchmark, arguments, real_data
from torch import Tensor
from torch.func import functional_call, grad, vmap

from influencespace.data.images import decode_image
from influencespace.data.readers import list_shards, read_shard
from influencespace.data.schema import Sample
from influencespace.data.synthetic import WorldConfig, write_world
from influencespace.models.encoders import load_encoder
from influencespace.models.space import Inputs
from influencespace.models.streamed import StreamedSpace
from influencespace.models.tower_parameters import tower_parameters
from influencespace.models.tower_tangents import TowerTangents, choose_steps
from influencespace.models.towers import TowerModel
from influencespace.stages.ingest.fit_encoder import FitEncoder

PARTS = ("synthetic", "real", "memory")
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
    first = [sample for sample, _ in zip((s for s in samples if isinstance(s, Sample)), range(count))]
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

    def added(proxy: TowerModel) -> Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]:
        def value(parameters: dict[str, Tensor], pixels: Tensor, tokens: Tensor) -> Tensor:
            u, t = functional_call(proxy, parameters, (pixels[None], tokens[None]))
            found: Tensor = (u * cotangent[0, 0]).sum() + (t * cotangent[0, 0]).sum()
            return found

        return value

    def one_by_one() -> None:
        for pixels, tokens in zip(*one):
            grad(added(proxy))(space.parameters, pixels, tokens)

    def together() -> None:
        vmap(grad(added(unmasked)), (None, 0, 0))(space.parameters, *one)

    return {
        "embedding": lambda: embed(proxy, inputs),
        SCORING: lambda: chosen.tangents(inputs, direction),
        "central differences": lambda: differences.tangents(inputs, direction),
        "forward mode": lambda: space.tangents(inputs, direction),
        "forward and backward": lambda: space.pullback(inputs, cotangent, cotangent),
        "per-sample gradients, one by one": one_by_one,
        "per-sample gradients, vmap": together,
    }, disagreement


def price_part(bench: Benchmark, encoder: str, pool: Path, pairs: int, rounds: int) -> None:
    """Each route's time for a pair, over embedding's."""
    for name in SPACES:
        proxy = TowerModel(load_encoder(encoder, device=DEVICE))
        space = StreamedSpace(proxy, tower_parameters(proxy, name), rows=ROWS)
        inputs = read_pairs(proxy, pool, pairs)
        unmasked = TowerModel(load_encoder(encoder, device=DEVICE))
        # vmap allows no mask whose values are looked at; a caption by itself is not padded and needs none
        unmasked.text_inputs = ("input_ids",)
        work, disagreement = routes(space, inputs, unmasked)
        ratios: dict[str, list[float]] = {route: [] for route in work}
        possible(work)
        for _ in range(rounds):
            took = {
                route: seconds(job) / (SINGLE if "per-sample" in route else pairs)
                for route, job in work.items()
            }
            for route, spent in took.items():
                ratios[route].append(spent / took["embedding"])
        for route, found in ratios.items():
            bench.row(
                route=route,
                space=name,
                pairs=SINGLE if "per-sample" in route else pairs,
                over_embedding=median(found) if found else None,
                interval=[min(found), max(found)] if found else None,
                disagreement=disagreement if route == SCORING else None,
            )
        promises(bench, name, ratios)


def possible(work: dict[str, Callable[[], object]]) -> None:
    """Do everything once, to warm up; a route that a model does not allow is taken out, its reason printed."""
    for route, job in list(work.items()):
        try:
            job()
        except (RuntimeError, NotImplementedError) as error:
            print(f"{route} is not possible: {' '.join(str(error).split())[:200]}", flush=True)
            del work[route]


def promises(bench: Benchmark, space: str, ratios: dict[str, list[float]]) -> None:
    """The targets of one space."""
    part, ours = bench.part, ratios[SCORING]
    bench.target(
        name=f"scoring through {space} over embedding ({part}, median of rounds)",
        target="at most 2.2",
        measured=median(ours),
        interval=(min(ours), max(ours)),
        reached=median(ours) <= 2.2,
    )
    for route, least in (("per-sample gradients, one by one", 8.0), ("per-sample gradients, vmap", 1.5)):
        found = [theirs / mine for theirs, mine in zip(ratios.get(route, []), ours)]
        bench.target(
            name=f"{route}, over scoring through {space} ({part})",
            target=f"at least {least:g}",
            measured=median(found) if found else None,
            interval=(min(found), max(found)) if found else None,
            reached=bool(found) and median(found) >= least,
        )


def memory_part(bench: Benchmark, encoders: dict[str, tuple[str, tuple[int, int]]]) -> None:
    """Peak memory of scoring through all of the towers, by number of pairs, in processes of their own."""
    for name, (encoder, sizes) in encoders.items():
        found = [in_child(encoder, pairs) for pairs in sizes]
        for pairs, peak in zip(sizes, found):
            bench.row(encoder=name, pairs=pairs, **peak)
        peaks = [peak["scoring_peak_mb"] for peak in found]
        bench.target(
            name=f"peak memory of scoring, {sizes[1]:,} pairs against {sizes[0]:,} ({name}, ratio)",
            target="at most 1.05",
            measured=peaks[1] / peaks[0],
            reached=peaks[1] / peaks[0] <= 1.05,
        )
        if found[0]["model_mb"] < 50:  # an allocator's whims are larger
            continue
        more = max(peak["scoring_peak_mb"] - peak["embedding_peak_mb"] for peak in found)
        models = 1 + more / found[0]["model_mb"]
        bench.target(
            name=f"models held while scoring, beside one batch ({name})",
            target="at most 2, within a twentieth",
            measured=models,
            reached=models <= 2.1,
        )


def in_child(encoder: str, pairs: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, "--child", encoder, str(pairs)], capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def as_child(encoder: str, pairs: int) -> None:
    """Embed, then score, the same random pairs batch by batch; prints what both took at their peak."""
    proxy = TowerModel(load_encoder(encoder))
    space = StreamedSpace(proxy, tower_parameters(proxy, "towers"), rows=ROWS)
    caption = "two dogs run over a green field"

    def batches() -> Any:
        generator = torch.Generator().manual_seed(0)
        _, _, height, width = read_shape(proxy)
        for _ in range(0, pairs, ROWS):
            pixels = torch.randint(0, 256, (ROWS, 3, height, width), dtype=torch.uint8, generator=generator)
            yield pixels, proxy.tokenize([caption] * ROWS)

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


def read_shape(proxy: TowerModel) -> torch.Size:
    from influencespace.models.pixels import probe_images

    return proxy.encoder.preprocess_images(probe_images()).shape


def peak_mb() -> float:
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(peak) / 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def main() -> None:
    torch.set_num_threads(1)
    options = arguments(__doc__ or "", "towers", parts=PARTS)
    bench = Benchmark("towers", options.quick, options.out, seeds=(0,))
    data = real_data()
    if data is None:
        print("without real data: set INFLUENCESPACE_DATA to a folder that holds flickr8k/")
        options.parts = [part for part in options.parts if part != "real"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_world(folder, WorldConfig(pretrain=200, pool=128, target=0, test=0, shard_size=128))
        tiny = str(folder / "encoder")
        FitEncoder(shards=str(folder / "pretrain"), out=Path(tiny), steps=20, seed=0)()
        rounds = 2 if options.quick else 5

        def part(name: str) -> None:
            if name == "synthetic":
                price_part(bench, tiny, folder / "pool", 64 if options.quick else 128, rounds)
                return
            given = "" if data is None else str(data.parent / "models" / "mobilenetv2-minilm")
            if name == "real" and data is not None:
                price_part(bench, given, data / "flickr8k" / "dev", 32, rounds)
            elif name == "memory":
                encoders = {"tiny CLIP": (tiny, (64, 320) if options.quick else (200, 2000))}
                if given and not options.quick:
                    encoders["MobileNetV2 and MiniLM"] = (given, (50, 200))
                memory_part(bench, encoders)

        bench.measure(options.parts, part, PARTS)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "--child":
        torch.set_num_threads(1)
        as_child(sys.argv[2], int(sys.argv[3]))
    else:
        main()
