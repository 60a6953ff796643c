"""What image features say by themselves, and what the whole model draws by name."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trl_recipes import naming as module
from trl_recipes.mask_regions import MaskRegions, shares_of_queries
from trl_recipes.naming import drawn, marked, naming
from trl_recipes.scenes import SceneDataset
from trl_recipes.word_regions import WordList, WordRegions


@pytest.fixture(scope="module")
def scenes(known_scenes):
    return SceneDataset(known_scenes.bank, known_scenes.config, known_scenes.seed, 4, 2)


class Seeing(torch.nn.Module):
    """Its features of the next scene are the words for what its cells show, or for what `mistaken` makes of it."""

    def __init__(self, scenes, processor, words, mistaken=lambda nouns: nouns):
        super().__init__()
        self.embedding = torch.nn.Embedding(len(processor.tokenizer), 64)
        vectors = WordRegions(words, processor.tokenizer)
        vectors = vectors.embed(vectors.nouns, self.embedding.weight.detach())
        nouns = [torch.from_numpy(words.of_cells(scenes.scene(i)[0])["nouns"]) for i in range(len(scenes))]
        self.features = iter([vectors[mistaken(one).clamp(min=0)].repeat(1, 2)[None] for one in nouns])
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def get_input_embeddings(self):
        return self.embedding

    def get_image_features(self, pixels, **kwargs):
        return SimpleNamespace(pooler_output=next(self.features))


def test_features_that_are_the_right_words_name_and_find_all(parts, scenes):
    words = WordList(scenes.bank, side=16)
    result = naming(Seeing(scenes, parts[1], words), parts[1], scenes, words)
    assert result["named"] > 0.9 and result["found"] > 0.9 and 0 < result["chance"] < 1


def test_features_that_are_the_wrong_words_name_nothing(parts, scenes):
    words = WordList(scenes.bank, side=16)
    model = Seeing(scenes, parts[1], words, lambda nouns: (nouns + 1) % (len(words.nouns) - 1))
    assert naming(model, parts[1], scenes, words)["named"] < 0.1


@pytest.mark.parametrize("obedient", [True, False])
def test_a_model_that_draws_what_is_named_is_told_from_one_that_does_not_listen(parts, monkeypatch, scenes, obedient):
    several = [one for one in (scenes.scene(i)[0] for i in range(len(scenes))) if len(names_of(one)) > 1]
    shown = iter(several)

    def draw(model, processor, samples, **options):
        scene = next(shown)
        wanted = [sample["text"].removeprefix("the ") for sample in samples]
        if not obedient:
            wanted = [scene.objects[0].sprite.name] * len(samples)
        ids = [[one.index for one in scene.objects if one.sprite.name == name] for name in wanted]
        return [{"segments": [{"mask": scene.mask(some)}]} for some in ids]

    monkeypatch.setattr(module, "draw", draw)
    result = drawn(None, None, scenes)
    monkeypatch.undo()
    words = WordList(scenes.bank, side=16)
    chance = naming(Seeing(scenes, parts[1], words), parts[1], scenes, words)["chance"]
    assert several and 0 < chance < 1
    assert result == pytest.approx(1.0 if obedient else chance)


class Marking(torch.nn.Module):
    """Its queries mark, in every scene, what is named, or the scene's first thing whatever the name."""

    def __init__(self, model, processor, scenes, obedient):
        super().__init__()
        text_config, config = SimpleNamespace(hidden_size=8), model.config
        self.config = SimpleNamespace(
            text_config=text_config, picture_length=config.picture_length, patch_nums=config.patch_nums
        )
        self.model, self.device = self, torch.device("cpu")
        self.find_pictures, self.length = model.model.find_pictures, processor.num_visual_tokens
        self.regions = MaskRegions(8, processor.visual_tokenizer.config.patch_nums)
        self.shown, self.obedient = iter(scenes), obedient

    def forward(self, input_ids, **kwargs):
        scene = next(self.shown)
        names = sorted(names_of(scene)) if self.obedient else [scene.objects[0].sprite.name] * len(names_of(scene))
        masks = [scene.mask([one.index for one in scene.objects if one.sprite.name == name]) for name in names]
        shares = shares_of_queries(torch.from_numpy(np.stack(masks)), self.config.patch_nums)
        hidden = torch.zeros(*input_ids.shape, 8)
        rows, columns = self.find_pictures(input_ids)
        places = columns[:, None] + torch.arange(self.length)
        hidden[rows[:, None], places] = 5 * (2 * shares[..., None] - 1) * self.regions.direction
        return SimpleNamespace(last_hidden_state=hidden)


@pytest.mark.parametrize("obedient", [True, False])
def test_queries_that_mark_what_is_named_are_told_from_those_that_do_not_listen(parts, scenes, obedient):
    several = [one for one in (scenes.scene(i)[0] for i in range(len(scenes))) if len(names_of(one)) > 1]
    result = marked(Marking(*parts, several, obedient), parts[1], scenes)
    words = WordList(scenes.bank, side=16)
    chance = naming(Seeing(scenes, parts[1], words), parts[1], scenes, words)["chance"]
    assert result == pytest.approx(1.0 if obedient else chance)


def test_nothing_drawn_is_nothing_found(monkeypatch, scenes):
    monkeypatch.setattr(module, "draw", lambda model, processor, samples, **_: [{"segments": []} for _ in samples])
    assert drawn(None, None, scenes) == 0.0


def names_of(scene):
    return {one.sprite.name for one in scene.objects}
