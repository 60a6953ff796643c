"""ARGenSeg (Wang et al., NeurIPS 2025): a vision-language model that draws masks as visual tokens in its own stream.

A picture in `input_ids` is `<gen_start> v_1 ... v_T`. At the position of v_i (i < T) the model reads the query for
v_{i+1}, built from the scales before it; at the position of v_T it reads `<gen_end>`. Everything below follows.

Shapes: B batch, L stream length, N pictures in the batch, T visual tokens a picture, D codebook width.
"""

import copy
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, GenerationConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import ModelOutput

from .configuration_argenseg import ARGenSegConfig
from .generation_argenseg import ARGenSegGenerationMixin
from .released_checkpoint import LoadsReleased, model_arguments
from .var_tokenizer import MultiScaleQuantizer, VARTokenizer


@dataclass
class ARGenSegModelOutputWithPast(ModelOutput):
    """Hidden states of the stream; `image_hidden_states` are the projected image features."""

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None


@dataclass
class ARGenSegCausalLMOutputWithPast(ModelOutput):
    """`loss` = `text_loss` + visual_loss_weight * `visual_loss`; logits (B, L, vocabulary)."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
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


class ARGenSegPreTrainedModel(PreTrainedModel):
    config_class = ARGenSegConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = "past_key_values"
    _keep_in_fp32_modules_strict = ["quantizer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True

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


class ARGenSegModel(ARGenSegPreTrainedModel):
    """The vision-language model, the frozen quantizer and the parts that turn drawn scales into queries."""

    def __init__(self, config: ARGenSegConfig) -> None:
        super().__init__(config)
        width = config.text_config.hidden_size
        pictures = config.visual_tokenizer_config
        self.vlm = AutoModel.from_config(config.vlm_config)
        self.generation_projector = GenerationProjector(config)
        self.scale_embedding = nn.Embedding(len(pictures.patch_nums), width)
        self.position_embedding = nn.Embedding(pictures.num_tokens, width)
        self.quantizer = MultiScaleQuantizer(pictures).requires_grad_(False)
        self.post_init()

    def train(self, mode: bool = True) -> "ARGenSegModel":
        """As usual; also freezes the quantizer again, because `from_pretrained` replaces its parameters."""
        super().train(mode)
        self.quantizer.requires_grad_(False)
        return self

    @property
    def language_model(self) -> nn.Module:
        return self.vlm.language_model

    def get_input_embeddings(self) -> nn.Module:
        return self.vlm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.vlm.set_input_embeddings(value)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        """Projected image features of the vision-language model, under `pooler_output`."""
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
        patch_nums = self.config.patch_nums
        sizes = torch.tensor([side * side for side in patch_nums], device=features.device)
        scales = torch.arange(first_scale, last_scale + 1, device=features.device)
        scales = scales.repeat_interleave(sizes[first_scale : last_scale + 1])
        start = int(sizes[:first_scale].sum())
        positions = torch.arange(start, start + features.shape[1], device=features.device)
        projector = self.generation_projector
        projected = projector(features.to(projector[0].weight.dtype))
        return projected + self.scale_embedding(scales) + self.position_embedding(positions)

    def embed_stream(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Input embeddings (B, L, hidden) of a stream: text as usual, queries at v_1..v_{T-1}, `<gen_end>` at v_T."""
        rows, columns = self.find_pictures(input_ids)
        embed = self.get_input_embeddings()
        if rows.numel() == 0:
            return embed(input_ids)
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

    def insert_image_features(
        self, embeds: torch.Tensor, input_ids: torch.Tensor, features: torch.Tensor | list[torch.Tensor]
    ) -> torch.Tensor:
        """Image features in place of the placeholders, in order.

        Raises:
            ValueError: placeholders and features do not match in number.
        """
        features = torch.cat(list(features)) if isinstance(features, (list, tuple)) else features.flatten(0, 1)
        places = input_ids == self.config.image_token_id
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
        sides = self.config.patch_nums
        start, device = 1, input_ids.device
        for scale, side in enumerate(sides[1:], start=1):
            inside = columns[:, None] + torch.arange(start, start + side * side, device=device)
            numbers = torch.arange(rows.numel(), device=device) * len(sides) + scale
            blocks[rows[:, None], inside] = numbers[:, None]
            start += side * side
        return blocks

    def attention_mask_of(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
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
        if past_key_values is not None:  # blocks are counted from the first column of the cache
            blocks = F.pad(blocks, (past_key_values.get_seq_length(), 0), value=-1)
        return create_causal_mask(
            self.language_model.config,
            inputs_embeds,
            attention_mask,
            past_key_values,
            position_ids=position_ids,  # tell packed streams apart
            block_sequence_ids=blocks,
        )

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> ARGenSegModelOutputWithPast:
        """Hidden states of a stream (B, L), text and pictures alike.

        Raises:
            ValueError: a picture in the stream is not whole, or placeholders and images do not match.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        kwargs.pop("return_dict", None)
        image = (mm_encoder_outputs or {}).get("image")
        if image is None and pixel_values is not None:
            image = self.get_image_features(pixel_values, return_dict=True)
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        if inputs_embeds is None:
            inputs_embeds = self.embed_stream(input_ids)
            if image is not None:
                inputs_embeds = self.insert_image_features(inputs_embeds, input_ids, image.pooler_output)
            attention_mask = self.attention_mask_of(
                input_ids, inputs_embeds, attention_mask, past_key_values, position_ids
            )
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        return ARGenSegModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=None if image is None else image.pooler_output,
        )


class ARGenSegForConditionalGeneration(LoadsReleased, ARGenSegPreTrainedModel, ARGenSegGenerationMixin):
    """ARGenSeg with the language model's own head: one softmax over text and visual ids."""

    _tied_weights_keys = {"lm_head.weight": "model.vlm.language_model.embed_tokens.weight"}
    # the loss is a sum of two means; Trainer must not normalise it by the number of text labels
    accepts_loss_kwargs = False
    _released_arguments = staticmethod(model_arguments)

    def __init__(self, config: ARGenSegConfig) -> None:
        super().__init__(config)
        self.model = ARGenSegModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_vlm(
        cls,
        vlm: "str | os.PathLike | PreTrainedModel | Any",
        visual_tokenizer: "str | os.PathLike | VARTokenizer",
        first_new_token_id: int | None = None,
        **config_changes: Any,
    ) -> "ARGenSegForConditionalGeneration":
        """Start from a plain vision-language model: adds the picture vocabulary and the parts that draw.

        The ids `<gen_start>`, `<gen_end>` and the codebook follow `first_new_token_id` in this order. New rows of
        the embedding and the head start as the mean of the old ones, projector and embeddings of the queries at
        zero (as released).

        Args:
            vlm: path or Hub name of an image-text-to-text model, its configuration (random weights), or the model.
            visual_tokenizer: path or Hub name of a VAR tokenizer, or the tokenizer itself.
            first_new_token_id: id of `<gen_start>`; default: the size of the vocabulary as it is.
            config_changes: further fields of `ARGenSegConfig`, such as `scale_attention="block"`.
        """
        base, head, generation_config = _load_vlm(vlm)
        if not isinstance(visual_tokenizer, PreTrainedModel):
            visual_tokenizer = AutoModel.from_pretrained(visual_tokenizer)
        old_size = base.get_input_embeddings().weight.shape[0]
        first = old_size if first_new_token_id is None else first_new_token_id
        new_size = max(old_size, first + 2 + visual_tokenizer.config.vocab_size)
        config = ARGenSegConfig(
            vlm_config=copy.deepcopy(base.config),  # the vocabulary grows below, but not that of the caller's model
            visual_tokenizer_config=copy.deepcopy(visual_tokenizer.config),
            gen_start_token_id=first,
            gen_end_token_id=first + 1,
            visual_token_offset=first + 2,
            tie_word_embeddings=base.config.tie_word_embeddings if head is None else False,
            **config_changes,
        )
        config.text_config.vocab_size = new_size
        model = cls(config).to(base.dtype)
        model.model.quantizer.float()
        if generation_config is not None:
            model.generation_config = copy.deepcopy(generation_config)
        model._take_over(base, head, visual_tokenizer, first)
        return model

    @torch.no_grad()
    def _take_over(
        self, base: PreTrainedModel, head: torch.Tensor | None, visual_tokenizer: PreTrainedModel, first: int
    ) -> None:
        state = base.state_dict()
        embedding_key = next(
            k
            for k in state
            if state[k] is base.get_input_embeddings().weight
            or state[k].data_ptr() == base.get_input_embeddings().weight.data_ptr()
        )
        state[embedding_key] = _with_mean_rows(state[embedding_key], first, self.lm_head.out_features)
        self.model.vlm.load_state_dict(state)
        if head is not None:
            self.lm_head.weight.copy_(_with_mean_rows(head, first, self.lm_head.out_features))
        self.tie_weights()
        for module in (self.model.generation_projector, self.model.scale_embedding, self.model.position_embedding):
            for parameter in module.parameters():
                parameter.zero_()
        self.set_visual_tokenizer(visual_tokenizer)

    def set_visual_tokenizer(self, visual_tokenizer: PreTrainedModel) -> None:
        """Copies the codebook and the phi convolutions of a VAR tokenizer into the frozen quantizer."""
        self.model.quantizer.load_state_dict(visual_tokenizer.quantize.state_dict())

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        """Projected image features; pass them on as `mm_encoder_outputs={"image": ...}` to use them again."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def visual_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) over the codebook alone; a plain head multiplies only its visual rows."""
        first, count = self.config.visual_token_offset, self.config.visual_vocab_size
        if type(self.lm_head) is nn.Linear:  # an adapter around the head must see all of it
            return F.linear(hidden_states, self.lm_head.weight[first : first + count])
        return self.lm_head(hidden_states)[..., first : first + count]

    def scale_of_tokens(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, L): the scale (0-based) of every visual id of the stream, -1 for text."""
        order = torch.arange(self.config.picture_length, device=input_ids.device)
        starts = torch.tensor(self.config.visual_tokenizer_config.scale_starts, device=input_ids.device)
        scales = torch.full_like(input_ids, -1)
        rows, columns = self.model.find_pictures(input_ids)
        scales[rows[:, None], columns[:, None] + 1 + order] = torch.bucketize(order, starts, right=True) - 1
        return scales

    def split_loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        input_ids: torch.Tensor | None,
        keep: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross-entropy of text labels and of visual labels, each over the whole vocabulary (as released).

        Either is zero where the batch has no such label. With `visual_loss="scale"` the visual mean is over the tokens
        of each scale, then over the scales.

        Args:
            logits: (B, L, vocabulary), or (N, vocabulary) at the N positions that `keep` (B, L) marks.
        """
        keep = torch.ones_like(labels, dtype=torch.bool) if keep is None else keep
        targets = F.pad(labels[:, 1:], (0, 1), value=-100)[keep]
        losses = F.cross_entropy(logits.float().flatten(0, -2), targets, ignore_index=-100, reduction="none")
        is_visual = self.config.is_visual(targets)
        is_text = (targets != -100) & ~is_visual
        zero = losses.sum() * 0.0
        text_loss = losses[is_text].mean() if bool(is_text.any()) else zero
        if not bool(is_visual.any()):
            return text_loss, zero
        if self.config.visual_loss == "token":
            return text_loss, losses[is_visual].mean()
        scales = F.pad(self.scale_of_tokens(input_ids)[:, 1:], (0, 1), value=-1)[keep]
        drawn = [is_visual & (scales == scale) for scale in range(len(self.config.patch_nums))]
        means = [losses[where].mean() for where in drawn if bool(where.any())]
        return text_loss, torch.stack(means).mean()

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
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ARGenSegCausalLMOutputWithPast | tuple:
        """Teacher forcing needs nothing beside the ids: pictures in the stream become queries here.

        Args:
            input_ids: stream (B, L); a picture is `<gen_start>` and T visual ids.
            pixel_values: images as the processor makes them, one for each image in the prompts, in order.
            labels: stream (B, L) with -100 where nothing is to be learned; shifted here.
            logits_to_keep: as in transformers. With labels, all positions or a bool mask (B, L): the head then runs
                at the marked positions only, logits are (N, vocabulary), and the loss is over those.

        Raises:
            ValueError: a picture in the stream is not whole, or placeholders and images do not match.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = text_loss = visual_loss = None
        if labels is not None:
            keep = logits_to_keep if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.ndim == 2 else None
            text_loss, visual_loss = self.split_loss(logits, labels, input_ids, keep)
            loss = text_loss + self.config.visual_loss_weight * visual_loss
        result = ARGenSegCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            text_loss=text_loss,
            visual_loss=visual_loss,
        )
        return result.to_tuple() if return_dict is False else result


def _load_vlm(vlm: Any) -> tuple[PreTrainedModel, torch.Tensor | None, GenerationConfig | None]:
    """The base model, the weight of its head (None: no head of its own) and how it generates."""
    from transformers import AutoModelForImageTextToText, PreTrainedConfig

    if isinstance(vlm, (str, os.PathLike)):
        vlm = AutoModelForImageTextToText.from_pretrained(vlm)
    elif isinstance(vlm, PreTrainedConfig):
        vlm = AutoModelForImageTextToText.from_config(vlm)
    base = vlm.base_model
    head = vlm.get_output_embeddings()
    tied = head is not None and head.weight is base.get_input_embeddings().weight
    return base, None if head is None or tied else head.weight, vlm.generation_config


def _with_mean_rows(old: torch.Tensor, first: int, size: int) -> torch.Tensor:
    """`old` (V, hidden) grown to `size` rows; the rows from `first` on are the mean of those before it."""
    new = old.new_empty(size, old.shape[1])
    new[: old.shape[0]] = old[:size]
    new[first:] = old[:first].float().mean(0).to(old.dtype)
    return new


__all__ = ["ARGenSegForConditionalGeneration", "ARGenSegModel", "ARGenSegPreTrainedModel"]
