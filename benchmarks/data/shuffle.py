"""Plants wrong captions in any list of pairs: a known truth for benchmarks on real data."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from influencespace.errors import InputError

REDRAWS = 20  # choices of pairs that are tried before the list is called impossible


def shuffle_captions(
    captions: Sequence[str], image_ids: Sequence[Hashable], fraction: float, seed: int
) -> tuple[list[str], NDArray[np.bool_]]:
    """Permutes the captions of exactly round(fraction * N) pairs among these, so that each becomes wrong.

    A chosen pair never gets a caption that its own image has in the list, not even as an identical text from
    another image. Returns the N captions after the shuffle and N flags that say which are wrong; the same
    seed gives the same result. Raises InputError for lists of different lengths, a fraction outside 0..1,
    and where no such permutation was found.
    """
    total = len(captions)
    if len(image_ids) != total:
        raise InputError(
            f"{total} captions but {len(image_ids)} image ids: give one image id for each caption."
        )
    if not 0 <= fraction <= 1:
        raise InputError(f"The fraction of wrong captions is {fraction}: give a number from 0 to 1.")
    own: defaultdict[Hashable, set[str]] = defaultdict(set)
    for image, caption in zip(image_ids, captions):
        own[image].add(caption)

    rng = np.random.default_rng(seed)
    chosen_count = round(fraction * total)
    for _ in range(REDRAWS):
        chosen = rng.choice(total, chosen_count, replace=False)
        donors = _derange([captions[i] for i in chosen], [image_ids[i] for i in chosen], own)
        if donors is not None:
            shuffled, wrong = list(captions), np.zeros(total, dtype=np.bool_)
            wrong[chosen] = True
            for receiver, donor in zip(chosen, donors):
                shuffled[receiver] = captions[chosen[donor]]
            return shuffled, wrong
    raise InputError(
        f"{chosen_count} of {total} captions (fraction {fraction}) cannot be permuted so that each becomes "
        "wrong: they are too few, or too many of them share one image or one text; give more pairs or "
        "another fraction."
    )


def _derange(texts: list[str], images: list[Hashable], own: dict[Hashable, set[str]]) -> list[int] | None:
    """For each place the place whose text it takes, never a text of its own image; None where none can be."""
    if not _enough_texts(texts, images, own):
        return None
    exchange = _Exchange(texts, [own[image] for image in images])
    return exchange.donor if all(map(exchange.mend, exchange.clashing)) else None


def _enough_texts(texts: list[str], images: list[Hashable], own: dict[Hashable, set[str]]) -> bool:
    """Whether each image has texts to take and each text has places to go: an early no, in linear time."""
    supply, refusals = Counter(texts), Counter[str]()
    for image, places in Counter(images).items():
        if places > len(texts) - sum(supply[text] for text in own[image]):
            return False
        refusals.update(dict.fromkeys(own[image], places))
    return all(number <= len(texts) - refusals[text] for text, number in supply.items())


class _Exchange:
    """Who takes whose text: a rotation by one (places come in random order), mended along augmenting paths.

    Such paths end in a perfect matching whenever there is one; nearly always the first step is enough.
    """

    def __init__(self, texts: list[str], taboo: list[set[str]]) -> None:
        size = len(texts)
        self.texts, self.taboo = texts, taboo
        self.donor = [(place + 1) % size for place in range(size)]
        self.receiver = [(source - 1) % size for source in range(size)]
        self.clashing = [place for place in range(size) if texts[self.donor[place]] in taboo[place]]
        self.free: defaultdict[str, list[int]] = defaultdict(list)  # sources that nobody takes, by text
        for place in self.clashing:
            self.free[texts[self.donor[place]]].append(self.donor[place])

    def mend(self, place: int) -> bool:
        """Finds a donor for a clashing place, moving others to new donors if need be (breadth first)."""
        wanted_by: dict[int, int] = {}  # source -> the place that would take it over
        if self._settle(place, place, wanted_by):
            return True
        queue = deque([place])
        while queue:
            taker = queue.popleft()
            for step in range(len(self.texts)):
                source = (taker + step) % len(self.texts)
                if source in wanted_by or self.texts[source] in self.taboo[taker]:
                    continue
                wanted_by[source] = taker
                loser = self.receiver[source]
                if self._settle(loser, place, wanted_by):
                    return True
                queue.append(loser)
        return False

    def _settle(self, taker: int, place: int, wanted_by: dict[int, int]) -> bool:
        """If `taker` may have a free text: gives it, and what it had to who wanted that, back to `place`."""
        text = next((text for text in self.free if text not in self.taboo[taker]), None)
        if text is None:
            return False
        source = self.free[text].pop()
        if not self.free[text]:
            del self.free[text]
        while True:
            left = self.donor[taker]
            self.donor[taker], self.receiver[source] = source, taker
            if taker == place:
                return True
            source, taker = left, wanted_by[left]
