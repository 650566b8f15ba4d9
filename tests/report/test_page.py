"""The page: harmless whatever the captions say, sufficient to itself, and true to the artifacts."""

import base64
import io
import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fake_run import HOSTILE, HOSTILE_UID
from PIL import Image

from influencespace.data.artifacts import write_json
from influencespace.data.embeddings import EmbeddingTable
from influencespace.errors import InputError
from influencespace.report import write_report
from tests.planted import write_pairs

VOID = {"meta", "img", "br"}
EMPTY = VOID | {"path", "use", "g", "rect"}  # of a chart
Attributes = dict[str, str]


class Page(HTMLParser):
    """A parsed page; fails when its tags are not balanced."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, Attributes]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.styles = ""
        self._open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attributes]
        assert len(set(names)) == len(names), (tag, names)
        self.tags.append((tag, {name: value or "" for name, value in attributes}))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in EMPTY
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            self.styles += data
            return
        self.texts.append(data)
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += f" {data.strip()}"

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def all(self, tag: str) -> list[Attributes]:
        return [attributes for name, attributes in self.tags if name == tag]

    def row(self, first: str) -> list[str]:
        """The cells of the row that begins with `first`, words separated by single blanks."""
        cells = [[" ".join(cell.split()) for cell in row] for row in self.rows]
        return next(row for row in cells if row and row[0] == first)


@pytest.fixture(scope="session")
def page(finished_run: Path) -> Page:
    return Page(write_report(finished_run))


@pytest.fixture
def with_summary(run: Path) -> Callable[[dict[str, Any]], Page]:
    """The page of a run with another summary."""

    def write(summary: dict[str, Any]) -> Page:
        write_json(run / "summary.json", summary)
        return Page(write_report(run))

    return write


def test_hostile_text_stays_text(page: Page) -> None:
    assert HOSTILE in page.text
    assert HOSTILE_UID in page.text
    assert "<b>resolved</b>" in page.text
    assert not page.all("script")
    assert "onerror" not in {name for _, attributes in page.tags for name in attributes}


def test_nothing_is_loaded_and_nothing_runs(page: Page) -> None:
    tags = {name for name, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "video", "audio"}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert not {"srcset", "action", "background", "poster"} & set(attributes)
        assert attributes.get("xlink:href", "#").startswith("#")
        assert attributes.get("clip-path", "url(#").startswith("url(#")
        assert attributes.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
        assert attributes.get("href", "#").startswith("#")
        assert "url(" not in attributes.get("style", "")
    assert "url(" not in page.styles
    assert "@import" not in page.styles
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_links_lead_to_sections(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    targets = set(ids)
    assert len(ids) == len(targets)
    links = [link["href"].removeprefix("#") for link in page.all("a")]
    assert links
    assert set(links) <= targets


def test_it_can_be_read_without_seeing_it(page: Page) -> None:
    assert all(image["alt"] for image in page.all("img"))
    assert all(header.get("scope") for header in page.all("th"))
    assert len(page.all("svg")) == 4
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in page.all("svg"))
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1


def test_the_table_is_the_summary(page: Page, summary: dict[str, Any]) -> None:
    labels = {
        "curated": "Curated",
        "everything": "Everything",
        "random": "Random",
        "clip_score": "CLIP score",
        "neg_clip_loss": "negCLIPLoss",
    }
    for name, method in summary["methods"].items():
        row = page.row(labels[name])
        low, high = method["mean_recall_ci"]
        assert row[1] == f"{method['mean_recall']:.2f} {low:.2f} to {high:.2f}"
        if name != "curated":
            compared = summary["comparisons"][name]
            numbers = (compared["difference"], *compared["ci"])
            difference, low, high = (f"{value:+.2f}".replace("-", "−") for value in numbers)
            assert row[2] == f"{difference} {low} to {high}"
        assert row[3:5] == [
            " / ".join(f"{method['recall'][direction][cut]:.1f}" for cut in ("1", "5", "10"))
            for direction in ("image_to_text", "text_to_image")
        ]
        kept, seconds = method["kept_fraction"], method["seconds"]
        assert row[5:] == [f"{100 * kept:.1f} %", f"{method['steps']:,}", f"{seconds:.1f}s"]


def test_decisions_are_counted(page: Page, finished_run: Path) -> None:
    reasons = pq.read_table(finished_run / "curated.parquet")["reason"].to_pylist()
    for reason in set(reasons):
        row = page.row(reason)
        assert row[1] == f"{reasons.count(reason):,}"
        assert row[2] == f"{100 * reasons.count(reason) / len(reasons):.1f} %"


def test_rejections_have_reasons_and_examples(page: Page) -> None:
    row = page.row("the caption is empty")
    assert row[1] == "1"
    assert row[2] == "empty in pool.tar"


def test_notes_warnings_and_the_caption_control_are_shown(page: Page, summary: dict[str, Any]) -> None:
    assert summary["notes"][0] in page.text
    assert page.text.count("the proxy has not converged") == 1
    assert "24.3 %" in page.text


def test_pictures_are_small_and_each_group_is_full(page: Page) -> None:
    images = page.all("img")
    assert len(images) == 36
    for image in images:
        data = base64.b64decode(image["src"].partition(",")[2])
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.format == "JPEG"
            assert max(picture.size) <= 160
    assert len(page.source) < 500_000


def test_stages_are_in_the_order_of_the_work(page: Page) -> None:
    positions = [page.text.index(f"{name}") for name in ("48.2s", "9.7s", "21.4s", "1m35s", "11.9s")]
    assert positions == sorted(positions)
    assert page.row("split")[-1] == "1,000 set aside"
    assert page.row("embed pool")[-1] == "2"


def test_what_workers_took_is_shown(page: Page) -> None:
    assert {"87.5 %", "1.23 GB"} <= {*page.row("embed pool")}
    assert (
        "321.5 images a second, 107.2 for each GPU; encoders computed for 93.3 % of the time; 6.78 GB"
        in page.text
    )
    assert page.row("proxies").count("–") >= 2


def test_the_same_artifacts_give_the_same_page(page: Page, finished_run: Path) -> None:
    assert write_report(finished_run).read_text() == page.source


def test_a_loss_is_called_a_loss(
    with_summary: Callable[[dict[str, Any]], Page], summary: dict[str, Any]
) -> None:
    summary["comparisons"]["everything"] = {"difference": -1.5, "ci": [-2.5, -0.5]}
    page = with_summary(summary)
    assert "retrieval got worse" in page.text
    assert "do not use the curated set" in page.text
    assert "−1.50" in page.text
    summary["comparisons"]["everything"] = {"difference": 0.5, "ci": [-0.5, 1.5]}
    page = with_summary(summary)
    assert "did not clearly change" in page.text
    assert "got better" not in page.text


def test_a_summary_may_be_nearly_empty(run: Path, with_summary: Callable[[dict[str, Any]], Page]) -> None:
    for name in ("selection", "embed"):
        shutil.rmtree(run / name)
    (run / "config.yaml").unlink()
    page = with_summary({"kept_fraction": 0.5})
    assert "50.0 % of the pairs were kept" in page.text
    assert "not known whether the curation helped" in page.text
    assert not page.all("svg")
    assert not page.all("img")


def test_numbers_that_are_not_known_are_not_invented(
    with_summary: Callable[[dict[str, Any]], Page], summary: dict[str, Any]
) -> None:
    summary["methods"] = {"curated": {"mean_recall": None}, "<new>": {"mean_recall": float("nan")}}
    summary["caption_control"] = {"influence_mean": 1.0}
    page = with_summary(summary)
    assert page.row("<new>") == ["<new>"]  # nothing is known of any column
    assert "nan" not in page.text.lower()


def test_zero_shot_accuracy_has_a_column_where_it_was_measured(
    page: Page, with_summary: Callable[[dict[str, Any]], Page], summary: dict[str, Any]
) -> None:
    assert "Zero-shot" not in page.text
    summary["methods"]["curated"]["zero_shot_accuracy"] = 12.34
    assert with_summary(summary).row("Curated")[5] == "12.3"


def test_pictures_that_moved_leave_a_mark(run: Path, tmp_path: Path) -> None:
    pairs = EmbeddingTable.open(run / "embed" / "pool").pairs().to_pydict()
    pairs["image_path"] = [path.replace("pool.tar", "gone.tar") for path in pairs["image_path"]]
    write_pairs(run / "embed" / "pool", pairs)
    page = Page(write_report(run))
    assert not page.all("img")
    assert page.text.count("picture not available") == 36


def test_runs_that_are_not_finished(run: Path, tmp_path: Path) -> None:
    (run / "curated.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(InputError, match="damaged"):
        write_report(run)
    (run / "curated.parquet").unlink()
    with pytest.raises(InputError, match=r"no curated\.parquet"):
        write_report(run)
    for text in ("{", "[]"):
        (run / "summary.json").write_text(text)
        with pytest.raises(InputError, match="damaged"):
            write_report(run)
    (run / "summary.json").unlink()
    for folder in (run, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="no finished run"):
            write_report(folder)


def test_a_later_round_may_be_the_best(
    run: Path, with_summary: Callable[[dict[str, Any]], Page], summary: dict[str, Any]
) -> None:
    (run / "round-1").mkdir()
    (run / "selection").rename(run / "round-1" / "selection")
    losses = {"elsewhere/mine": 2.0, "elsewhere/mine/round-1": 1.0}
    summary["rounds"] = [{"folder": folder, "target_loss": loss} for folder, loss in losses.items()]
    summary["stages"] |= {"proxies (round 2)": {"seconds": 7.77}}
    page = with_summary(summary)
    assert len(page.all("svg")) == 4
    assert page.row("proxies (round 2)")[1] == "7.8s"


def test_many_reasons_are_summed_up(
    with_summary: Callable[[dict[str, Any]], Page], summary: dict[str, Any]
) -> None:
    summary["rejected_reasons"] = {f"reason {i}": 100 - i for i in range(20)}
    page = with_summary(summary)
    assert page.row("reason 11")[1] == "89"
    assert "And 8 other reasons, 676 pairs." in page.text
    assert json.dumps("reason 12") not in page.text
