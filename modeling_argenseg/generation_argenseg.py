"""Generation for ARGenSeg: text steps and scale steps in one loop, behind the `_sample` hook of `generate`.

Rows of a batch that emit `<gen_start>` wait until no row is writing text any more; then all pending pictures are
drawn together, one forward pass for each scale, and the rows go on with text. While they wait, rows are fed padding
that nobody attends to, so the key-value cache may hold gaps; the returned `sequences` do not.

The answer that the checkpoint was trained to give around a picture (`picture_answer_ids`) is read together with the
prompt instead of token by token, and kept as far as the model would have written it itself: one prefill tells whether
it draws. The same holds for what follows the picture.

Shapes: B rows asked for, R rows run (2 B under guidance: conditional rows, then unconditional), V codebook entries,
n tokens of the answer before its picture, m after it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationMixin,
    MaxLengthCriteria,
)
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS, GenerationMode

from .cache_name import CACHE
from .generation_drawing import DrawingMixin
from .generation_prefill import PrefillMixin
from .generation_rows import Rows
from .picture_streamer import PictureStream
from .shared_prefix import EncodedImage
from .static_steps import records, rounded_up, with_room

PICTURE_DEFAULTS: dict[str, Any] = {
    "picture_guidance_scale": 0.0,
    "picture_do_sample": False,
    "picture_temperature": 1.0,
    "picture_top_k": None,
    "picture_top_p": None,
    "picture_logit_adjustment": 0.0,
    "picture_answer_ids": None,
    "picture_prefill": "auto",
    "picture_stop_at_scale": None,
}
PREFILL = ("auto", "always", "never")
COUNT_COLUMNS = ("exponential_decay_length_penalty", "forced_eos_token_id")  # of transformers, by the stream's length


@dataclass
class ARGenSegGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate(return_dict_in_generate=True)` gives.

    Attributes:
        sequences: whole streams (B, L), visual ids included, right-padded.
        picture_scores: for each row, the score in [0, 1] of each picture drawn, in order: the geometric mean of the
            probabilities of its tokens, first over the tokens of each scale, then over the scales.
        picture_token_logprobs: for each row, the log-probabilities (T,) of the tokens of each picture drawn.
        past_key_values: as usual, of the columns of `sequences`; None for a static cache that waiting rows or words
            that were not written left gaps in.
    """

    picture_scores: list[list[float]] | None = None
    picture_token_logprobs: list[list[torch.Tensor]] | None = None


