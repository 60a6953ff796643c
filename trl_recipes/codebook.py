"""Fits the codebook of a VAR tokenizer to latents: at once by Lloyd iterations, then by steps that follow the encoder.

Both are entropy-constrained residual quantisation: codes are chosen by squared distance plus the price of their rarity.
"""

from dataclasses import dataclass

import torch
from tqdm.auto import trange

from modeling_argenseg import MultiScaleQuantizer

PART = 64  # latents that are coded at once


@dataclass
class Coded:
    """A latent, coded as it is.

    `f_hats`: what the codes say after every scale, K times (B, D, h, w). `hits`: how often each code was chosen at each
    scale (K, V). `sums`: of the vectors that chose it (V, D). `error`: the squared error left over. `places`: up to V
    vectors (N, D), drawn by how badly they are coded: places for new codes.
    """

    f_hats: list[torch.Tensor]
    hits: torch.Tensor
    sums: torch.Tensor
    error: torch.Tensor
    places: torch.Tensor


@torch.no_grad()
def assign(quantizer: MultiScaleQuantizer, f_BDhw: torch.Tensor, places: bool = True) -> Coded:
    """Codes a latent, and counts; without `places` nothing waits for the GPU."""
    codebook = quantizer.embedding.weight
    hits, sums = torch.zeros_like(quantizer.ema_vocab_hit_SV), torch.zeros_like(codebook)
    found = [f_BDhw.new_empty(0, codebook.shape[1])]
    share = -(-len(codebook) // len(quantizer.patch_nums))

    def choose(vectors: torch.Tensor, scale: int) -> torch.Tensor:
        ids = quantizer.nearest(vectors, scale)
        hits[scale].index_add_(0, ids, hits.new_ones(len(ids)))
        sums.index_add_(0, ids, vectors)
        if places:
            error = (vectors - codebook[ids]).square().sum(1)
            found.append(vectors[torch.multinomial(error.clamp(min=1e-9), min(share, len(error)))])
        return ids

    f_hats = list(quantizer.accumulate(quantizer.encode(f_BDhw, choose)))
    return Coded(f_hats, hits, sums, (f_BDhw - f_hats[-1]).square().sum(), torch.cat(found))


@torch.no_grad()
def fit_codebook(
    quantizer: MultiScaleQuantizer, f_BDhw: torch.Tensor, iterations: int = 10, restarts: int = 6, progress: bool = True
) -> float:
    """Replaces the codebook by one fitted to latents (B, D, h, w); seconds of this replace thousands of gradient steps.

    It begins with the zero and vectors drawn by their energy: where most cells are empty, vectors drawn evenly would
    be the same one again and again. The first `restarts` iterations have no rate term and move codes that are used
    less than twice to badly coded vectors; the rest keep half of each code (the scales share the codebook, and an
    update of the coarse ones moves the target of the fine). Returns the mean squared error per latent number.
    """
    rates, codebook, error = quantizer.rate_weights, quantizer.embedding.weight, 0.0
    codebook.zero_()
    quantizer.ema_vocab_hit_SV.zero_()
    for iteration in trange(iterations, desc="fitting the codebook", disable=not progress):
        first = iteration < restarts
        quantizer.rate_weights = [0.0] * len(rates) if first else rates
        hits, sums = torch.zeros_like(quantizer.ema_vocab_hit_SV), torch.zeros_like(codebook)
        left, found = f_BDhw.new_zeros(()), []
        for part in f_BDhw.split(PART):
            coded = assign(quantizer, part, places=first)
            hits, sums, left = hits + coded.hits, sums + coded.sums, left + coded.error
            found.append(coded.places)
        error = float(left) / f_BDhw.numel()
        count = hits.sum(0)
        used = count > 0
        codebook[used] = torch.lerp(codebook[used], sums[used] / count[used, None], 1.0 if first else 0.5)
        if iteration == 0:
            codebook[0] = 0.0
        if first:
            replace(codebook, count < 2, torch.cat(found))
        quantizer.ema_vocab_hit_SV.copy_(hits / hits.sum(1, keepdim=True))
    quantizer.rate_weights = rates
    return error


@torch.no_grad()
def replace(codebook: torch.Tensor, poor_V: torch.Tensor, places: torch.Tensor) -> None:
    """Moves poor codes to places drawn at random; never the first code, which begins as the zero."""
    poor = poor_V.nonzero()[:, 0]
    poor = poor[poor > 0][: len(places)]
    codebook[poor] = places[torch.randperm(len(places), device=places.device)[: len(poor)]]


def uses_per_picture(quantizer: MultiScaleQuantizer) -> torch.Tensor:
    """How often a picture has each code (V,), by what was recorded."""
    hits = quantizer.ema_vocab_hit_SV
    return hits.new_tensor([side * side for side in quantizer.patch_nums]) @ hits


@torch.no_grad()
def follow(quantizer: MultiScaleQuantizer, coded: Coded, pictures: int, decay: float = 0.99) -> None:
    """One step of online k-means: codes become the running mean of the vectors that choose them.

    The running counts are those of the rate term (`ema_vocab_hit_SV`), so that all of the state is in the model.
    """
    codebook, hits = quantizer.embedding.weight, coded.hits / pictures
    uses = hits.sum(0)
    kept = decay * uses_per_picture(quantizer) + (1 - decay) * uses
    pull = coded.sums / pictures - uses[:, None] * codebook
    codebook.add_(pull * ((1 - decay) / kept.clamp(min=1e-9))[:, None])
    shares = hits / hits.sum(1, keepdim=True)
    quantizer.ema_vocab_hit_SV.lerp_(shares, 1 - decay)


@torch.no_grad()
def revive(quantizer: MultiScaleQuantizer, coded: Coded, fewest: float = 2e-4) -> None:
    """Moves codes that fewer than `fewest` uses a picture to vectors that are badly coded."""
    replace(quantizer.embedding.weight, uses_per_picture(quantizer) < fewest, coded.places)
