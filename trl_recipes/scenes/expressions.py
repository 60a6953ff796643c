"""Referring expressions for a composed scene: unambiguous, in many phrasings, some for things that are not there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .bank import Sprite
from .compose import Scene
from .lexicon import CONFUSABLE_COLORS, NAMES, Lexicon, with_article
from .relations import ordinal, relation, size, spatial
from .view import Expression, SceneView, bare, colors_differ, definite

KIND_WEIGHTS: dict[str, float] = {
    "noun": 22,
    "colour": 15,
    "spatial": 14,
    "size": 10,
    "plural": 12,
    "reasoning": 9,
    "relation": 11,
    "ordinal": 4,
    "generic": 2,
    "none": 7,
}
NOUN_TEMPLATES = ("{the}", "{the}", "{the}", "{t}", "{a}", "{the} in the picture", "{the} in this image")
ALL_TEMPLATES = ("all the {p}", "the {p}", "{p}", "all {p}", "every {t}", "all of the {p}")
COLORS = tuple(CONFUSABLE_COLORS)
_RATIONED = ("none", "generic")
# How often a kind may fail before it is given up for the scene; a pair that stands as asked for takes luck.
_TRIES = {"noun": 8, "colour": 6, "size": 6, "relation": 12}


def sample_expressions(
    scene: Scene, vocabulary: Mapping[str, Any] | None, rng: np.random.Generator, count: int
) -> list[Expression]:
    """Draw expressions by `KIND_WEIGHTS` among the kinds that the scene permits.

    Args:
        scene: what they are about.
        vocabulary: the bank's vocabulary; None takes the scene's own.
        rng: the only source of chance.
        count: how many; texts differ. Fewer come back only if nothing more can be said.
    """
    if vocabulary is not None and vocabulary is not scene.lexicon.vocabulary:
        scene = Scene(
            scene.image,
            scene.objects,
            scene.index_map,
            scene.background,
            Lexicon(vocabulary, [*scene.lexicon.nouns.values(), *(one.sprite for one in scene.objects)]),
        )
    view = SceneView(scene, rng)
    found: dict[str, Expression] = {}
    # These two are drawn apart, at most once per scene: else scenes with little to say would speak of little else.
    for kind in _RATIONED:
        if rng.random() < count * KIND_WEIGHTS[kind] / sum(KIND_WEIGHTS.values()):
            _add(found, _MAKERS[kind](view))
    # First different things; only a scene with little to say repeats itself in other words.
    for repeat in (False, True):
        _fill(found, view, count, repeat)
    if len(found) < count and all(one.kind != "none" for one in found.values()):
        _add(found, none(view))
    made = list(found.values())
    return [made[place] for place in rng.permutation(len(made))]


def name_everything(scene: Scene, rng: np.random.Generator, count: int) -> list[Expression]:
    """Everything in a scene by its name, as "noun" or, where there are several, "plural", and, up to `count`, things
    that are not there: the requests from which a model learns that it matters what is asked for.

    Args:
        scene: what they are about.
        rng: the only source of chance.
        count: how many, of different texts. Where there are more names than that, some are left out, but one request
            is for a thing that is not there. Fewer come back only if nothing more can be said.
    """
    view, found = SceneView(scene, rng), dict[str, Expression]()
    names = list(dict.fromkeys(one.sprite.name for one in view.targets))
    for place in rng.permutation(len(names))[: count - 1]:
        name = names[place]
        terms = [*_synonyms(view, name), name]
        term = next((term for term in terms if view.group(term)), name)
        items = view.group(term)
        if len(items) == 1:
            _add(found, Expression(view.template(NOUN_TEMPLATES, term), "noun", view.ids(items)))
        elif items and term not in NAMES:
            _add(found, Expression(_all_of(view, term, len(items)), "plural", view.ids(items)))
    for _ in range(2 * count):
        if len(found) < count:
            _add(found, none(view))
    made_up = list(found.values())
    return [made_up[place] for place in rng.permutation(len(made_up))]


def _synonyms(view: SceneView, name: str) -> list[str]:
    """One of those of the objects of a name, seldom."""
    words = [word for one in view.targets if one.sprite.name == name for word in one.sprite.synonyms]
    return [str(view.choice(words))] if words and view.rng.random() < 0.2 else []


def _fill(found: dict[str, Expression], view: SceneView, count: int, repeat: bool) -> None:
    weights = {kind: weight for kind, weight in KIND_WEIGHTS.items() if kind not in _RATIONED}
    misses = dict.fromkeys(weights, 0)
    while len(found) < count and weights:
        kind = _draw_kind(weights, view.rng)
        if not _add(found, _MAKERS[kind](view), repeat):
            misses[kind] += 1
            if misses[kind] >= _TRIES.get(kind, 4):
                weights.pop(kind)


def _add(found: dict[str, Expression], made: Expression | None, repeat: bool = True) -> bool:
    if made is None or made.text in found:
        return False
    if not repeat and any((one.kind, one.object_ids) == (made.kind, made.object_ids) for one in found.values()):
        return False
    found[made.text] = made
    return True


def _draw_kind(weights: dict[str, float], rng: np.random.Generator) -> str:
    point = rng.random() * sum(weights.values())
    for kind, weight in weights.items():
        point -= weight
        if point < 0:
            return kind
    return kind


def noun(view: SceneView) -> Expression | None:
    """ "the mug": the only object of that name."""
    if not view.targets:
        return None
    target = view.choice(view.targets)
    term = view.word_for(target)
    if view.group(term) != [target]:
        return None
    return Expression(view.template(NOUN_TEMPLATES, term), "noun", (target.index,))


def colour(view: SceneView) -> Expression | None:
    """ "the red mug": the only one of that name and colour; others of that name have clearly other colours."""
    colored = [one for one in view.targets if one.sprite.color and _colorable(one.sprite)]
    if not colored:
        return None
    # Prefer a colour that is needed to tell the object from others.
    needed = [one for one in colored if len(view.parts(one.sprite.name)[0]) > 1]
    target = view.choice(needed if needed and view.rng.random() < 0.7 else colored)
    term, color = view.word_for(target), target.sprite.color
    fits, maybe = view.parts(term)
    others = [one.sprite.color for one in (*fits, *maybe) if one is not target]
    if view.clashes(term) or not colors_differ(color, others):
        return None
    said = view.say(term)
    phrase = f"{color} {said}"
    options = [f"the {phrase}", f"the {phrase}", phrase, with_article(phrase)]
    if view.lexicon.countable(term):
        options.append(f"the {said} that is {color}")
    return Expression(str(view.choice(options)), "colour", (target.index,))


def _colorable(sprite: Sprite) -> bool:
    # A person's dominant colour is that of the clothes, and naming people by colour means something else.
    return sprite.name not in NAMES and "person" not in sprite.categories


def plural(view: SceneView) -> Expression | None:
    """ "all the mugs", "both red chairs", "the dog and the sofa": two or more objects."""
    chance = view.rng.random()
    if chance < 0.2:
        return _pair(view)
    if chance < 0.35:
        return _colored_plural(view)
    term, items = view.pick_set(anything=0.03)
    if not items or term in NAMES or not any(one.targetable for one in items):
        return None
    return Expression(_all_of(view, term, len(items)), "plural", view.ids(items))


def _all_of(view: SceneView, term: str, number: int) -> str:
    templates = list(ALL_TEMPLATES)
    if not view.lexicon.countable(term):
        templates = ["all the {p}", "the {p}", "all {p}"]
    elif number == 2:
        templates += ["both {p}", "both {p}", "the two {p}", "both of the {p}"]
    elif number < 6:
        word = ("three", "four", "five")[number - 3]
        templates += [f"the {word} {{p}}", f"all {word} {{p}}"]
    return view.template(templates, term)


def _colored_plural(view: SceneView) -> Expression | None:
    for term in view.set_terms()[:3]:
        items = view.group(term)
        if not all(_colorable(one.sprite) for one in items):
            continue
        for color in dict.fromkeys(one.sprite.color for one in items if one.sprite.color):
            same = [one for one in items if one.sprite.color == color]
            others = [one.sprite.color for one in items if one.sprite.color != color]
            if len(same) < 2 or not colors_differ(color, others) or not any(one.targetable for one in same):
                continue
            plain = _all_of(view, term, len(same))
            words, many = view.lexicon.plural(term), view.say(term)
            said = (
                plain.replace(words, f"{color} {words}") if words in plain else plain.replace(many, f"{color} {many}")
            )
            return Expression(said, "plural", view.ids(same))
    return None


def _pair(view: SceneView) -> Expression | None:
    if len(view.targets) < 2:
        return None
    first, second = view.rng.permutation(len(view.targets))[:2]
    items = [view.targets[first], view.targets[second]]
    terms = [view.word_for(one, wide=0.08) for one in items]
    if any(view.group(term) != [one] for term, one in zip(terms, items, strict=True)):
        return None
    one, other = (view.say(term) for term in terms)
    options = (f"{definite(one)} and {definite(other)}", f"both {definite(one)} and {definite(other)}")
    return Expression(str(view.choice(options)), "plural", view.ids(items))


def reasoning(view: SceneView) -> Expression | None:
    """ "something to sit on": the phrase's only answer, or all of its answers ("all the things to sit on")."""
    lexicon = view.lexicon
    meant = frozenset().union(*(lexicon.answered(one.sprite) for one in view.targets))
    phrases = [phrase for phrase in lexicon.vocabulary["reasoning"] if phrase in meant]  # in an order that stays
    if not phrases:
        return None
    phrase = str(view.choice(phrases))
    items = [one for one in view.seen if lexicon.answers(phrase, one.sprite)]
    doubtful = any(one not in items and lexicon.may_answer(phrase, one.sprite) for one in view.seen)
    if doubtful or not all(one.clear for one in items) or not any(one.targetable for one in items):
        return None
    if any(view.clashes(term) for term in lexicon.vocabulary["reasoning"][phrase]):
        return None
    text = _reason_text(view, phrase, len(items))
    return Expression(text, "reasoning", view.ids(items)) if text else None