class ARGenSegGenerationMixin(PrefillMixin, DrawingMixin, GenerationMixin):
    """`generate` that draws. Beside the usual options:

    Args:
        encoded_image (`EncodedImage`, *optional*): what `encode_image` returned, if all prompts are about that image;
            `pixel_values` are not needed then.
        picture_prefix (`torch.LongTensor`, *optional*): codebook indices (B, t) of the first whole scales of each row's
            first picture, as `processor.encode_masks(masks)[:, :t]` makes them. The model takes them as if it had drawn
            them, also in its score, and goes on from a coarse picture. They take no passes of their own: they are read
            with the queries of the first scale that is drawn.
        picture_guidance_scale (`float`, defaults to 0): classifier-free guidance g of pictures, as released: at
            scale s of K (0-based) the logits are (1 + t) conditional - t unconditional with t = g s / (K - 1).
            Needs `negative_input_ids` (and `negative_attention_mask`), the unconditional prompts (B, L').
        picture_do_sample (`bool`, defaults to False): sample visual tokens instead of taking the most likely.
        picture_temperature, picture_top_k, picture_top_p: shape that sampling.
        picture_logit_adjustment (`float`, defaults to 0): logit adjustment (Menon et al. 2021). Subtracts this times
            the log-frequency that each code had at its scale when the VAR tokenizer was trained. Most cells of a mask
            are empty, so a model that is unsure where a thing is draws nothing; this makes it draw its best guess.
        picture_answer_ids (`list[int]`): the answer that comes with a picture, `<gen_start>` in the picture's place
            and the end-of-text token included (`processor.picture_answer_ids`).
        picture_prefill (`str`, defaults to `"auto"`): `"auto"` reads the answer's words with the prompt and keeps those
            that the model would have written, so that the result is the same in fewer passes (greedy text only; other
            ways of choosing text go token by token). `"always"` takes the words as said: every row draws. `"never"`
            writes token by token.
        picture_stop_at_scale (`int`): a preview. The answer ends after this many scales of its first picture.
    `max_new_tokens` and `min_new_tokens` count text; the tokens of pictures do not use them up.
    `cache_implementation="static"` works.
    """

    _supported_generation_modes = [GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE]

    @torch.no_grad()
    def encode_image(self, input_ids: torch.Tensor, **inputs: Any) -> EncodedImage:
        """Reads one prompt up to the last token of its image, for any number of prompts on that image.

            encoded = model.encode_image(**inputs)  # of any prompt on the image
            model.generate(**prompts, encoded_image=encoded)

        Args:
            input_ids: one prompt (1, L), as the processor makes it, with `pixel_values` or `mm_encoder_outputs`.

        Raises:
            ValueError: there is more than one prompt, or no image in it.
        """
        if input_ids.shape[0] != 1:
            raise ValueError(f"encode_image takes the inputs of one prompt, got {input_ids.shape[0]}")
        mask = inputs.pop("attention_mask", None)
        ids = input_ids[0] if mask is None else input_ids[0, mask[0].bool()]
        places = (ids == self.config.image_token_id).nonzero()
        if not len(places):
            raise ValueError(f"the prompt holds no image (placeholder id {self.config.image_token_id})")
        ids = ids[: int(places[-1]) + 1]
        outputs = self.model(input_ids=ids[None], use_cache=True, return_dict=True, **inputs)
        return EncodedImage.from_cache(ids, outputs[CACHE], inputs.get("pixel_values"))

    def compute_transition_scores(
        self, sequences: torch.Tensor, scores: tuple[torch.Tensor, ...], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """As usual, of answers in words.

        Raises:
            ValueError: there are pictures among the last `len(scores)` tokens; scores are of text alone.
        """
        if bool(self.config.is_visual(sequences[:, -len(scores) :]).any()):
            raise ValueError(
                "scores are of text, and these sequences hold pictures: the log-probabilities of their tokens are in "
                "picture_token_logprobs of what generate returned"
            )
        return super().compute_transition_scores(sequences, scores, *args, **kwargs)

    def stream(self, **inputs: Any) -> PictureStream:
        """`generate` that shows its pictures while they are drawn.

            for partial in model.stream(**inputs):
                masks, _ = processor.decode_masks(partial.codes)

        Args:
            inputs: as for `generate`; a `streamer` gets the text.

        Returns:
            an iterable of `PartialPicture`, one a scale, which has `generate`'s result in `.outputs` afterwards.
        """
        return PictureStream(self.generate, inputs, self.device.type)

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict]:
        given = {name: kwargs.pop(name) for name in PICTURE_DEFAULTS if name in kwargs}
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        for name, default in PICTURE_DEFAULTS.items():
            setattr(generation_config, name, given.get(name, getattr(generation_config, name, default)))
        if generation_config.picture_answer_ids is not None:
            ids = torch.as_tensor(generation_config.picture_answer_ids, device="cpu")
            generation_config.picture_answer_ids = ids.flatten().tolist()
        if model_kwargs.get("inputs_embeds") is not None:
            raise ValueError("generate takes no inputs_embeds; pass input_ids: pictures are found by their ids")
        if model_kwargs.get("encoded_image") is not None:
            model_kwargs["encoded_image"].check_images(model_kwargs.pop("pixel_values", None))
        return generation_config, model_kwargs

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """As usual; a static cache also has room for a picture for each row. It grows if more are drawn."""
        if generation_config.cache_implementation in ALL_STATIC_CACHE_IMPLEMENTATIONS:
            draft = len(generation_config.picture_answer_ids or [])
            negative = model_kwargs.get("negative_input_ids")
            longer = 0 if negative is None else negative.shape[1]
            max_cache_length = rounded_up(max_cache_length + longer + draft + self.config.picture_length)
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        negative_input_ids: torch.Tensor | None = None,
        negative_attention_mask: torch.Tensor | None = None,
        encoded_image: EncodedImage | None = None,
        picture_prefix: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        # `_sample` takes the four out before any step; named here so that `generate` accepts them
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        mask, cache, ids = kwargs.get("attention_mask"), inputs.get(CACHE), inputs.get("input_ids")
        if ids is not None and cache is not None and cache.is_compileable and self.config.scale_attention == "block":
            # for a static cache the mask is made here, and transformers' own knows of no pictures in the history
            embeds = torch.empty(*ids.shape, 0, dtype=self.dtype, device=ids.device)
            blocks = self.model.attention_mask_of(ids, embeds, mask, cache, inputs.get("position_ids"))
            inputs["attention_mask"] = inputs.get("attention_mask") if blocks is mask else blocks
        return inputs

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> ARGenSegGenerateOutput | torch.Tensor:
        self._check_options(generation_config, synced_gpus)
        self._check_image(input_ids, model_kwargs)
        cut = self.config.image_grid is not None or bool(self.config.is_visual(input_ids).any())
        if generation_config.prefill_chunk_size is not None and cut:
            raise ValueError("prefill_chunk_size would cut the pictures of the prompt, or the grid of an image")
        criteria = StoppingCriteriaList(c for c in stopping_criteria if not isinstance(c, MaxLengthCriteria))
        rows = self._rows(input_ids, generation_config, model_kwargs)
        draft = self._draft(rows, generation_config, logits_processor, criteria)
        logits = self._begin(rows, draft, generation_config, streamer)
        forward = self
        if self._compiles(rows, generation_config) and not records(generation_config.compile_config):
            forward = self.get_compiled_call(generation_config.compile_config)
        while True:
            if bool(rows.running.any()):
                tokens = self._choose_text(rows, logits, logits_processor, generation_config)
                logits = self._advance(rows, tokens, criteria, streamer, forward)
            elif bool(rows.waiting.any()):
                logits = self._picture(rows, generation_config, criteria, streamer)
            else:
                break
        if streamer is not None:
            streamer.end()
        return self._finish(rows, generation_config)

    # ------------------------------------------------------------------ text

    def _choose_text(
        self, rows: Rows, logits: torch.Tensor, processors: LogitsProcessorList, generation_config: GenerationConfig
    ) -> torch.Tensor:
        """Next text tokens (B,)."""
        logits = logits[: rows.running.shape[0]]
        # masked before the processors, so that top-k and top-p choose among text
        scores = processors(rows.streams, self._text_scores(logits))
        eos, length = generation_config._eos_token_tensor, rows.prompt_length - rows.padding
        if eos is not None and (generation_config.min_length or 0) > length:
            # what transformers' own processor counts are columns: text, pictures, and those that a row waited through
            written = generation_config.max_length - length - rows.budget
            is_short = written < generation_config.min_length - length
            scores[:, eos] = scores[:, eos].masked_fill(is_short[:, None], -torch.inf)
        if generation_config.return_dict_in_generate and generation_config.output_scores:
            rows.scores.append(scores)
        if generation_config.return_dict_in_generate and generation_config.output_logits:
            rows.logits.append(logits)
        if generation_config.do_sample:
            return torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]
        return scores.argmax(-1)

    def _advance(
        self, rows: Rows, tokens: torch.Tensor, criteria: StoppingCriteriaList, streamer: Any, forward: Any
    ) -> torch.Tensor | None:
        """Appends one column of text and runs it; afterwards rows run on, wait with their picture, or are done."""
        wrote = rows.running
        tokens = tokens.masked_fill(~wrote, rows.pad_id)
        used = rows.mask.shape[1]
        rows.append(rows.for_all(tokens)[:, None], wrote)
        rows.budget -= wrote.long()
        if streamer is not None:
            streamer.put(tokens.cpu())
        begins = wrote & (tokens == self.config.gen_start_token_id)
        done = criteria(rows.streams, None) | (rows.budget <= 0)
        rows.waiting = rows.waiting | begins
        rows.running = wrote & ~begins & ~done
        if not bool((rows.running | rows.waiting).any()):
            return None  # nobody will read this column
        cache = with_room(rows.model_kwargs[CACHE], self.model.language_model.config, used, used + 1)
        rows.model_kwargs |= {
            "attention_mask": rows.mask,
            "position_ids": self.model.text_positions(rows.ids, rows.mask),
            CACHE: cache,
            "use_cache": True,
        }
        inputs = self.prepare_inputs_for_generation(rows.ids, next_sequence_length=1, **rows.model_kwargs)
        # a step of text holds no picture to be found, which a GPU would be waited for and a graph broken by
        inputs["inputs_embeds"] = self.get_input_embeddings()(inputs.pop("input_ids"))
        logits = forward(**inputs, return_dict=True).logits[:, -1].float()
        rows.first_logits = torch.where(
            rows.for_all(begins)[:, None], logits[..., self.config.visual_slice], rows.first_logits
        )
        return logits

    # ------------------------------------------------------------------ pictures, and the end

    def _picture(
        self, rows: Rows, generation_config: GenerationConfig, criteria: StoppingCriteriaList, streamer: Any
    ) -> torch.Tensor | None:
        """Draws what is waiting. Returns the logits (R, vocabulary) of the text that follows; None after a preview."""
        logits, drew, after = self._draw(rows, generation_config, streamer), rows.waiting, rows.draft_after
        rows.waiting = torch.zeros_like(drew)
        if logits.shape[1] == 0:
            rows.running = rows.waiting
            return None
        rows.ids = torch.cat([rows.ids, after.expand(rows.ids.shape[0], -1)], dim=1)
        _, logits = self._accept(rows, after, logits, drew, streamer=streamer)
        rows.running = drew & (rows.budget > 0)
        if not after.numel():  # words that were expected are there with the end of text as the only criterion
            rows.running = rows.running & ~criteria(rows.streams, None)
        return logits

    def _finish(self, rows: Rows, generation_config: GenerationConfig) -> ARGenSegGenerateOutput | torch.Tensor:
        sequences = rows.answers()
        if not generation_config.return_dict_in_generate:
            return sequences
        return ARGenSegGenerateOutput(
            sequences=sequences,
            scores=tuple(rows.scores) or None,
            logits=tuple(rows.logits) or None,
            picture_scores=[[self._picture_score(one) for one in row] for row in rows.logprobs],
            picture_token_logprobs=rows.logprobs,
            **{CACHE: rows.compact_cache(rows.model_kwargs[CACHE])},
        )

    def _check_image(self, input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> None:
        image = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
        if any(given is not None for given in (image, *map(model_kwargs.get, ("pixel_values", "encoded_image")))):
            return
        cache = model_kwargs.get(CACHE)
        if (cache is None or not cache.get_seq_length()) and bool((input_ids == self.config.image_token_id).any()):
            raise ValueError(
                "the prompt holds an image, and none came: pass pixel_values (all that the processor returned, "
                "**inputs), encoded_image, or the cache of a generation that has read it"
            )

    def _check_options(self, generation_config: GenerationConfig, synced_gpus: bool) -> None:
        counting = [name for name in COUNT_COLUMNS if getattr(generation_config, name, None) is not None]
        if counting:
            raise ValueError(f"{' and '.join(counting)} would count the tokens of pictures, too: leave out")
        if generation_config.guidance_scale not in (None, 1):
            raise ValueError(
                "guidance_scale is for text, which is not guided here; for what is drawn give picture_guidance_scale"
            )
        if generation_config.use_cache is False:
            raise ValueError("drawing needs the key-value cache: leave use_cache=True")
        if synced_gpus:
            raise ValueError(
                "synced_gpus (sharded weights: ZeRO stage 3, FSDP) is not supported: rows draw at different steps on "
                "each rank. Where every rank asks for the same rows, pass synced_gpus=False"
            )
        if generation_config.output_attentions or generation_config.output_hidden_states:
            raise ValueError(
                "generate does not collect attentions or hidden states; run a forward pass over the returned sequences"
            )
        stop, scales = generation_config.picture_stop_at_scale, len(self.config.patch_nums)
        if stop is not None and not (isinstance(stop, int) and 1 <= stop <= scales):
            raise ValueError(f"picture_stop_at_scale must be from 1 to {scales}, the model's scales; got {stop!r}")
        prefill, ids = generation_config.picture_prefill, generation_config.picture_answer_ids
        if prefill not in PREFILL:
            raise ValueError(f"picture_prefill must be one of {PREFILL}, got {prefill!r}")
        if prefill == "always" and (not ids or generation_config.prefill_chunk_size is not None):
            raise ValueError(
                "picture_prefill='always' needs picture_answer_ids=processor.picture_answer_ids, and no "
                "prefill_chunk_size"
            )
        if ids and list(ids).count(self.config.gen_start_token_id) != 1:
            raise ValueError(f"picture_answer_ids must hold <gen_start> ({self.config.gen_start_token_id}) once: {ids}")


__all__ = ["ARGenSegGenerateOutput", "ARGenSegGenerationMixin"]
