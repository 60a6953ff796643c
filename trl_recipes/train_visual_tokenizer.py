"""Trains a small VAR tokenizer on masks (and, if asked, pictures), for models that draw masks.

    python -m trl_recipes.train_visual_tokenizer --bank BANK --output_dir out/visual_tokenizer --max_steps 3000

Four stages: a plain autoencoder; a codebook fitted to its latents at once (Lloyd iterations) and frozen; encoder and
decoder together, the latents pulled to the codes (off by default: hard to keep stable); last the decoder alone, on what
the codes say. That can be repeated (`--decoder_only`) without touching models trained on the codes.

What it watches beside reconstruction is *predictability*: a language model spends its capacity on every token that is
noise. Entropy-constrained quantisation (`rate_weight`) makes codes that are rarely right expensive, so that empty cells
get the same token nearly always; scale drop-out teaches the decoder to show what the coarse scales alone say.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import HfArgumentParser, Trainer, TrainingArguments

import modeling_argenseg  # noqa: F401 (registers the Auto classes)
from modeling_argenseg import VARTokenizer, VARTokenizerConfig

from .codebook import fit_codebook
from .masks import MaskPictures, compose_masks
from .resume import last_checkpoint


@dataclass
class TokenizerArguments:
    bank: str = field(metadata={"help": "folder with sprites.parquet, backgrounds.parquet and vocabulary.json"})
    start_from: str | None = field(
        default=None, metadata={"help": "tokenizer folder to go on from, e.g. an autoencoder"}
    )
    train_masks: int = field(default=20_000, metadata={"help": "masks to compose for training (cached in output_dir)"})
    test_masks: int = field(default=500, metadata={"help": "masks of test sprites to evaluate on"})
    photos: str | None = field(default=None, metadata={"help": "folder of pictures to mix in"})
    photo_share: float = field(default=0.1, metadata={"help": "share of pictures, where photos are given"})
    image_size: int = field(default=128, metadata={"help": "side of the picture that is coded"})
    base_channels: int = field(default=8, metadata={"help": "channels at full resolution"})
    channel_multipliers: list[int] = field(default_factory=lambda: [1, 2, 4, 8], metadata={"help": "per level"})
    patch_nums: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16], metadata={"help": "sides of the scales"})
    latent_channels: int = field(default=16, metadata={"help": "length of a code"})
    vocab_size: int = field(default=512, metadata={"help": "number of codes"})
    autoencoder_steps: int = field(default=2000, metadata={"help": "first steps, without the quantiser"})
    joint_steps: int = field(
        default=1000, metadata={"help": "steps in which encoder and decoder move together, after the codes"}
    )
    commitment_weight: float = field(
        default=5.0, metadata={"help": "pull of the latent to its code; too small, and the latent grows without end"}
    )
    rate_weight: list[float] = field(
        default_factory=lambda: [0.06], metadata={"help": "price of a nat, in squared distance; one, or one per scale"}
    )
    decoder_only: bool = field(
        default=False, metadata={"help": "keep the codes of start_from, so that models trained on them stay valid"}
    )
    fit_pictures: int = field(default=2048, metadata={"help": "pictures that the codebook is first fitted to"})
    scale_dropout: float = field(default=0.3, metadata={"help": "chance that a step uses only the first scales"})


@torch.no_grad()
def judge(model: VARTokenizer, masks: np.ndarray, batch_size: int = 32) -> dict[str, Any]:
    """Reconstruction IoU after every scale at the masks' own size, and how predictable the tokens are.

    Returns `iou` (mean), `iou_per_scale`, `entropy_per_scale` (nats a token), `entropy_per_picture` (nats), and
    `empty_share_per_scale`: among cells where the mask is empty, the share of the commonest code.
    """
    model.eval()
    config, ids, ious = model.config, [], []
    for start in range(0, len(masks), batch_size):
        truth = torch.from_numpy(masks[start : start + batch_size])
        pictures = MaskPictures(truth.numpy(), config.image_size, seed=None)
        pixels = torch.stack([pictures[i]["pixel_values"] for i in range(len(pictures))])
        ids.append(model.encode(pixels.to(model.device)).cpu())
        maps = model.decode_scales(ids[-1].to(model.device)).float().mean(2).cpu()  # (B, K, side, side)
        drawn = F.interpolate(maps, size=truth.shape[1:], mode="bilinear") > 0
        truth = truth[:, None]
        union = (drawn | truth).sum((2, 3))
        ious.append((drawn & truth).sum((2, 3)) / union.clamp(min=1) + (union == 0))
    model.train()
    ids_NT, iou_NK = torch.cat(ids), torch.cat(ious)
    entropies, shares = [], []
    for tokens, side in zip(model.quantize.split(ids_NT), config.patch_nums, strict=True):
        share = torch.bincount(tokens.flatten()).double() / tokens.numel()
        entropies.append(float(torch.special.entr(share).sum()))
        covered = F.adaptive_max_pool2d(torch.from_numpy(masks).float(), side).flatten(1)
        empty = tokens[covered == 0]
        shares.append(float(torch.bincount(empty).max() / len(empty)) if len(empty) else float("nan"))
    return {
        "iou": float(iou_NK[:, -1].mean()),
        "iou_per_scale": [round(float(x), 3) for x in iou_NK.mean(0)],
        "entropy_per_scale": [round(x, 3) for x in entropies],
        "entropy_per_picture": float(np.dot(entropies, [side * side for side in config.patch_nums])),
        "empty_share_per_scale": [round(x, 3) for x in shares],
    }


class TokenizerTrainer(Trainer):
    """`Trainer` that begins with an autoencoder, fits the codebook to it, drops scales, and evaluates by `judge`."""

    def __init__(self, *args: Any, recipe: TokenizerArguments, test_masks: np.ndarray, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recipe, self.test_masks = recipe, test_masks

    def num_scales_at(self, step: int) -> int | None:
        """How many scales the step reconstructs from: none (autoencoder), the first few, or all."""
        scales = len(self.recipe.patch_nums)
        if step < 0:
            return 0
        rng = np.random.default_rng([self.args.seed, step])
        return int(rng.integers(2, scales)) if scales > 2 and rng.random() < self.recipe.scale_dropout else None

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        recipe = self.recipe
        step = self.state.global_step - recipe.autoencoder_steps  # negative before the quantiser
        if step >= 0:
            model.quantize.requires_grad_(False)  # codes that follow the latent, and a latent that flees them, grow
        if step == 0 and not recipe.decoder_only:
            self.fit_codebook(model)
            self.optimizer.state.clear()  # the moments of the autoencoder's small gradients
        if step >= recipe.joint_steps or recipe.decoder_only:
            model.encoder.requires_grad_(False)
            model.quant_conv.requires_grad_(False)
        outputs = model(**inputs, num_scales=self.num_scales_at(step), masks=not self.recipe.photos)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    @torch.no_grad()
    def fit_codebook(self, model: VARTokenizer) -> None:
        batches = range(0, self.recipe.fit_pictures, 64)
        pictures = [[self.train_dataset[i + j]["pixel_values"] for j in range(64)] for i in batches]
        latents = [model.latent(torch.stack(batch).to(model.device)).float() for batch in pictures]
        error = fit_codebook(model.quantize, torch.cat(latents))
        self.log({"fit_error": error, "latent_std": float(torch.cat(latents).std())})

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, Any]:
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in judge(self.model, self.test_masks).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


@torch.no_grad()
def round_to_half(model: VARTokenizer) -> None:
    """Rounds all numbers to what fp16 holds, before any model learns the tokens: published at half the size, the same
    pictures still get the same tokens."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.copy_(tensor.half())


