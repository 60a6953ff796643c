"""ARGenSeg (Wang et al., NeurIPS 2025): a vision-language model that draws masks as visual tokens in its own stream.

A picture in `input_ids` is `<gen_start> v_1 ... v_T`. At the position of v_i (i < T) the model reads the query for
v_{i+1}, built from the scales before it; at the position of v_T it reads `<gen_end>`. Everything below follows.

Shapes: B batch, L stream length, N pictures in the batch, T visual tokens a picture, D codebook width.
"""

from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import TransformersKwargs, can_return_tuple

from .cache_name import CACHE, deprecates_past_key_values
from .configuration_argenseg import ARGenSegConfig
from .from_vlm import FULL_ATTENTION, FromVLMMixin, check_vlm
from .generation_argenseg import ARGenSegGenerationMixin
from .image_grid import ImageGridMixin, deep_features, patchify, plain_positions
from .losses_argenseg import LossMixin, cross_entropy, token_losses
from .released_checkpoint import LoadsReleased, model_arguments
from .var_quantizer import MultiScaleQuantizer


@dataclass
class ARGenSegModelOutputWithPast(BaseModelOutputWithPast):
    """Hidden states of the stream; `image_hidden_states` are the projected image features."""

    image_hidden_states: torch.Tensor | None = None


@dataclass
class ARGenSegCausalLMOutputWithPast(CausalLMOutputWithPast):
    """`loss` = `text_loss` + visual_loss_weight * `visual_loss`; logits (B, L, vocabulary)."""

    image_hidden_states: torch.Tensor | None = None
    text_loss: torch.Tensor | None = None
    visual_loss: torch.Tensor | None = None


