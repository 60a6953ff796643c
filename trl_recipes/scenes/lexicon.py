"""Words: which term fits which sprite, which term might be taken to fit it, plurals and articles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from .bank import Sprite


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Nouns that people mix up: one of them in the scene makes a sentence about another one ambiguous.
LOOKALIKES: tuple[frozenset[str], ...] = tuple(
    _words(words)
    for words in (
        "cup mug glass wineglass pitcher bowl vase jar pot bucket kettle teapot",
        "table desk workbench vanity bench stool dresser cabinet cupboard wardrobe shelves bookcase",
        "oven stove cooker microwave fireplace heater radiator",
        "sofa armchair chair bench stool bed crib",
        "bag handbag backpack suitcase briefcase basket box crate toolbox safe gift",
        "phone telephone tablet remote tv screen computer laptop keyboard projector",
        "boat ship rowboat sailboat speedboat canoe",
        "car taxi van minibus sportscar racecar truck bus ambulance firetruck dumper tractor forklift crane",
        "train tram locomotive",
        "bicycle motorcycle scooter tricycle",
        "horse donkey zebra camel dromedary llama",
        "deer doe moose caribou wapiti blackbuck",
        "cow bull ox bison yak zebu gnu",
        "sheep lamb ram ewe goat",
        "dog dingo wolf fox",
        "cat lion tiger leopard",
        "rabbit hamster mouse rat squirrel chipmunk marmot beaver hedgehog ferret otter badger wombat",
        "monkey gorilla orangutan chimpanzee tamarin",
        "bear panda teddybear koala",
        "whale dolphin orca shark fish",
        "bee hornet fly mosquito",
        "ant spider beetle cockroach woodlouse cricket",
        "butterfly moth",
        "turkey hen rooster chicken chick guineafowl grouper",
        "duck rubberduck goose swan drake",
        "crocodile lizard dinosaur",
        "apple peach tomato apricot cherry orange tangerine mango pomegranate plant",
        "lemon lime",
        "banana squash",
        "melon watermelon pumpkin",
        "potato yam ginger",
        "nut almond walnut pecan peanut chestnut",
        "cake pie cupcake pudding pancake waffle",
        "bread bagel croissant sandwich hamburger hotdog taco burrito pretzel",
        "meat steak bacon",
        "hat cap helmet crown hood",
        "coat jacket suit shirt tshirt kimono dress skirt trousers shorts",
        "shoe boot sneakers slippers",
        "bathtub sink washbasin bidet toilet urinal shower aquarium",
        "gravestone headstone tombstone rock",
        "pen pencil marker paintbrush brush broom toothbrush",
        "hammer mallet axe",
        "wrench pliers clamp tools screwdriver",
        "lamp lantern lightbulb chandelier streetlamp candle flashlight",
        "guitar banjo violin cello",
        "flute bassoon saxophone trumpet",
        "piano keyboard accordion xylophone",
        "drum drumkit",
        "door window fence",
        "man woman boy girl fireman astronaut person doll",
        "earth globe moon venus mars jupiter neptune uranus ball",
        "clock watch hourglass",
        "washingmachine dryer fridge oven",
        "blender mixer toaster coffeemaker grinder",
        "saw knife",
        "squash pumpkin",
        "tray plate dartboard",
        "towel scarf",
        "remote phone multimeter radio",
        "heater fan",
    )
)

# Words beyond the vocabulary's own that could also answer a reasoning phrase, found by a part of the phrase.
REASONING_LOOKALIKES: dict[str, str] = {
    "eat": "animal fish plant candy bowl plate",
    "hungry": "animal fish nut plant",
    "sit on": "bed table box crate rock bench toilet horse swing motorcycle bicycle tricycle scooter hammock "
    "trampoline car wheelchair ball tractor suitcase camel",
    "drive": "vehicle boat train tram forklift crane",
    "transport": "horse camel donkey animal wheelchair stroller skateboard suitcase bag",
    "music": "radio speaker phone bell computer tv bird xylophone",
    "living creature": "plant doll toy snowman",
    "fly": "bird insect kite rocket bat balloon moth",
    "water": "animal boat crab shrimp",
    "wear": "bag handbag backpack watch glasses sunglasses headphones shoe boot helmet hat scarf ring crown slippers "
    "sneakers mug towel glove",
    "light": "candle fireplace moon flashlight lantern lightbulb screen tv tree phone projector",
    "drink": "bottle glass bowl container pot bucket coconut milk teapot kettle pitcher jar",
    "repairing": "tool ladder toolbox saw axe tapemeasure clamp multimeter wheel",
    "kick": "balloon egg orange globe toy sports",
    "soil": "vegetable fruit food mushroom christmastree basket worm",
    "electricity": "lamp fan heater drill tool clock vehicle car radiator oven lightbulb toy musical treadmill "
    "flashlight dryer kitchen grinder train tram sign bathroom fireplace",
    "sleep": "armchair bench crib chair stroller tent seat",
    "cut": "tool kitchen grinder mower",
    "read": "sign newspaper calendar tablet laptop computer phone box bottle clock screen puzzle watch thermometer",
    "time": "phone calendar computer tablet",
    "write": "keyboard computer brush paintbrush laptop tablet pencilholder",
    "put things": "furniture kitchen appliance drinking vehicle car tableware fridge clothing bag tent shoe boot hat "
    "stroller sink bathtub bathroom washbasin box trashcan pencilholder aquarium",
    "milk": "farm animal sheep animal",
    "neck": "animal bird",
    "stripes": "animal",
    "pictures": "phone computer tablet laptop",
    "farm": "animal plant vehicle",
    "bathroom": "towel soap toothbrush sponge mirror vanity cabinet brush appliance radiator container",
}

# Colour names that two people may use for one thing.
CONFUSABLE_COLORS: dict[str, frozenset[str]] = {
    "red": frozenset({"orange", "pink", "brown", "purple"}),
    "orange": frozenset({"red", "yellow", "brown"}),
    "yellow": frozenset({"orange", "white", "green", "brown"}),
    "green": frozenset({"yellow", "blue"}),
    "blue": frozenset({"purple", "green", "grey"}),
    "purple": frozenset({"pink", "blue", "red"}),
    "pink": frozenset({"red", "purple", "white"}),
    "brown": frozenset({"orange", "red", "black", "grey", "yellow"}),
    "black": frozenset({"grey", "brown"}),
    "white": frozenset({"grey", "yellow", "pink"}),
    "grey": frozenset({"white", "black", "brown", "blue"}),
}

PAIRED = _words("scissors pliers trousers binoculars glasses sunglasses headphones shorts slippers sneakers tweezers")
UNCOUNTABLE = _words(
    "bread milk butter sugar meat corn broccoli garlic rice bacon cheese chocolate popcorn spaghetti sushi ginger "
    "lettuce thyme lavender tools shelves balsam soap steak food candy salad fries bamboo"
) | {"french fries"}
NAMES = _words("earth jupiter mars moon neptune saturn uranus venus mercury")
FLYING = _words(
    "airplane helicopter balloon butterfly bee hornet eagle seagull gull crow pigeon owl parrot moth dragonfly "
    "mosquito ladybug bat kite rocket lark magpie vulture moon earth jupiter venus uranus neptune"
)
_VOWELS = "aeiou"


class Lexicon:
    """Matches terms with sprites and inflects them, by the bank's vocabulary.

    Args:
        vocabulary: the bank's `vocabulary.json`.
        sprites: the sprites whose nouns are known; their categories tell what a word's wider words are.
    """

    def __init__(self, vocabulary: Mapping[str, Any], sprites: Iterable[Sprite] = ()) -> None:
        self.vocabulary = vocabulary
        self.parents: dict[str, set[str]] = {word: set(wider) for word, wider in vocabulary["parents"].items()}
        self.nouns: dict[str, Sprite] = {}
        for sprite in sprites:
            self.nouns.setdefault(sprite.noun, sprite)
            for word in (sprite.noun, sprite.name, *sprite.synonyms):
                self.parents.setdefault(word, set()).update(sprite.categories)
        self._fits: dict[tuple[str, str, tuple[str, ...], tuple[str, ...]], int] = {}
        self._families: dict[str, frozenset[str]] = {}
        self._answered: dict[tuple[str, tuple[str, ...], tuple[str, ...]], frozenset[str]] = {}

    def family(self, word: str) -> frozenset[str]:
        """The word and everything wider than it ("palm" -> palm, tree, plant)."""
        if word not in self._families:
            found, todo = set(), [word]
            while todo:
                one = todo.pop()
                if one not in found:
                    found.add(one)
                    todo.extend(self.parents.get(one, ()))
            self._families[word] = frozenset(found)
        return self._families[word]

    def terms(self, sprite: Sprite) -> frozenset[str]:
        """Every word that names the sprite rightly: its noun, names, categories and theirs."""
        found = {sprite.noun, sprite.name, *sprite.synonyms}
        for category in sprite.categories:
            found |= self.family(category)
        return frozenset(found)

    def fits(self, term: str, sprite: Sprite) -> bool:
        """True if the term names the sprite rightly."""
        return self._fit(term, sprite) == 2

    def may_fit(self, term: str, sprite: Sprite) -> bool:
        """True if someone might take the term to mean the sprite; wider than `fits`."""
        return self._fit(term, sprite) > 0

    def _fit(self, term: str, sprite: Sprite) -> int:
        key = (term, sprite.noun, sprite.synonyms, sprite.categories)
        if key not in self._fits:
            terms = self.terms(sprite)
            self._fits[key] = 2 if term in terms else int(self._related(term, sprite, terms))
        return self._fits[key]

    def _related(self, term: str, sprite: Sprite, terms: frozenset[str]) -> bool:
        own = {sprite.noun, sprite.name, *sprite.synonyms}
        # A sprite known only as "tree" may be the palm that is asked for; "sports car" ends like "car".
        if own & self.family(term) or any(_tail(term, word) for word in terms):
            return True
        squeezed = term.replace(" ", "")
        kin = {word for group in LOOKALIKES if squeezed in group or term in group for word in group}
        return bool(kin & terms)

    def clashes(self, term: str, avoid: Iterable[str]) -> bool:
        """True if a background that shows `avoid` may show the term too: a narrower or a wider word of it."""
        family = self.family(term)
        return any(word in family or term in self.family(word) or _tail(term, word) for word in avoid)

    def plural(self, term: str) -> str:
        """The term in the plural; the vocabulary's irregular plurals win."""
        irregular = self.vocabulary["irregular_plurals"]
        if term in irregular:
            return irregular[term]
        head, _, last = term.rpartition(" ")
        plural = irregular.get(last) or regular_plural(last)
        return f"{head} {plural}" if head else plural

    def singular(self, term: str) -> str:
        """The countable form of a category ("furniture" -> "piece of furniture"); other words stay."""
        return self.vocabulary["as_one"].get(term, term)

    def countable(self, term: str) -> bool:
        """True if "a <term>" and "two <plural>" are both natural."""
        return term not in UNCOUNTABLE and term not in PAIRED and term not in NAMES

    def answers(self, phrase: str, sprite: Sprite) -> bool:
        """True if the sprite is what a reasoning phrase means."""
        return phrase in self.answered(sprite)

    def answered(self, sprite: Sprite) -> frozenset[str]:
        """The reasoning phrases that mean the sprite."""
        key = (sprite.noun, sprite.synonyms, sprite.categories)
        if key not in self._answered:
            meant = self.vocabulary["reasoning"].items()
            self._answered[key] = frozenset(
                phrase for phrase, terms in meant if any(self.fits(term, sprite) for term in terms)
            )
        return self._answered[key]

    def may_answer(self, phrase: str, sprite: Sprite) -> bool:
        """True if someone might give the sprite as an answer to the phrase."""
        terms = self.vocabulary["reasoning"][phrase]
        if any(self.may_fit(term, sprite) for term in terms):
            return True
        words = {word for term in self.terms(sprite) for word in (term, *term.split())}
        return any(part in phrase and words & set(extra.split()) for part, extra in REASONING_LOOKALIKES.items())


@lru_cache(maxsize=65536)
def _tail(one: str, other: str) -> bool:
    one, other = one.replace(" ", ""), other.replace(" ", "")
    short, long = sorted((one, other), key=len)
    return len(short) >= 3 and long.endswith(short)


def regular_plural(word: str) -> str:
    """English plural by rule ("box" -> "boxes", "berry" -> "berries")."""
    if word.endswith(("fish", "sheep")):
        return word
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and len(word) > 1 and word[-2] not in _VOWELS:
        return word[:-1] + "ies"
    return word + "s"


def with_article(phrase: str) -> str:
    """The phrase with its indefinite article ("apple" -> "an apple", "scissors" -> "a pair of scissors")."""
    last = phrase.rpartition(" ")[2]
    if phrase in NAMES:
        return phrase
    if last in PAIRED:
        return f"a pair of {phrase}"
    if last in UNCOUNTABLE or phrase in UNCOUNTABLE:
        return f"some {phrase}"
    if phrase.startswith(("uni", "uri", "ura", "ute", "one")):
        return f"a {phrase}"
    return f"an {phrase}" if phrase[0].lower() in _VOWELS else f"a {phrase}"
