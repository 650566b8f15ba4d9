"""Measures of retrained proxies against direct counting, and paired comparisons of methods."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chain import Careful, beside, carry, columns
from safetensors.torch import load_file

from influencespace.run import Run
from influencespace.stages.ingest.encode import EmbedConfig
from influencespace.stages.proxies.proxy import Proxy
from influencespace.stages.proxies.target import TargetHalves, choosing_loss
from influencespace.stages.rivals.names import DEFAULT as METHODS
from influencespace.stages.training import evaluate
from influencespace.stages.training.evaluate import EvaluateConfig, Measure, recall_by_group, summarise

BASELINES = [method for method in METHODS if method != "curated"]


def measure(
    truth: Run,
    method: str,
    seed: int,
    *,
    folder: Path | None = None,
    classes: tuple[str, ...] = (),
    prompts: torch.Tensor | None = None,
) -> Measure:
    return Measure(
        test=truth.test,
        halves=TargetHalves(truth.target, truth.seed),
        config=truth.config.proxy.train,
        proxy=Proxy(folder or truth.at("train"), f"{method}-{seed}"),
        method=method,
        seed=seed,
        classes=classes,
        prompts=prompts,
    )


def counted_recall(truth: Run, method: str, seed: int) -> dict[str, dict[int, float]]:
    """Recall by looking at each query's best k answers."""
    test = truth.test
    state = load_file(truth.at("train") / f"{method}-{seed}.safetensors")
    _, first, own = np.unique(test.image, return_index=True, return_inverse=True)
    images, texts = test.inputs(first)[0], test.inputs(slice(None))[1]
    unit = torch.nn.functional.normalize
    S = unit(images @ state["image"], dim=-1) @ unit(texts @ state["text"], dim=-1).T
    recall: dict[str, dict[int, float]] = {"image_to_text": {}, "text_to_image": {}}
    for k in (1, 5, 10):
        best = S.topk(k, dim=1).indices.numpy()
        hits = [bool((own[best[i]] == i).any()) for i in range(len(images))]
        recall["image_to_text"][k] = 100 * float(np.mean(hits))
        best = S.topk(k, dim=0).indices.numpy()
        hits = [own[j] in best[:, j] for j in range(len(texts))]
        recall["text_to_image"][k] = 100 * float(np.mean(hits))
    return recall


def test_recall_is_what_counting_gives(truth: Run) -> None:
    result = measure(truth, "curated", 0)()
    counted = counted_recall(truth, "curated", 0)
    for way, levels in counted.items():
        for k, share in levels.items():
            assert result["recall"][way][str(k)] == pytest.approx(share)
    mean = np.mean([share for levels in counted.values() for share in levels.values()])
    assert result["by_image"].mean() == pytest.approx(mean)
    assert result["by_image"].shape == (50,)


def test_methods_are_means_over_seeds(truth: Run) -> None:
    methods = truth.manifest("evaluate").details["methods"]
    assert set(methods) == set(METHODS)
    by_image, rows = columns(truth, "evaluate/by_image"), len(truth.pool)
    weights = {"everything": np.ones(rows), "curated": columns(truth, "selection/curated", "kept")["kept"]}
    weights |= columns(truth, "rivals/weights")
    for method, measures in methods.items():
        runs = [by_image[f"{method}-{seed}"] for seed in (0, 1)]
        assert measures["mean_recall"] == pytest.approx(np.mean(runs))
        assert measures["seeds"] == [0, 1]
        low, high = measures["mean_recall_ci"]
        assert low <= measures["mean_recall"] <= high
        counted = [counted_recall(truth, method, seed)["text_to_image"][5] for seed in (0, 1)]
        assert measures["recall"]["text_to_image"]["5"] == pytest.approx(np.mean(counted))
        assert measures["kept_fraction"] == pytest.approx((weights[method] > 0).mean())
        factor = truth.manifest("selection").details["steps_factor"] if method == "curated" else 1
        assert measures["steps"] == 20 * factor
        assert measures["seconds"] > 0
        assert measures["zero_shot_accuracy"] is None


