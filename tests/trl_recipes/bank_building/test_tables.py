"""The tables agree with each other, and wrong names that have occurred stay out."""

import json

import pytest

from trl_recipes.bank_building import tables
from trl_recipes.scenes.bank import VOCABULARY_KEYS


def identities() -> dict[str, str]:
    """Nouns of all identities."""
    stamps = {f"tux:{name}": noun for name, (noun, _) in tables.stamps().items()}
    emoji = {f"fl:{code}": noun for code, noun in tables.emoji().items()}
    return stamps | emoji | {f"sh3d:{name}": noun for name, noun in tables.furniture().items()}


def test_every_noun_is_known_and_used() -> None:
    assert set(identities().values()) == set(tables.nouns())
    assert all(one.written and one.written.isascii() for one in tables.nouns().values())


@pytest.mark.parametrize("name", ["nouns", "emoji", "tuxpaint", "furniture", "backgrounds"])
def test_rows_are_whole_and_unique(name: str) -> None:
    rows = tables.read_table(name)
    keys = [row["file"] if name == "backgrounds" else next(iter(row.values())) for row in rows]
    assert len(set(keys)) == len(keys)
    assert all(None not in row and None not in row.values() for row in rows)


def test_splits() -> None:
    splits, nouns = tables.splits(), identities()
    assert set(splits) == set(nouns)
    assert {nouns[one] for one, split in splits.items() if split == "unseen"} == tables.UNSEEN
    trained = {nouns[one] for one, split in splits.items() if split == "train"}
    assert set(nouns.values()) == trained | tables.UNSEEN  # val and test ask for nothing that train has not shown
    shares = {split: list(splits.values()).count(split) / len(splits) for split in ("val", "test")}
    assert 0.03 < shares["val"] < 0.08 and 0.1 < shares["test"] < 0.18
    for source in ("plasma", "mate", "lomiri", "stellarium"):
        assert {one.split for one in tables.backdrops(source)} == {"train", "val", "test"}


def test_vocabulary_speaks_of_known_words() -> None:
    vocabulary = json.loads(tables.VOCABULARY.read_text(encoding="utf-8"))
    assert set(VOCABULARY_KEYS) <= set(vocabulary)
    words = set(tables.nouns()) | {word for one in tables.nouns().values() for word in one.categories}
    assert {word for meant in vocabulary["reasoning"].values() for word in meant} <= words


def test_wrong_names_stay_out() -> None:
    stamps = {name: noun for name, (noun, _) in tables.stamps().items()}
    assert "military/vehicles/ww2_german_gun" not in stamps
    assert {noun for name, noun in stamps.items() if "grave-" in name} == {"gravestone"}
    assert stamps["space/planets/6_saturn"] == "saturn" and stamps["space/planets/4_mars"] == "mars"
    assert stamps["vehicles/auto/beetle"] == "car"
    assert "1f3cf" not in tables.emoji()  # cricket, the game
    assert "1f5b1-fe0f" not in tables.emoji()  # the mouse of a computer
    dogs = {name for name, noun in tables.furniture().items() if noun == "dog"}
    assert not any("house" in name.lower() for name in dogs)
    knives = {name for name, noun in tables.furniture().items() if noun == "knife"}
    assert not any("stand" in name.lower() or "block" in name.lower() for name in knives)
