"""What stands between people's data and the model."""

from .image_inputs import load_image
from .mask_inputs import load_mask
from .pipeline_argenseg import ARGenSegPipeline
from .processing_argenseg import ARGenSegProcessor
from .zoom import zoom_in

__all__ = ["ARGenSegPipeline", "ARGenSegProcessor", "load_image", "load_mask", "zoom_in"]
