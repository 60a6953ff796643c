"""ARGenSeg for transformers: a multimodal LLM that answers with pixels. Importing this registers the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY

from processing import ARGenSegPipeline, ARGenSegProcessor
from processing.pipeline_argenseg import SegmentationPipelineDispatch

from .configuration_argenseg import ARGenSegConfig, VARTokenizerConfig
from .generation_argenseg import ARGenSegGenerateOutput, ARGenSegGenerationMixin
from .modeling_argenseg import ARGenSegForConditionalGeneration, ARGenSegModel, ARGenSegPreTrainedModel
from .picture_streamer import PartialPicture, PictureStreamer
from .shared_prefix import EncodedImage
from .var_quantizer import MultiScaleQuantizer
from .var_tokenizer import VARTokenizer
from .vision_efficientnet_lite import (
    EfficientNetLiteVisionConfig,
    EfficientNetLiteVisionModel,
    HybridInternVLConfig,
    HybridInternVLForConditionalGeneration,
    HybridInternVLModel,
)

# the vision tower registers itself
for config_class, model_class in ((VARTokenizerConfig, VARTokenizer), (ARGenSegConfig, ARGenSegModel)):
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class, exist_ok=True)
AutoModelForImageTextToText.register(ARGenSegConfig, ARGenSegForConditionalGeneration, exist_ok=True)
AutoModelForImageSegmentation.register(ARGenSegConfig, ARGenSegForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(ARGenSegConfig, ARGenSegForConditionalGeneration, exist_ok=True)
AutoProcessor.register(ARGenSegConfig, ARGenSegProcessor, exist_ok=True)
# `register_pipeline` would warn that the task is taken; models of other kinds still get transformers' own pipeline
PIPELINE_REGISTRY.supported_tasks["image-segmentation"]["impl"] = SegmentationPipelineDispatch

__all__ = [
    "ARGenSegConfig",
    "ARGenSegForConditionalGeneration",
    "ARGenSegGenerateOutput",
    "ARGenSegGenerationMixin",
    "ARGenSegModel",
    "ARGenSegPipeline",
    "ARGenSegPreTrainedModel",
    "ARGenSegProcessor",
    "EfficientNetLiteVisionConfig",
    "EfficientNetLiteVisionModel",
    "EncodedImage",
    "HybridInternVLConfig",
    "HybridInternVLForConditionalGeneration",
    "HybridInternVLModel",
    "MultiScaleQuantizer",
    "PartialPicture",
    "PictureStreamer",
    "VARTokenizer",
    "VARTokenizerConfig",
]
