"""Fits the codebook of a VAR tokenizer to latents by Lloyd iterations (entropy-constrained residual quantisation)."""

import torch
from tqdm.auto import trange

from modeling_argenseg import MultiScaleQuantizer

PART = 64  # latents that are coded at once


@torch.no_grad()
def assign(
    quantizer: MultiScaleQuantizer, f_BDhw: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float, torch.Tensor]:
    """Codes a latent as it is.

    Returns: how often each code was chosen at each scale (K, V), the sums (V, D) of the vectors that chose it, the
    squared error left over, and up to V vectors (N, D), drawn by how badly they are coded: places for new codes.
    """
    codebook = quantizer.embedding.weight
    hits, sums = torch.zeros_like(quantizer.ema_vocab_hit_SV), torch.zeros_like(codebook)
    rest, places = f_BDhw, []
    for scale in range(len(quantizer.patch_nums)):
        vectors = quantizer.rest_at_scale(rest, scale)
        ids = quantizer.nearest(vectors, scale)
        hits[scale] += torch.bincount(ids, minlength=len(codebook))
        sums.index_add_(0, ids, vectors)
        error = (vectors - codebook[ids]).square().sum(1)
        share = -(-len(codebook) // len(quantizer.patch_nums))
        places.append(vectors[torch.multinomial(error.clamp(min=1e-9), min(share, len(error)))])
        rest = rest - quantizer.contribution(ids.view(len(rest), -1), scale)
    return hits, sums, float(rest.square().sum()), torch.cat(places)


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
        parts = [assign(quantizer, part) for part in f_BDhw.split(PART)]
        hits, sums = sum(part[0] for part in parts), sum(part[1] for part in parts)
        error = sum(part[2] for part in parts) / f_BDhw.numel()
        count = hits.sum(0)
        used = count > 0
        codebook[used] = torch.lerp(codebook[used], sums[used] / count[used, None], 1.0 if first else 0.5)
        if iteration == 0:
            codebook[0] = 0.0
        if first:
            places = torch.cat([part[3] for part in parts])
            poor = (count < 2).nonzero()[:, 0]
            poor = poor[poor > 0][: len(places)]
            codebook[poor] = places[torch.randperm(len(places))[: len(poor)]]
        quantizer.ema_vocab_hit_SV.copy_(hits / hits.sum(1, keepdim=True))
    quantizer.rate_weights = rates
    return error