def test_curated_is_compared_with_every_baseline(truth: Run) -> None:
    details = truth.manifest("evaluate").details
    assert set(details["comparisons"]) == set(BASELINES)
    for method, comparison in details["comparisons"].items():
        expected = details["methods"]["curated"]["mean_recall"] - details["methods"][method]["mean_recall"]
        assert comparison["difference"] == pytest.approx(expected)
        low, high = comparison["ci"]
        assert low <= comparison["difference"] <= high


def test_the_target_loss_is_that_of_the_choosing_half(truth: Run) -> None:
    halves = TargetHalves(truth.target, truth.seed)
    reported = truth.manifest("evaluate").details["target_loss"]
    for method in METHODS:
        heads = [measure(truth, method, seed).heads for seed in (0, 1)]
        losses = [choosing_loss(head, halves, truth.config.proxy.train) for head in heads]
        assert reported[method] == pytest.approx(np.mean(losses), rel=1e-5)


def run(method: str, seed: int, by_image: np.ndarray) -> dict[str, object]:
    recall = {way: {str(k): 1.0 for k in (1, 5, 10)} for way in ("image_to_text", "text_to_image")}
    return {
        "method": method,
        "seed": seed,
        "by_image": by_image,
        "recall": recall,
        "zero_shot_accuracy": None,
    }


def test_equal_results_differ_by_nothing_and_equal_shifts_surely() -> None:
    """Intervals are of paired differences: what all images and seeds share cancels."""
    generator = np.random.default_rng(0)
    results = []
    for seed in range(3):
        by_image = generator.uniform(0, 100, 40)
        results += [
            run("curated", seed, by_image),
            run("everything", seed, by_image),
            run("random", seed, by_image - 2),
        ]
    table, comparisons = summarise(results[::-1], ("curated", "everything", "random"))
    assert comparisons["everything"] == {"difference": 0.0, "ci": [0.0, 0.0]}
    assert comparisons["random"]["difference"] == pytest.approx(2)
    assert comparisons["random"]["ci"] == pytest.approx([2, 2])
    assert table["curated"]["seeds"] == [0, 1, 2]


def test_without_curated_there_is_nothing_to_compare() -> None:
    _, comparisons = summarise([run("random", 0, np.ones(5))], ("random",))
    assert comparisons == {}


def test_zero_shot_takes_the_nearest_class_by_the_mean_of_its_prompts(truth: Run) -> None:
    """Only images whose group is a class count."""
    test = truth.test
    generator = torch.Generator().manual_seed(0)
    prompts = torch.nn.functional.normalize(torch.randn(2, 3, 16, generator=generator), dim=-1)
    classes = ("dog", "cat")
    accuracy = measure(truth, "curated", 0, classes=classes, prompts=prompts)()["zero_shot_accuracy"]
    state = load_file(truth.at("train") / "curated-0.safetensors")
    unit = torch.nn.functional.normalize
    names = unit(unit(prompts @ state["text"], dim=-1).mean(1), dim=-1)
    _, first, own = np.unique(test.image, return_index=True, return_inverse=True)
    u = unit(test.inputs(first)[0] @ state["image"], dim=-1)
    group_of_image = dict(zip(own.tolist(), test.column("group"), strict=True))
    right = [
        classes[int((u[image] @ names.T).argmax())] == group
        for image, group in group_of_image.items()
        if group in classes
    ]
    assert 0 < len(right) < 50
    assert accuracy == pytest.approx(100 * np.mean(right))
    unknown = measure(truth, "curated", 0, classes=("fish",), prompts=prompts[:1])
    assert unknown()["zero_shot_accuracy"] is None


def test_a_result_does_not_depend_on_the_folder(truth: Run, tmp_path: Path) -> None:
    (tmp_path / "curated-0.safetensors").write_bytes(
        (truth.at("train") / "curated-0.safetensors").read_bytes()
    )
    moved, original = measure(truth, "curated", 0, folder=tmp_path)(), measure(truth, "curated", 0)()
    np.testing.assert_array_equal(moved["by_image"], original["by_image"])


