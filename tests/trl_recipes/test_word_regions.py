"""What the cells of a scene show, and the loss that brings image features near the words for it."""

import numpy as np
import pytest
import torch

from trl_recipes.word_regions import WordList, WordRegions, token_side


@pytest.fixture(scope="module")
def words(known_scenes):
    return WordList(known_scenes.bank, side=8)


def test_cells_show_the_thing_that_covers_half_of_them(known_scenes, words):
    scene, _ = known_scenes.scene(0)
    cells = words.of_cells(scene)
    side = scene.index_map.shape[0] // 8
    kinds = set()
    for index, (noun, color) in enumerate(zip(cells["nouns"], cells["colors"], strict=True)):
        row, column = divmod(index, 8)
        shown = scene.index_map[row * side : (row + 1) * side, column * side : (column + 1) * side]
        counts = np.bincount(shown.ravel(), minlength=len(scene.objects) + 1) / shown.size
        if noun == -100:
            assert counts[0] < 0.98 and counts[1:].max() < 0.5 and color == -100
            kinds.add("mixed")
        elif words.nouns[noun] == "background":
            assert counts[0] >= 0.98 and color == -100
            kinds.add("background")
        else:
            sprite = scene.objects[counts[1:].argmax()].sprite
            assert counts[1:].max() >= 0.5 and words.nouns[noun] == sprite.name
            assert color == (-100 if sprite.color is None else words.colors.index(sprite.color))
            kinds.add("thing")
    assert kinds == {"mixed", "background", "thing"}


def test_the_loss_is_low_where_features_are_the_words_of_their_cells(parts, words):
    model, processor = parts
    regions = WordRegions(words, processor.tokenizer)
    embedding = torch.randn_like(model.get_input_embeddings().weight)
    nouns, colors = torch.tensor([[0, 1, -100]]), torch.full((1, 3), -100)
    half = regions.embed(regions.nouns, embedding)[[0, 1, 1]]
    features = torch.cat([half, torch.randn_like(half)], dim=1)[None]
    right = regions(features, embedding, nouns, colors)
    wrong = regions(features.flip(1), embedding, nouns, colors)
    assert right < 0.05 and wrong > 1
    torch.testing.assert_close(regions(features * 7, embedding, nouns, colors), right)  # only directions count
    both = regions(features, embedding, nouns, torch.tensor([[0, -100, -100]]))
    assert both > right  # colours count as well
    assert regions(features, embedding, colors, colors) == 0


def test_background_weighs_less_in_sum_and_count(parts, words):
    regions = WordRegions(words, parts[1].tokenizer)
    embedding, features = torch.randn(len(parts[1].tokenizer), 8), torch.randn(1, 4, 8)
    nouns = torch.tensor([[0, -100, 1, len(words.nouns) - 1]])
    half = torch.nn.functional.normalize(features[0, :, :4], dim=-1)
    logits = half @ regions.embed(regions.nouns, embedding).T / 0.07
    weight = torch.tensor([1.0] * (len(words.nouns) - 1) + [0.1])
    expected = torch.nn.functional.cross_entropy(logits, nouns[0], weight=weight)
    torch.testing.assert_close(regions(features, embedding, nouns, torch.full((1, 4), -100)), expected)


def test_a_word_is_the_mean_of_its_tokens(parts, words):
    regions, tokenizer = WordRegions(words, parts[1].tokenizer), parts[1].tokenizer
    embedding = torch.randn(len(tokenizer), 8)
    ids = tokenizer(f" {words.nouns[0]}", add_special_tokens=False)["input_ids"]
    expected = torch.nn.functional.normalize(embedding[ids, :4].mean(0), dim=0)
    torch.testing.assert_close(regions.embed(regions.nouns[:1], embedding)[0], expected)


def test_image_tokens_form_a_square():
    assert token_side(256) == 16
    with pytest.raises(ValueError, match="255"):
        token_side(255)
