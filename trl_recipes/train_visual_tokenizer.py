"""Trains a small VAR tokenizer on masks (and, if asked, pictures), for models that draw masks.

    python -m trl_recipes.train_visual_tokenizer --bank BANK --output_dir out/visual_tokenizer --max_steps 3000

Three phases, each with a learning rate that rises quickly and falls to nothing: a plain autoencoder; a codebook fitted
to its latents at once (Lloyd iterations), and then encoder, codes and decoder together: the encoder takes the gradient
of what the codes say and is pulled to them, the codes follow it as running means (with gradients of their own they
would chase each other, and grow), those that nothing uses are moved to where they are missing; last the decoder alone.
That can be repeated (`--decoder_only`) without touching models trained on the codes; with `--search_steps` the decoder
sees every second mask as the tokens that are found by trying them out, as `VARTokenizer.encode` does it.

`--codes keep` or `follow` goes on with encoder and decoder and the codes of `--start_from`, and `--edge_weight` with
what counts in the end: pictures read like masks. Give `--commitment_weight 40` with it: edges have steep gradients, and
with a weaker pull the latents leave their codes.

What it watches beside reconstruction is *predictability*: a language model spends its capacity on every token that is
noise. Entropy-constrained quantisation (`rate_weight`) makes codes that are rarely right expensive, so that empty cells
get the same token nearly always; scale drop-out teaches the decoder to show what the coarse scales alone say.

Masks are kept and cut out on the GPU, if there is one. `--minutes` ends a run in time, whatever the steps take. Of
`TrainingArguments` what has no use here is refused: the form of the learning rate, epochs, accumulation of batches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import HfArgumentParser, Trainer, TrainingArguments

import modeling_argenseg  # noqa: F401 (registers the Auto classes)
from modeling_argenseg import VARTokenizer, VARTokenizerConfig
from modeling_argenseg.code_search import STRETCH, edge_logits

from .clock import Clock
from .codebook import assign, fit_codebook, follow, revive
from .command_line import errors_in_a_line
from .help_format import Help
from .masks import MaskPictures, compose_masks, find_photos
from .resume import train_or_go_on, where_to_go_on
from .searched_tokens import searched_tokens
from .training_options import (
    check_minutes,
    check_numbers,
    options_that_differ,
    refuse,
    refuse_ignored,
    refuse_many_processes,
)
from .visual_tokenizers import load_visual_tokenizer

LEAST_AREA = 0.002  # of the picture: smaller masks weigh less
ENTROPY_SHARE = 0.25
IGNORED = (  # of TrainingArguments
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "label_smoothing_factor", "num_train_epochs",
    "per_device_eval_batch_size",
)  # fmt: skip
# sizes of a tokenizer; what is coded and how, and the codes
NETWORK = ("image_size", "base_channels", "channel_multipliers", "latent_channels")
CODES = ("patch_nums", "vocab_size", "rate_weight")
LEAST = {
    "train_masks": 1,
    "test_masks": 1,
    "autoencoder_steps": 0,
    "joint_steps": 0,
    "search_steps": 0,
    "fit_pictures": 1,
    "workers": 1,
}


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
        default=700,
        metadata={"help": "steps in which encoder, codes and decoder move together; then the decoder alone"},
    )
    minutes: float | None = field(
        default=None,
        metadata={
            "help": "end the run after so long, if max_steps comes later: all phases become shorter alike (such a run "
            "cannot be resumed exactly)"
        },
    )
    joint_learning_rate: float = field(default=1.0, metadata={"help": "of the joint phase, times learning_rate"})
    decoder_learning_rate: float = field(default=1.0, metadata={"help": "of the decoder's phase, times learning_rate"})
    commitment_weight: float = field(
        default=5.0, metadata={"help": "pull of the latent to its code; too small, and the latent grows without end"}
    )
    latent_variance: float = field(
        default=0.09,
        metadata={"help": "variance that the latent is held at, so that rate_weight means the same always"},
    )
    variance_weight: float = field(default=0.03, metadata={"help": "how strongly it is held there"})
    codebook_decay: float = field(default=0.99, metadata={"help": "of the running means that the codes are"})
    rate_weight: list[float] = field(
        default_factory=lambda: [0.035], metadata={"help": "price of a nat, in squared distance; one, or one per scale"}
    )
    decoder_only: bool = field(
        default=False, metadata={"help": "keep the codes of start_from, so that models trained on them stay valid"}
    )
    codes: str = field(
        default="new",
        metadata={
            "help": "new: fitted to the latents, then they follow the encoder; follow: those of start_from follow it; "
            "keep: they stay, and models trained on them need little to get used to the encoder's new tokens",
            "choices": ["new", "follow", "keep"],
        },
    )
    edge_weight: float = field(
        default=0.0,
        metadata={
            "help": "factor on a loss of pictures read like masks, at twice the side, black or white, a small mask as "
            "important as a large one; for what draws masks already"
        },
    )
    search_steps: int = field(
        default=0,
        metadata={
            "help": "with decoder_only: steps of the search for the tokens of every second mask, which are kept in "
            "output_dir; masks are not cut and mirrored then"
        },
    )
    fit_pictures: int = field(default=2048, metadata={"help": "pictures that the codebook is first fitted to"})
    scale_dropout: float = field(default=0.1, metadata={"help": "share of pictures drawn from the first scales only"})
    workers: int = field(default=1, metadata={"help": "processes that compose masks"})


@torch.no_grad()
def judge(model: VARTokenizer, masks: np.ndarray, batch_size: int = 32) -> dict[str, Any]:
    """Reconstruction IoU after every scale at the masks' own size, and how predictable the tokens are: nearest codes.

    Returns `iou` (mean), `iou_per_scale`, `entropy_per_scale` (nats a token), `entropy_per_picture` (nats), and
    `empty_share_per_scale`: among cells where the mask is empty, the share of the commonest code.
    """
    model.eval()
    config, ids, ious = model.config, [], []
    pictures = MaskPictures(masks, config.image_size, seed=None, device=model.device)
    for indices in torch.arange(len(masks)).split(batch_size):
        tokens = model.encode(pictures.batch(indices), search_steps=0)
        maps = model.decode_scales(tokens).float().mean(2)  # (B, K, side, side)
        drawn = F.interpolate(maps, size=masks.shape[1:], mode="bilinear") > 0
        truth = pictures.masks[indices.to(model.device), None]
        union = (drawn | truth).sum((2, 3))
        ious.append(((drawn & truth).sum((2, 3)) / union.clamp(min=1) + (union == 0)).cpu())
        ids.append(tokens.cpu())
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


def edge_loss(pictures: torch.Tensor, white: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """How far decoded pictures (B, C, H, W), read like masks, are from masks (B, 1, S * H, S * W), S = `STRETCH`:
    1 - IoU, softly, and the cross-entropy of the pixels over the mask's area. The mean of the pictures that are
    `counted` (B,).

    The first is what is asked for; where a pixel is plainly wrong its slope is nothing, and the second has one.
    """
    logits, white = edge_logits(pictures), white.float()
    share, area = logits.sigmoid(), white.sum((1, 2, 3))
    both = (share * white).sum((1, 2, 3))
    either = share.sum((1, 2, 3)) + area - both
    least = LEAST_AREA * white[0].numel()
    entropy = F.binary_cross_entropy_with_logits(logits, white, reduction="none").sum((1, 2, 3))
    losses = 1 - (both + 1) / (either + 1) + ENTROPY_SHARE * entropy / area.clamp(min=least)
    return (losses * counted).sum() / counted.sum().clamp(min=1)


def as_batch(indices: list[int]) -> dict[str, torch.Tensor]:
    return {"indices": torch.tensor(indices)}


class TokenizerTrainer(Trainer):
    """`Trainer` whose batches are indices of `pictures`, in three phases, evaluated by `judge`."""

    def __init__(
        self,
        *args: Any,
        recipe: TokenizerArguments,
        test_masks: np.ndarray,
        pictures: MaskPictures,
        tokens: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, data_collator=as_batch, **kwargs)
        self.recipe, self.test_masks, self.pictures, self.tokens = recipe, test_masks, pictures, tokens
        self.parts: dict[str, torch.Tensor] = {}
        self.clock = Clock(recipe.minutes)
        self.add_callback(self.clock)

    # ------------------------------------------------------------------ the schedule

    def place(self, step: int) -> float:
        return self.clock.place(step, self.args.max_steps)

    def phase_at(self, place: float) -> tuple[str, float]:
        """The phase, and how much of it is over (0 to 1)."""
        recipe, joint_end = self.recipe, self.recipe.autoencoder_steps + self.recipe.joint_steps
        if recipe.decoder_only:
            name, start, end = "decoder", 0, self.args.max_steps
        elif place < recipe.autoencoder_steps:
            name, start, end = "autoencoder", 0, recipe.autoencoder_steps
        elif place < joint_end:
            name, start, end = "joint", recipe.autoencoder_steps, joint_end
        else:
            name, start, end = "decoder", joint_end, self.args.max_steps
        return name, min((place - start) / max(end - start, 1), 1.0)

    def learning_rate_factor(self, step: int) -> float:
        """Of each phase: up in its first twentieth, then down to nothing along a cosine."""
        name, progress = self.phase_at(self.place(step))
        recipe = self.recipe
        peaks = {"autoencoder": 1.0, "joint": recipe.joint_learning_rate, "decoder": recipe.decoder_learning_rate}
        return peaks[name] * min(20 * progress + 0.05, 1.0) * (0.505 + 0.495 * math.cos(math.pi * progress))

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.learning_rate_factor)
        return self.lr_scheduler

    def num_scales_at(self, step: int, pictures: int) -> torch.Tensor:
        """From how many scales each picture of a step is drawn (B,): all, or for a few of them the first ones only."""
        scales = len(self.model.config.patch_nums)
        rng = np.random.default_rng([self.args.seed, step])
        fewer = rng.integers(2, max(scales, 3), pictures)
        return torch.from_numpy(np.where(rng.random(pictures) < self.recipe.scale_dropout, fewer, scales))

    # ------------------------------------------------------------------ a step

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        pixels, step = self.pictures.batch(inputs["indices"]), self.state.global_step
        phase, progress = self.phase_at(self.place(step))
        self.begin(phase, model)
        with self.accelerator.autocast():  # which otherwise covers `model.forward` alone
            latent = model.latent(pixels).float()
        variance, commitment, drawn = latent.var(), latent.new_zeros(()), latent
        complete = torch.ones(len(pixels), dtype=torch.bool, device=latent.device)
        if phase != "autoencoder":
            reviving = phase == "joint" and self.recipe.codes != "keep" and progress < 0.8 and step % 100 == 0
            coded = assign(model.quantize, latent.detach(), places=reviving)
            whole = coded.f_hats[-1]
            if self.tokens is not None:
                whole[::2] = self.searched(model, inputs["indices"][::2])
            drawn = latent + (whole - latent).detach()
            scales = self.num_scales_at(step, len(pixels)).to(latent.device)
            complete = scales == len(coded.f_hats)
            for count, f_hat in list(enumerate(coded.f_hats, 1))[:-1]:
                fewer = (scales == count)[:, None, None, None]
                drawn = torch.where(fewer, f_hat, drawn)  # which says nothing about the latent: no gradient
            if phase == "joint":
                commitment = F.mse_loss(latent, whole)
                if self.recipe.codes != "keep":
                    follow(model.quantize, coded, len(pixels), self.recipe.codebook_decay)
                if reviving:
                    revive(model.quantize, coded)
        with self.accelerator.autocast():
            picture = model.decode_latent(drawn).float()
        if self.recipe.photos:
            drawing = F.l1_loss(picture, pixels) + F.mse_loss(picture, pixels)
        else:  # 4 x is the logit of "white"
            drawing = 2 * F.binary_cross_entropy_with_logits(4 * picture, (pixels + 1) / 2)
        self.parts = {"drawing": drawing, "commitment": commitment, "latent_variance": variance}
        loss = drawing + self.recipe.commitment_weight * commitment
        if self.recipe.edge_weight:
            white = self.pictures.batch(inputs["indices"], STRETCH * pixels.shape[-1]).mean(1, keepdim=True) > 0
            self.parts["edges"] = edges = edge_loss(picture, white, complete)
            loss = loss + self.recipe.edge_weight * edges
        if phase != "decoder":
            loss = loss + self.recipe.variance_weight * (variance / self.recipe.latent_variance - 1).square()
        return (loss, {"reconstruction": picture}) if return_outputs else loss

    def searched(self, model: VARTokenizer, indices: torch.Tensor) -> torch.Tensor:
        """What the tokens that were searched for masks say (B, D, h, w)."""
        assert self.tokens is not None
        *_, f_hat = model.quantize.accumulate(self.tokens[indices.cpu() % len(self.tokens)].to(indices.device))
        return f_hat

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:  # of the last step
            logs |= {name: float(part.detach()) for name, part in self.parts.items()} | {
                "place": self.place(self.state.global_step)
            }
        super().log(logs, *args, **kwargs)

    def begin(self, phase: str, model: VARTokenizer) -> None:
        """What a phase needs before its first step: the phase of the step before tells whether this is it."""
        step = self.state.global_step
        before = getattr(self, "phase", None) or (self.phase_at(step - 1)[0] if step else None)
        self.phase = phase
        model.quantize.requires_grad_(False)
        for part in (model.encoder, model.quant_conv):
            part.requires_grad_(phase != "decoder")
        if phase == before or self.recipe.decoder_only:
            return
        if self.recipe.codes == "new" and phase != "autoencoder" and before in (None, "autoencoder"):
            self.fit_codebook(model)
        self.optimizer.state.clear()  # the moments of other gradients

    @torch.no_grad()
    def fit_codebook(self, model: VARTokenizer) -> None:
        rng = np.random.default_rng(self.args.seed)
        seen = max(len(self.train_dataset), self.recipe.fit_pictures)
        indices = torch.from_numpy(rng.choice(seen, self.recipe.fit_pictures, replace=False))
        with self.accelerator.autocast():
            latents = torch.cat([model.latent(self.pictures.batch(part)).float() for part in indices.split(64)])
        error = fit_codebook(model.quantize, latents, progress=not self.args.disable_tqdm)
        self.log({"fit_error": error, "latent_variance": float(latents.var())})

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
        model = load_visual_tokenizer(recipe.start_from)
        if recipe.decoder_only or recipe.codes != "new":
            refuse_other_sizes(recipe, model.config, (*NETWORK, *CODES))
            return model
        refuse_other_sizes(recipe, model.config, NETWORK)
        fresh = VARTokenizer(new_config(recipe))  # the codebook may have another size
        own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("quantize.")}
        fresh.load_state_dict(own, strict=False)
        return fresh
    return VARTokenizer(new_config(recipe))


def refuse_other_sizes(recipe: TokenizerArguments, config: VARTokenizerConfig, names: Sequence[str]) -> None:
    """The tokenizer to go on from has its sizes already; `recipe` gets them where it says nothing.

    Raises:
        ValueError: the recipe says something else.
    """
    own = {name: getattr(config, name) for name in names}
    if isinstance(own.get("rate_weight"), float):
        own["rate_weight"] = [own["rate_weight"]]
    for name, asked, value in options_that_differ(recipe, TokenizerArguments(recipe.bank), own):
        raise ValueError(f"--{name} {asked}: the tokenizer of --start_from has {value}; leave it out")
    for name, value in own.items():
        setattr(recipe, name, value)


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
    )


def prepare(recipe: TokenizerArguments, training: TrainingArguments) -> TokenizerTrainer:
    """Masks, tokenizer and trainer.

    Raises:
        ValueError: the bank, a folder or an option is at fault, or options do not go together.
    """
    refuse_many_processes(training)
    refuse_ignored(training, IGNORED, "each phase has a warm-up and a cosine of its own, up to --max_steps")
    refuse(training, ("gradient_accumulation_steps",), "does not go with codes that follow every batch")
    check_minutes(recipe.minutes)
    where_to_go_on(training)  # or it says why not
    check_numbers(recipe, LEAST, ("photo_share", "scale_dropout"))
    if recipe.search_steps and (not recipe.decoder_only or recipe.photos):
        raise ValueError("--search_steps goes with --decoder_only True and without --photos: it is for masks, once")
    if recipe.edge_weight and recipe.photos:
        raise ValueError("--edge_weight is for masks, which have edges: leave --photos out")
    if (recipe.codes != "new" or recipe.decoder_only) and recipe.start_from is None:
        raise ValueError("--codes keep or follow, and --decoder_only, go on from a tokenizer: give --start_from")
    if recipe.codes != "new" and recipe.autoencoder_steps:
        raise ValueError(f"--codes {recipe.codes} has no use for an autoencoder: give --autoencoder_steps 0")
    photos = find_photos(Path(recipe.photos)) if recipe.photos else None
    if training.max_steps < 1:
        raise ValueError("the phases are parts of the run: give --max_steps")
    training.remove_unused_columns = False
    output = Path(training.output_dir)
    torch.manual_seed(training.seed)
    model = build(recipe).to(memory_format=torch.channels_last)
    masks = compose_masks(
        recipe.bank, "train", recipe.train_masks, training.seed, output / "train_masks.npy", recipe.workers
    )
    test_masks = compose_masks(
        recipe.bank, "test", recipe.test_masks, training.seed, output / "test_masks.npy", recipe.workers
    )
    seen = training.max_steps * training.train_batch_size
    indices = range(max(seen, len(masks)))
    pictures = MaskPictures(
        masks,
        recipe.image_size,
        None if recipe.search_steps else training.seed,
        photos,
        recipe.photo_share,
        device=training.device,
    )
    tokens = None
    if recipe.search_steps:
        model.to(training.device)
        tokens = searched_tokens(model.eval(), pictures, recipe.search_steps, output / "searched_tokens.npy")
    return TokenizerTrainer(
        model=model,
        args=training,
        train_dataset=indices,
        eval_dataset=indices,  # evaluation is by `judge`
        recipe=recipe,
        test_masks=test_masks,
        pictures=pictures,
        tokens=tokens,
    )


def main(recipe: TokenizerArguments, training: TrainingArguments) -> None:
    output = Path(training.output_dir)
    with errors_in_a_line():
        trainer = prepare(recipe, training)
    train_or_go_on(trainer)
    round_to_half(trainer.model)
    trainer.evaluate()
    trainer.model.save_pretrained(output)


def make_parser() -> HfArgumentParser:
    return HfArgumentParser((TokenizerArguments, TrainingArguments), description=__doc__, formatter_class=Help)


if __name__ == "__main__":
    main(*make_parser().parse_args_into_dataclasses())
