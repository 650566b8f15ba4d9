from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from influencespace.data.schema import ImageRef, Sample
from influencespace.data.uids import digest, pair_uids

captions = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5)


def sample(image: bytes = b"image", texts: tuple[str, ...] = ("a",), uid: str | None = None) -> Sample:
    return Sample(
        image=image, captions=texts, uid=uid, group=None, ref=ImageRef(path="00000.tar", offset=512)
    )


def test_digest_has_sixteen_bytes_and_is_that_of_the_content() -> None:
    assert digest(b"").hex() == "cae66941d9efbd404e4d88758ea67670"  # BLAKE2b-128 of nothing
    assert len(digest(b"x" * 1000)) == 16


def test_one_caption_keeps_the_uid() -> None:
    assert pair_uids(sample(uid="7")) == ["7"]


def test_several_captions_are_numbered() -> None:
    assert pair_uids(sample(texts=("a", "b"), uid="7")) == ["7#0", "7#1"]


def test_leaving_captions_out_renames_no_other() -> None:
    chosen = replace(sample(texts=("b",), uid="7"), positions=(1,))
    assert pair_uids(chosen) == ["7#1"]


def test_without_a_uid_it_is_32_hex_digits_of_image_and_caption() -> None:
    (uid,) = pair_uids(sample())
    assert len(uid) == 32
    assert int(uid, 16)
    assert pair_uids(sample(image=b"other")) != [uid]
    assert pair_uids(sample(texts=("b",))) != [uid]


@given(st.binary(), captions, st.none() | st.text(min_size=1), st.text(), st.integers(0))
def test_a_uid_depends_on_content_alone(
    image: bytes, texts: list[str], uid: str | None, path: str, offset: int
) -> None:
    here = sample(image, tuple(texts), uid)
    elsewhere = replace(here, ref=ImageRef(path=path, offset=offset), group="g")
    assert pair_uids(here) == pair_uids(elsewhere)


@given(st.binary(max_size=4), st.binary(max_size=4), st.text(max_size=4), st.text(max_size=4))
def test_only_equal_pairs_share_a_uid(image: bytes, other: bytes, text: str, another: str) -> None:
    same = (image, text) == (other, another)
    assert (pair_uids(sample(image, (text,))) == pair_uids(sample(other, (another,)))) == same