def _reason_text(view: SceneView, phrase: str, number: int) -> str:
    first, _, rest = phrase.partition(" ")
    if number > 1:
        word = "living things" if phrase == "a living creature" else f"things {rest}" if first == "something" else ""
        rest_is_plural = rest.split(" ")[0] in ("you", "to", "used", "found")
        # "things that gives light" would need its verb inflected.
        return f"all the {word}" if word and (word == "living things" or rest_is_plural) else ""
    if first == "something":
        return str(view.choice((phrase, phrase, f"the thing {rest}", f"the object {rest}")))
    return str(view.choice((phrase, f"the {rest}"))) if first in ("a", "an") else phrase


def generic(view: SceneView) -> Expression | None:
    """ "the object", "everything in the picture"; only over backgrounds that show no things of their own."""
    items = view.everything()
    if not items or not any(one.targetable for one in items):
        return None
    if len(items) == 1:
        options = ("the object", "the object in the picture", "the main object", "the thing in the foreground")
    else:
        options = ("all the objects", "all objects in the picture", "every object", "all the things in the picture")
    return Expression(str(view.choice(options)), "generic", view.ids(items))


def none(view: SceneView) -> Expression | None:
    """Something plausible that is not there: another noun, or a right noun with a wrong colour."""
    if view.rng.random() < 0.3:
        phrase = _wrong_color(view)
        if phrase:
            options = (f"the {phrase}", f"the {phrase}", phrase, with_article(phrase))
            return Expression(str(view.choice(options)), "none", (), bare(phrase))
    term = absent_term(view)
    if not term:
        return None
    templates = list(NOUN_TEMPLATES)
    if view.lexicon.countable(term):
        templates += ["{the} on the left", "{the} on the right", "the biggest {t}", "all the {p}", "the {p}"]
    return Expression(view.template(templates, term), "none", (), bare(view.say(term)))


