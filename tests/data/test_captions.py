from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from influencespace.data.captions import (
    MAX_CAPTION,
    MAX_LABEL,
    RawSample,
    RejectedCaption,
    assemble,
    clean_caption,
    label,
    original_captions,
)
from influencespace.data.schema import CaptionChoice, ImageRef, Rejection, Sample
from influencespace.data.uids import pair_uids

anything = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()


def results(
    choice: CaptionChoice = "all", seed: int = 0, **what: Any
) -> tuple[list[Sample], list[Rejection]]:
    raw = RawSample(**{"shard": "s", "key": "k", "image": b"i", "ref": ImageRef(path="s"), **what})
    found = list(assemble(raw, choice, seed))
    return [r for r in found if isinstance(r, Sample)], [r for r in found if isinstance(r, Rejection)]


@pytest.mark.parametrize(
    ("raw", "caption"),
    [("a dog", "a dog"), (" a dog\r\n", "a dog"), (b"\xef\xbb\xbfa dog", "a dog"), ("été".encode(), "été")],
)
def test_usable_captions(raw: object, caption: str) -> None:
    assert clean_caption(raw) == caption


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (None, "missing"),
        ("", "empty"),
        (" \t\n", "empty"),
        (b"\xff\xfe", "not UTF-8"),
        ("\ud83d", "surrogate"),
        (7, "not text but int"),
        ({"text": "a"}, "not text but dict"),
    ],
)
def test_unusable_captions(raw: object, reason: str) -> None:
    with pytest.raises(RejectedCaption, match=reason):
        clean_caption(raw)


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ((["a", "b"], b"t", "c"), ["a", "b"]),
        ((None, b"t", "c"), [b"t"]),
        (([], b"t", "c"), [b"t"]),
        ((None, b" ", "c"), ["c"]),
        ((["", "b"], b"t", None), ["", "b"]),
        ((None, b"", None), [b""]),
        ((None, None, None), []),
    ],
)
def test_the_first_source_that_is_not_blank_counts(
    sources: tuple[object, ...], expected: list[object]
) -> None:
    assert original_captions(*sources) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, None), ("", None), (float("nan"), None), (17, "17"), ("x", "x"), (b"x", "x")],
)
def test_labels(value: object, expected: str | None) -> None:
    assert label(value, "uid") == expected


@pytest.mark.parametrize("value", [["x"], {"a": 1}, b"\xff", "\ud83d"])
def test_what_names_nothing_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="the uid is not"):
        label(value, "uid")


def test_all_captions_are_one_sample() -> None:
    (sample,), rejections = results(captions=["a", "b"], uid=7, group="g")
    assert (sample.captions, sample.uid, sample.group, sample.positions) == (("a", "b"), "7", "g", None)
    assert not rejections


def test_a_bad_caption_costs_only_its_own_pair() -> None:
    (sample,), rejections = results(captions=["a", " ", "c"], uid="7")
    assert sample.captions == ("a", "c")
    assert pair_uids(sample) == ["7#0", "7#2"]
    assert [(r.uid, r.reason) for r in rejections] == [("7#1", "the caption is empty")]


@pytest.mark.parametrize(
    ("what", "uids", "reason"),
    [
        ({"captions": []}, ["k"], "no caption"),
        ({"captions": ["a"], "image": None}, ["k"], "image is missing"),
        ({"captions": [], "image": None}, ["k"], "image is missing"),
        ({"captions": ["a", "b"], "image": b"", "uid": "7"}, ["7#0", "7#1"], "image is empty"),
        ({"captions": ["a"], "uid": ["7"]}, ["k"], "the uid is not text"),
        ({"captions": ["a"], "uid": "7", "group": {}}, ["7"], "the group is not text"),
    ],
)
def test_rejections_name_pair_and_reason(what: dict[str, Any], uids: list[str], reason: str) -> None:
    samples, rejections = results(**what)
    assert not samples
    assert [r.uid for r in rejections] == uids
    assert all(reason in r.reason for r in rejections)


