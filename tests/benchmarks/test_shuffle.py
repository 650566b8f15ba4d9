"""Laws of planted wrong captions."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.data.shuffle import _derange, shuffle_captions
from influencespace.errors import InputError

# Few images and few texts, so that clashes are the rule and impossible lists occur.
crowded = st.lists(st.tuples(st.integers(0, 4), st.sampled_from("abcdef")), max_size=14)
fractions = st.floats(0, 1)
seeds = st.integers(0, 2**32 - 1)


@given(pairs=crowded, fraction=fractions, seed=seeds)
def test_every_flagged_pair_is_wrong_and_every_other_untouched(pairs, fraction, seed):
    images, captions = [image for image, _ in pairs], [caption for _, caption in pairs]
    try:
        shuffled, wrong = shuffle_captions(captions, images, fraction, seed)
    except InputError:
        return
    assert wrong.dtype == np.bool_
    assert wrong.sum() == round(fraction * len(pairs))
    assert Counter(shuffled) == Counter(captions)  # a permutation
    for image, before, after, flagged in zip(images, captions, shuffled, wrong):
        own = {caption for other, caption in pairs if other == image}
        assert after not in own if flagged else after == before


@given(captions_per_image=st.integers(1, 5), images=st.integers(10, 30), fraction=fractions, seed=seeds)
def test_distinct_captions_of_several_images_can_always_be_shuffled(
    captions_per_image, images, fraction, seed
):
    ids = [image for image in range(images) for _ in range(captions_per_image)]
    captions = [f"caption {place}" for place in range(len(ids))]
    if round(fraction * len(ids)) == 1:
        return
    shuffled, wrong = shuffle_captions(captions, ids, fraction, seed)
    image_of = dict(zip(captions, ids))
    assert all((image_of[caption] != image) == flag for caption, image, flag in zip(shuffled, ids, wrong))


@given(pairs=st.lists(st.tuples(st.integers(0, 3), st.sampled_from("abcd")), min_size=1, max_size=6))
def test_a_way_is_found_exactly_where_one_exists(pairs):
    images, texts = [image for image, _ in pairs], [text for _, text in pairs]
    own = {image: {text for other, text in pairs if other == image} for image in images}
    exists = any(
        all(texts[source] not in own[image] for image, source in zip(images, order))
        for order in permutations(range(len(pairs)))
    )
    donors = _derange(texts, images, own)
    assert (donors is not None) == exists
    if donors is not None:
        assert sorted(donors) == list(range(len(pairs)))
        assert all(texts[source] not in own[image] for image, source in zip(images, donors))


def test_the_seed_decides():
    captions = [f"caption {place}" for place in range(200)]
    first, wrong = shuffle_captions(captions, range(200), 0.3, seed=1)
    again, wrong_again = shuffle_captions(captions, range(200), 0.3, seed=1)
    other, _ = shuffle_captions(captions, range(200), 0.3, seed=2)
    assert first == again
    assert np.array_equal(wrong, wrong_again)
    assert first != other


def test_common_texts_are_worked_round():
    captions = ["stock photo"] * 400 + [f"caption {place}" for place in range(600)]
    shuffled, wrong = shuffle_captions(captions, range(1000), 1.0, seed=0)
    assert wrong.all()
    assert all(before != after for before, after in zip(captions, shuffled))


@pytest.mark.parametrize(
    ("captions", "images", "fraction", "message"),
    [
        (["a", "b"], [1], 0.5, "2 captions but 1 image ids"),
        (["a", "b"], [1, 2], 1.5, "from 0 to 1"),
        (["a", "b"], [1, 1], 1.0, "share one image"),
        (["a", "a", "a", "b"], [1, 2, 3, 4], 1.0, "one text"),
        (["a", "b", "c", "d"], [1, 2, 3, 4], 0.25, "too few"),
    ],
)
def test_what_cannot_be_done_is_said(captions, images, fraction, message):
    with pytest.raises(InputError, match=message):
        shuffle_captions(captions, images, fraction, seed=0)
