"""transformers' `ModelTesterMixin` and `ConfigTester` on the tiny model.

What the library's tests skip by themselves here, and why that is right: what needs an accelerator, several of them,
flash attention, `kernels`, deepspeed or `RUN_SLOW=1`; mixtures of experts, sliding windows, encoder-decoders and tensor
parallelism, which this model has not; `test_sdpa_can_dispatch_*`, which look for the towers right in the base model
(ours are one level deeper, in `vlm`, where `test_can_set_attention_dynamically_composite_model` finds them).
`GenerationTesterMixin` and `ExportTesterMixin` are not part of the source distribution (see library_tests.py): how the
model generates is tested in tests/modeling_argenseg.
"""

import unittest
from unittest.mock import patch

import tiny
import torch
from library_tests import library_tests
from transformers import LlamaConfig, LlavaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from modeling_argenseg import ARGenSegConfig, ARGenSegForConditionalGeneration, ARGenSegModel, ARGenSegPreTrainedModel

common = library_tests("test_modeling_common")
configuration = library_tests("test_configuration_common")
# The library knows by name what its classes take. While these tests run, ours are known, too.
REGISTERED = (
    (common.MODEL_MAPPING_NAMES, "ARGenSegModel"),
    (common.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "ARGenSegForConditionalGeneration"),
)
RANDOM_IDS = common.ids_tensor


class Tester:
    """What the mixin asks for: a configuration, and inputs of two rows with an image and a picture each."""

    is_training = True
    batch_size = 2
    num_hidden_layers = 2
    hidden_size = 32
    num_attention_heads = 4

    def __init__(self, vlm: PreTrainedConfig, image_tokens: int, **changes: object) -> None:
        self.vlm, self.image_tokens, self.changes = vlm, image_tokens, changes
        self.vision_config = vlm.vision_config.to_dict()
        self.with_pictures = True

    @property
    def seq_length(self) -> int:
        return self.prepare_config_and_inputs_for_common()[1]["input_ids"].shape[1]

    def get_config(self) -> ARGenSegConfig:
        return tiny.config(type(self.vlm).from_dict(self.vlm.to_dict()), **self.changes)

    def prepare_config_and_inputs_for_common(self) -> tuple[ARGenSegConfig, dict[str, torch.Tensor]]:
        image, pictures = [tiny.IMAGE] * self.image_tokens, tiny.pictures(self.batch_size)
        drawn = [[tiny.GEN_START, picture] if self.with_pictures else [] for picture in pictures]
        ids = torch.cat([tiny.stream(*image, tiny.CAT + i, *drawn[i], 5, 6 + i) for i in range(self.batch_size)])
        return self.get_config(), {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": tiny.images(self.batch_size),
        }


class LibraryTests(common.ModelTesterMixin, common.GenerationTesterMixin):
    """All of `ModelTesterMixin`, with what ours needs said otherwise."""

    all_model_classes = (ARGenSegModel, ARGenSegForConditionalGeneration)
    _is_composite = True
    # ours is not in the library, so that it is not dated by a copyright line either
    test_can_init_all_missing_weights_before_2023 = True
    # the test looks for a `vision_config` right in our configuration; it is in `vlm_config`
    skip_test_image_features_output_shape = True

    def setUp(self) -> None:
        self.model_tester = self.make_tester()
        self.config_tester = configuration.ConfigTester(self, config_class=ARGenSegConfig, has_text_modality=False)
        for names, ours in REGISTERED:
            known = patch.dict(names, {"argenseg": ours})
            known.start()
            self.addCleanup(known.stop)
        # tests of rotary embeddings read random ids: words, since loose visual ids are refused
        words = patch.object(common, "ids_tensor", lambda shape, _: RANDOM_IDS(shape, tiny.GEN_START))
        words.start()
        self.addCleanup(words.stop)

    def make_tester(self) -> Tester:
        raise NotImplementedError

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def test_reverse_loading_mapping(self) -> None:
        """Of the library's own way to save. Ours writes the names of the model; see its `save_pretrained`."""
        with patch.object(ARGenSegPreTrainedModel, "save_pretrained", PreTrainedModel.save_pretrained):
            super().test_reverse_loading_mapping()

    def test_inputs_embeds_matches_input_ids(self) -> None:
        """The library's test embeds ids one by one, but at a picture its queries are read: here there is no picture."""
        self.model_tester.with_pictures = False
        super().test_inputs_embeds_matches_input_ids()


def text_config(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    """Weights of the usual size, for which the library's half-precision tolerances are made; and more words than
    `test_resize_tokens_embeddings` takes away, or it would make visual ids of words."""
    return tiny.text_config(kind, initializer_range=0.02, vocab_size=tiny.VOCAB + 20)


class TestInternVL(LibraryTests, unittest.TestCase):
    """As released: a Llama, untied, causal attention."""

    def make_tester(self) -> Tester:
        return Tester(tiny.internvl_config(text_config(LlamaConfig)), tiny.IMAGE_TOKENS)


class TestLlava(LibraryTests, unittest.TestCase):
    """Another tower, another language model, tied embeddings, the deeper projector, the other loss."""

    # image features are those of the last layer but one: the last has no gradient
    test_all_params_have_gradient = False
    # CLIP, a model of 2021, does not pass this test: its `_init_weights` forgets a part of its MLP
    test_can_init_all_missing_weights_before_2023 = False

    def make_tester(self) -> Tester:
        vlm: LlavaConfig = tiny.llava_config(text_config=text_config(Qwen2Config), tie_word_embeddings=True)
        options = dict(tie_word_embeddings=True, generation_projector_depth=2, visual_loss="scale")
        return Tester(vlm, 4, **options)


del LibraryTests  # or it would be collected by itself
