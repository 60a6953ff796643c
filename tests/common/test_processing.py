"""transformers' `ProcessorTesterMixin` on the processor of the toy model.

What the library's tests skip by themselves here: video and audio, which this processor does not take (for its missing
parts they ask `librosa` and `torchcodec`); tools, which the chat template does not know; and the token counts that vLLM
asks for (`_get_num_multimodal_tokens`), since vLLM cannot draw a scale in parallel.
"""

import unittest

import tiny
import toy
from library_tests import library_tests

from processing import ARGenSegProcessor

common = library_tests("test_processing_common")


class TestProcessor(common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = ARGenSegProcessor

    @classmethod
    def _setup_from_components(cls) -> ARGenSegProcessor:
        processor = toy.build()[1]
        processor.tokenizer.model_max_length = 1024  # the library's texts are longer than what the toy model reads
        return processor

    @staticmethod
    def prepare_processor_dict() -> dict[str, int]:
        return {"image_seq_length": tiny.IMAGE_TOKENS}

    def does_processor_return_mm_offsets(self, processor_class: type, method: str) -> bool:
        """The library's helper compares with the first base class only; ours is a mixin of our own."""
        return method == "replace_image_token"

    def test_if_input_has_mismatching_tokens_and_mm_data(self) -> None:
        """The library's test insists on its own wording."""
        processor, token = self.get_processor(), self.image_token
        for text, images in ((f"a {token}", 2), (f"{token} and {token}", 1), ("no place", 1), (f"{token}", 0)):
            with self.assertRaisesRegex(ValueError, "image"):
                processor(text=[text], images=self.prepare_images_inputs(batch_size=images) if images else None)