def test_prompts_of_another_encoder_are_another_result(
    truth: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where embeddings were provided, nothing else that a result depends on names the encoder."""
    asked: list[str] = []

    def prompts(embed: Any, config: EvaluateConfig) -> Any:
        def embedded() -> torch.Tensor:
            asked.append(embed.encoder)
            return torch.ones(2, 1, 16)

        return embedded

    monkeypatch.setattr(evaluate, "Prompts", prompts)
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    settings = {"evaluate.classes": ["dog", "cat"], "embed.encoder": str(encoder)}
    run = beside(truth, tmp_path / "run", "evaluate", settings=settings)
    fingerprints = []
    for content in ("one", "another", "another"):
        (encoder / "weights").write_text(content)
        fingerprints.append(carry(run, "evaluate").fingerprint)
    assert len(asked) == 2
    assert fingerprints[0] != fingerprints[1] == fingerprints[2]


def test_many_prompts_are_embedded_in_batches() -> None:
    sizes: list[int] = []

    class Lengths:
        """Embeds a text as its number of letters."""

        def tokenize(self, texts: list[str]) -> tuple[list[str], int]:
            return texts, 0

        def encode_text(self, texts: list[str]) -> torch.Tensor:
            sizes.append(len(texts))
            return torch.tensor([[float(len(text))] for text in texts])

    config = EvaluateConfig(classes=("a", "bb", "ccc", "dddd", "eeeee"), templates=("{}", "a {}."))
    task = evaluate.Prompts(
        embed=EmbedConfig(encoder="unused", batch_size=4),
        config=config,
        load_encoder=lambda embed, device: Lengths(),
    )
    assert task()[..., 0].tolist() == [[n, n + 3] for n in range(1, 6)]
    assert sizes == [4, 4, 2]


class Backwards(Careful):
    """The plain loop, whose last task ends first."""

    def map(self, *arguments: Any, **options: Any) -> Iterator[Any]:
        return iter(list(super().map(*arguments, **options))[::-1])


def test_it_does_not_matter_which_worker_ends_first(truth: Run, tmp_path: Path) -> None:
    run = beside(truth, tmp_path, "evaluate")
    details = carry(run, "evaluate", engine=Backwards()).details
    assert details["methods"] == truth.manifest("evaluate").details["methods"]


def test_recall_by_group_is_the_mean_over_its_images() -> None:
    shares = np.array([[10.0, 20.0, 60.0, 90.0, 0.0], [30.0, 20.0, 60.0, 90.0, 0.0]])
    recall = recall_by_group(shares, ["a", "a", "b", None, "b"])
    assert recall is not None
    assert recall["by_group"] == {"a": 20.0, "b": 30.0}
    assert (recall["worst_group"], recall["worst_group_recall"], recall["group_gap"]) == ("a", 20.0, 10.0)
    low, high = recall["worst_group_recall_ci"]
    assert 0 <= low < 20 < high <= 100
    low, high = recall["group_gap_ci"]
    assert low < 0 < 10 < high
    assert recall_by_group(shares, ["a", None, "a", None, None]) is None


def test_a_gap_of_all_images_is_sure() -> None:
    shares = np.array([[0.0, 1.0, 100.0, 99.0] * 10])
    recall = recall_by_group(shares, ["a", "a", "b", "b"] * 10)
    assert recall is not None
    assert recall["group_gap_ci"] == pytest.approx([99, 99], abs=0.5)


def test_groups_of_the_test_images_are_reported(truth: Run) -> None:
    groups = truth.test.column("group")
    group_of_image = dict(zip(truth.test.image.tolist(), groups, strict=True))
    shares = columns(truth, "evaluate/by_image")
    mean = np.mean([values for name, values in shares.items() if name.startswith("curated-")], 0)
    reported = truth.manifest("evaluate").details["methods"]["curated"]["groups"]
    assert set(reported["by_group"]) == set(groups)
    for name, value in reported["by_group"].items():
        mine = [image for image in sorted(group_of_image) if group_of_image[image] == name]
        places = np.searchsorted(sorted(group_of_image), mine)
        assert value == pytest.approx(mean[places].mean())
