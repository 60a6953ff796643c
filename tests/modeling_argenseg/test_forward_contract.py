"""What transformers expects of any model. Its own tests (tests/common) check this, too, where they are at hand."""

import inspect

import pytest
import tiny
import torch
from safetensors.torch import load_file

from modeling_argenseg import ARGenSegConfig, ARGenSegForConditionalGeneration, ARGenSegModel, VARTokenizerConfig

ROW = tiny.stream(tiny.IMAGE, tiny.CAT, tiny.GEN_START, tiny.pictures(1), 5, 6)


@pytest.mark.parametrize("where", ["argument", "configuration"])
def test_tuples_for_those_who_want_them(where):
    net = tiny.model()
    whole = net(ROW, pixel_values=tiny.images(1), labels=ROW)
    hidden = net.model(ROW, pixel_values=tiny.images(1)).last_hidden_state
    options = {}
    if where == "argument":
        options["return_dict"] = False
    else:
        net.config.return_dict = False
    loss, logits, *_ = net(ROW, pixel_values=tiny.images(1), labels=ROW, **options)
    torch.testing.assert_close((loss, logits), (whole.loss, whole.logits))
    first = net.model(ROW, pixel_values=tiny.images(1), **options)[0]
    torch.testing.assert_close(first, hidden)
    assert isinstance(net.get_image_features(tiny.images(1), **options), tuple)
    out = tiny.generate(net, {"input_ids": ROW[:, :2]}, [tiny.GEN_START, tiny.DONE], pixel_values=tiny.images(1))
    assert len(tiny.drawn(tiny.answers(out.sequences, 2)[0])) == tiny.T


@pytest.mark.parametrize("visual_loss", ["token", "scale"])
def test_labels_that_are_shifted_already(visual_loss):
    net = tiny.model(visual_loss=visual_loss)
    shifted = torch.nn.functional.pad(ROW[:, 1:], (0, 1), value=-100)
    expected = net(ROW, labels=ROW)
    for labels in (None, torch.zeros_like(ROW)):  # the shifted ones count
        found = net(ROW, labels=labels, shift_labels=shifted)
        torch.testing.assert_close((found.text_loss, found.visual_loss), (expected.text_loss, expected.visual_loss))


def test_an_image_reaches_a_prompt_of_embeddings():
    net, ids = tiny.model(), tiny.stream(5, tiny.IMAGE, tiny.CAT)
    embeds = net.get_input_embeddings()(ids)
    with torch.no_grad():
        found = net(inputs_embeds=embeds, pixel_values=tiny.images(1)).logits
        torch.testing.assert_close(found, net(ids, pixel_values=tiny.images(1)).logits)
    with pytest.raises(ValueError, match="2 features"):
        net(inputs_embeds=embeds, pixel_values=tiny.images(2))


@pytest.mark.parametrize("kind", [ARGenSegModel, type(tiny.model())])
def test_the_options_of_a_forward_pass_are_declared(kind):
    """transformers looks at this annotation for what may be asked for."""
    declared = inspect.signature(kind.forward).parameters["kwargs"].annotation.__args__[0].__annotations__
    assert {"output_attentions", "output_hidden_states"} <= set(declared)


@pytest.mark.parametrize("vlm", [tiny.internvl_config, tiny.llava_config, tiny.hybrid_config])
def test_a_saved_file_has_the_names_of_the_model(vlm, tmp_path):
    """`Trainer` loads a checkpoint's file as it is, and passes over names that the model does not have."""
    net = tiny.model(vlm())
    net.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == net.state_dict().keys()
    net.model.save_pretrained(tmp_path / "base")
    assert load_file(tmp_path / "base" / "model.safetensors").keys() == net.model.state_dict().keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale_attention": "Block"}, "'causal' or 'block', got 'Block'"),
        ({"visual_loss": "tokens"}, "'token' or 'scale', got 'tokens'"),
        ({"num_scales": 0}, "from 1 to 4, or None"),
        ({"num_scales": -1}, "from 1 to 4, or None"),
        ({"num_scales": 5}, "from 1 to 4, or None"),
    ],
)
def test_a_mistyped_option_is_told(change, message, tmp_path):
    tiny.model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        tiny.config(**change)
    with pytest.raises(ValueError, match=message):
        type(tiny.model()).from_pretrained(tmp_path, **change)


def test_the_parts_that_libraries_ask_for():
    net = tiny.model()
    assert net.get_encoder("image") is net.model.get_encoder("image") is net.model.vlm.vision_tower
    assert net.get_decoder() is net.model.language_model
    clip = {"CLIPEncoderLayer", "CLIPVisionEmbeddings"}  # CLIPTextEmbeddings is none of its layers
    for one, tower in ((net, {"InternVLVisionLayer"}), (tiny.model(tiny.llava_config()), clip)):
        assert set(one._no_split_modules) == set(one.model._no_split_modules) == {"LlamaDecoderLayer"} | tower


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visual_token_offset": tiny.VOCAB - tiny.CODES + 1}, "visual_token_offset 45 and 32 codes do not fit"),
        ({"visual_token_offset": -1}, "do not fit"),
        ({"gen_start_token_id": tiny.FIRST_VISUAL + 3}, "gen_start_token_id 45 is an id of the codebook"),
        ({"gen_end_token_id": tiny.FIRST_VISUAL}, "gen_end_token_id 42 is an id of the codebook"),
        ({"gen_end_token_id": tiny.GEN_START}, "gen_start_token_id and gen_end_token_id are both 40"),
        ({"gen_start_token_id": tiny.VOCAB}, "gen_start_token_id 76 is no id of a vocabulary of 76"),
    ],
)
def test_ids_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        ARGenSegForConditionalGeneration(tiny.config(**changes))


def test_ids_that_are_missing():
    config = tiny.config(gen_start_token_id=None)
    with pytest.raises(ValueError, match="gen_start_token_id is not set"):
        ARGenSegForConditionalGeneration(config)


@pytest.mark.parametrize("keep", [2, torch.tensor([3, 4])])
@pytest.mark.parametrize("training", [False, True])
def test_labels_go_with_all_logits_or_marked_ones(keep, training):
    net = tiny.model().train(training)
    with pytest.raises(ValueError, match="with labels, logits_to_keep is a bool mask"):
        net(ROW, labels=ROW, logits_to_keep=keep)


@pytest.mark.parametrize("kind", [ARGenSegConfig, VARTokenizerConfig])
def test_a_configuration_is_pushed_with_its_code(kind, tmp_path, monkeypatch):
    seen = {}

    def push_to_hub(self, repo_id, **kwargs):
        self.save_pretrained(tmp_path / "upload", max_shard_size="1GB")  # what transformers does before the upload
        seen[repo_id] = kwargs

    monkeypatch.setattr(kind, "push_to_hub", push_to_hub)
    config = tiny.config() if kind is ARGenSegConfig else tiny.tokenizer_config()
    config.save_pretrained(tmp_path / "local", push_to_hub=True, private=True)
    assert seen == {"local": {"private": True}}
    for folder in ("local", "upload"):
        assert (tmp_path / folder / "configuration_argenseg.py").is_file()
