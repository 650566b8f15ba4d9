"""From what lies in a file to a Sample: which texts are captions, which are usable, and which are chosen."""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from influencespace.data.schema import MAX_CAPTIONS, CaptionChoice, ImageRef, Rejection, Sample
from influencespace.data.uids import digest, pair_uid

# Characters of a caption that are kept, some 10,000 words; tokenizers cut it long before, and say so. Ten megabytes of text in
# a tokenizer took 3 GB.
MAX_CAPTION = 2**16

# Characters of a uid or of the name of a group.
MAX_LABEL = 2**12


class RejectedCaption(ValueError):
    """A caption that cannot be used; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class RawSample:
    """What a reader finds for one image, before any of it is judged."""

    shard: str
    key: str
    """Where the file holds it; names it in rejections when it has no uid."""
    image: bytes | None
    captions: Sequence[object]
    uid: object = None
    group: object = None
    ref: ImageRef
    missing: str = "the image is missing"
    """The reason to give when `image` is None."""


def clean_caption(raw: object) -> str:
    """`raw` (str, or UTF-8 bytes) without outer whitespace, its first MAX_CAPTION characters; raises RejectedCaption when
    that is no text."""
    if raw is None:
        raise RejectedCaption("the caption is missing")
    if isinstance(raw, bytes):
        try:
            raw = _decoded(raw)
        except UnicodeDecodeError as error:
            raise RejectedCaption(f"the caption is not UTF-8 (byte {error.start})") from None
    if not isinstance(raw, str):
        raise RejectedCaption(f"the caption is not text but {type(raw).__name__}")
    caption = raw.strip()[:MAX_CAPTION]
    if not caption:
        raise RejectedCaption("the caption is empty")
    if not _is_unicode(caption):
        raise RejectedCaption("the caption is not valid Unicode (lone surrogate)")
    return caption


def original_captions(*sources: object) -> list[object]:
    """The captions of the first source, a text or a list of texts, that is not blank.

    When all are blank, those of the first that exists, for its blanks to be rejected; [] when there is none.
    """
    present = [list(s) if isinstance(s, list | tuple) else [s] for s in sources if s is not None]
    not_blank = (captions for captions in present if not all(map(_is_blank, captions)))
    return next(not_blank, present[0] if present else [])


def label(value: object, what: str) -> str | None:
    """A uid or group as text, None for a missing or empty one; raises ValueError for what is no name, called `what`."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    elif isinstance(value, int) and value.bit_length() > 4 * MAX_LABEL:  # Python refuses to print it
        raise ValueError(f"the {what} is a number of {value.bit_length():,} bits")
    if value is None or value == "" or value != value:  # NaN is pandas' missing value
        return None
    if not isinstance(value, str | int | float):
        raise ValueError(f"the {what} is not text or a number but {type(value).__name__}")
    if len(text := value if isinstance(value, str) else str(value)) > MAX_LABEL:
        raise ValueError(f"the {what} has {len(text):,} characters, more than {MAX_LABEL:,}")
    if not _is_unicode(text):
        raise ValueError(f"the {what} is not valid Unicode")
    return text


def assemble(
    raw: RawSample, choice: CaptionChoice = "all", seed: int = 0, max_captions: int = MAX_CAPTIONS
) -> Iterator[Sample | Rejection]:
    """The Sample of the usable captions of `raw`, if any, then one Rejection for each unusable pair.

    Captions beyond the first `max_captions` are one Rejection together.
    """

    def reject(reason: str, uid: str) -> Rejection:
        return Rejection(shard=raw.shard, uid=uid, reason=reason)

    name = raw.key
    try:
        uid = label(raw.uid, "uid")
        name = uid or name
        group = label(raw.group, "group")
    except ValueError as error:
        yield reject(str(error), name)
        return
    captions, beyond = raw.captions[:max_captions], len(raw.captions) - max_captions
    names = [pair_uid(name, i, only=len(raw.captions) == 1) for i in range(len(captions))]
    rejections = []
    if beyond > 0:
        reason = f"{beyond:,} captions beyond the first {max_captions} of the image are left out"
        rejections.append(reject(reason, pair_uid(name, max_captions, only=False)))
    if not raw.image or not captions:
        reason = "the image has no caption" if raw.image else "the image is empty"
        reason = raw.missing if raw.image is None else reason
        yield from [reject(reason, pair) for pair in names or [name]] + rejections
        return
    usable: dict[int, str] = {}
    for position, caption in enumerate(captions):
        try:
            usable[position] = clean_caption(caption)
        except RejectedCaption as error:
            rejections.append(reject(str(error), names[position]))
    if usable:
        chosen = _choose(list(usable), choice, f"{seed}:{uid or digest(raw.image).hex()}")
        yield Sample(
            image=raw.image,
            captions=tuple(usable[position] for position in chosen),
            uid=uid,
            group=group,
            ref=raw.ref,
            positions=None if len(chosen) == len(raw.captions) else chosen,
        )
    yield from rejections


def _choose(positions: list[int], choice: CaptionChoice, drawn_by: str) -> tuple[int, ...]:
    """The positions to use. A draw depends on the seed and the image alone, not on where it was read."""
    if choice == "all":
        return tuple(positions)
    draw = int.from_bytes(digest(drawn_by.encode())) if choice == "choice" else 0
    return (positions[draw % len(positions)],)


def _decoded(raw: bytes) -> str:
    """The text of UTF-8 bytes as far as it can be kept; a character that the cut splits is left out."""
    start = 3 * raw.startswith(codecs.BOM_UTF8)
    longest = 4 * MAX_CAPTION
    return codecs.utf_8_decode(raw[start : start + longest], "strict", len(raw) <= start + longest)[0]


def _is_blank(caption: object) -> bool:
    return caption is None or (isinstance(caption, str | bytes) and not caption.strip())


def _is_unicode(text: str) -> bool:
    """Whether UTF-8, and so any file, can hold `text`: JSON may smuggle in halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
