"""Generation for ARGenSeg: text steps and scale steps in one loop, behind the `_sample` hook of `generate`.

Rows of a batch that emit `<gen_start>` wait until no row is writing text any more; then all pending pictures are
drawn together, one forward pass for each scale, and the rows go on with text. While they wait, rows are fed padding
that nobody attends to, so the key-value cache may hold gaps; the returned `sequences` do not.

Shapes: B rows asked for, R rows run (2 B under guidance: conditional rows, then unconditional), V codebook entries.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationMixin,
    MaxLengthCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.masking_utils import create_bidirectional_mask

PICTURE_DEFAULTS: dict[str, Any] = {
    "picture_guidance_scale": 0.0,
    "picture_do_sample": False,
    "picture_temperature": 1.0,
    "picture_top_k": None,
    "picture_top_p": None,
    "picture_logit_adjustment": 0.0,
}


@dataclass
class ARGenSegGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate(return_dict_in_generate=True)` gives.

    Attributes:
        sequences: whole streams (B, L), visual ids included, right-padded.
        picture_scores: for each row, the score in [0, 1] of each picture drawn, in order: the geometric mean of the
            probabilities of its tokens, first over the tokens of each scale, then over the scales.
        picture_token_logprobs: for each row, the log-probabilities (T,) of the tokens of each picture drawn.
    """

    picture_scores: list[list[float]] | None = None
    picture_token_logprobs: list[list[torch.Tensor]] | None = None


@dataclass
class _Rows:
    """State of the loop: columns of the stream as the cache holds them, and what each row is doing."""

    ids: torch.Tensor  # (R, columns)
    mask: torch.Tensor  # (R, columns), 0 where nobody attends
    prompt_length: int
    padding: int  # columns that longer unconditional prompts put before the prompts
    budget: torch.Tensor  # (B,) text tokens left
    running: torch.Tensor  # (B,) writes text
    waiting: torch.Tensor  # (B,) has emitted <gen_start>
    first_logits: torch.Tensor  # (R, V) logits of v_1 of the waiting rows
    model_kwargs: dict[str, Any]
    logprobs: list[list[torch.Tensor]] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)

    @property
    def copies(self) -> int:
        """2 under guidance, else 1."""
        return self.ids.shape[0] // self.running.shape[0]

    @property
    def streams(self) -> torch.Tensor:
        """The rows asked for (B, columns) as the caller knows them, gaps included."""
        return self.ids[: self.running.shape[0], self.padding :]

    def for_all(self, per_row: torch.Tensor) -> torch.Tensor:
        """A value per row asked for (B, ...) to one per row run (R, ...)."""
        return torch.cat([per_row] * self.copies)

    def append(self, ids: torch.Tensor, active: torch.Tensor) -> None:
        """New columns `ids` (R, l); rows that are not `active` (B,) will not attend to them."""
        self.ids = torch.cat([self.ids, ids], dim=1)
        self.extend_mask(active, ids.shape[1])

    def extend_mask(self, active: torch.Tensor, length: int) -> None:
        columns = self.for_all(active).to(self.mask.dtype)[:, None].expand(-1, length)
        self.mask = torch.cat([self.mask, columns], dim=1)

    def positions(self) -> torch.Tensor:
        return (self.mask.long().cumsum(-1) - 1).clamp(min=0)


