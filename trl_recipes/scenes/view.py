"""What can be said about a scene without ambiguity: objects by term, and words for an object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .compose import Scene, SceneObject
from .lexicon import CONFUSABLE_COLORS, NAMES, PAIRED, with_article


@dataclass(frozen=True)
class Expression:
    """A referring expression and what it means.

    Attributes:
        text: the words, lower case, without a full stop.
        kind: noun, colour, spatial, size, plural, reasoning, relation, ordinal, generic or none.
        object_ids: indices into `Scene.index_map`; empty for the kind "none".
        missing: for the kind "none", the bare thing that is not there ("zebra", "red mug"); else "".
    """

    text: str
    kind: str
    object_ids: tuple[int, ...] = ()
    missing: str = ""


class SceneView:
    """A scene's objects as a speaker sees them.

    Args:
        scene: the scene.
        rng: chance for the choice of words.
    """

    def __init__(self, scene: Scene, rng: np.random.Generator) -> None:
        self.scene = scene
        self.rng = rng
        self.lexicon = scene.lexicon
        self.avoid = scene.background.avoid
        # What shows no pixel cannot be confused with anything; what shows a few still can.
        self.seen = [one for one in scene.objects if one.visible > 0]
        self.targets = [one for one in scene.objects if one.targetable]
        self.size = scene.index_map.shape[1]
        self._parts: dict[str, tuple[list[SceneObject], list[SceneObject]]] = {}

    def parts(self, term: str) -> tuple[list[SceneObject], list[SceneObject]]:
        """The objects that the term names, and those that someone might take it to name."""
        if term not in self._parts:
            fits = [one for one in self.seen if self.lexicon.fits(term, one.sprite)]
            maybe = [one for one in self.seen if one not in fits and self.lexicon.may_fit(term, one.sprite)]
            self._parts[term] = (fits, maybe)
        return self._parts[term]

    def clashes(self, term: str) -> bool:
        """True if the background may show the term."""
        return bool(self.avoid) and self.lexicon.clashes(term, self.avoid)

    def group(self, term: str) -> list[SceneObject]:
        """All objects of that name if it is certain which they are and all are clear to see; else []."""
        fits, maybe = self.parts(term)
        if maybe or self.clashes(term) or not all(one.clear for one in fits):
            return []
        return fits

    def everything(self) -> list[SceneObject]:
        """All objects if "object" can only mean them: nothing half hidden, nothing in the background; else []."""
        plain = self.scene.background.plain and not self.avoid
        return [] if not plain or not all(one.clear for one in self.seen) else self.seen

    def word_for(self, item: SceneObject, wide: float = 0.22) -> str:
        """A term for the object: mostly its name, now and then a synonym or (share `wide`) a category."""
        chance, sprite = self.rng.random(), item.sprite
        if sprite.categories and chance < wide:
            return str(self.choice(sprite.categories))
        if sprite.synonyms and chance < wide + 0.2:
            return str(self.choice(sprite.synonyms))
        return sprite.name

    def set_terms(self) -> list[str]:
        """Terms that may name several objects, names before categories; "object" stands for all of them."""
        terms = [one.sprite.name for one in self.targets]
        found = [term for term in dict.fromkeys(terms) if len(self.group(term)) > 1]
        wider = dict.fromkeys(word for one in self.targets for word in one.sprite.categories)
        found += [term for term in wider if len(self.group(term)) > 1]
        return found

    def pick_set(self, anything: float = 0.1) -> tuple[str, list[SceneObject]]:
        """A term and the two or more objects that it names; ("", []) where there is none."""
        if self.rng.random() < anything and len(self.everything()) > 1:
            return str(self.choice(("object", "thing"))), list(self.everything())
        terms = self.set_terms()
        if not terms:
            return "", []
        # Names come first in the list and are the more natural choice.
        term = terms[0] if self.rng.random() < 0.5 else str(self.choice(terms))
        return term, list(self.group(term))

    def choice(self, options: Sequence):
        """One option at random."""
        return options[int(self.rng.integers(len(options)))]

    def say(self, term: str) -> str:
        """The term as a countable noun phrase without an article."""
        return self.lexicon.singular(term)

    def ids(self, items: Sequence[SceneObject]) -> tuple[int, ...]:
        """The objects' indices, ascending."""
        return tuple(sorted(one.index for one in items))

    def template(self, templates: Sequence[str], term: str, **words: str) -> str:
        """A template filled with `{t}` (the term), `{the}` and `{a}` (the term with its article) and `{p}` (plural)."""
        said = self.say(term)
        return str(self.choice(templates)).format(
            t=said, the=definite(said), a=with_article(said), p=self.lexicon.plural(term), **words
        )


def definite(phrase: str) -> str:
    """The phrase with "the", but for planets and the like."""
    return phrase if phrase in NAMES and phrase not in ("earth", "moon") else f"the {phrase}"


def bare(phrase: str) -> str:
    """The phrase as it stands after "There is no"."""
    return f"pair of {phrase}" if phrase.rpartition(" ")[2] in PAIRED else phrase


def colors_differ(color: str | None, others: Sequence[str | None]) -> bool:
    """True if every other colour is known and nobody would call it `color`."""
    confusable = CONFUSABLE_COLORS.get(color or "", frozenset())
    return color is not None and all(
        other is not None and other != color and other not in confusable for other in others
    )
