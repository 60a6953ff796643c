"""How near one prompt is to the limit of the hardware: weights have to be read once a pass, at the memory's speed."""

from typing import Any

import torch

from .stopwatch import now


def copy_bandwidth(device: torch.device, megabytes: int = 512, times: int = 5) -> float:
    """Bytes a second that a large copy reads and writes, the fastest of a few."""
    source = torch.empty(megabytes * 2**20, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(times + 1):
        begin = now(device)
        target.copy_(source)
        best = min(best, now(device) - begin)
    return 2 * source.numel() / best


def floors(case: Any, results: dict[str, dict[str, float]]) -> dict[str, float]:
    """What one prompt cannot undercut: weights read in all passes but the prefill, at the measured speed of a copy, and
    the measured vision, prefill and decoder; and how many times that "ours fast" (or "ours") takes."""
    net = case.model
    passes = len(net.config.patch_nums) - 1
    body = sum(p.numel() * p.element_size() for p in net.model.language_model.layers.parameters())
    row = net.lm_head.in_features * net.lm_head.weight.element_size()
    heads = row * (net.config.visual_vocab_size * passes + 2 * net.lm_head.out_features)  # the text before and after
    bandwidth = copy_bandwidth(net.device)
    name = "ours fast" if "ours fast" in results else "ours"
    found = results[name]
    measured = found["vision"] + found["prefill"] + found["decoder"]
    reading = (body * passes + heads) / bandwidth
    return {
        "copy bandwidth, GB/s": bandwidth / 1e9,
        "weights of the language model's layers, GB": body / 1e9,
        "passes after the prefill": passes,
        "heads read in all, GB": heads / 1e9,
        "reading weights, ms": 1000 * reading,
        "vision, prefill and decoder as measured, ms": 1000 * measured,
        "floor, ms": 1000 * (reading + measured),
        f"{name}, ms": 1000 * found["total"],
        f"{name}, times the floor": found["total"] / (reading + measured),
    }
