"""The table says what the summary says, in a terminal and in Markdown."""

import io
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from influencespace.report import markdown_table, print_summary
from influencespace.report.findings import findings, methods, title, verdict, weighting_findings
from influencespace.report.numbers import interval, percent, seconds, signed
from influencespace.report.table import COLUMNS, Cell, Column, rows


def printed(summary: dict[str, Any], width: int = 200) -> str:
    file = io.StringIO()
    print_summary(summary, Console(file=file, width=width))
    return file.getvalue()


def test_curated_comes_first_and_strangers_last(summary: dict[str, Any]) -> None:
    summary["methods"] = {"zzz": {}, "random": {}, "aaa": {}, "curated": {}}
    assert [method["name"] for method in methods(summary)] == ["curated", "random", "aaa", "zzz"]


def test_markdown_holds_the_numbers(summary: dict[str, Any]) -> None:
    lines = markdown_table(summary).splitlines()
    assert len(lines) == 2 + len(summary["methods"])
    assert {line.count("|") for line in lines} == {8 + 1}
    assert lines[2].startswith("| **Curated** | 41.24 (40.53 to 41.95) |  | 18.9 / 45.4 / 56.3 |")
    assert "| negCLIPLoss | 41.87 (41.18 to 42.56) | −0.63 (−1.11 to −0.15) |" in lines[6]


