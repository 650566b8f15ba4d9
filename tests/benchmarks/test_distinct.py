"""Images and captions of a set, each once."""

from pathlib import Path

import numpy as np

from benchmarks.data.distinct import Distinct
from influencespace.data.pair_set import PairSet
from tests.planted import plant


def test_each_image_is_there_once_and_every_pair_finds_its_own(tmp_path: Path) -> None:
    pairs = PairSet(plant(tmp_path / "pool", 30, captions=3).folder)
    known = Distinct(pairs)
    images, texts = pairs.inputs(slice(None))
    assert known.images.shape == (30, 16)
    assert known.texts.shape == (90, 16)
    np.testing.assert_array_equal(known.images[known.image], images.numpy())
    np.testing.assert_array_equal(known.texts[known.text], texts.numpy())
    np.testing.assert_array_equal(np.unique(known.image), np.arange(30))
