"""Where adapters go, how large they are, what trains beside them, and that nothing else moves."""

import pytest
import tiny
import torch
from adapted import check_what_moved
from peft import PeftModel
from torch import nn

from modeling_argenseg import ARGenSegForConditionalGeneration
from trl_recipes.adapters import add_adapters, choose_rank, is_just_made, lora_config, new_token_rows, target_names

ROOMY = 0.5  # toy models are small: one rank is already some per cent


def fresh(tied: bool = False, depth: int = 1, vlm=None) -> ARGenSegForConditionalGeneration:
    """A model as `from_vlm` makes it: random weights in the language model, nothing in the parts that draw."""
    torch.manual_seed(0)
    vlm = vlm or tiny.internvl_config(
        tiny.text_config(vocab_size=tiny.GEN_START, tie_word_embeddings=tied), tie_word_embeddings=tied
    )
    return ARGenSegForConditionalGeneration.from_vlm(vlm, tiny.visual_tokenizer(), generation_projector_depth=depth)


def lesson(count: int = 2) -> dict[str, torch.Tensor]:
    """Requests about random images, answered by pictures."""
    rows = [tiny.stream(tiny.IMAGE, 5, 6, tiny.GEN_START, picture, 7) for picture in tiny.pictures(count)]
    ids = torch.cat(rows)
    return {"input_ids": ids, "pixel_values": tiny.images(count), "labels": ids.clone()}


def copy_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def take_steps(model: nn.Module, count: int = 3) -> float:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(count):
        loss = model.train()(**lesson()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def adapted(model, **options):
    return add_adapters(model, lora_config(model, max_share=ROOMY, **options), ROOMY)


@pytest.mark.parametrize("vlm", [tiny.internvl_config, tiny.llava_config, tiny.hybrid_config])
def test_adapters_sit_in_the_language_model_alone(vlm):
    model = tiny.model(vlm())
    found, sizes = adapted(model, rank=2)
    places = {name.split(".lora_")[0] for name, p in found.named_parameters() if p.requires_grad}
    layers = "base_model.model.model.vlm.language_model.layers"
    assert len(places) == 2 * 7 and all(name.startswith(layers) for name in places)
    assert sizes.adapters == sum(p.numel() for p in found.parameters() if p.requires_grad) and not sizes.new_parts
    assert len(target_names(tiny.model(vlm()), "attention")) == 2 * 4


def test_the_rank_is_as_large_as_the_share_allows():
    model = tiny.model()
    total = sum(p.numel() for p in model.parameters())
    per_rank = sum(sum(model.get_submodule(name).weight.shape) for name in target_names(model, "all"))
    for share in (0.05, 0.1, 0.2):
        rank = choose_rank(model, "all", 99, share)
        assert rank * per_rank < share * total <= (rank + 1) * per_rank
    assert choose_rank(model, "all", 2, 0.5) == 2
    with pytest.raises(ValueError, match="--lora_targets attention"):
        choose_rank(model, "all", 16, 0.5 * per_rank / total)


def test_adapters_that_are_too_large_are_refused():
    model = tiny.model()
    with pytest.raises(ValueError, match=r"adapters: [\d,]+ parameters, .*the limit is 0\.10%"):
        add_adapters(model, lora_config(model, rank=1, max_share=ROOMY), 0.001)


def test_the_default_model_takes_adapters_below_one_per_cent():
    from pathlib import Path

    folder = Path(__file__).parents[2] / "hub_cards/argenseg-tiny"
    if not (folder / "config.json").exists():
        pytest.skip("needs hub_cards/argenseg-tiny")
    model = ARGenSegForConditionalGeneration.from_pretrained(folder)
    _, sizes = add_adapters(model, lora_config(model))
    assert 0.002 < sizes.share < 0.01 and not sizes.new_parts


def test_a_trained_model_keeps_its_new_parts_and_a_just_made_one_trains_them():
    assert not is_just_made(tiny.model()) and is_just_made(fresh())
    assert lora_config(tiny.model(), max_share=ROOMY).modules_to_save is None
    _, sizes = adapted(fresh(), rank=2)
    width, scales = 32, len(tiny.SIDES)
    projector = 8 * width + width
    rows = 2 + 1 + tiny.CODES  # read: both marks; drawn: <gen_start> and the codes
    assert sizes.new_parts == projector + (scales + tiny.T + rows) * width


def test_rows_of_new_tokens():
    model = fresh()
    rows = new_token_rows(model)
    first = tiny.GEN_START
    assert rows == {"embed_tokens": [first, first + 1], "lm_head": [first, *range(first + 2, first + 2 + tiny.CODES)]}
    assert new_token_rows(fresh(tied=True)) == {"embed_tokens": list(range(first, first + 2 + tiny.CODES))}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_new_parts_move_and_survive_saving_and_merging(tied, depth, tmp_path):
    model = fresh(tied, depth)
    before = copy_of(model)
    found, _ = adapted(model, rank=2)
    trainable = {name: p.detach().clone() for name, p in found.named_parameters() if p.requires_grad}
    take_steps(found)
    still = [name for name, p in found.named_parameters() if name in trainable and torch.equal(p, trainable[name])]
    assert not still
    found.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = found(**lesson()).loss
        loaded = PeftModel.from_pretrained(fresh(tied, depth), tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(**lesson()).loss, expected)
        merged = found.merge_and_unload()
        torch.testing.assert_close(merged(**lesson()).loss, expected, rtol=1e-4, atol=1e-5)
    check_what_moved(before, merged, new_parts=True, tied=tied)
    merged.save_pretrained(tmp_path / "merged", save_original_format=False)
    again = ARGenSegForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**lesson()).loss, expected, rtol=1e-4, atol=1e-5)


def test_frozen_parts_do_not_move():
    model = tiny.model(scale_attention="block")
    before = copy_of(model)
    found, _ = adapted(model, rank=2)
    take_steps(found)
    check_what_moved(before, found.merge_and_unload(), new_parts=False)


def test_the_vision_tower_of_llava_has_a_position_embedding_of_its_own():
    model = fresh(vlm=tiny.llava_config(text_config=tiny.text_config(vocab_size=tiny.GEN_START)))
    found, _ = adapted(model, rank=2)
    training = [name for name, p in found.named_parameters() if p.requires_grad]
    assert sum("position_embedding" in name for name in training) == 1
    assert not any("vision" in name for name in training)
