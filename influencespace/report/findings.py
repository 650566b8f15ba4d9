"""What a run gained or lost, in sentences made from `summary.json`."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from influencespace.core.select import CHOSEN
from influencespace.report.numbers import interval, is_number, number, percent, signed

Summary = Mapping[str, Any]
Method = Mapping[str, Any]
Verdict = Literal["ahead", "behind", "unclear"]

LABELS = {
    "curated": "Curated",
    "dynamic": "Dynamic",
    "everything": "Everything",
    "random": "Random",
    "clip_score": "CLIP score",
    "neg_clip_loss": "negCLIPLoss",
    "norm_sim": "NormSim",
    "norm_sim_2": "NormSim-2",
    "dfn": "DFN",
    "datainf": "DataInf",
    "d2": "D2",
    "semdedup": "SemDeDup",
    "diversity": "Diversity",
    "coreset": "Coreset",
    "m_flyt": "M-FLYT",
    "mgd": "Metagradient descent",
    "target_alone": "Target alone",
    "pool_and_target": "Pool and target",
}
"""Methods in the order in which they are shown; then validated ones in the same order, then others by name."""
VALIDATED = "_validated"


def label(name: str) -> str:
    """How a method is called."""
    plain = name.removesuffix(VALIDATED)
    return LABELS.get(plain, plain) + (", validated" if plain != name else "")


def methods(summary: Summary) -> list[Method]:
    """The record of each method, in order, with its `name`, its `label` and its `comparison` with curated."""
    records, comparisons = summary.get("methods", {}), summary.get("comparisons", {})
    known = [*LABELS, *(f"{name}{VALIDATED}" for name in LABELS)]
    ordered = [name for name in known if name in records] + sorted(set(records) - set(known))
    return [
        {**records[n], "name": n, "label": label(n), "comparison": comparisons.get(n) or {}} for n in ordered
    ]


def verdict(ci: Sequence[float | None] | None) -> Verdict:
    """Where curated stands by the interval of its difference; `unclear` when that includes zero."""
    if not ci or not is_number(ci[0]) or not is_number(ci[1]):
        return "unclear"
    return "ahead" if ci[0] > 0 else "behind" if ci[1] < 0 else "unclear"


def title(summary: Summary) -> str:
    """What happened, in one line."""
    kept = f"{percent(summary.get('kept_fraction'))} of the pairs were kept"
    compared = summary.get("comparisons", {}).get("everything")
    if not compared:
        return kept
    outcome = {
        "ahead": "retrieval got better",
        "behind": "retrieval got worse",
        "unclear": "retrieval did not clearly change",
    }
    return f"{kept}, and {outcome[verdict(compared.get('ci'))]}"


def findings(summary: Summary) -> list[str]:
    """What was gained or lost, with intervals."""
    records = {method["name"]: method for method in methods(summary)}
    if "curated" not in records:
        return ["Nothing was retrained, so it is not known whether the curation helped."]
    curated, everything = records.pop("curated"), records.pop("everything", {})
    sentences = [
        f"Trained on the kept pairs, the proxy reaches a mean recall of {number(curated.get('mean_recall'))} % "
        f"(95 % interval {interval(curated.get('mean_recall_ci'))})."
    ]
    if everything.get("comparison"):
        recall, points = f"{number(everything.get('mean_recall'))} %", _points(everything, "95 % interval ")
        outcome = {
            "ahead": f"The curated set is better than training on everything ({recall}): {points}.",
            "behind": f"The curated set is worse than training on everything ({recall}): {points}. "
            "For this pool and target, do not use the curated set.",
            "unclear": f"Training on everything reaches {recall}. The difference ({points}) includes zero: "
            "neither is shown to be better.",
        }
        sentences.append(outcome[verdict(everything["comparison"].get("ci"))])
    groups: dict[Verdict, list[str]] = {"ahead": [], "unclear": [], "behind": []}
    for method in records.values():
        if method["comparison"]:
            name = f"{method['label']} ({_points(method)})"
            groups[verdict(method["comparison"].get("ci"))].append(name)
    words = {"ahead": "ahead of", "unclear": "not clearly different from", "behind": "behind"}
    clauses = [f"{words[outcome]} {_listed(names)}" for outcome, names in groups.items() if names]
    if clauses:
        sentences.append(f"Among the other methods it is {'; '.join(clauses)}.")
    return sentences + weighting_findings(summary)


def _points(method: Method, name: str = "") -> str:
    compared = method["comparison"]
    return f"{signed(compared.get('difference'))} points, {name}{interval(compared.get('ci'), sign=True)}"


def weighting_findings(summary: Summary) -> list[str]:
    """Which weights the kept pairs have and for how long they train, by the target losses of the trials, if any."""
    chosen = summary.get("weights") or {}
    if not chosen.get("trials"):
        return []
    uniform = chosen["trials"][0]
    at_first = [trial for trial in chosen["trials"] if _factor(trial) == 1]
    (taken,) = (trial for trial in chosen["trials"] if trial["chosen"])
    # weights were chosen at the steps of all methods, and then the steps
    weighed = next(trial for trial in at_first if _same_weights(trial, taken))
    before = number(uniform["target_loss"], 3)
    if chosen["weighting"] == "uniform":
        best = number(min(trial["target_loss"] for trial in at_first[1:]), 3)
        sentences = [
            "The kept pairs have equal weights: no other weights were better after retraining "
            f"(target loss {before} with equal weights, {best} with the best others)."
        ]
    else:
        basis = "influence"
        if share := weighed.get("clip_score_share"):
            basis += f" and, {share:g} times as much, by the CLIP score of the pretrained encoder"
        sentences = [
            f"The kept pairs are weighted by {basis}, at a temperature of {chosen['temperature']:g} standard deviations: "
            f"this gave the lowest target loss after retraining ({number(weighed['target_loss'], 3)} instead of "
            f"{before} with equal weights)."
        ]
    if weighed.get("group_share"):
        sentences.append(
            "The weights also serve the groups of the target with the highest loss: the loss of the worst group is "
            f"{number(weighed['worst_group_loss'], 3)} instead of {number(uniform['worst_group_loss'], 3)}."
        )
    if _factor(taken) != 1:
        sentences.append(
            f"They train for {_factor(taken):g} times as many steps as the methods that are not validated: this lowered the "
            f"target loss to {number(taken['target_loss'], 3)}. What that alone is worth, everything_validated shows."
        )
    return sentences


def _factor(trial: Mapping[str, Any]) -> float:
    factor: float = trial.get("steps_factor", 1)
    return factor


def _same_weights(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one.get(name) == other.get(name) for name in CHOSEN if name != "steps_factor")


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
