"""The axes along which influence is pooled: scores of a pair without a gradient, each blind to some kind of wrong pair."""

import numpy as np

from influencespace.core.arrays import FloatArray, IntArray

MAX_SHARED = 0.5
"""Share of pairs with another image's caption above which captions are names of classes, not descriptions."""


def standardised(values: FloatArray) -> FloatArray:
    """Values (n,) in units of their spread around their mean; zeros where they are all alike."""
    spread = values.std()
    result: FloatArray = (values - values.mean()) / (spread if spread > 0 else 1.0)
    return result


def quality_axis(in_sample: FloatArray, out_of_fold: FloatArray) -> FloatArray:
    """Mean of two scores in units of their spread: by the proxy that trained on the pair and by one that did not.

    Either alone has a blind spot: the first has learned some of the wrong pairs, the second lacks the other captions of
    the pair's image. (n,), (n,) -> (n,), mean 0.
    """
    return (standardised(in_sample) + standardised(out_of_fold)) / 2


def caption_images(image: IntArray, text: IntArray) -> FloatArray:
    """Logarithm of how many images of the pool have a pair's caption: (n,), (n,) -> (n,), 0 for a caption of its own.

    Boilerplate matches no image badly enough for a quality score to find it; the number of images that share it does.
    """
    pairs = np.unique(np.stack([text, image]), axis=1)
    captions, counts = np.unique(pairs[0], return_counts=True)
    return np.log(counts[np.searchsorted(captions, text)])


def shared_captions(image: IntArray, text: IntArray) -> float:
    """The share of pairs whose caption another image has as well: (n,), (n,)."""
    return float((caption_images(image, text) > 0).mean())


def caption_axis(image: IntArray, text: IntArray) -> FloatArray:
    """`caption_images`, but unknown, nan, for all where most captions are shared: (n,), (n,) -> (n,).

    There a caption is the name of a class, and how many images have it is the size of the class.
    """
    images = caption_images(image, text)
    return images if (images > 0).mean() <= MAX_SHARED else np.full(len(images), np.nan)


def agreement(texts: FloatArray, image: IntArray) -> FloatArray:
    """Mean cosine of each caption with the other captions of its image: unit (n, D), (n,) -> (n,); nan for an only one."""
    _, owner, counts = np.unique(image, return_inverse=True, return_counts=True)
    total = np.zeros((len(counts), texts.shape[1]))
    np.add.at(total, owner, texts)
    return cosine_with_others(texts, total[owner], counts[owner])


def cosine_with_others(texts: FloatArray, total: FloatArray, count: IntArray | int) -> FloatArray:
    """Mean cosine of unit rows (n, D) with the others of a set, of its sum (n, D) or (D,) and its size; nan for an only row."""
    cosines = np.einsum("nd,nd->n", total - texts, texts.astype(np.float64))
    others = np.asarray(count) - 1
    return np.where(others > 0, cosines / np.maximum(others, 1), np.nan)
