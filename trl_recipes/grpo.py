"""Teaches an ARGenSeg model by the masks that it draws itself: reinforcement learning with TRL's `GRPOTrainer`.

    python -m trl_recipes.grpo --config trl_recipes/configs/grpo.yaml \\
        --model_name_or_path out/my_masks/merged --data my_masks/ --output_dir out/grpo

Training on tokens shows a model the true mask up to the token that it has to tell. Here it draws on its own: several
answers to each request, by chance, of which those learn that are better than the others. The reward of an answer is
the IoU of its mask with the true one (1 for words where nothing is to be drawn, 0 for words in place of a mask), the
same number whose mean evaluation calls gIoU. So it needs a model that draws passably already, and changes it little.

Answers are drawn, text and masks alike, at `--temperature`, under the model's own `picture_logit_adjustment`; the
probabilities that are learned are those of just this, computed by teacher forcing from the ids alone.

The options are those of TRL (`GRPOConfig`, `ModelConfig`), and those of `trl_recipes.lora` for the data; a YAML file
holds any of them, and the command line goes before it. A run that was stopped goes on from its last checkpoint when the
same command is given again.
"""

import copy
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import GenerationConfig

from processing.zoom import generate_option

from .adapters import without_adapters
from .command_line import needing
from .evaluation.answers import union
from .lora import MaskEvaluation, evaluates, load_data
from .mask_data import check_requests, conversation_of, target_masks
from .mask_data.mask_values import union_of
from .mask_data.samples import BadSample
from .metrics import SegmentationMetrics
from .run_settings import run_settings, start_run
from .sft import RESULTS, SFTMaskArguments, begin, run, sft_settings, tell_sizes
from .training_options import refuse

with needing("train", __name__):
    from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser

REFUSED = (
    "use_vllm",
    "use_liger_kernel",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "generation_kwargs",
    "cast_lm_head_to_fp32",
    "sync_ref_model",
)
SETTINGS = (
    "num_generations", "max_completion_length", "mask_truncated_completions", "steps_per_generation", "num_iterations",
    "temperature", "beta", "loss_type", "scale_rewards", "epsilon", "importance_sampling_level",
)  # fmt: skip


class MaskGRPOTrainer(MaskEvaluation, GRPOTrainer):
    """`GRPOTrainer` that learns the probabilities with which answers were drawn, and evaluates by drawing masks.

    Rows are those of `requests_of`. Sampling follows what `GRPOConfig` says alone, whatever the generation
    configuration of the model has beside it.
    """

    def __init__(self, *args: Any, model: Any, **kwargs: Any) -> None:
        training: GRPOConfig = kwargs["args"]
        beta, reference = training.beta, None
        if beta and kwargs.get("peft_config") is None:
            reference = copy.deepcopy(model).requires_grad_(False).eval()
        training.beta = 0.0  # TRL would load the reference by a class that it looks for in transformers
        super().__init__(*args, model=model, **kwargs)
        self.beta = training.beta = beta
        if reference is not None:
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)

    def _own_model(self, model: Any) -> Any:
        """Without what trainer and adapters put around it."""
        return without_adapters(self.accelerator.unwrap_model(model))

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        net = self._own_model(self.model)
        own, net.generation_config = net.generation_config, GenerationConfig()
        try:
            answers, logprobs = super()._generate_single_turn(*args, **kwargs)
        finally:
            net.generation_config = own
        return [self._without_padding(ids) for ids in answers], logprobs

    def _without_padding(self, ids: list[int]) -> list[int]:
        """An answer that was cut, without what fills it up beside a longer one that draws: TRL takes that for text."""
        is_text = ~self._own_model(self.model).config.is_visual(torch.tensor(ids))
        return ids[: int((is_text.cumsum(0) <= self.max_completion_length).sum())]

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        pixel_values: Any = None,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        net = self._own_model(model)
        count = batch_size or len(input_ids)
        parts = []
        for start in range(0, len(input_ids), count):
            ids, mask, pixels = (given[start : start + count] for given in (input_ids, attention_mask, pixel_values))
            with self.accelerator.autocast():
                outputs = model(
                    input_ids=ids,
                    attention_mask=mask,
                    pixel_values=pixels,
                    logits_to_keep=1,
                    output_hidden_states=True,
                    use_cache=False,
                )
                hidden = outputs.hidden_states[-1][:, -logits_to_keep - 1 : -1]
                parts.append(answer_log_probs(net, hidden, ids, self.temperature))
        logps, entropies = (torch.cat(part) for part in zip(*parts, strict=True))
        return logps, entropies if compute_entropy else None, None