def _wrong_color(view: SceneView) -> str:
    colorable = [one.sprite for one in view.targets if _colorable(one.sprite)]
    if not colorable:
        return ""
    term = view.choice(colorable).name
    fits, maybe = view.parts(term)
    colors = [one.sprite.color for one in (*fits, *maybe)]
    free = [color for color in COLORS if colors_differ(color, colors)]
    if not free or view.clashes(term):
        return ""
    return f"{view.choice(free)} {view.say(term)}"


def absent_term(view: SceneView) -> str:
    """A plausible term that names nothing in the scene; "" where none was found."""
    nouns = list(view.lexicon.nouns.values())
    present = {word for one in view.seen for word in one.sprite.categories}
    kindred = view.rng.random() < 0.6
    for attempt in range(24):
        sprite = view.choice(nouns)
        if kindred and attempt < 16 and not present & set(sprite.categories):
            continue
        wide = sprite.categories and view.rng.random() < 0.15
        term = str(view.choice(sprite.categories)) if wide else sprite.name
        # Objects without a pixel count as well: nothing is lost, and the sentence is true of the whole scene.
        if not view.clashes(term) and not any(view.lexicon.may_fit(term, one.sprite) for one in view.scene.objects):
            return term
    return ""


_MAKERS: dict[str, Callable[[SceneView], Expression | None]] = {
    "noun": noun,
    "colour": colour,
    "spatial": spatial,
    "size": size,
    "plural": plural,
    "reasoning": reasoning,
    "relation": relation,
    "ordinal": ordinal,
    "generic": generic,
    "none": none,
}
