"""Which things a scene shows, which way round, and which of them may be asked for."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_scenes import write_bank

from trl_recipes.scenes import SceneBank, SceneConfig, SceneDataset, compose_scene
from trl_recipes.scenes.compose import _backdrop, _choose_sprites, bank_lexicon
from trl_recipes.scenes.view import SceneView

QUIET = {"jitter": 0.0, "photo_share": 1.0, "render_share": 1.0, "stylised_share": 1.0}


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return SceneBank.from_folder(write_bank(tmp_path_factory.mktemp("bank")), "train")


def test_the_first_thing_is_seldom_one_that_the_background_shows(bank):
    """Six tries are made: of four nouns drawn alike often, one is avoided in all but 1 of 4,000 cases."""
    lexicon, config = bank_lexicon(bank), SceneConfig(image_size=64, max_objects=1, min_objects=1)
    avoiding = next(one for one in bank.backgrounds if one.avoid)
    plain = next(one for one in bank.backgrounds if not one.avoid)
    clashes = {}
    for background in (avoiding, plain):
        nouns = [
            _choose_sprites(bank, lexicon, background, np.random.default_rng(seed), config)[0]
            for seed in range(200)
        ]  # fmt: skip
        clashes[bool(background.avoid)] = sum(
            any(lexicon.clashes(term, avoiding.avoid) for term in (one.noun, *one.categories[:1])) for one in nouns
        )
    assert clashes[True] <= 5 and clashes[False] > 40


@pytest.mark.parametrize(("share", "mirrored"), [(0.0, 0), (1.0, 40)])
def test_things_are_mirrored_as_often_as_asked(bank, monkeypatch, share, mirrored):
    """Each sprite is given a dark left half, which lies on the right in a mirrored one."""
    pixels = np.full((20, 20, 4), 255, np.uint8)
    pixels[:, :10, :3] = 0
    monkeypatch.setattr(bank, "sprite_pixels", lambda index: pixels)
    monkeypatch.setattr("trl_recipes.scenes.compose.develop", lambda canvas, rng, config: Image.fromarray(canvas))
    found = 0
    for seed in range(40):
        config = SceneConfig(image_size=96, min_objects=1, max_objects=1, flip_share=share, **QUIET)
        scene = compose_scene(bank, np.random.default_rng(seed), config)
        (one,) = scene.objects
        left, top, right, bottom = one.bbox
        grey, middle = np.asarray(scene.image).mean(-1), (left + right) // 2
        found += grey[top:bottom, left:middle].mean() > grey[top:bottom, middle:right].mean()
    assert found == mirrored


def test_backgrounds_are_mirrored_sideways(bank, monkeypatch):
    picture = Image.fromarray(np.arange(256, dtype=np.uint8)[None, :, None].repeat(256, 0).repeat(3, 2))
    monkeypatch.setattr(bank, "background_image", lambda index: picture)
    slopes = set()
    for seed in range(30):
        pixels, _ = _backdrop(bank, bank.backgrounds[0], np.random.default_rng(seed), 64)
        assert np.ptp(pixels.astype(int), axis=0).max() == 0  # rows stay alike: nothing is upside down or turned
        slopes.add(int(np.sign(int(pixels[0, -1, 0]) - int(pixels[0, 0, 0]))))
    assert slopes == {1, -1}


def test_what_is_too_small_is_no_target(bank):
    config = SceneConfig(image_size=128)
    least = 0.03
    strict = dataclasses.replace(config, min_target_pixels=least)
    dropped = 0
    for seed in range(40):
        loose, tight = (compose_scene(bank, np.random.default_rng(seed), one) for one in (config, strict))
        for one, other in zip(loose.objects, tight.objects, strict=True):
            assert other.targetable == (one.targetable and one.visible >= least * 128 * 128)
            dropped += one.targetable and not other.targetable
    assert dropped > 20


def test_photographs_may_show_more_than_they_tell(tmp_path):
    """Counts and lists are asked for only where nothing else can be in the picture."""
    folder = write_bank(tmp_path)
    rows = pq.read_table(folder / "backgrounds.parquet").to_pylist()
    told = {}
    for kind in ("texture", "photo"):
        table = pa.Table.from_pylist([row | {"kind": kind, "avoid": []} for row in rows])
        pq.write_table(table, folder / "backgrounds.parquet")
        dataset = SceneDataset(SceneBank.from_folder(folder, "train"), SceneConfig(image_size=64), 3, 60, 1)
        scenes = [dataset.scene(index)[0] for index in range(60)]
        assert all(scene.background.plain == (kind == "texture") for scene in scenes)
        told[kind] = sum(bool(SceneView(scene, np.random.default_rng(0)).everything()) for scene in scenes)
    assert told["texture"] > 20 and told["photo"] == 0
