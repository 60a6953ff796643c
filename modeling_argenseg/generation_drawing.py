"""Drawing, the half of generation that makes pictures: one pass of the language model a scale that is drawn.

Shapes: B rows asked for, R rows run (2 B under guidance), V codebook entries, m tokens that the answer goes on with.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.masking_utils import create_causal_mask

from .cache_name import CACHE
from .generation_rows import Rows
from .picture_streamer import PartialPicture, PictureStreamer
from .static_steps import ScaleGraphs, scale_graphs, with_room


class DrawingMixin:
    """How the pictures of all waiting rows are drawn together."""

    _scale_graphs: ScaleGraphs | None = None

    def _draw(self, rows: Rows, generation_config: GenerationConfig, streamer: Any) -> torch.Tensor:
        """Draws the pictures of all waiting rows. `<gen_start>` has been read already; its logits choose v_1.

        What follows the picture, `<gen_end>` and `rows.draft_after`, needs nothing of the last scale's tokens, so it is
        read in the same pass as the last scale's queries. Nor do queries after given scales wait for anything: they are
        read in one pass.

        Returns:
            the logits (R, 1 + m, vocabulary) of the text that follows; after a preview nothing, (R, 0, 0).
        """
        sides = self.config.patch_nums
        count = generation_config.picture_stop_at_scale or len(sides)
        drawn: list[torch.Tensor] = []
        logprobs: list[torch.Tensor] = []
        closing = self._closing(rows) if count == len(sides) else rows.first_logits.new_empty(0)
        for scale, read in enumerate(self._read_scales(rows, drawn, count, closing, generation_config)):
            logits, hidden = read
            tokens, chosen = self._choose_visual(logits, scale, generation_config, rows)
            drawn.append(tokens)
            logprobs.append(chosen)
            self._stream_scale(rows, drawn, count, streamer)
        if count == len(sides) and (count == 1 or not self._reads_on_after_a_scale):
            hidden = self._scale_step(rows, [closing], 0, generation_config)
        self._append_pictures(rows, torch.cat(drawn, dim=1), torch.cat(logprobs, dim=1))
        if count < len(sides):
            rows.extend_mask(rows.waiting, 1)  # of v_t, which nothing was read for
            return rows.first_logits.new_empty(rows.ids.shape[0], 0, 0)
        return self.lm_head(hidden[:, -closing.shape[1] :]).float()

    def _read_scales(
        self,
        rows: Rows,
        drawn: list[torch.Tensor],
        count: int,
        closing: torch.Tensor,
        generation_config: GenerationConfig,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Logits (R, l, V) of the first `count` scales, one after the other, with the hidden states of the pass in
        which they were read. Meanwhile `drawn` is filled with the tokens (B, l) of each."""
        quantizer, starts, f_hat = self.model.quantizer, self.config.scale_starts, 0.0
        yield rows.first_logits[:, None], closing
        for scales in self._passes(rows, count):
            queries: list[torch.Tensor] = []
            for scale in scales:
                codes = rows.prefix[:, starts[scale - 1] : starts[scale]] if queries else drawn[-1]
                f_hat = f_hat + quantizer.contribution(rows.for_all(codes), scale - 1)
                queries.append(self.model.embed_queries(quantizer.query_features(f_hat, scale), scale, scale))
            reads_on = scale == len(self.config.patch_nums) - 1 and self._reads_on_after_a_scale
            after = [closing.to(queries[0].dtype)] if reads_on else []
            hidden = self._scale_step(rows, queries, scale, generation_config, after)
            lengths = [one.shape[1] for one in queries]
            for logits in self.visual_logits(hidden[:, : sum(lengths)]).float().split(lengths, dim=1):
                yield logits, hidden

    def _passes(self, rows: Rows, count: int) -> list[range]:
        """Which scales of the first `count` are read together: each alone, but for those that follow given ones."""
        given, together = rows.prefix.shape[1], 1
        drew = any(rows.logprobs[row] for row in rows.waiting.nonzero()[:, 0].tolist())  # what is given is of the first
        if given and not drew and self._reads_on_after_a_scale:
            together = self.config.scale_starts.index(given)
        together = min(together, count - 1)
        passes = [range(1, together + 1), *(range(scale, scale + 1) for scale in range(together + 1, count))]
        return [scales for scales in passes if scales]

    @property
    def _reads_on_after_a_scale(self) -> bool:
        """Whether one pass can hold a scale's queries and what follows them. Flash attention has one mask for all."""
        flash = "flash" in self.model.language_model.config._attn_implementation
        return self.config.scale_attention == "causal" or not flash

    def _closing(self, rows: Rows) -> torch.Tensor:
        """Embeddings (R, 1 + m, hidden) of `<gen_end>` and the text that the answer is expected to go on with."""
        ids = torch.cat([rows.draft_after.new_tensor([self.config.gen_end_token_id]), rows.draft_after])
        return self.get_input_embeddings()(ids.expand(rows.ids.shape[0], -1))

    def _scale_step(
        self,
        rows: Rows,
        queries: list[torch.Tensor],
        scale: int,
        generation_config: GenerationConfig,
        closing: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """Hidden states (R, l, hidden) of the queries of one scale, or of several up to `scale`, and of the text
        `closing` after them.

        Only waiting rows take part.
        """
        lengths, embeds = [one.shape[1] for one in queries], torch.cat([*queries, *closing], dim=1)
        text_config, used = self.model.language_model.config, rows.mask.shape[1]
        cache = with_room(rows.model_kwargs[CACHE], text_config, used, used + embeds.shape[1])
        rows.model_kwargs[CACHE] = cache
        rows.extend_mask(rows.waiting, embeds.shape[1])
        positions = self.model.text_positions(rows.ids, rows.mask)
        inputs = {
            "inputs_embeds": embeds,
            "attention_mask": rows.mask,
            # contiguous: a compiled graph is made for strides, too
            "position_ids": positions[:, -embeds.shape[1] :].clone(memory_format=torch.contiguous_format),
            CACHE: cache,
            "use_cache": True,
        }
        flash, compiles = "flash" in text_config._attn_implementation, self._compiles(rows, generation_config)
        block = self.config.scale_attention == "block" and scale > 0
        if flash and block:
            inputs["is_causal"] = False
        elif not flash and (block or compiles):
            blocks = torch.full_like(rows.mask, -1)
            if block:
                for number, part in enumerate(blocks[:, used : used + sum(lengths)].split(lengths, dim=1)):
                    part.fill_(number)
            inputs["attention_mask"] = create_causal_mask(
                text_config, embeds, rows.mask, cache, block_sequence_ids=blocks
            )
        if compiles:
            return self._graphs(generation_config)(scale, used + embeds.shape[1], **inputs)
        return self.model(**inputs, return_dict=True).last_hidden_state

    def _compiles(self, rows: Rows, generation_config: GenerationConfig) -> bool:
        return self._valid_auto_compile_criteria(rows.model_kwargs, generation_config)

    def _graphs(self, generation_config: GenerationConfig) -> ScaleGraphs:
        config, graphs = generation_config.compile_config, self._scale_graphs
        if graphs is None or (config is not None and graphs.config != config):
            self._scale_graphs = graphs = scale_graphs(self.model.language_model, config)
        return graphs

    def _choose_visual(
        self, logits: torch.Tensor, scale: int, generation_config: GenerationConfig, rows: Rows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codebook indices, drawn or given, and their log-probabilities, both (B, l), from logits (R, l, V)."""
        if rows.copies == 2:
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
        tokens = rows.with_prefix(tokens, self.config.scale_starts[scale])
        return tokens, logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]

    def _stream_scale(self, rows: Rows, drawn: list[torch.Tensor], count: int, streamer: Any) -> None:
        if isinstance(streamer, PictureStreamer):
            codes = torch.cat(drawn, dim=1)[rows.waiting]
            streamer.put_scale(PartialPicture(len(drawn), count, rows.waiting.nonzero()[:, 0], codes))

    def _append_pictures(self, rows: Rows, codes: torch.Tensor, logprobs: torch.Tensor) -> None:
        """Writes pictures (B, t) and the log-probabilities of their tokens into the waiting rows."""
        ids = (codes + self.config.visual_token_offset).masked_fill(~rows.waiting[:, None], rows.pad_id)
        rows.ids = torch.cat([rows.ids, rows.for_all(ids)], dim=1)
        for row in rows.waiting.nonzero()[:, 0].tolist():
            rows.logprobs[row].append(logprobs[row])

    def _picture_score(self, logprobs: torch.Tensor) -> float:
        """Score of a picture, or of its first whole scales, from the log-probabilities (t,) of its tokens."""
        scales = self.model.quantizer.split(logprobs[None])
        return float(torch.stack([scale.mean() for scale in scales]).mean().exp())


def _picture_warpers(generation_config: GenerationConfig) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if generation_config.picture_temperature not in (None, 1.0):
        warpers.append(TemperatureLogitsWarper(generation_config.picture_temperature))
    if generation_config.picture_top_k:  # 0 is none, as for `top_k`
        warpers.append(TopKLogitsWarper(generation_config.picture_top_k))
    if generation_config.picture_top_p is not None:
        warpers.append(TopPLogitsWarper(generation_config.picture_top_p))
    return warpers


__all__ = ["DrawingMixin"]
