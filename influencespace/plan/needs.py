"""What each stage needs, as formulas of the sizes: bytes read and written, memory, workers, and work.

Symbols: n pairs of the pool, D embedding dimension, d proxy dimension, p = 2 D d parameters, B batch size, C contexts
of M pairs in a bank, K folds of the pool, F folds of the target. Work is in multiply-adds on the longest path through
the stage's workers (pairs, where the encoder or files decide); only ratios of it are used.
"""

from dataclasses import dataclass, replace
from functools import cached_property

from influencespace.config import RunConfig
from influencespace.data.merge import BLOCK_BYTES, BLOCK_PAIRS
from influencespace.engine.local import AHEAD, Engine
from influencespace.plan.choices import Choices
from influencespace.plan.survey import Sizes
from influencespace.report.pictures import SHOWN
from influencespace.stages.ingest.embed import share, worker_bytes
from influencespace.stages.ingest.imports import PART_PAIRS
from influencespace.stages.scoring.fairness import MAX_FITTED
from influencespace.stages.selection.selection import DYNAMIC
from influencespace.stages.selection.weighting import SEEDS, candidates, serves_groups
from influencespace.stages.training.dynamic import MAX_SCORED

# Timing with torch 2.9 and Ray 2.51: a driver after its first stages, a worker with the libraries it imports.
DRIVER_BYTES = 450 * 2**20
WORKER_BYTES = 400 * 2**20
TASK_BYTES = 4096  # a task on the driver: itself, pickled, and Ray's record of it
# Columns of all pairs (rows, images, captions, folds, orders) in each worker of a stage, in bytes a pair: what peaks
# grew by from 200,000 to 600,000 pairs, rounded up. Consolidation says about itself that it takes 100.
PAIR_BYTES = {"embed": 100, "split": 100, "proxy": 350, "cluster": 200, "redundancy": 200}
PAIR_BYTES |= {"curvature": 200, "attribute": 300, "fairness": 100, "curate": 400, "train": 350}
CAPTION_BYTES = 1000  # a row of pairs.parquet while it is made
# A solve holds probes and products in float32 and some six copies in float64: 56 to 59 bytes were measured.
SKETCH_BYTES = 60
# Drawing the probes takes 20, and a probe (or right-hand side) at work its row in float64 and float32, some copies of it.
PROBE_BYTES = 20
ROW_BYTES = 40
# Reading and fusing a pair costs about as much as comparing it with this many centroids.
FUSION_CENTROIDS = 32
LARGEST_CLUSTER = 3  # in mean sizes; 1.9 was measured on real pairs, 2.9 where a third of them were copies
DECISION_WORK = 10_000  # of one pair in the decision, in multiplications
# Of one pair whose sampler is re-weighted: what strata and axes hold of it, its weights old and new.
AXES_BYTES = 250
PAGE_BYTES = 75_000  # report.html without its pictures
THUMBNAIL_BYTES = 8_000  # as base64


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one stage needs."""

    stage: str
    pairs: int
    read: int
    """Bytes of files, once for each pass over them; what training draws again and again comes from memory."""
    written: int
    """Bytes that stay on disk."""
    temporary: int = 0
    """Bytes on disk that are gone when the stage ends."""
    worker: int
    """Bytes of memory of one worker."""
    driver: int
    """Bytes of memory of the driver."""
    workers: int = 1
    work: float = 1.0
    seconds: float | None = None
    """None before a calibration."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """The formulas, one method a stage."""

    config: RunConfig
    sizes: Sizes
    choices: Choices
    engine: Engine

    def all(self) -> list[Need]:
        """The stages in their order; those after the split for as many rounds as there can be."""
        once = [*(self.embed(role) for role in self.sizes.surveys), self.split()]
        rounds = [
            self.proxy(),
            self.cluster(),
            self.redundancy(),
            self.curvature(),
            self.attribute(),
            self.fairness(),
            self.curate(),
        ]
        return repeated([*once, *rounds, self.train(), self.evaluate(), self.report()], self.config.iterate)

    @property
    def n(self) -> int:
        return self.sizes.roles["pool"].pairs

    @property
    def D(self) -> int:
        return self.sizes.dimension

    @property
    def d(self) -> int:
        return self.config.proxy.train.dimension

    @property
    def p(self) -> int:
        return 2 * self.D * self.d

    @property
    def proxies(self) -> int:
        return 1 + self.config.proxy.folds

    @property
    def F(self) -> int:
        return min(self.config.target.folds, max(1, self.sizes.roles["target"].images // 2))

    @property
    def B(self) -> int:
        return min(self.config.proxy.train.batch_size, self.sizes.roles["pool"].images)

    @cached_property
    def bank(self) -> tuple[int, int]:
        """C, M: contexts of a proxy's bank and the pairs of each."""
        given = self.config.proxy
        images = self.sizes.roles["pool"].images
        count = given.bank_batches(images)
        return count, min(given.train.batch_size - 1, max(2, given.min_images(images) // count))

    @property
    def pair_bytes(self) -> int:
        """Both embeddings of a pair."""
        return 8 * self.D

    @property
    def _step_work(self) -> int:
        """Multiplications of one training step: heads forward and backward, and the logits."""
        return self.B * (6 * self.D * self.d + 3 * self.B * self.d)

    @property
    def _quality_work(self) -> int:
        """Multiplications of the quality of all pairs by one proxy."""
        C, M = self.bank
        return self.n * (2 * self.D * self.d + 2 * C * M * self.d)

    @property
    def _quality_bytes(self) -> int:
        return self._block(self.config.proxy.bucket_size, self.pair_bytes + 8 * self.d + 12 * self.bank[1])

    @property
    def _influence_work(self) -> int:
        """Multiplications of the influence of one pair: its embeddings or tangents, against the bank."""
        return 2 * self.D * self.d + 4 * self.bank[0] * self.bank[1] * self.d

    @property
    def runs(self) -> int:
        return len(self.config.train.seeds) * len(self.config.train.methods)

    @property
    def refreshes(self) -> int:
        """Re-weightings of all dynamic proxies together."""
        given = self.config.train
        return len(given.seeds) * (DYNAMIC in given.methods) * ((self.choices.steps - 1) // given.refresh)

    def embed(self, role: str) -> Need:
        given, found = self.config.embed, self.sizes.surveys[role]
        vectors = 4 * self.D * (found.images + found.texts)
        written = vectors + round(found.row_bytes * found.pairs)
        consolidation = (
            PAIR_BYTES["embed"] * found.pairs
            + min(BLOCK_BYTES, vectors)
            + CAPTION_BYTES * min(BLOCK_PAIRS, found.pairs)
        )
        imported = role == "pool" and self.config.data.embeddings is not None
        if imported:
            workers, towers = 1, WORKER_BYTES + 6 * self.pair_bytes * min(PART_PAIRS, found.pairs)
        else:
            workers, towers = share(given, self.engine, found.shards).num_actors, worker_bytes(given)
        return self._need(
            f"embed {role}",
            pairs=found.pairs,
            read=(1 if imported else 2) * found.bytes,  # to index, then to embed
            written=written,
            temporary=written + 100 * found.pairs,
            worker=max(towers, WORKER_BYTES + consolidation),
            workers=workers,
            work=found.pairs / workers,
            tasks=found.shards,
        )

    def split(self) -> Need:
        everything = sum(found.pairs for found in self.sizes.surveys.values())
        rows = sum(role.pairs for role in self.sizes.roles.values())
        return self._need("split", pairs=everything, read=12 * everything, written=8 * rows, work=everything)

    def proxy(self) -> Need:
        given, (C, M) = self.config.proxy, self.bank
        turns = -(-given.folds // min(given.folds, self.engine.cores))
        path = self.choices.tried + self.choices.steps * turns
        workers = self._workers(self.n, given.bucket_size, least=given.folds)
        return self._need(
            "proxy",
            read=3 * self.n * self.pair_bytes,  # to train, and twice for quality
            written=self.proxies * (8 * self.p + 8 * C * M) + 32 * self.n,
            worker=self._training + self._quality_bytes,
            workers=workers,
            work=path * self._step_work + 2 * self._quality_work / workers,
            tasks=self._blocks(given.bucket_size),
        )

    def cluster(self) -> Need:
        given, levels = self.config.cluster, self.choices.levels
        width = (2 if given.fusion.name == "concatenation" else 1) * self.D
        workers = self._workers(min(self.n, given.batch_size), given.bucket_size)
        statistic = 8 * width * levels[-1]
        passes = len(levels) * (given.epochs + 1) + 1
        return self._need(
            "cluster",
            read=passes * self.n * self.pair_bytes,
            written=6 * self.n + 4 * width * levels[-1],
            worker=self._block(max(given.bucket_size, given.sample), 12 * width + 8 * levels[-1])
            + 4 * statistic,
            workers=workers,
            work=self.n * width * sum((given.epochs + 1) * (k + FUSION_CENTROIDS) for k in levels) / workers,
            tasks=self._blocks(given.bucket_size),
            driver=statistic * AHEAD * workers,
        )

    def redundancy(self) -> Need:
        given, clusters = self.config.redundancy, self.choices.levels[-1]
        largest = min(self.n, LARGEST_CLUSTER * self.n // clusters)
        workers = max(1, min(self.engine.cores, clusters))
        return self._need(
            "redundancy",
            read=self.n * self.pair_bytes + 24 * self.n,
            written=10 * self.n,
            temporary=48 * self.n,
            worker=4 * largest * self.pair_bytes,  # as read, less their mean, fused, and those of leaders
            workers=workers,
            work=self.n * self.D * min(largest, given.most) / workers,
            tasks=clusters,
        )

    def curvature(self) -> Need:
        (C, M), rank = self.bank, self.choices.rank
        workers = min(self.engine.cores, self.proxies)
        products = C * M * (rank + 2 * self.F) + self.F * self.sizes.roles["target"].pairs / 2
        ranks, following = rank, self.config.curvature.rank
        while following < rank:
            ranks, following = ranks + following, 2 * following
        return self._need(
            "curvature",
            pairs=C * M * self.proxies,
            read=self.proxies * (C * M + self.sizes.roles["target"].pairs) * self.pair_bytes,
            written=self.proxies * 4 * self.F * self.p,
            temporary=self.proxies * 4 * self.p * ranks,
            worker=self._sketching(),
            workers=workers,
            work=self.proxies * products * (4 * self.D * self.d + 2 * M * self.d) / workers,
            tasks=4 * self.engine.cores,
        )

    def _sketching(self) -> int:
        """Of the larger of solving with all probes and multiplying some of them: parameters x rank decide."""
        rank, M = self.choices.rank, self.bank[1]
        rows = max(4, self.F, -(-rank * self.proxies // (4 * self.engine.cores)))
        at_work = rows * (ROW_BYTES * self.p + 16 * M * (M + 2 * self.d))
        return max(SKETCH_BYTES * self.p * rank, PROBE_BYTES * self.p * rank + at_work)

    @property
    def _scored(self) -> int:
        """Pairs that are scored at most."""
        given = self.config.attribute
        quantiles = given.quantiles_of(self.n)
        return min(self.n, self.choices.levels[-1] * quantiles * given.budget)

    def attribute(self) -> Need:
        given, (C, M) = self.config.attribute, self.bank
        quantiles = given.quantiles_of(self.n)
        scored = self._scored
        target, caption_control = (
            min(self.n, quantiles * given.target_budget),
            min(self.n, given.caption_control),
        )
        workers = self._workers(scored, given.bucket_size)
        influence = 8 * (6 + C) * scored + 8 * (1 + self.F) * target + 16 * caption_control
        scorers = self.proxies * 4 * (self.p * (self.F + 3) + 4 * C * M * self.d * (1 + self.F))
        passes = 4 * scored + 2 * (1 + self.F) * target + 2 * caption_control
        return self._need(
            "attribute",
            read=2 * (scored + target + caption_control) * self.pair_bytes + 24 * self.n,
            written=influence + 8 * (scored + target + 2 * caption_control) + 38 * self.n,
            temporary=influence,
            worker=scorers
            + self._block(
                given.bucket_size,
                self.pair_bytes
                + max(16 * self.d + 40 * M, (8 * self.d * (1 + self.F) + 40 * M + 16 * M * self.F) // 4),
            ),
            workers=workers,
            work=passes * self._influence_work / workers,
            tasks=self._blocks(given.bucket_size),
        )

    @property
    def _serves_groups(self) -> bool:
        return self.sizes.target_groups and serves_groups(self.config.curate)

    def fairness(self) -> Need:
        """Of a target that names groups; of another it is next to nothing."""
        if not self._serves_groups:
            return self._need(
                "fairness", read=self.sizes.roles["target"].pairs * self.pair_bytes, written=1000
            )
        C, M = self.bank
        scored, target = self._scored, self.sizes.roles["target"].pairs
        fitted = min(scored, MAX_FITTED)
        block = self.config.attribute.bucket_size
        workers = self._workers(scored, block)
        return self._need(
            "fairness",
            read=(target + C * M + scored + fitted + self.n) * self.pair_bytes,
            written=16 * scored + 8 * self.n + 4 * self.p,
            temporary=16 * scored + 8 * self.n,
            # embeddings in float64, centred, and their Gram matrix with its eigenvectors; or a block that is scored
            worker=max(
                self._sketching(),
                fitted * 5 * self.pair_bytes + 3 * 8 * (2 * self.D) ** 2,
                20 * self.p + self._block(block, 5 * self.pair_bytes + 16 * self.d + 40 * M),
            ),
            workers=workers,
            work=2 * scored * self._influence_work / workers
            + fitted * (2 * self.D) ** 2
            + C * M * (self.config.curvature.rank + 2) * (4 * self.D * self.d + 2 * M * self.d),
            tasks=self._blocks(block),
        )

    def curate(self) -> Need:
        strata = self.choices.levels[-1] * self.config.attribute.quantiles
        choices = candidates(self.config.curate, self._serves_groups)
        trials = len(choices) * len(SEEDS) if len(choices) > 1 else 0
        workers = max(1, min(self.engine.cores, trials))
        return self._need(
            "curate",
            read=40 * self.n + trials * (40 + self.pair_bytes) * self.n,
            written=self._curated + 2 * self.n + 128 * strata,
            worker=self._training if trials else 0,
            workers=workers,
            work=DECISION_WORK * self.n + trials * self.choices.steps * self._step_work / workers,
        )

    def train(self) -> Need:
        judged = min(self.n, MAX_SCORED) + self.sizes.roles["target"].pairs // 2
        refresh = self._quality_work + 2 * judged * self._influence_work + DECISION_WORK * self.n
        weighing = AXES_BYTES * self.n + self._quality_bytes if self.refreshes else 0
        return self._need(
            "train",
            read=(1 + self.refreshes) * self.n * self.pair_bytes,
            written=4 * self.p * self.runs,
            worker=self._training + weighing,
            workers=self.config.train.workers,
            work=self.runs * self.choices.steps * self._step_work + self.refreshes * refresh,
        )

    def evaluate(self) -> Need:
        test = self.sizes.roles["test"]
        workers = min(self.engine.cores, self.runs)
        return self._need(
            "evaluate",
            pairs=test.pairs,
            read=test.pairs * self.pair_bytes,
            written=2 * self.runs * test.images + 10_000,
            worker=test.pairs * (2 * self.pair_bytes + 8 * self.d + 100 + 4 * 4 * min(1024, test.images)),
            workers=workers,
            work=test.pairs * (test.images + 2 * self.D) * self.d * self.runs / workers,
            driver=16 * self.runs * test.images,
        )

    def report(self) -> Need:
        picture = min(THUMBNAIL_BYTES, 4 / 3 * self.sizes.surveys["pool"].image_bytes)
        page = PAGE_BYTES + round(3 * SHOWN * picture)
        return self._need("report", read=self._curated, written=self._curated + page)

    @property
    def _curated(self) -> int:
        """Bytes of curated.parquet: uid, weight, score, standard error, stratum and reason of each pair."""
        return round((self.sizes.surveys["pool"].uid_bytes + 14) * self.n)

    @property
    def _training(self) -> int:
        """Heads, gradients, AdamW's moments, a batch and its logits."""
        return 24 * self.p + self.B * (32 * self.B + 2 * self.pair_bytes + 32 * self.d)

    def _need(
        self,
        stage: str,
        *,
        read: int,
        written: int,
        pairs: int | None = None,
        temporary: int = 0,
        worker: int = 0,
        driver: int = 0,
        workers: int = 1,
        work: float = 1.0,
        tasks: int = 1,
    ) -> Need:
        """A Need, with what every worker of the stage holds added, and the tasks on the driver."""
        if not stage.startswith("embed"):
            worker += WORKER_BYTES + PAIR_BYTES.get(stage, 0) * self.n
        return Need(
            stage=stage,
            pairs=self.n if pairs is None else pairs,
            read=read,
            written=written,
            temporary=temporary,
            worker=worker,
            driver=DRIVER_BYTES + TASK_BYTES * tasks + driver,
            workers=workers,
            work=work,
        )

    def _blocks(self, size: int) -> int:
        return -(-self.n // size)

    def _block(self, size: int, row: int) -> int:
        return min(size, self.n) * row

    def _workers(self, rows: int, block: int, least: int = 1) -> int:
        return max(1, min(self.engine.cores, max(least, -(-rows // block))))


def repeated(needs: list[Need], rounds: int) -> list[Need]:
    """The needs of a run whose stages after the split are done `rounds` times, each in folders of its own."""
    return [
        need
        if need.stage.startswith(("embed", "split", "report"))
        else replace(need, read=rounds * need.read, written=rounds * need.written, work=rounds * need.work)
        for need in needs
    ]
