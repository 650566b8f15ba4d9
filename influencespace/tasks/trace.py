"""Trace a proxy's error on a pair back to the training pairs that caused it, with a page of them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from influencespace.core.arrays import IntArray
from influencespace.data.artifacts import fingerprint, write_json
from influencespace.data.images import RejectedImage, decode_image
from influencespace.data.pair_set import PairSet, rows_of
from influencespace.engine.local import Engine
from influencespace.errors import InputError
from influencespace.models.space import Inputs
from influencespace.report.pictures import shortened, thumbnail
from influencespace.report.sheet import Card, Section, cards, write_sheet
from influencespace.run import Run, Workers, carry_out
from influencespace.stages.ingest.encode import EncoderLoader, load
from influencespace.stages.proxies.proxy import ALL, Proxy
from influencespace.stages.scoring.scoring import ScoringInputs
from influencespace.stages.scoring.trace import Cause, Causes, GradientIndex, TraceConfig, trace

ROLES = ("test", "target")
MAX_NAME = 40  # characters of a uid in the name of a folder
HEADINGS = {"harmful": "Caused the error", "helpful": "Held against it"}
SIGN = (
    "A score below zero predicts that more weight on the training pair raises the loss of the query, a score above zero that "
    "it lowers it; it is the sum of the pair's influence as an anchor (own) and as a negative of others. Relative influence "
    "has no sign and orders the pairs."
)


@dataclass(frozen=True, kw_only=True)
class Query:
    """A pair that the proxy may have got wrong: one of the run's own, or a picture with a caption."""

    name: str
    """The uid, or the path of the picture."""
    caption: str
    role: str = "test"
    """The set that it is of, or is put among, to be retrieved."""
    row: int | None = None
    """Of that set; None for a picture from outside."""
    picture: bytes = b""
    """The encoded picture from outside."""

    @property
    def folder(self) -> str:
        """A name for its results: readable, and its own."""
        readable = re.sub(r"[^\w.-]+", "_", Path(self.name).name)[:MAX_NAME].strip("._")
        return f"{readable}-{fingerprint([self.name, self.caption])[:8]}"


def query_by_uid(run: Run, uid: str) -> Query:
    """The pair of the test or target set with this uid; raises InputError where there is none."""
    for role in ROLES:
        pairs = run.sets[role]
        for row in rows_of(pairs, [uid]).values():
            caption = str(pairs.read(np.array([row]), "caption")["caption"][0])
            return Query(name=uid, caption=caption, role=role, row=row)
    reason = "is in neither the test nor the target set of the run"
    if rows_of(run.pool, [uid]):
        reason = "is in the pool: it is a training pair, not a query"
    raise InputError(
        f"uid {uid!r} {reason}; give a pair of the test or target set (their uids are in embed/*/*/pairs.parquet), or a picture "
        "and its caption by --query"
    )


def query_by_picture(run: Run, image: Path, caption: str) -> Query:
    """A picture file with its caption; raises InputError for one that cannot be read or decoded, or for no caption."""
    if not run.config.embed.encoder:
        raise InputError(
            f"{run.folder} was made from embeddings without an encoder, so that a picture cannot be embedded: give --uid"
        )
    caption = caption.encode(errors="replace").decode().strip()  # a terminal may hand over broken bytes
    if not caption:
        raise InputError(f"the caption of {image} is empty: give the text that belongs to the picture")
    try:
        data = image.expanduser().read_bytes()
        decode_image(data, run.config.embed.max_pixels)
    except OSError as error:
        raise InputError(f"picture {image} cannot be read: {error.strerror}") from None
    except RejectedImage as error:
        raise InputError(f"picture {image} cannot be used: {error}") from None
    return Query(name=str(image), caption=caption, picture=data)


def trace_run(
    run: Run, queries: Sequence[Query], config: TraceConfig, engine: Engine, *, index: bool = False
) -> list[dict[str, Any]]:
    """Find the training pairs behind the answers to queries of the proxy of all pairs of a finished run.

    With `index` candidates are looked up in trace/index, stored projected gradients of the pool, which the first such call
    writes: quicker for many queries, at the risk of missing some pair; without it all pairs are scored. Writes
    trace/<query>/trace.json and trace.html for each query, and returns what the files say, with their paths. Raises InputError
    where the run is not finished, and where the encoder is not that of the pool's embeddings.
    """
    run.summary()
    workers = Workers(engine=engine, folder=run.at("trace"), stage="trace")
    answers: list[Answered] = workers.once(Answer(queries=tuple(queries), run=run))
    folder = None
    if index:
        stage = GradientIndex(config)
        carry_out(stage, run, engine)
        folder = run.at(stage.name)
    images, texts = (torch.cat(part) for part in zip(*(answer.inputs for answer in answers)))
    traced = trace(ScoringInputs.of(run), (images, texts), config, workers, folder)
    return [_written(run, *one) for one in zip(queries, answers, traced)]


