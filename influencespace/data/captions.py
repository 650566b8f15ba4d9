"""From what lies in a file to a Sample: which texts are captions, which are usable, and which are chosen."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from influencespace.data.schema import CaptionChoice, ImageRef, Rejection, Sample
from influencespace.data.uids import digest, pair_uid


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
    """`raw` (str, or UTF-8 bytes) without outer whitespace; raises RejectedCaption when that is no text."""
    if raw is None:
        raise RejectedCaption("the caption is missing")
    if isinstance(raw, bytes):
        try:
            raw = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise RejectedCaption(f"the caption is not UTF-8 (byte {error.start})") from None
    if not isinstance(raw, str):
        raise RejectedCaption(f"the caption is not text but {type(raw).__name__}")
    caption = raw.strip()
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
    if value is None or value == "" or value != value:  # NaN is pandas' missing value
        return None
    if not isinstance(value, str | int | float):
        raise ValueError(f"the {what} is not text or a number but {type(value).__name__}")
    if not _is_unicode(text := str(value)):
        raise ValueError(f"the {what} is not valid Unicode")
    return text


def assemble(raw: RawSample, choice: CaptionChoice = "all", seed: int = 0) -> Iterator[Sample | Rejection]:
    """The Sample of the usable captions of `raw`, if any, then one Rejection for each unusable pair."""

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
    names = [pair_uid(name, i, only=len(raw.captions) == 1) for i in range(len(raw.captions))]
    if not raw.image or not raw.captions:
        reason = "the image has no caption" if raw.image else "the image is empty"
        reason = raw.missing if raw.image is None else reason
        yield from (reject(reason, pair) for pair in names or [name])
        return
    usable: dict[int, str] = {}
    rejections = []
    for position, caption in enumerate(raw.captions):
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


def _is_blank(caption: object) -> bool:
    return caption is None or (isinstance(caption, str | bytes) and not caption.strip())


def _is_unicode(text: str) -> bool:
    """Whether UTF-8, and so any file, can hold `text`: JSON may smuggle in halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
