"""ARGenSeg for transformers: a multimodal LLM that answers with pixels. Importing this registers the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from processing import ARGenSegProcessor

from .configuration_argenseg import ARGenSegConfig, VARTokenizerConfig
from .generation_argenseg import ARGenSegGenerateOutput, ARGenSegGenerationMixin
from .modeling_argenseg import ARGenSegForConditionalGeneration, ARGenSegModel, ARGenSegPreTrainedModel
from .var_tokenizer import MultiScaleQuantizer, VARTokenizer
from .vision_efficientnet_lite import (
    EfficientNetLiteVisionConfig,
    EfficientNetLiteVisionModel,
    HybridInternVLConfig,
    HybridInternVLForConditionalGeneration,
    HybridInternVLModel,
)

for config_class, model_class in (
    (VARTokenizerConfig, VARTokenizer),
    (EfficientNetLiteVisionConfig, EfficientNetLiteVisionModel),
    (HybridInternVLConfig, HybridInternVLModel),
    (ARGenSegConfig, ARGenSegModel),
):
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class, exist_ok=True)
AutoModelForImageTextToText.register(HybridInternVLConfig, HybridInternVLForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(ARGenSegConfig, ARGenSegForConditionalGeneration, exist_ok=True)
AutoProcessor.register(ARGenSegConfig, ARGenSegProcessor, exist_ok=True)

__all__ = [
    "ARGenSegConfig",
    "ARGenSegForConditionalGeneration",
    "ARGenSegGenerateOutput",
    "ARGenSegGenerationMixin",
    "ARGenSegModel",
    "ARGenSegPreTrainedModel",
    "ARGenSegProcessor",
    "EfficientNetLiteVisionConfig",
    "EfficientNetLiteVisionModel",
    "HybridInternVLConfig",
    "HybridInternVLForConditionalGeneration",
    "HybridInternVLModel",
    "MultiScaleQuantizer",
    "VARTokenizer",
    "VARTokenizerConfig",
]
