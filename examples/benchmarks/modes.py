"""What is timed: the released procedure, sequential drawing, and this package's ways, all on the same weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from transformers import DynamicCache

from .cases import Case
from .stopwatch import Stopwatch

SEQUENTIAL_STEPS = 256  # tokens of a single-scale picture of 256 px


def to_mask(pictures: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Pictures (N, 3, H, W) in [-1, 1] to bool masks (N, height, width)."""
    grey = pictures.float().mean(1, keepdim=True)
    return F.interpolate(grey, size=size, mode="bilinear")[:, 0] > 0


@torch.inference_mode()
def released(case: Case, watch: Stopwatch) -> torch.Tensor:
    """The released procedure: one prompt, the answer token by token, logits of the whole vocabulary at every position,
    ten passes for a picture and the decoder after each scale. Returns the codebook indices (1, T)."""
    net, cache = case.model, DynamicCache(config=case.model.config.get_text_config())
    config, quantizer = net.config, net.model.quantizer

    def read(embeds: torch.Tensor, phase: str) -> torch.Tensor:
        watch.phase, mask = phase, None
        if phase == "scales" and config.scale_attention == "block":  # the small model's; sdpa
            seen = cache.get_seq_length() + embeds.shape[1]
            mask = torch.ones(1, 1, embeds.shape[1], seen, dtype=torch.bool, device=net.device)
        hidden = net.model(inputs_embeds=embeds, attention_mask=mask, cache=cache).last_hidden_state
        logits = net.lm_head(hidden)
        watch.phase = None
        return logits

    def words(ids: list[int]) -> None:
        for token in ids:  # the next is chosen from the logits, and is the answer's
            embeds = net.get_input_embeddings()(torch.tensor([[token]], device=net.device))
            int(read(embeds, "text")[0, -1].argmax())

    ids = case.prompts[0][None]
    features = net.get_image_features(case.pixel_values, return_dict=True).pooler_output
    embeds = net.model.insert_image_features(net.model.embed_stream(ids), ids, features)
    int(read(embeds, "prefill")[0, -1].argmax())
    words(case.before[:-1])
    first, count = config.visual_token_offset, config.visual_vocab_size
    f_hat: Any = 0.0
    drawn, f_hats = [], []
    for scale in range(len(config.patch_nums)):
        if scale:
            queries = net.model.embed_queries(quantizer.query_features(f_hat, scale), scale, scale)
        else:
            queries = net.get_input_embeddings()(torch.tensor([[config.gen_start_token_id]], device=net.device))
        logits = read(queries, "scales")
        drawn.append(logits[..., first : first + count].argmax(-1))
        f_hat = f_hat + quantizer.contribution(drawn[-1], scale)
        f_hats.append(f_hat)
    pictures = [case.visual_tokenizer.decode_latent(one).clamp(-1, 1) for one in f_hats]
    words([config.gen_end_token_id, *case.after])
    to_mask(pictures[-1], case.size)
    return torch.cat(drawn, dim=1)


@torch.inference_mode()
def sequential(case: Case, watch: Stopwatch) -> None:
    """Drawing as Janus or LlamaSeg do: one token a pass, 256 of them; only the visual rows of the head, no decoder."""
    net, cache = case.model, DynamicCache(config=case.model.config.get_text_config())
    ids = case.prompts[0][None]
    features = net.get_image_features(case.pixel_values, return_dict=True).pooler_output
    embeds = net.model.insert_image_features(net.model.embed_stream(ids), ids, features)
    watch.phase = "prefill"
    net.model(inputs_embeds=embeds, cache=cache, use_cache=True)
    watch.phase = "scales"
    token = torch.tensor([[net.config.gen_start_token_id]], device=net.device)
    for _ in range(SEQUENTIAL_STEPS):
        embeds = net.get_input_embeddings()(token)
        hidden = net.model(inputs_embeds=embeds, cache=cache, use_cache=True).last_hidden_state
        token = net.visual_logits(hidden).argmax(-1) + net.config.visual_token_offset
    watch.phase = None


@torch.inference_mode()
def ours(case: Case, prompts: int = 1, shared: bool = False, **options: Any) -> torch.Tensor:
    """`generate` and the decoder: one image a prompt, or one for all of them. Returns the codes (prompts, T)."""
    inputs = case.batch(prompts, images=0 if shared else prompts)
    if shared:
        one = {"input_ids": case.prompts[0][None], "pixel_values": case.pixel_values}
        options["encoded_image"] = case.model.encode_image(**one)
    sequences = case.model.generate(**inputs, do_sample=False, **options)
    codes = codes_of(case, sequences)
    for part in codes.split(8):
        to_mask(case.visual_tokenizer.decode(part), case.size)
    return codes


def codes_of(case: Case, sequences: torch.Tensor) -> torch.Tensor:
    """The picture of each stream (N, L): codebook indices (N, T)."""
    config = case.model.config
    visual = config.is_visual(sequences)
    if not bool((visual.sum(1) == config.picture_length).all()):
        raise RuntimeError("every answer must hold one picture")
    return sequences[visual].view(len(sequences), -1) - config.visual_token_offset


def modes(case: Case, watch: Stopwatch, count: int, **options: Any) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Name -> (masks it makes, what to run). "fast" ones decode in bf16."""

    def fast(**how: Any) -> Callable[[], Any]:
        def run() -> Any:
            case.visual_tokenizer.decode_dtype = torch.bfloat16
            try:
                return ours(case, **how, **options)
            finally:
                case.visual_tokenizer.decode_dtype = None

        return run

    return {
        "released": (1, lambda: released(case, watch)),
        "sequential": (1, lambda: sequential(case, watch)),
        "ours": (1, lambda: ours(case, **options)),
        "ours fast": (1, fast()),
        "images": (count, lambda: ours(case, count, **options)),
        "images fast": (count, fast(prompts=count)),
        "prompts": (count, lambda: ours(case, count, shared=True, **options)),
        "prompts fast": (count, fast(prompts=count, shared=True)),
    }