def test_a_column_is_one_entry(summary: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Shown everywhere once it is in COLUMNS; a column of which nothing is known is nowhere."""
    own = Column("Kilowatt hours", lambda method: Cell(text=str(method.get("energy", ""))))
    assert rows(summary, [*COLUMNS, own]) == rows(summary)
    summary["methods"]["random"]["energy"] = 12
    headings, lines = rows(summary, [*COLUMNS, own])
    assert headings[-1] == "Kilowatt hours"
    assert [cells[-1].text for _, cells in lines] == ["", "", "12", "", ""]


def test_markdown_cannot_be_broken_by_a_name(summary: dict[str, Any]) -> None:
    summary["methods"] = {"a|b": {}}
    assert markdown_table(summary).splitlines()[2].startswith("| a\\|b |")


def test_the_terminal_shows_table_counts_notes_and_paths(summary: dict[str, Any]) -> None:
    text = printed(summary)
    for wanted in (
        "41.24 (40.53 to 41.95)",
        "+2.33 (+1.31 to +3.34)",
        "18.9 / 45.4 / 56.3",
        "retrieval got better",
    ):
        assert wanted in text
    assert "rejected 2; captions cut by the tokenizer 7." in text
    assert f"Note: {summary['notes'][0]}" in text
    assert summary["paths"]["report.html"] in text


def test_a_narrow_terminal_still_shows_what_matters(summary: dict[str, Any]) -> None:
    text = printed(summary, width=80)
    for wanted in ("41.24", "(40.53 to 41.95)", "+2.33", "(+1.31 to +3.34)", "1,200"):
        assert wanted in text
    assert "18.9 / 45.4" not in text
    assert "…" not in text


def test_names_and_notes_are_no_markup(summary: dict[str, Any]) -> None:
    summary["methods"]["[red]x[/red]"] = {}
    summary["notes"] = ["[bold]literal[/bold]"]
    text = printed(summary)
    assert "[red]x[/red]" in text
    assert "[bold]literal[/bold]" in text


def test_a_run_without_retraining_says_so() -> None:
    text = printed({"kept_fraction": 0.25})
    assert "25.0 % of the pairs were kept" in text
    assert "Nothing was retrained" in text


@given(st.floats(-5, 5), st.floats(0, 5), st.floats(0, 5))
def test_the_verdict_follows_the_interval(middle: float, below: float, above: float) -> None:
    low, high = middle - below, middle + above
    compared = {"everything": {"difference": middle, "ci": [low, high]}}
    summary = {"kept_fraction": 0.5, "methods": {"curated": {}, "everything": {}}, "comparisons": compared}
    sentence = f"{title(summary)} {' '.join(findings(summary))}"
    assert ("got better" in sentence) == ("set is better" in sentence) == (low > 0)
    assert ("got worse" in sentence) == ("set is worse" in sentence) == (high < 0)
    assert ("did not clearly change" in sentence) == ("includes zero" in sentence) == (low <= 0 <= high)


@pytest.mark.parametrize("ci", [None, [], [math.nan, 1.0], [None, None]])
def test_without_an_interval_nothing_is_claimed(ci: Any) -> None:
    assert verdict(ci) == "unclear"


def test_numbers_as_people_read_them() -> None:
    assert (signed(1.234), signed(-1.234), signed(-0.001), signed(0)) == ("+1.23", "−1.23", "0.00", "0.00")
    assert (signed(None), signed(math.nan), signed(-1234.5)) == ("–", "–", "−1,234.50")
    assert (percent(0.7104), percent(None)) == ("71.0 %", "–")
    assert (seconds(3.21), seconds(185), seconds(None)) == ("3.2s", "3m05s", "–")
    assert (interval([1, 2]), interval(None), interval([-1, 2], sign=True)) == (
        "1.00 to 2.00",
        "–",
        "−1.00 to +2.00",
    )


def chosen(weighting: str, temperature: float, losses: dict[tuple[str, float], float]) -> dict[str, Any]:
    trials = [
        {
            "weighting": w,
            "temperature": t,
            "steps_factor": 1.0,
            "target_loss": x,
            "chosen": (w, t) == (weighting, temperature),
        }
        for (w, t), x in losses.items()
    ]
    return {"weights": {"weighting": weighting, "temperature": temperature, "trials": trials}}


def test_steps_that_were_chosen_are_reported() -> None:
    summary = chosen("influence", 0.5, {("uniform", 1.0): 3.0, ("influence", 0.5): 2.8})
    trials = summary["weights"]["trials"]
    trials[1]["chosen"] = False
    trials += [trials[1] | {"steps_factor": 0.5, "target_loss": 2.9}]
    trials += [trials[1] | {"steps_factor": 2.0, "target_loss": 2.5, "chosen": True}]
    weights, steps = weighting_findings(summary)
    assert "2.800 instead of 3.000" in weights
    assert "for 2 times as many steps" in steps
    assert "2.500" in steps


def test_the_weighting_is_reported_with_the_losses_of_its_trials() -> None:
    losses = {("uniform", 1.0): 3.0, ("influence", 1.0): 2.9, ("influence", 0.5): 2.8}
    (sentence,) = weighting_findings(chosen("influence", 0.5, losses))
    assert "temperature of 0.5" in sentence
    assert "2.800 instead of 3.000" in sentence
    (sentence,) = weighting_findings(
        chosen("uniform", 1.0, {("uniform", 1.0): 3.0, ("influence", 1.0): 3.2, ("influence", 0.5): 3.1})
    )
    assert "equal weights" in sentence
    assert "3.000 with equal weights, 3.100 with the best others" in sentence
    fair = chosen("influence", 0.5, losses)
    fair["weights"]["trials"][0] |= {"group_share": 0.0, "worst_group_loss": 5.0}
    fair["weights"]["trials"][2] |= {"group_share": 0.3, "worst_group_loss": 4.5}
    assert "loss of the worst group is 4.500 instead of 5.000" in weighting_findings(fair)[1]
    assert "CLIP score" not in weighting_findings(fair)[0]
    fair["weights"]["trials"][2] |= {"clip_score_share": 0.5}
    assert (
        "by influence and, 0.5 times as much, by the CLIP score of the pretrained encoder"
        in weighting_findings(fair)[0]
    )
    assert weighting_findings({"weights": {"weighting": "uniform", "temperature": 1.0, "trials": []}}) == []