def answer_log_probs(
    model: Any, hidden: torch.Tensor, input_ids: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities with which `generate` samples an answer, and the entropies that it chose under; both (B, l).

    Visual tokens are chosen among the codes, under the model's `picture_logit_adjustment`; text among all other tokens.

    Args:
        model: an `ARGenSegForConditionalGeneration`.
        hidden: last hidden states (B, l, hidden) at the tokens before those of the answer, the last l of the stream.
        input_ids: streams (B, L).
    """
    config, length = model.config, hidden.shape[1]
    ids = input_ids[:, -length:]
    is_visual = config.is_visual(ids)
    text = model._text_scores(model.lm_head(hidden[~is_visual]).float())
    text[:, config.image_token_id] = -torch.inf
    visual = model.visual_logits(hidden[is_visual]).float()
    adjustment = picture_logit_adjustment(model)
    if adjustment:
        frequencies = [model.model.quantizer.log_frequency(scale) for scale in range(len(config.patch_nums))]
        scales = model.scale_of_tokens(input_ids)[:, -length:][is_visual]
        visual = visual - adjustment * torch.stack(frequencies)[scales]
    logps, entropies = (hidden.new_zeros(ids.shape, dtype=torch.float32) for _ in range(2))
    for where, logits, targets in (
        (~is_visual, text, ids[~is_visual]),
        (is_visual, visual, ids[is_visual] - config.visual_token_offset),
    ):
        # checks of its own fail where there is none, as in a batch that draws nothing
        chosen = torch.distributions.Categorical(logits=logits / temperature, validate_args=False)
        logps = logps.masked_scatter(where, chosen.log_prob(targets))
        entropies = entropies.masked_scatter(where, chosen.entropy())
    return logps, entropies


def picture_logit_adjustment(model: Any) -> float:
    return generate_option(model, {}, "picture_logit_adjustment") or 0.0


def mask_reward(processor: Any) -> Callable[..., list[float]]:
    """The reward: IoU of what is drawn with what is true, as evaluation counts it, but that masks are as they were
    drawn and follow no edges: the model shall not leave its outlines to them."""

    def mask_iou(completion_ids: list[list[int]], masks: list, image_size: list, **others: Any) -> list[float]:
        pad, sizes = processor.tokenizer.pad_token_id, [tuple(size) for size in image_size]
        rows = [torch.tensor(ids) for ids in completion_ids]
        answers = processor.post_process_segmentation(
            torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad), target_sizes=sizes
        )
        metrics = SegmentationMetrics()
        return [
            metrics.add(union(found), union_of(truth, size))
            for found, truth, size in zip(answers, masks, sizes, strict=True)
        ]

    return mask_iou


def requests_of(rows: Dataset, processor: Any) -> Dataset:
    """Rows of `load_mask_data` as `GRPOTrainer` takes them: `image`, `prompt` (messages), and for the reward the true
    `masks` and the `image_size`.

    Raises:
        BadSample: a conversation has masks before its last answer.
    """
    prompts, truths = [], []
    plain = rows.remove_columns("image")
    for row in plain:
        *before, _ = conversation_of(processor, row | {"image": None})
        blocks = [block for turn in before for block in turn["content"]]
        if any(block["type"] == "mask" for block in blocks):
            raise BadSample(row["sample"], "conversation", "masks before the last answer are not for this recipe")
        texts = ["".join(block.get("text", "") for block in turn["content"]) for turn in before]
        prompts.append([{"role": turn["role"], "content": text} for turn, text in zip(before, texts, strict=True)])
        truths.append(target_masks(row))
    kept = rows.select_columns(["image", "image_size"])
    return kept.add_column("prompt", prompts).add_column("masks", truths)


def prepare(recipe: SFTMaskArguments, training: GRPOConfig, model_args: ModelConfig) -> MaskGRPOTrainer:
    """Everything before the first step.

    Raises:
        ValueError: with what is wrong, and how to mend it.
    """
    refuse(training, REFUSED, "does not go with masks that are drawn by the model itself")
    model, processor, config = begin(recipe, training, model_args)
    training.generation_kwargs = {
        "picture_do_sample": True,
        "picture_temperature": training.temperature,
        "picture_logit_adjustment": picture_logit_adjustment(model),
        "suppress_tokens": [model.config.image_token_id],  # the newest TRL does so by itself
    }
    parts = load_data(recipe, training.seed, not training.disable_tqdm, evaluates(training))
    rows, validation = (check_requests(part, processor, recipe.skip_bad_samples) for part in parts)
    requests = requests_of(rows, processor)
    settings = run_settings(training, model, rows, validation) | sft_settings(recipe, config)
    settings |= {name: getattr(training, name) for name in SETTINGS}
    start_run(Path(training.output_dir), settings, str(model_args.model_name_or_path), recipe.overwrite, RESULTS)
    trainer = MaskGRPOTrainer(
        model=model,
        reward_funcs=mask_reward(processor),
        args=training,
        train_dataset=requests,
        eval_dataset=validation,  # evaluation draws its masks
        processing_class=processor,
        peft_config=config,
        processor=processor,
        validation=validation,
        shown=recipe.shown_samples,
    )
    if trainer.is_fsdp_enabled:
        raise ValueError("this command does not train under FSDP; ZeRO stage 2 and plain processes will do")
    tell_sizes(trainer)
    return trainer


def make_parser() -> TrlParser:
    kinds: Any = (SFTMaskArguments, GRPOConfig, ModelConfig)
    return TrlParser(kinds, description=__doc__, formatter_class=RawDescriptionHelpFormatter)


def main(arguments: list[str] | None = None) -> None:
    run(make_parser(), prepare, arguments)


if __name__ == "__main__":
    main()