class GenerationProjector(nn.Sequential):
    """Codebook features (D) to the language model's width; Linear as released, Linear-GELU-Linear at depth 2."""

    def __init__(self, config: ARGenSegConfig) -> None:
        width = config.text_config.hidden_size
        layers: list[nn.Module] = [nn.Linear(config.visual_tokenizer_config.latent_channels, width)]
        if config.generation_projector_depth == 2:
            layers += [nn.GELU(), nn.Linear(width, width)]
        super().__init__(*layers)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features of any dtype; weights may be of another (that of the active adapter counts, where there is one), or
        packed by a quantizer and no tensors any more."""
        weight = getattr(self[0], "weight", None)
        return super().forward(features.to(weight.dtype) if isinstance(weight, torch.Tensor) else features)


class ARGenSegPreTrainedModel(PreTrainedModel):
    config_class = ARGenSegConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = [CACHE]
    _keep_in_fp32_modules_strict = ["quantizer"]
    _keep_in_fp32_modules = ["generation_projector"]  # in fp16, and when the rest is quantised
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True

    def save_pretrained(self, *args: Any, save_original_format: bool = False, **kwargs: Any) -> None:
        """As usual, but under the names of these classes: transformers would write those of older ones where the
        vision-language model has had other names before, and `Trainer` silently resumes without weights it does not
        know. Options of pictures in the generation configuration are read back."""
        if self.can_generate():  # of one that was made from a model's, transformers reads back only what it knows
            self.generation_config._from_model_config = False
        super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.text_config.initializer_range
        if isinstance(module, ARGenSegModel):
            init.normal_(module.scale_embedding.weight, std=std)
            init.normal_(module.position_embedding.weight, std=std)
        elif isinstance(module, MultiScaleQuantizer):
            init.normal_(module.embedding.weight, std=std)
            init.zeros_(module.ema_vocab_hit_SV)


class ARGenSegModel(ImageGridMixin, ARGenSegPreTrainedModel):
    """The vision-language model, the frozen quantizer and the parts that turn drawn scales into queries."""

    def __init__(self, config: ARGenSegConfig) -> None:
        super().__init__(config)
        config.check()
        config.check_ids()
        width = config.text_config.hidden_size
        pictures = config.visual_tokenizer_config
        self.vlm = AutoModel.from_config(config.vlm_config)
        check_vlm(self.vlm, config.image_grid)
        self.generation_projector = GenerationProjector(config)
        self.scale_embedding = nn.Embedding(len(pictures.patch_nums), width)
        self.position_embedding = nn.Embedding(pictures.num_tokens, width)
        self.quantizer = MultiScaleQuantizer(pictures).requires_grad_(False)
        self.post_init()
        # of layers that are here: CLIP, for one, also names those of its text model, and sharding would look for them
        named = set(getattr(self, "_no_split_modules", None) or ())
        self._no_split_modules = named & {type(one).__name__ for one in self.modules()}
        # rows of the embedding, and of a head tied to it, are read by hand: in tensor parallelism they stay whole
        self._tp_plan.pop("vlm.language_model.embed_tokens", None)

    def train(self, mode: bool = True) -> "ARGenSegModel":
        """As usual; also freezes the quantizer again, because `from_pretrained` replaces its parameters."""
        super().train(mode)
        self.quantizer.requires_grad_(False)
        return self

    @property
    def language_model(self) -> nn.Module:
        return self.vlm.language_model

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return super().get_encoder() if modality is None else self.vlm.get_encoder(modality)

    def get_input_embeddings(self) -> nn.Module:
        return self.vlm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.vlm.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        """Projected image features of the vision-language model, under `pooler_output`."""
        if self.config.image_grid is not None:
            pixel_values, grid = patchify(pixel_values, self.config.vlm_config.vision_config, self.config.image_grid)
            return self.vlm.get_image_features(pixel_values, image_grid_thw=grid, **kwargs)
        return self.vlm.get_image_features(pixel_values, **kwargs)

    def find_pictures(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (N,) and columns (N,) of the `<gen_start>` of every whole picture in a stream (B, L).

        Raises:
            ValueError: visual ids that do not stand T in a row right after `<gen_start>`.
        """
        config, length = self.config, self.config.picture_length
        is_visual = config.is_visual(input_ids)
        begins = (input_ids == config.gen_start_token_id) & F.pad(is_visual[:, 1:], (0, 1))
        rows, columns = begins.nonzero(as_tuple=True)
        count = int(is_visual.sum())
        if count == 0:
            return rows, columns
        inside = columns[:, None] + torch.arange(1, length + 1, device=columns.device)
        in_reach = bool((inside < input_ids.shape[1]).all())
        if count != rows.numel() * length or not in_reach or not bool(is_visual[rows[:, None], inside].all()):
            raise ValueError(
                f"a picture in the stream is <gen_start> (id {config.gen_start_token_id}) followed by exactly {length} "
                f"visual ids; got {count} visual ids after {rows.numel()} <gen_start>. Is a picture cut by "
                "truncation, or a visual id outside a picture? Raise max_length, or drop the broken picture."
            )
        return rows, columns

    def picture_ids(self, input_ids: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Codebook indices (N, T) of the pictures that begin at (rows, columns)."""
        inside = columns[:, None] + torch.arange(1, self.config.picture_length + 1, device=columns.device)
        return input_ids[rows[:, None], inside] - self.config.visual_token_offset

    def embed_queries(self, features: torch.Tensor, first_scale: int, last_scale: int) -> torch.Tensor:
        """Query embeddings of the scales first..last (0-based) from their features (N, tokens of these scales, D)."""
        sizes, device = self.config.scale_sizes, features.device
        # built on the device from Python numbers, so that nothing waits for the GPU
        scales = [torch.full((sizes[k],), k, device=device) for k in range(first_scale, last_scale + 1)]
        start = self.config.scale_starts[first_scale]
        positions = torch.arange(start, start + features.shape[1], device=device)
        projected = self.generation_projector(features)
        added = self.scale_embedding(torch.cat(scales)) + self.position_embedding(positions)
        return projected.to(added.dtype) + added

    def embed_stream(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Input embeddings (B, L, hidden) of a stream: text as usual, queries at v_1..v_{T-1}, `<gen_end>` at v_T."""
        rows, columns = self.find_pictures(input_ids)
        embed = self.get_input_embeddings()
        if rows.numel() == 0:
            return self._with_unused_parts(embed(input_ids))
        config = self.config
        is_visual = config.is_visual(input_ids)
        embeds = embed(input_ids.masked_fill(is_visual, config.gen_end_token_id))
        with torch.no_grad():
            features = self.quantizer.next_scale_inputs(self.picture_ids(input_ids, rows, columns))
        if features.shape[1] == 0:
            return embeds
        queries = self.embed_queries(features, 1, len(config.patch_nums) - 1)
        inside = columns[:, None] + torch.arange(1, config.picture_length, device=columns.device)
        return embeds.index_put((rows[:, None], inside), queries.to(embeds.dtype))

    def _with_unused_parts(self, embeds: torch.Tensor) -> torch.Tensor:
        """The same embeddings. In training by several processes the parts that make queries get a gradient of zero from
        them: sharded training wants one of every parameter on every rank, also where a batch has no picture."""
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not (several and self.training and torch.is_grad_enabled()):
            return embeds
        parts = (self.generation_projector, self.scale_embedding, self.position_embedding)
        if not any(one.requires_grad for part in parts for one in part.parameters()):
            return embeds
        nothing = embeds.new_zeros(1, 1, self.config.visual_tokenizer_config.latent_channels)
        return embeds + (self.embed_queries(nothing, 0, 0) * 0.0).sum().to(embeds.dtype)

    def image_mask(self, embeds: torch.Tensor, input_ids: torch.Tensor | None) -> torch.Tensor:
        """Where the placeholders of images stand (B, L). Without ids they are known by their embedding."""
        placeholder = self.config.image_token_id
        if input_ids is not None:
            return input_ids == placeholder
        looks = self.get_input_embeddings()(torch.tensor(placeholder, device=embeds.device))
        return (embeds == looks).all(-1)

    def insert_image_features(
        self, embeds: torch.Tensor, input_ids: torch.Tensor | None, features: torch.Tensor | list[torch.Tensor]
    ) -> torch.Tensor:
        """Image features in place of the placeholders, in order.

        Raises:
            ValueError: placeholders and features do not match in number.
        """
        features = torch.cat(list(features)) if isinstance(features, (list, tuple)) else features.flatten(0, 1)
        places = self.image_mask(embeds, input_ids)
        if int(places.sum()) != features.shape[0]:
            raise ValueError(
                f"the prompt has {int(places.sum())} image placeholders (id {self.config.image_token_id}), the images "
                f"give {features.shape[0]} features: put one image in the prompt for each image passed"
            )
        return embeds.masked_scatter(places[..., None], features.to(embeds.device, embeds.dtype))

    def scale_block_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, L): a number of its own for the queries of each scale of each picture; -1 where attention is causal."""
        blocks = torch.full_like(input_ids, -1)
        rows, columns = self.find_pictures(input_ids)
        sizes, starts, device = self.config.scale_sizes, self.config.scale_starts, input_ids.device
        for scale in range(1, len(sizes)):
            inside = columns[:, None] + torch.arange(starts[scale], starts[scale] + sizes[scale], device=device)
            numbers = torch.arange(rows.numel(), device=device) * len(sizes) + scale
            blocks[rows[:, None], inside] = numbers[:, None]
        return blocks

    def attention_mask_of(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """The 4-D mask of block attention where the stream holds pictures; else the mask as it came."""
        four_d = attention_mask is not None and attention_mask.ndim == 4
        if self.config.scale_attention == "causal" or four_d or input_ids.shape[1] == 1:
            return attention_mask
        blocks = self.scale_block_ids(input_ids)
        if not bool((blocks >= 0).any()):
            return attention_mask
        if "flash" in self.language_model.config._attn_implementation:
            raise ValueError(
                "flash attention cannot express scale_attention='block' in one pass over a whole picture; load the "
                "model with attn_implementation='sdpa'"
            )
        if cache is not None:  # blocks are counted from the first column of the cache
            blocks = F.pad(blocks, (int(cache.get_seq_length()), 0), value=-1)
        return create_causal_mask(
            self.language_model.config,
            inputs_embeds,
            attention_mask,
            cache,
            # they mark where packed streams begin; the 3-D positions of an image grid would be misread
            position_ids=None if self.config.image_grid else position_ids,
            block_sequence_ids=blocks,
        )

    @deprecates_past_key_values
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> ARGenSegModelOutputWithPast:
        """Hidden states of a stream (B, L), text and pictures alike.

        Pictures are found by their ids: with `inputs_embeds`, or with a 4-D `attention_mask`, attention is as the mask
        says, causal by default, also where `scale_attention` is `"block"`.

        Raises:
            ValueError: a picture in the stream is not whole, or placeholders and images do not match.
        """
        cache = past_key_values if cache is None else cache  # the same thing, by its old and its new name
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if isinstance(attention_mask, dict):  # by kind of layer, as `generate` prepares it for a static cache
            attention_mask = attention_mask[FULL_ATTENTION]
        image = (mm_encoder_outputs or {}).get("image")
        if image is None and pixel_values is not None:
            image = self.get_image_features(pixel_values, return_dict=True)
        embeds = self.embed_stream(input_ids) if inputs_embeds is None else inputs_embeds
        if self.config.image_grid is not None:
            places = None if input_ids is None and image is None else self.image_mask(embeds, input_ids)
            position_ids = self.rotary_positions(places, attention_mask, cache, position_ids)
            kwargs |= {} if image is None else deep_features(image, places)
        elif position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = plain_positions(attention_mask)[:, -embeds.shape[1] :]
        if image is not None:
            embeds = self.insert_image_features(embeds, input_ids, image.pooler_output)
        if input_ids is not None:
            attention_mask = self.attention_mask_of(input_ids, embeds, attention_mask, cache, position_ids)
        outputs = self.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
            **kwargs,
        )
        return ARGenSegModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=None if image is None else image.pooler_output,
        )


class ARGenSegForConditionalGeneration(
    LoadsReleased, FromVLMMixin, LossMixin, ARGenSegPreTrainedModel, ARGenSegGenerationMixin
):
    """ARGenSeg with the language model's own head: one softmax over text and visual ids."""

    _keep_in_fp32_modules = ["model.generation_projector"]  # quantisers match from the start of a name
    _tied_weights_keys = {"lm_head.weight": "model.vlm.language_model.embed_tokens.weight"}
    # the loss is a sum of two means; Trainer must not normalise it by the number of text labels
    accepts_loss_kwargs = False
    _released_arguments = staticmethod(model_arguments)

    def __init__(self, config: ARGenSegConfig) -> None:
        super().__init__(config)
        self.model = ARGenSegModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        """Projected image features; pass them on as `mm_encoder_outputs={"image": ...}` to use them again."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def visual_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) over the codebook alone; a plain head multiplies only its visual rows."""
        visual = self.config.visual_slice
        # an adapter around the head must see all of it, and a head that is kept elsewhere is brought by its own call
        if type(self.lm_head) is nn.Linear and self.lm_head.weight.device == hidden_states.device:
            return F.linear(hidden_states, self.lm_head.weight[visual])
        return self.lm_head(hidden_states)[..., visual]

    @deprecates_past_key_values
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        skip_logits: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> ARGenSegCausalLMOutputWithPast:
        """Teacher forcing needs nothing beside the ids: pictures in the stream become queries here.

        Args:
            input_ids: stream (B, L); a picture is `<gen_start>` and T visual ids.
            pixel_values: images as the processor makes them, one for each image in the prompts, in order.
            labels: stream (B, L) with -100 where nothing is to be learned; shifted here.
            logits_to_keep: as in transformers. With labels, all positions or a bool mask (B, L): the head then runs
                at the marked positions only, logits are (N, vocabulary), and the loss is over those.
            skip_logits: with labels, make the loss without ever holding all logits, and return none. Default: in
                training. The loss is the same, the memory a fraction where the vocabulary is large.
            kwargs: among them `shift_labels`, labels that are shifted already (as trainers for sharded sequences make
                them); used in place of `labels`. Not named above: `Trainer` would wait for both.

        Raises:
            ValueError: a picture in the stream is not whole, placeholders and images do not match, or there are labels
                of visual tokens but no `input_ids`.
        """
        targets = kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        masked = isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.ndim == 2
        logits = loss = text_loss = visual_loss = None
        if targets is None and labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=-100)
        if targets is None:
            logits = self.lm_head(slice_logits_to_keep(hidden, logits_to_keep))
        else:
            if not masked and (isinstance(logits_to_keep, torch.Tensor) or logits_to_keep):
                raise ValueError(
                    "with labels, logits_to_keep is a bool mask (B, L) of the positions to keep, or 0 for all"
                )
            keep = logits_to_keep if masked else torch.ones_like(targets, dtype=torch.bool)
            if self.training if skip_logits is None else skip_logits:
                keep = keep & (targets != -100)
                losses = token_losses(self.lm_head, hidden[keep], targets[keep], self.config.text_config.vocab_size)
            else:
                logits = self.lm_head(slice_logits_to_keep(hidden, logits_to_keep))
                losses = cross_entropy(logits.flatten(0, -2), targets[keep])
            text_loss, visual_loss = self.split_loss(losses, targets[keep], input_ids, keep)
            loss = text_loss + self.config.visual_loss_weight * visual_loss
        return ARGenSegCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            text_loss=text_loss,
            visual_loss=visual_loss,
        )


__all__ = ["ARGenSegForConditionalGeneration", "ARGenSegModel", "ARGenSegPreTrainedModel"]
