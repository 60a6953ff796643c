"""Things that are seen as if nobody had ever seen their like."""

import pytest
import tiny_scenes
import torch
from torch.nn import functional as F

from trl_recipes.scene_samples import SceneCollator, SceneSamples
from trl_recipes.scenes import flat_expressions
from trl_recipes.train_scenes import SceneTrainer
from trl_recipes.unfamiliar import FARTHEST, make_unfamiliar, thing_of_cells
from trl_recipes.word_regions import WordList, token_side

NAMES, WIDTH = 5, 64  # the background is name 5
NOUNS = torch.tensor([[0, 0, 5, 5], [0, 0, 5, 5], [5, 5, 3, 3], [5, 5, 3, 3]]).view(1, 16)


@pytest.fixture
def names() -> torch.Tensor:
    return F.normalize(torch.randn(NAMES, WIDTH, generator=torch.Generator().manual_seed(1)), dim=-1)


@pytest.fixture
def features() -> torch.Tensor:
    return 3 * torch.randn(1, 16, 2 * WIDTH, generator=torch.Generator().manual_seed(2))


def angles(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.cosine_similarity(one, other, dim=-1).clamp(-1, 1).arccos()


def test_the_background_and_what_is_not_chosen_stay(features, names):
    found = make_unfamiliar(features, NOUNS, names, 1.0)
    same = (found == features).all(-1)
    assert torch.equal(same, NOUNS == NAMES)
    torch.testing.assert_close(make_unfamiliar(features, NOUNS, names, 0.0), features)


def test_all_cells_of_a_thing_are_turned_alike_and_no_farther_than_told(names):
    torch.manual_seed(0)
    features = names[NOUNS.clamp(max=NAMES - 1)].repeat(1, 1, 2)  # every cell is what its name says
    farthest = 0.0
    for _ in range(40):
        found = make_unfamiliar(features, NOUNS, names, 1.0)
        for name in (0, 3):
            cells = found[name == NOUNS]
            torch.testing.assert_close(cells, cells[:1].expand_as(cells))
        turned = angles(found[..., :WIDTH], features[..., :WIDTH])
        farthest = max(farthest, float(turned.max()))
        apart = angles(found[0, 0, :WIDTH], found[0, -1, :WIDTH])
        assert apart > 1e-3  # each thing has a direction of its own
    assert 1.0 < farthest < FARTHEST + 0.2  # what it is turned towards need not be at right angles


def test_a_turned_thing_is_nearer_to_another_name_and_about_as_long(names):
    torch.manual_seed(0)
    features = 4 * names[NOUNS.clamp(max=NAMES - 1)].repeat(1, 1, 2)
    own, others = [], []
    for _ in range(200):
        found = make_unfamiliar(features, NOUNS, names, 1.0)[0, 0]
        assert 2.0 < found[:WIDTH].norm() < 6.0
        likeness = F.normalize(found[:WIDTH], dim=-1) @ names.T
        own.append(likeness[0])
        others.append(likeness[1:].max())
    before = (names[1:] @ names[0]).max()
    assert torch.stack(own).mean() < 0.85 and torch.stack(others).mean() > before + 0.05


def test_cells_that_show_no_one_thing_belong_to_one_beside_them():
    nouns = NOUNS.clone()
    nouns[0, 2] = -100  # beside name 0
    nouns[0, 12] = -100  # beside nothing
    found = thing_of_cells(nouns, NAMES)
    expected = NOUNS.clone()
    expected[0, 2] = 0
    assert torch.equal(found, expected)


def test_the_recipe_shows_them_to_the_language_model_alone(parts, known_scenes, tmp_path):
    model, processor = parts
    words = WordList(known_scenes.bank, token_side(processor.image_seq_length))
    samples = SceneSamples(known_scenes, processor, words)
    trainer = SceneTrainer(
        model=model.eval(),
        args=tiny_scenes.training_arguments(tmp_path),
        train_dataset=samples,
        processor=processor,
        validation=flat_expressions(known_scenes, 4),
        recipe=tiny_scenes.scene_arguments("bank", "tokenizer", word_region_weight=0.5),
        words=words,
    )
    batch = SceneCollator(processor.tokenizer.pad_token_id)([samples[0], samples[1]])
    shown: dict[float, list[torch.Tensor]] = {}
    losses = {}
    for share in (0.0, 1.0):
        trainer.recipe.unfamiliar = share
        image = model.get_image_features(trainer.encoder(batch)["pixel_values"], return_dict=True)
        before = image.pooler_output
        losses[share] = trainer.extra_loss(model, image, {k: v for k, v in batch.items() if k.startswith("cell_")})
        shown[share] = [before, image.pooler_output]
    torch.testing.assert_close(losses[0.0], losses[1.0])
    torch.testing.assert_close(*shown[0.0])
    things = (batch["cell_nouns"] >= 0) & (batch["cell_nouns"] != len(words.nouns) - 1)
    changed = (shown[1.0][0] - shown[1.0][1]).abs().amax(-1) > 1e-4
    assert things.any() and changed[things].all() and not changed.all()


def test_without_the_words_of_the_cells_it_is_refused(parts, samples, known_scenes, tmp_path):
    with pytest.raises(ValueError, match="--word_region_weight"):
        SceneTrainer(
            model=parts[0],
            args=tiny_scenes.training_arguments(tmp_path),
            train_dataset=samples,
            processor=parts[1],
            validation=flat_expressions(known_scenes, 4),
            recipe=tiny_scenes.scene_arguments("bank", "tokenizer", word_region_weight=0.0, unfamiliar=0.5),
        )
