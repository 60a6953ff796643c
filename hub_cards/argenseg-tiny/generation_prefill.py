"""Prefill, the half of generation that reads: the prompt, and the words that the answer is expected to begin with.

A draft is read like a prompt, in one pass, and kept as far as the model would have written it itself (speculative
decoding with the checkpoint's own answer as the draft), so that it changes nothing but the number of passes.

Shapes: B rows asked for, R rows run (2 B under guidance: conditional rows, then unconditional), n tokens of a draft.
"""

from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria

from .cache_name import CACHE
from .generation_rows import Rows, stack_left_padded


class PrefillMixin:
    """From prompts to rows that write or wait with a picture."""

    def _rows(self, input_ids: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> Rows:
        """The rows before anything is read; unconditional prompts become rows of their own."""
        batch, length = input_ids.shape
        pad = generation_config._pad_token_tensor
        pad_id = self.config.gen_end_token_id if pad is None else int(pad.flatten()[0])
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
            if negative.shape[0] != batch:
                raise ValueError(f"got {batch} prompts and {negative.shape[0]} unconditional ones: each needs its own")
            negative_mask = torch.ones_like(negative) if negative_mask is None else negative_mask
            starts = self.config.gen_start_token_id
            if not torch.equal(input_ids[:, -1] == starts, negative[:, -1] == starts):
                raise ValueError("prompt and unconditional prompt must both end in <gen_start>, or neither")
            input_ids = stack_left_padded(input_ids, negative, pad_id)
            mask = stack_left_padded(mask, negative_mask.to(mask.dtype), 0)
        nobody = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
        return Rows(
            ids=input_ids,
            mask=mask,
            prompt_length=input_ids.shape[1],
            padding=input_ids.shape[1] - length,
            budget=torch.full((batch,), generation_config.max_length - length, device=input_ids.device),
            running=~nobody,
            waiting=nobody,
            first_logits=torch.empty(0),
            model_kwargs=model_kwargs,
            pad_id=pad_id,
            draft_after=input_ids.new_empty(0),
            prefix=self._prefix(model_kwargs.pop("picture_prefix", None), batch, input_ids.device),
            logprobs=[[] for _ in range(batch)],
        )

    def _prefix(self, prefix: torch.Tensor | None, batch: int, device: torch.device) -> torch.Tensor:
        """`picture_prefix` as codes (B, t), t = 0 without one."""
        if prefix is None:
            return torch.empty(batch, 0, dtype=torch.long, device=device)
        whole = self.config.scale_starts[1:]
        prefix = torch.as_tensor(prefix, device=device)
        if prefix.ndim != 2 or prefix.shape[0] != batch or prefix.shape[1] not in whole:
            raise ValueError(
                f"picture_prefix must be ({batch}, t): for each prompt the codebook indices of the first whole scales, "
                f"t one of {whole}; got the shape {tuple(prefix.shape)}"
            )
        size = self.config.visual_vocab_size
        if prefix.is_floating_point() or bool(((prefix < 0) | (prefix >= size)).any()):
            raise ValueError(
                f"picture_prefix must hold codebook indices, 0 to {size - 1}; from token ids subtract "
                f"visual_token_offset = {self.config.visual_token_offset}"
            )
        return prefix.long()

    def _draft(
        self,
        rows: Rows,
        generation_config: GenerationConfig,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
    ) -> torch.Tensor:
        """What the answer is expected to begin with (n,), `<gen_start>` included; sets what it goes on with.

        A draft is checked with the plain rule, so nothing may bend the choice of text or ask for every step.
        """
        ids, config = generation_config.picture_answer_ids, generation_config
        always, nothing = config.picture_prefill == "always", rows.draft_after
        if config.picture_prefill == "never" or not ids:
            return nothing
        plain = not (config.do_sample or processors or config.output_scores or config.output_logits)
        plain = plain and all(isinstance(criterion, EosTokenCriteria) for criterion in criteria)
        plain = plain and config.prefill_chunk_size is None
        at = ids.index(self.config.gen_start_token_id) + 1
        eos = config._eos_token_tensor
        ends = [] if eos is None else eos.flatten().tolist()
        plain = plain and not set(ids[:at]) & set(ends)
        if plain:
            end = next((i for i in range(at, len(ids)) if ids[i] in ends), len(ids))
            rows.draft_after = nothing.new_tensor(ids[at:end])
        return nothing.new_tensor(ids[:at]) if plain or always else nothing

    def _begin(
        self, rows: Rows, draft: torch.Tensor, generation_config: GenerationConfig, streamer: Any
    ) -> torch.Tensor:
        """Prefill, draft included. Rows whose prompt ends in `<gen_start>` wait from the start: the mask comes at once.

        Returns:
            the logits (R, vocabulary) at the last token of each row.
        """
        model_kwargs, columns = rows.model_kwargs, rows.ids
        encoded = model_kwargs.pop("encoded_image", None)
        if encoded is not None:
            columns, rows.mask = encoded.move_padding_behind(rows.ids, rows.mask)
            if bool((columns[:, encoded.length :] == self.config.image_token_id).any()):
                raise ValueError(
                    "a prompt has an image beside that of encoded_image: leave encoded_image out, and pass pixel_values"
                )
            encoded.fill(model_kwargs[CACHE], rows.ids.shape[0])
        batch, count = rows.running.shape[0], draft.shape[0]
        starts = rows.ids[:batch, -1:].eq(self.config.gen_start_token_id).any(-1)
        draft_ids = draft.expand(rows.ids.shape[0], -1)
        rows.append(draft_ids, ~starts)
        columns = torch.cat([columns, draft_ids], dim=1)
        model_kwargs["attention_mask"] = rows.mask
        model_kwargs["position_ids"] = self.model.text_positions(columns, rows.mask)
        model_kwargs["logits_to_keep"] = 1 + count
        outputs = self._prefill(columns, generation_config, model_kwargs)
        model_kwargs["logits_to_keep"] = 1
        model_kwargs[CACHE] = outputs[CACHE]
        always = generation_config.picture_prefill == "always"
        accepted, logits = self._accept(rows, draft, outputs.logits[:, -1 - count :].float(), ~starts, always, streamer)
        rows.first_logits = logits[..., self.config.visual_slice]
        rows.waiting = starts if count == 0 else starts | (accepted == count)
        rows.running = ~rows.waiting & (rows.budget > 0)
        return logits

    def _accept(
        self,
        rows: Rows,
        draft: torch.Tensor,
        logits: torch.Tensor,
        active: torch.Tensor,
        always: bool = False,
        streamer: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a draft (n,) that the rows have just read, keeps what the `active` (B,) ones would have written.

        Args:
            logits: (R, 1 + n, vocabulary), at the token before the draft and at each token of it.

        Returns:
            how many tokens each row keeps (B,), and the logits (R, vocabulary) after them.
        """
        batch, count = active.shape[0], draft.shape[0]
        agrees = active[:, None].expand(-1, count)
        if not always and count:
            written = self._text_scores(logits[:batch, :-1]).argmax(-1)
            order = torch.arange(count, device=draft.device)
            agrees = agrees & (written == draft) & (order < rows.budget[:, None])
        kept = agrees.long().cumprod(-1).bool()
        accepted = kept.sum(-1)
        rows.keep(kept)
        rows.budget -= accepted
        if streamer is not None:
            for column in range(int(accepted.max()) if count else 0):
                streamer.put(draft[column].expand(batch).masked_fill(~kept[:, column], rows.pad_id).cpu())
        everyone = torch.arange(logits.shape[0], device=logits.device)
        return accepted, logits[everyone, rows.for_all(accepted)]

    def _text_scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of text: visual ids and `<gen_end>` are none and cannot be chosen."""
        scores = logits.clone()
        scores[..., self.config.visual_slice] = -torch.inf
        scores[..., self.config.gen_end_token_id] = -torch.inf
        return scores


__all__ = ["PrefillMixin"]
