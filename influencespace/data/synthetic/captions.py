"""Captions of scenes in two steps: what is mentioned (a view: a scene with gaps), then in which words."""

from dataclasses import replace
from random import Random

from influencespace.data.synthetic.scenes import Group, Scene

# Words for each meaning; a meaning that is not listed is its own word.
NOUNS = {
    "circle": ("circle", "disc", "dot"),
    "square": ("square", "box"),
    "diamond": ("diamond", "rhombus"),
    "cross": ("cross", "plus sign"),
    "ring": ("ring", "hoop"),
    "crescent": ("crescent", "moon"),
    "": ("shape", "object", "thing"),
}
ADJECTIVES = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    "red": ("red", "red", "crimson"),
    "blue": ("blue", "blue", "azure"),
    "green": ("green", "green", "emerald"),
    "yellow": ("yellow", "yellow", "golden"),
    "purple": ("purple", "violet"),
    "cyan": ("cyan", "turquoise"),
    "pink": ("pink", "pink", "rosy"),
    "maroon": ("maroon", "burgundy"),
    "lavender": ("lavender", "lilac"),
    "gray": ("gray", "grey"),
    "beige": ("beige", "cream"),
    "navy": ("navy", "dark blue"),
}
NUMBERS = {
    1: ("a", "a", "one", "a single"),
    2: ("two", "2", "a pair of"),
    3: ("three", "3"),
    4: ("four", "4"),
}

# {a} is the first group (on the left or above), {b} the second.
RELATIONS = {
    "left": (
        "{a} to the left of {b}",
        "{a} left of {b}",
        "{b} to the right of {a}",
        "{b} right of {a}",
        "{a} on the left and {b} on the right",
    ),
    "above": (
        "{a} above {b}",
        "{a} over {b}",
        "{b} below {a}",
        "{b} under {a}",
        "{a} at the top and {b} at the bottom",
    ),
    "": ("{a} and {b}", "{b} and {a}", "{a} together with {b}", "{b} with {a}"),
}
FRAMES = (*3 * ("{}",), "a picture of {}", "an image of {}", "a drawing of {}", "this shows {}", "we see {}")
GROUNDS = (
    "{what} on a {ground} background",
    "{what} on {ground}",
    "{what} against a {ground} backdrop",
    "a {ground} background with {what}",
)
BOILERPLATE = (
    "image {}",
    "IMG_{}.JPG",
    "stock photo",
    "stock photo {}",
    "click to enlarge",
    "photo by admin",
    "no description available",
    "untitled",
    "thumbnail {}",
    "free shipping, buy now",
    "page {}",
)


def choose_view(scene: Scene, rng: Random) -> Scene:
    """What a caption mentions of the scene: people leave out sizes, backgrounds, relations, even whole groups."""
    groups = scene.groups
    if len(groups) == 2 and rng.random() < 0.15:
        groups = (rng.choice(groups),)
    relation = scene.relation if len(groups) == 2 and rng.random() < 0.8 else ""
    background = scene.background if rng.random() < 0.7 else ""
    return Scene(
        groups=tuple(_leave_out(group, rng) for group in groups), relation=relation, background=background
    )


def _leave_out(group: Group, rng: Random) -> Group:
    mentioned = replace(group, size=group.size if rng.random() < 0.6 else "")
    chance = rng.random()
    if chance < 0.05:
        return replace(mentioned, colour="")
    return replace(mentioned, shape="") if chance < 0.1 else mentioned


def agrees(view: Scene, scene: Scene) -> bool:
    """Whether all that the view mentions is true of the scene."""
    if view.background not in ("", scene.background):
        return False
    if len(view.groups) == 1:
        return any(_fits(view.groups[0], group) for group in scene.groups)
    if len(scene.groups) == 1:
        return False
    in_order = all(map(_fits, view.groups, scene.groups))
    if view.relation:
        return in_order and view.relation == scene.relation
    return in_order or all(map(_fits, view.groups, reversed(scene.groups)))


def _fits(mentioned: Group, group: Group) -> bool:
    return (
        mentioned.count == group.count
        and mentioned.size in ("", group.size)
        and mentioned.colour in ("", group.colour)
        and mentioned.shape in ("", group.shape)
    )


def write_caption(view: Scene, rng: Random) -> str:
    """The view in words: one of several phrasings and synonyms."""
    phrases = [_noun_phrase(group, rng) for group in view.groups]
    what = phrases[0]
    if len(phrases) == 2:
        what = rng.choice(RELATIONS[view.relation]).format(a=phrases[0], b=phrases[1])
    if view.background:
        what = rng.choice(GROUNDS).format(what=what, ground=_adjective(view.background, rng))
    text = rng.choice(FRAMES).format(what)
    return f"{text[0].upper()}{text[1:]}." if rng.random() < 0.2 else text


def _noun_phrase(group: Group, rng: Random) -> str:
    noun = rng.choice(NOUNS.get(group.shape, (group.shape,)))
    if group.count > 1:
        noun += "es" if noun.endswith(("s", "x")) else "s"
    rest = " ".join(filter(None, (_adjective(group.size, rng), _adjective(group.colour, rng), noun)))
    number = rng.choice(NUMBERS[group.count])
    if number == "a" and rest[0] in "aeiou":
        number = "an"
    return f"{number} {rest}"


def _adjective(meaning: str, rng: Random) -> str:
    return rng.choice(ADJECTIVES.get(meaning, (meaning,)))


def write_boilerplate(rng: Random) -> str:
    """A caption that does not describe its image."""
    return rng.choice(BOILERPLATE).format(rng.randrange(1, 10_000))