def test_first_takes_the_first_usable_caption() -> None:
    (sample,), rejections = results("first", captions=["", "b", "c"], uid="7")
    assert pair_uids(sample) == ["7#1"]
    assert len(rejections) == 1


def test_a_draw_is_fair_and_depends_on_image_and_seed_alone() -> None:
    def draw(seed: int, uid: int, key: str = "k") -> str:
        (sample,), _ = results("choice", seed, captions=list("abcde"), uid=uid, key=key)
        return sample.captions[0]

    assert draw(1, 5, key="one place") == draw(1, 5, key="another")
    assert [draw(1, uid) for uid in range(20)] != [draw(2, uid) for uid in range(20)]
    counts = Counter(draw(0, uid) for uid in range(1000))
    assert set(counts) == set("abcde")
    assert max(counts.values()) < 260  # expected 200, standard deviation 13


@given(st.lists(anything, max_size=4), anything, anything, st.none() | st.binary(max_size=3), st.text())
def test_every_pair_is_used_or_rejected_once(
    captions: list[object], uid: object, group: object, image: bytes | None, key: str
) -> None:
    samples, rejections = results(captions=captions, uid=uid, group=group, image=image, key=key)
    used = sum(len(sample.captions) for sample in samples)
    assert used + len(rejections) >= 1
    if used:
        assert used + len(rejections) == len(captions)
    for sample in samples:
        assert all(caption.strip() == caption != "" for caption in sample.captions)
        assert len(set(pair_uids(sample))) == used or sample.uid is None
    for rejection in rejections:
        rejection.uid.encode()
        rejection.reason.encode()


def test_a_rejection_can_be_written_to_any_file() -> None:
    rejection = Rejection(shard="s", uid="a\udcffb", reason="\ud83d")
    assert (rejection.uid, rejection.reason) == ("a?b", "?")


def test_a_long_caption_is_cut() -> None:
    words = 2_000_000 * "words "
    assert clean_caption(words) == words[:MAX_CAPTION]
    assert clean_caption(words.encode()) == words[:MAX_CAPTION]
    assert (
        clean_caption(("a" + 2_000_000 * "😀").encode()) == "a" + (MAX_CAPTION - 1) * "😀"
    )  # a cut within a character
    with pytest.raises(RejectedCaption, match="not UTF-8"):
        clean_caption(b"a\xff" + bytes(10**6))


@pytest.mark.parametrize(
    "value", [(MAX_LABEL + 1) * "x", 10**5000, (MAX_LABEL + 1) * b"x"], ids=["text", "number", "bytes"]
)
def test_a_name_that_is_no_name_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"the uid (has|is a number of) [0-9,]+ (characters|bits)"):
        label(value, "uid")
    samples, (rejection,) = results(captions=["a"], uid=value)
    assert not samples
    assert rejection.uid == "k"


def test_captions_beyond_the_limit_are_one_rejection() -> None:
    (sample,), (rejection,) = results(captions=[f"c{i}" for i in range(250)], uid="7")
    assert len(sample.captions) == 100
    assert pair_uids(sample) == [f"7#{i}" for i in range(100)]
    assert rejection == Rejection(
        shard="s", uid="7#100", reason="150 captions beyond the first 100 of the image are left out"
    )
    raw = RawSample(shard="s", key="k", image=b"i", captions=["a", "b", "c"], ref=ImageRef(path="s"))
    sample, rejection = assemble(raw, max_captions=2)  # type: ignore[assignment]
    assert (sample.captions, sample.positions) == (("a", "b"), (0, 1))


def test_a_rejection_quotes_little() -> None:
    rejection = Rejection(shard="s", uid=10**6 * "u", reason=10**6 * "r")
    assert len(rejection.uid) == len(rejection.reason) == 500
