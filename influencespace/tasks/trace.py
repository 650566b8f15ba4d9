"""Trace a proxy's error on a pair back to the training pairs that caused it, with a page of them."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from influencespace.config import load_config
from influencespace.data.artifacts import fingerprint, write_json
from influencespace.data.images import RejectedImage, decode_image
from influencespace.data.pair_set import PairSet
from influencespace.engine.local import Engine, run_once
from influencespace.errors import InputError
from influencespace.models.space import Inputs
from influencespace.report.pictures import shortened, thumbnail
from influencespace.report.sheet import Card, Section, cards, write_sheet
from influencespace.report.table import read_summary
from influencespace.stages.finish import stage_of
from influencespace.stages.ingest.encode import EmbedConfig, EncoderLoader, load
from influencespace.stages.ingest.split import pair_sets
from influencespace.stages.proxies.proxies import ALL, Proxy
from influencespace.stages.scoring.trace import Cause, Causes, TraceConfig, gradient_index, trace
from influencespace.tasks.score import valued

IntArray = NDArray[np.int64]
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


def query_by_uid(run: Path, uid: str) -> Query:
    """The pair of the test or target set with this uid; raises InputError where there is none, or the run is not finished."""
    read_summary(run)
    sets = _sets(run)
    for role in ROLES:
        uids = list(map(str, sets[role].column("uid")))
        if uid in uids:
            row = uids.index(uid)
            return Query(name=uid, caption=str(sets[role].column("caption")[row]), role=role, row=row)
    told = "is in the pool: it is a training pair, not a query" if uid in sets["pool"].column("uid") else ""
    raise InputError(
        f"uid {uid!r} {told or 'is in neither the test nor the target set of the run'}; give a pair of the test or target set "
        "(their uids are in embed/*/pairs.parquet), or a picture and its caption by --query"
    )


def query_by_picture(run: Path, image: Path, caption: str) -> Query:
    """A picture file with its caption; raises InputError for one that cannot be read or decoded, or for no caption."""
    read_summary(run)
    config = load_config(run / "config.yaml", {}).embed
    if not config.encoder:
        raise InputError(
            f"{run} was made from embeddings without an encoder, so that a picture cannot be embedded: give --uid"
        )
    caption = caption.encode(errors="replace").decode().strip()  # a terminal may hand over broken bytes
    if not caption:
        raise InputError(f"the caption of {image} is empty: give the text that belongs to the picture")
    try:
        data = image.expanduser().read_bytes()
        decode_image(data, config.max_pixels)
    except OSError as error:
        raise InputError(f"picture {image} cannot be read: {error.strerror}") from None
    except RejectedImage as error:
        raise InputError(f"picture {image} cannot be used: {error}") from None
    return Query(name=str(image), caption=caption, picture=data)


def trace_run(
    run: Path, queries: Sequence[Query], config: TraceConfig, engine: Engine, *, index: bool = False
) -> list[dict[str, Any]]:
    """Find the training pairs behind the answers to queries of the proxy of all pairs of a finished run.

    With `index` candidates are looked up in trace/index, stored projected gradients of the pool, which the first such call
    writes: quicker for many queries, at the risk of missing some pair; without it all pairs are scored. Writes
    trace/<query>/trace.json and trace.html for each query, and returns what the files say, with their paths.
    """
    run = run.expanduser().absolute()
    given, inputs = valued(run)
    sets = _sets(run)
    found = run_once(
        engine,
        Answer(
            queries=tuple(queries),
            sets=sets,
            proxy=Proxy(run / "proxy", ALL),
            embed=load_config(run / "config.yaml", {}).embed,
        ),
    )
    folder = None
    if index:
        folder = run / "trace" / "index"
        gradient_index(given, inputs, config, folder, engine)
    embedded = [answer.inputs for answer in found]
    together = torch.cat([image for image, _ in embedded]), torch.cat([text for _, text in embedded])
    traced = trace(given, together, config, engine, folder)
    return [
        _written(run, sets, query, answer, causes) for query, answer, causes in zip(queries, found, traced)
    ]


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
    sets: dict[str, PairSet]
    proxy: Proxy
    embed: EmbedConfig
    load_encoder: EncoderLoader = load

    def __call__(self) -> list[Answered]:
        encoder = (
            self.load_encoder(self.embed, "cpu") if any(query.row is None for query in self.queries) else None
        )
        galleries = {
            role: self.proxy.embed(self.sets[role].inputs(slice(None)))
            for role in {query.role for query in self.queries}
        }
        return [self._answered(query, encoder, *galleries[query.role]) for query in self.queries]

    def _answered(self, query: Query, encoder: Any, u: Tensor, t: Tensor) -> Answered:
        image = self.sets[query.role].image
        if query.row is None:
            inputs = self._embedded(query, encoder)
            right = np.zeros(len(image), bool)
        else:
            inputs = self.sets[query.role].inputs(np.array([query.row]))
            right = image == image[query.row]
        own_u, own_t = self.proxy.embed(inputs)
        own = float((own_u * own_t).sum())
        distinct = np.unique(image, return_index=True)[
            1
        ]  # a picture once, whatever the number of its captions
        return Answered(
            inputs=inputs,
            caption=retrieved((t @ own_u[0]).numpy(), right, own, np.arange(len(image))),
            picture=retrieved((u[distinct] @ own_t[0]).numpy(), right[distinct], own, distinct),
        )

    def _embedded(self, query: Query, encoder: Any) -> Inputs:
        pixels = encoder.preprocess_images([decode_image(query.picture, self.embed.max_pixels)])
        tokens, _ = encoder.tokenize([query.caption])
        found = encoder.encode_image(pixels).clone(), encoder.encode_text(tokens).clone()
        width = self.sets["pool"].table.dimension
        if found[0].shape[1] != width:
            raise InputError(
                f"the encoder {self.embed.encoder} embeds in {found[0].shape[1]} dimensions, the run's pool has {width}: "
                "its embeddings were imported from another encoder; give --uid of a pair of the run"
            )
        return found


def retrieved(similarity: NDArray[Any], right: NDArray[np.bool_], own: float, rows: IntArray) -> Retrieved:
    """Where the query's own answer comes among others: similarity, right, rows (n,), `own` the similarity of its own.

    Other right answers (of the same picture) count as its own; equal similarities come after it.
    """
    others = np.where(right, -np.inf, similarity)
    best = max(own, float(similarity[right].max(initial=-np.inf)))
    better = int((others > best).sum())
    first = int(rows[np.argmax(others)]) if better else -1
    return Retrieved(rank=better + 1, of=int((~right).sum()) + 1, first=first)


def _sets(run: Path) -> dict[str, PairSet]:
    run = run.expanduser().absolute()
    return pair_sets(run / "split", stage_of(run, "split"))


def _uids(pairs: PairSet, rows: Sequence[int]) -> list[str]:
    found: list[str] = pairs.table.pairs("uid")["uid"].take(pairs.rows[list(rows)]).to_pylist()
    return found


def _written(
    run: Path, sets: dict[str, PairSet], query: Query, answered: Answered, causes: Causes
) -> dict[str, Any]:
    """Write trace.json and trace.html of one query; what they say."""
    out = run / "trace" / query.folder
    out.mkdir(parents=True, exist_ok=True)
    answers = {"caption": answered.caption, "picture": answered.picture}
    instead = {
        what: _uids(sets[query.role], [one.first])[0] for what, one in answers.items() if one.first >= 0
    }
    ranked = {
        "harmful": _ranked(sets["pool"], causes.harmful),
        "helpful": _ranked(sets["pool"], causes.helpful),
    }
    found = {
        "query": query.name,
        "caption": query.caption,
        "retrieved": {
            what: {"rank": one.rank, "of": one.of, "first": instead.get(what, query.name)}
            for what, one in answers.items()
        },
    } | ranked
    write_json(out / "trace.json", found)
    paths = {name: str(out / name) for name in ("trace.html", "trace.json")}
    told = [
        f"The proxy of the whole pool puts the query's caption at rank {answered.caption.rank:,} of "
        f"{answered.caption.of:,} for its picture, and its picture at rank {answered.picture.rank:,} of "
        f"{answered.picture.of:,} for its caption.",
        SIGN,
    ]
    if not instead:
        told.insert(1, "It does not err on this pair; what is below made that less sure, or surer.")
    mine = _own_card(sets[query.role], query)
    asked = sets[query.role].folder / "pairs.parquet"
    others = cards(asked, [(uid, f"comes first as the {what}") for what, uid in instead.items()])
    sections = [Section(cards=[mine, *others], heading="The query, and what is retrieved in its place")]
    for name, heading in HEADINGS.items():
        wanted = [
            (
                cause["uid"],
                f"{cause['rank']} · score {cause['score']:.3g} (own {cause['own']:.3g}, negative "
                f"{cause['negative']:.3g}) · relative influence {cause['relative_influence']:.3g}",
            )
            for cause in ranked[name]
        ]
        shown = cards(sets["pool"].folder / "pairs.parquet", wanted)
        sections.append(Section(cards=shown, heading=heading, sentences=() if shown else ["No pair of the pool."]))
    write_sheet(out / "trace.html", "Training pairs behind an error", told, sections)
    return found | {"paths": paths}


def _ranked(pool: PairSet, causes: Sequence[Cause]) -> list[dict[str, Any]]:
    uids = _uids(pool, [cause.row for cause in causes])
    ranked = []
    for rank, (uid, cause) in enumerate(zip(uids, causes), 1):
        values = asdict(cause)
        del values["row"]
        ranked.append({"rank": rank, "uid": uid} | values)
    return ranked


def _own_card(asked: PairSet, query: Query) -> Card:
    if query.row is None:
        return Card(
            caption=shortened(query.caption),
            picture=thumbnail(query.picture),
            facts=("the query", query.name),
        )
    (card,) = cards(asked.folder / "pairs.parquet", [(query.name, "the query")])
    return card