class ARGenSegGenerationMixin(GenerationMixin):
    """`generate` that draws. Beside the usual options:

    Args:
        picture_guidance_scale (`float`, defaults to 0): classifier-free guidance g of pictures, as released: at
            scale s of K (0-based) the logits are (1 + t) conditional - t unconditional with t = g s / (K - 1).
            Needs `negative_input_ids` (and `negative_attention_mask`), the unconditional prompts (B, L').
        picture_do_sample (`bool`, defaults to False): sample visual tokens instead of taking the most likely.
        picture_temperature, picture_top_k, picture_top_p: shape that sampling.
        picture_logit_adjustment (`float`, defaults to 0): logit adjustment (Menon et al. 2021). Subtracts this times
            the log-frequency that each code had at its scale when the VAR tokenizer was trained. Most cells of a mask
            are empty, so a model that is unsure where a thing is draws nothing; this makes it draw its best guess.
    `max_new_tokens` counts text; the tokens of pictures do not use it up.
    """

    _supported_generation_modes = [GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE]

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict]:
        given = {name: kwargs.pop(name) for name in PICTURE_DEFAULTS if name in kwargs}
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        for name, default in PICTURE_DEFAULTS.items():
            setattr(generation_config, name, given.get(name, getattr(generation_config, name, default)))
        return generation_config, model_kwargs

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        negative_input_ids: torch.Tensor | None = None,
        negative_attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        # the unconditional prompts are rows of their own by now; named here so that `generate` lets them pass
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

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
        _check_options(generation_config, synced_gpus)
        criteria = StoppingCriteriaList(c for c in stopping_criteria if not isinstance(c, MaxLengthCriteria))
        pad = generation_config._pad_token_tensor
        pad_id = self.config.gen_end_token_id if pad is None else int(pad.flatten()[0])
        rows, logits = self._begin(input_ids, generation_config, pad_id, model_kwargs)
        while True:
            if bool(rows.running.any()):
                tokens = self._choose_text(rows, logits, logits_processor, generation_config)
                logits = self._advance(rows, tokens, pad_id, criteria, streamer)
            elif bool(rows.waiting.any()):
                logits = self._draw(rows, generation_config, pad_id)
            else:
                break
        if streamer is not None:
            streamer.end()
        return self._finish(rows, generation_config, pad_id)

    def _begin(
        self, input_ids: torch.Tensor, generation_config: GenerationConfig, pad_id: int, model_kwargs: dict[str, Any]
    ) -> tuple[_Rows, torch.Tensor]:
        """Prefill. Rows whose prompt ends in `<gen_start>` wait from the start: the mask comes at once."""
        batch, length = input_ids.shape
        cache = model_kwargs.get("past_key_values")
        if cache is not None and cache.is_compileable:
            raise ValueError("a static cache has no room for pictures: leave cache_implementation unset")
        mask = model_kwargs.pop("attention_mask", None)
        mask = torch.ones_like(input_ids) if mask is None else mask.to(input_ids.dtype)
        negative = model_kwargs.pop("negative_input_ids", None)
        negative_mask = model_kwargs.pop("negative_attention_mask", None)
        if generation_config.picture_guidance_scale:
            if negative is None:
                raise ValueError(
                    "picture_guidance_scale needs the unconditional prompts: pass negative_input_ids and "
                    "negative_attention_mask (processor(text=[...]) makes them)"
                )
            negative_mask = torch.ones_like(negative) if negative_mask is None else negative_mask
            starts = self.config.gen_start_token_id
            if not torch.equal(input_ids[:, -1] == starts, negative[:, -1] == starts):
                raise ValueError("prompt and unconditional prompt must both end in <gen_start>, or neither")
            input_ids = _stack_left_padded(input_ids, negative, pad_id)
            mask = _stack_left_padded(mask, negative_mask.to(mask.dtype), 0)
        nobody = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
        rows = _Rows(
            ids=input_ids,
            mask=mask,
            prompt_length=input_ids.shape[1],
            padding=input_ids.shape[1] - length,
            budget=torch.full((batch,), generation_config.max_length - length, device=input_ids.device),
            running=~nobody,
            waiting=nobody,
            first_logits=torch.empty(0),
            model_kwargs=model_kwargs,
            logprobs=[[] for _ in range(batch)],
        )
        model_kwargs["attention_mask"] = rows.mask
        model_kwargs["position_ids"] = rows.positions()
        outputs = self._prefill(input_ids, generation_config, model_kwargs)
        model_kwargs["past_key_values"] = outputs.past_key_values
        logits = outputs.logits[:, -1].float()
        rows.first_logits = self._visual_slice(logits)
        rows.waiting = rows.ids[:batch, -1] == self.config.gen_start_token_id
        rows.running = ~rows.waiting
        return rows, logits

    def _visual_slice(self, logits: torch.Tensor) -> torch.Tensor:
        first = self.config.visual_token_offset
        return logits[..., first : first + self.config.visual_vocab_size]

    def _choose_text(
        self, rows: _Rows, logits: torch.Tensor, processors: LogitsProcessorList, generation_config: GenerationConfig
    ) -> torch.Tensor:
        """Next text tokens (B,). Visual ids and `<gen_end>` are no text and cannot be chosen."""
        batch = rows.running.shape[0]
        logits, first = logits[:batch], self.config.visual_token_offset
        scores = logits.clone()  # masked before the processors, so that top-k and top-p choose among text
        scores[:, first : first + self.config.visual_vocab_size] = -torch.inf
        scores[:, self.config.gen_end_token_id] = -torch.inf
        scores = processors(rows.streams, scores)
        if generation_config.return_dict_in_generate and generation_config.output_scores:
            rows.scores.append(scores)
        if generation_config.return_dict_in_generate and generation_config.output_logits:
            rows.logits.append(logits)
        if generation_config.do_sample:
            return torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]
        return scores.argmax(-1)

    def _advance(
        self, rows: _Rows, tokens: torch.Tensor, pad_id: int, criteria: StoppingCriteriaList, streamer: Any
    ) -> torch.Tensor | None:
        """Appends one column of text and runs it; afterwards rows run on, wait with their picture, or are done."""
        wrote = rows.running
        tokens = tokens.masked_fill(~wrote, pad_id)
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
        inputs = self.prepare_inputs_for_generation(
            rows.ids,
            next_sequence_length=1,
            **{**rows.model_kwargs, "attention_mask": rows.mask, "position_ids": rows.positions(), "use_cache": True},
        )
        logits = self(**inputs, return_dict=True).logits[:, -1].float()
        rows.first_logits = torch.where(rows.for_all(begins)[:, None], self._visual_slice(logits), rows.first_logits)
        return logits

    def _draw(self, rows: _Rows, generation_config: GenerationConfig, pad_id: int) -> torch.Tensor:
        """Draws the pictures of all waiting rows: one forward pass a scale, then `<gen_end>`.

        `<gen_start>` has been read already; its logits choose v_1. Returns the logits (R, vocabulary) of the text
        that follows.
        """
        quantizer, sides = self.model.quantizer, self.config.patch_nums
        logits, f_hat, drawn, logprobs = rows.first_logits[:, None], 0.0, [], []
        for scale in range(len(sides)):
            if scale:
                queries = self.model.embed_queries(quantizer.query_features(f_hat, scale), scale, scale)
                logits = self.visual_logits(self._scale_step(rows, queries)).float()
            tokens, chosen = self._choose_visual(logits, scale, generation_config, rows.copies)
            f_hat = f_hat + quantizer.contribution(rows.for_all(tokens), scale)
            drawn.append(tokens)
            logprobs.append(chosen)
        gen_end = rows.ids.new_full((rows.ids.shape[0], 1), self.config.gen_end_token_id)
        hidden = self._scale_step(rows, self.get_input_embeddings()(gen_end))
        ids = torch.cat(drawn, dim=1) + self.config.visual_token_offset
        ids = ids.masked_fill(~rows.waiting[:, None], pad_id)
        rows.ids = torch.cat([rows.ids, rows.for_all(ids)], dim=1)
        for row in rows.waiting.nonzero()[:, 0].tolist():
            rows.logprobs[row].append(torch.cat(logprobs, dim=1)[row])
        rows.running = rows.waiting & (rows.budget > 0)
        rows.waiting = torch.zeros_like(rows.waiting)
        return self.lm_head(hidden)[:, -1].float()

    def _scale_step(self, rows: _Rows, embeds: torch.Tensor) -> torch.Tensor:
        """Hidden states (R, l, hidden) of the queries of one scale; only waiting rows take part."""
        cache = rows.model_kwargs["past_key_values"]
        rows.extend_mask(rows.waiting, embeds.shape[1])
        text_config, mask, options = self.model.language_model.config, rows.mask, {}
        if self.config.scale_attention == "block" and embeds.shape[1] > 1:
            if "flash" in text_config._attn_implementation:
                options["is_causal"] = False
            else:
                mask = create_bidirectional_mask(
                    text_config, embeds, mask, past_key_values=cache, allow_is_bidirectional_skip=False
                )
        outputs = self.model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=rows.positions()[:, -embeds.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            **options,
        )
        return outputs.last_hidden_state

    def _choose_visual(
        self, logits: torch.Tensor, scale: int, generation_config: GenerationConfig, copies: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codebook indices and their log-probabilities, both (B, l), from logits (R, l, V)."""
        if copies == 2:
            conditional, unconditional = logits.chunk(2)
            t = generation_config.picture_guidance_scale * scale / max(len(self.config.patch_nums) - 1, 1)
            logits = (1 + t) * conditional - t * unconditional
        preferred = logits
        if generation_config.picture_logit_adjustment:
            prior = self.model.quantizer.log_frequency(scale)
            preferred = logits - generation_config.picture_logit_adjustment * prior
        if generation_config.picture_do_sample:
            flat = preferred.flatten(0, 1)
            for warper in _picture_warpers(generation_config):
                flat = warper(None, flat)
            tokens = torch.multinomial(flat.softmax(-1), num_samples=1).view(logits.shape[:2])
        else:
            tokens = preferred.argmax(-1)
        return tokens, logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]

    def _finish(
        self, rows: _Rows, generation_config: GenerationConfig, pad_id: int
    ) -> ARGenSegGenerateOutput | torch.Tensor:
        """Closes the gaps that waiting left in the columns, so that every row is a plain stream again."""
        batch, prompt = rows.running.shape[0], rows.prompt_length
        answers = [
            row[keep] for row, keep in zip(rows.ids[:batch, prompt:], rows.mask[:batch, prompt:].bool(), strict=True)
        ]
        answers = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=pad_id)
        sequences = torch.cat([rows.ids[:batch, rows.padding : prompt], answers], dim=1)
        if not generation_config.return_dict_in_generate:
            return sequences
        return ARGenSegGenerateOutput(
            sequences=sequences,
            scores=tuple(rows.scores) or None,
            logits=tuple(rows.logits) or None,
            past_key_values=rows.model_kwargs["past_key_values"],
            picture_scores=[[self._picture_score(one) for one in row] for row in rows.logprobs],
            picture_token_logprobs=rows.logprobs,
        )

    def _picture_score(self, logprobs: torch.Tensor) -> float:
        means = [scale.mean() for scale in logprobs.split([side * side for side in self.config.patch_nums])]
        return float(torch.stack(means).mean().exp())


def _check_options(generation_config: GenerationConfig, synced_gpus: bool) -> None:
    if generation_config.use_cache is False:
        raise ValueError("drawing needs the key-value cache: leave use_cache=True")
    if synced_gpus:
        raise ValueError("synced_gpus (ZeRO stage 3) is not supported: rows draw at different steps on each rank")
    if generation_config.output_attentions or generation_config.output_hidden_states:
        raise ValueError(
            "generate does not collect attentions or hidden states; run a forward pass over the returned sequences"
        )


def _picture_warpers(generation_config: GenerationConfig) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if generation_config.picture_temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(generation_config.picture_temperature))
    if generation_config.picture_top_k is not None:
        warpers.append(TopKLogitsWarper(generation_config.picture_top_k))
    if generation_config.picture_top_p is not None:
        warpers.append(TopPLogitsWarper(generation_config.picture_top_p))
    return warpers


def _stack_left_padded(first: torch.Tensor, second: torch.Tensor, value: int) -> torch.Tensor:
    """Rows of both (B, L) and (B, L'), left-padded to the same length."""
    length = max(first.shape[1], second.shape[1])
    return torch.cat([torch.nn.functional.pad(t, (length - t.shape[1], 0), value=value) for t in (first, second)])


__all__ = ["ARGenSegGenerateOutput", "ARGenSegGenerationMixin"]
