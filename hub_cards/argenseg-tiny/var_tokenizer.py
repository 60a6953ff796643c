"""VAR's multi-scale VQ-VAE (Tian et al. 2024) as a transformers model: pictures to visual tokens and back.

Parameter names are those of VAR's `vae_ch160v4096z32`.

Shapes: B batch, D latent channels, V codebook entries, K scales of side p_1..p_K, T = sum of p_k squared,
h = w = p_K the side of the latent, H = W the side of the picture.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .code_search import CodeSearch
from .configuration_argenseg import VARTokenizerConfig
from .released_checkpoint import LoadsReleased, visual_tokenizer_arguments
from .var_layers import Decoder, Encoder, LastConv2d
from .var_quantizer import MultiScaleQuantizer, Phi


@dataclass
class VARTokenizerOutput(ModelOutput):
    """The reconstruction (B, 3, H, W) in [-1, 1] and the visual tokens (B, T)."""

    reconstruction: torch.Tensor | None = None
    visual_ids: torch.Tensor | None = None


class VARTokenizer(LoadsReleased, PreTrainedModel):
    """Multi-scale VQ-VAE of VAR. `encode` and `decode` are what the processor calls; `forward` is both. Its recipe,
    `trl_recipes.train_visual_tokenizer`, brings its own loss."""

    config_class = VARTokenizerConfig
    _released_arguments = staticmethod(visual_tokenizer_arguments)
    main_input_name = "pixel_values"
    _supports_sdpa = True

    # what `decode` and `decode_scales` run in; None: as loaded. torch.bfloat16 is several times as fast on processors
    # and GPUs that multiply it in hardware, and moves a mask by pixels on its edge at most. Nearest codes do not depend
    # on it; those that `search` tries out, by decoding them, may. It is not saved.
    decode_dtype: torch.dtype | None = None

    def __init__(self, config: VARTokenizerConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 3, padding=1)
        self.quantize = MultiScaleQuantizer(config)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 3, padding=1)
        self.decoder = Decoder(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Phi):
            init.dirac_(module.weight)  # phi begins as the identity: the codebook can be learned at once
            init.zeros_(module.bias)
        elif isinstance(module, LastConv2d):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, nonlinearity="linear")
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            bound = 1 / module.num_embeddings
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, MultiScaleQuantizer):
            init.zeros_(module.ema_vocab_hit_SV)
        else:
            super()._init_weights(module)

    def latent(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Picture (B, 3, H, W) in [-1, 1] to the latent before quantisation (B, D, h, w)."""
        side = self.config.image_size
        if pixel_values.ndim != 4 or pixel_values.shape[2:] != (side, side):
            raise ValueError(f"pixel_values must be (B, 3, {side}, {side}), got {tuple(pixel_values.shape)}")
        return self.quant_conv(self.encoder(pixel_values.to(self.dtype)))

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor, search_steps: int | None = None) -> torch.Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to visual tokens (B, T).

        Args:
            pixel_values: the pictures.
            search_steps: for masks, black and white: tries out tokens of the last scale in so many steps and keeps
                those that bring the decoded mask nearer (`CodeSearch`), in `decode_dtype`. A step takes two decoder
                passes, one of them with its gradient. Default: the configuration's; 0: nearest codes, as released.

        Raises:
            ValueError: pictures of another size; a negative number of steps.
        """
        steps = self.config.search_steps if search_steps is None else search_steps
        return self.search(pixel_values, self.quantize.encode(self.latent(pixel_values)), steps)

    @torch.no_grad()
    def search(self, pixel_values: torch.Tensor, visual_ids: torch.Tensor, steps: int) -> torch.Tensor:
        """Visual tokens (B, T) with those of the last scale nearer to masks (B, 3, H, W), as `encode` does it."""
        if steps < 0:
            raise ValueError(f"search_steps must be 0 (the nearest codes) or more, got {steps}")
        if steps == 0 or len(visual_ids) == 0:
            return visual_ids
        with torch.inference_mode(False):  # where there are no gradients
            search = CodeSearch(self.quantize, self._decode_faster, pixel_values.clone(), visual_ids.clone())
            return search.run(steps)

    def decode_latent(self, f_hat_BDhw: torch.Tensor) -> torch.Tensor:
        """f_hat (B, D, h, w) to pictures (B, 3, H, W), not clamped."""
        return self.decoder(self.post_quant_conv(f_hat_BDhw.to(self.post_quant_conv.weight.dtype)))

    def _decode_faster(self, f_hat_BDhw: torch.Tensor) -> torch.Tensor:
        """`decode_latent` in `decode_dtype`."""
        faster = self.decode_dtype not in (None, self.dtype)
        with torch.autocast(f_hat_BDhw.device.type, self.decode_dtype, enabled=faster):
            return self.decode_latent(f_hat_BDhw).to(f_hat_BDhw.dtype)

    def _picture(self, f_hat_BDhw: torch.Tensor) -> torch.Tensor:
        """f_hat (B, D, h, w) to pictures (B, 3, H, W) in [-1, 1], in `decode_dtype`."""
        return self._decode_faster(f_hat_BDhw).clamp(-1, 1)

    @torch.no_grad()
    def decode(self, visual_ids: torch.Tensor) -> torch.Tensor:
        """Visual tokens (B, T), or those of the first whole scales, to pictures (B, 3, H, W): one decoder pass."""
        *_, f_hat = self.quantize.accumulate(visual_ids)
        return self._picture(f_hat)

    @torch.no_grad()
    def decode_scales(self, visual_ids: torch.Tensor) -> torch.Tensor:
        """Visual tokens (B, T) to the picture after every scale (B, K, 3, H, W), coarse to fine."""
        f_hats = list(self.quantize.accumulate(visual_ids))
        pictures = self._picture(torch.cat(f_hats))  # (K * B, 3, H, W), scale-major
        return pictures.unflatten(0, (len(f_hats), -1)).transpose(0, 1)

    @torch.no_grad()
    def next_scale_inputs(self, visual_ids: torch.Tensor) -> torch.Tensor:
        """Visual tokens (B, T) to the teacher-forcing features of scales 2..K (B, T - 1, D)."""
        return self.quantize.next_scale_inputs(visual_ids)

    @torch.no_grad()
    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor) -> VARTokenizerOutput:
        """Pictures (B, 3, H, W) in [-1, 1] to visual tokens, and to what is left of the pictures."""
        visual_ids = self.encode(pixel_values)
        return VARTokenizerOutput(reconstruction=self.decode(visual_ids), visual_ids=visual_ids)


__all__ = ["MultiScaleQuantizer", "VARTokenizer"]