@dataclass(frozen=True, kw_only=True)
class Retrieved:
    """What comes first of n answers, and where the right one comes."""

    rank: int
    """Of the best right answer; 1 is first."""
    of: int
    first: int
    """Pair of the set that comes first; -1 where that is the query itself."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A query's embeddings (two (1, D)) and the proxy's answers to it."""

    inputs: Inputs
    caption: Retrieved
    """For its picture."""
    picture: Retrieved
    """For its caption."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Task: embed the queries and let the proxy retrieve, for each its caption and its picture among its set's."""

    queries: tuple[Query, ...]
    run: Run
    load_encoder: EncoderLoader = load

    def __call__(self) -> list[Answered]:
        outside = any(query.row is None for query in self.queries)
        encoder = self.load_encoder(self.run.config.embed, "cpu") if outside else None
        proxy = Proxy(self.run.at("proxies"), ALL)
        galleries = {
            role: proxy.embed(self.run.sets[role].inputs(slice(None)))
            for role in {query.role for query in self.queries}
        }
        return [self._answered(query, encoder, proxy, galleries[query.role]) for query in self.queries]

    def _answered(self, query: Query, encoder: Any, proxy: Proxy, gallery: tuple[Tensor, Tensor]) -> Answered:
        pairs, (u, t) = self.run.sets[query.role], gallery
        image = pairs.image
        if query.row is None:
            inputs, right = self._embedded(query, encoder), np.zeros(len(image), bool)
        else:
            inputs, right = pairs.inputs(np.array([query.row])), image == image[query.row]
        own_u, own_t = proxy.embed(inputs)
        own = float((own_u * own_t).sum())
        # a picture once, whatever the number of its captions
        distinct = np.unique(image, return_index=True)[1]
        return Answered(
            inputs=inputs,
            caption=retrieved((t @ own_u[0]).numpy(), right, own, np.arange(len(image))),
            picture=retrieved((u[distinct] @ own_t[0]).numpy(), right[distinct], own, distinct),
        )

    def _embedded(self, query: Query, encoder: Any) -> Inputs:
        embed, width = self.run.config.embed, self.run.pool.table.dimension
        pixels = encoder.preprocess_images(
            [decode_image(query.picture, embed.max_pixels, encoder.input_size)]
        )
        tokens, _ = encoder.tokenize([query.caption])
        inputs = encoder.encode_image(pixels).clone(), encoder.encode_text(tokens).clone()
        if inputs[0].shape[1] != width:
            raise InputError(
                f"the encoder {embed.encoder} embeds in {inputs[0].shape[1]} dimensions, the run's pool has {width}: "
                "its embeddings were imported from another encoder; give --uid of a pair of the run"
            )
        return inputs


def retrieved(similarity: NDArray[Any], right: NDArray[np.bool_], own: float, rows: IntArray) -> Retrieved:
    """Where the query's own answer comes among others: similarity, right, rows (n,), `own` the similarity of its own.

    Other right answers (of the same picture) count as its own; equal similarities come after it.
    """
    others = np.where(right, -np.inf, similarity)
    best = max(own, float(similarity[right].max(initial=-np.inf)))
    better = int((others > best).sum())
    first = int(rows[np.argmax(others)]) if better else -1
    return Retrieved(rank=better + 1, of=int((~right).sum()) + 1, first=first)


def _uids(pairs: PairSet, rows: Sequence[int]) -> list[str]:
    uids: list[str] = pairs.read(np.array(rows, np.int64), "uid")["uid"].tolist()
    return uids


def _written(run: Run, query: Query, answered: Answered, causes: Causes) -> dict[str, Any]:
    """Write trace.json and trace.html of one query; what they say."""
    out = run.at("trace") / query.folder
    asked = run.sets[query.role]
    answers = {"caption": answered.caption, "picture": answered.picture}
    instead = {what: _uids(asked, [one.first])[0] for what, one in answers.items() if one.first >= 0}
    result: dict[str, Any] = {
        "query": query.name,
        "caption": query.caption,
        "retrieved": {
            what: {"rank": one.rank, "of": one.of, "first": instead.get(what, query.name)}
            for what, one in answers.items()
        },
        "harmful": _ranked(run.pool, causes.harmful),
        "helpful": _ranked(run.pool, causes.helpful),
    }
    write_json(out / "trace.json", result)
    sentences = [
        f"The proxy of the whole pool puts the query's caption at rank {answered.caption.rank:,} of "
        f"{answered.caption.of:,} for its picture, and its picture at rank {answered.picture.rank:,} of "
        f"{answered.picture.of:,} for its caption.",
        *([] if instead else ["It does not err on this pair; what is below made it less certain, or more."]),
        SIGN,
    ]
    facts = [(uid, f"comes first as the {what}") for what, uid in instead.items()]
    shown = [_own_card(asked, query), *cards(asked.folder, facts)]
    first = Section(cards=shown, heading="The query, and what is retrieved in its place")
    sections = [first, *(_section(run.pool, heading, result[name]) for name, heading in HEADINGS.items())]
    write_sheet(out / "trace.html", "Training pairs behind an error", sentences, sections)
    return result | {"paths": {name: str(out / name) for name in ("trace.html", "trace.json")}}


def _ranked(pool: PairSet, causes: Sequence[Cause]) -> list[dict[str, Any]]:
    uids = _uids(pool, [cause.row for cause in causes])
    ranked = [
        {"rank": rank, "uid": uid} | asdict(cause) for rank, (uid, cause) in enumerate(zip(uids, causes), 1)
    ]
    return [{name: value for name, value in one.items() if name != "row"} for one in ranked]


def _section(pool: PairSet, heading: str, causes: Sequence[Mapping[str, Any]]) -> Section:
    """The cards of the pairs on one side."""
    facts = [
        (
            cause["uid"],
            f"{cause['rank']} · score {cause['score']:.3g} (own {cause['own']:.3g}, negative {cause['negative']:.3g}) · "
            f"relative influence {cause['relative_influence']:.3g}",
        )
        for cause in causes
    ]
    shown = cards(pool.folder, facts)
    return Section(cards=shown, heading=heading, sentences=() if shown else ["No pair of the pool."])


def _own_card(asked: PairSet, query: Query) -> Card:
    if query.row is None:
        facts = ("the query", query.name)
        return Card(caption=shortened(query.caption), picture=thumbnail(query.picture), facts=facts)
    (card,) = cards(asked.folder, [(query.name, "the query")])
    return card