def build(recipe: TokenizerArguments) -> VARTokenizer:
    """A tokenizer without normalisation or attention, so that a token depends on what is near it."""
    if recipe.start_from is not None:
        if recipe.decoder_only:
            return VARTokenizer.from_pretrained(recipe.start_from)
        model = VARTokenizer.from_pretrained(recipe.start_from)
        fresh = VARTokenizer(new_config(recipe))  # the codebook may have another size
        own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("quantize.")}
        fresh.load_state_dict(own, strict=False)
        return fresh
    return VARTokenizer(new_config(recipe))


def new_config(recipe: TokenizerArguments) -> VARTokenizerConfig:
    return VARTokenizerConfig(
        image_size=recipe.image_size,
        base_channels=recipe.base_channels,
        channel_multipliers=recipe.channel_multipliers,
        num_res_blocks=1,
        norm_num_groups=0,
        use_attention=False,
        latent_channels=recipe.latent_channels,
        vocab_size=recipe.vocab_size,
        patch_nums=recipe.patch_nums,
        rate_weight=recipe.rate_weight if len(recipe.rate_weight) > 1 else recipe.rate_weight[0],
        commitment_weight=recipe.commitment_weight,
    )


def main(recipe: TokenizerArguments, training: TrainingArguments) -> None:
    training.remove_unused_columns = False
    output = Path(training.output_dir)
    torch.manual_seed(training.seed)
    model = build(recipe).to(memory_format=torch.channels_last)
    masks = compose_masks(recipe.bank, "train", recipe.train_masks, training.seed, output / "train_masks.npy")
    test_masks = compose_masks(recipe.bank, "test", recipe.test_masks, training.seed, output / "test_masks.npy")
    photos = sorted(Path(recipe.photos).glob("*.*")) if recipe.photos else None
    seen = training.max_steps * training.train_batch_size * training.gradient_accumulation_steps
    dataset = MaskPictures(masks, recipe.image_size, training.seed, photos, recipe.photo_share, max(seen, len(masks)))
    trainer = TokenizerTrainer(
        model=model,
        args=training,
        train_dataset=dataset,
        eval_dataset=dataset,  # evaluation is by `judge`
        recipe=recipe,
        test_masks=test_masks,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(output))
    round_to_half(model)
    trainer.evaluate()
    model.save_pretrained(output)


def make_parser() -> HfArgumentParser:
    return HfArgumentParser((TokenizerArguments, TrainingArguments), description=__doc__)


if __name__ == "__main__":
    main(*make_parser().parse_args_into_dataclasses())
