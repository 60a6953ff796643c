"""The small model of the recipes: its text tokenizer, processor and first weights, and a change of its codebook."""

import copy
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, GenerationConfig, GotOcr2ImageProcessorPil, LlamaConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from modeling_argenseg import (
    ARGenSegConfig,
    ARGenSegForConditionalGeneration,
    EfficientNetLiteVisionConfig,
    HybridInternVLConfig,
)
from processing import ARGenSegProcessor
from processing.picture_spans import VISUAL_TOKEN

from .command_line import loading
from .pretrained_vision import load_efficientnet_lite0
from .scenes import SceneDataset
from .text_tokenizer import train_text_tokenizer
from .visual_tokenizers import load_visual_tokenizer
from .word_regions import token_side

IMAGE_SIDE, GRID = 256, 16  # of the vision tower: pixels unless the recipe says otherwise, and tokens in a row


def build_processor(recipe: Any, scenes: SceneDataset) -> ARGenSegProcessor:
    """A text tokenizer trained on the recipe's own conversations, and the image geometry of the small model.

    Raises:
        ValueError: the text tokenizer that the recipe names is for another codebook.
    """
    visual_tokenizer = load_visual_tokenizer(recipe.visual_tokenizer)
    side = recipe.image_size or IMAGE_SIDE
    image_processor = GotOcr2ImageProcessorPil(
        size={"height": side, "width": side},
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )
    if recipe.text_tokenizer is None:
        lines, codes = conversation_lines(recipe, scenes), visual_tokenizer.config.vocab_size
        tokenizer = train_text_tokenizer(lines, recipe.text_vocab_size, codes, context=2048)
    else:
        with loading(recipe.text_tokenizer):
            tokenizer = AutoTokenizer.from_pretrained(recipe.text_tokenizer)
    return ARGenSegProcessor(image_processor, tokenizer, visual_tokenizer, image_seq_length=recipe.image_tokens)


def conversation_lines(recipe: Any, scenes: SceneDataset) -> list[str]:
    """What is said about the first scenes."""
    lines = ["Please segment {prompt} in this image.", "Sure, the segmentation result: ", "user\n", "assistant\n", "."]
    for index in tqdm(range(recipe.text_scenes), desc="reading expressions"):
        scene, expressions = scenes.scene(index)
        for expression in expressions:
            lines.append(f"Please segment {expression.text} in this image.")
            lines.append(f"There is no {expression.missing or expression.text}.")
        lines += [line for question in scenes.questions(index, scene) for line in (question.text, question.answer)]
    return lines


def build_model(recipe: Any, processor: ARGenSegProcessor) -> ARGenSegForConditionalGeneration:
    """Random weights, but for the vision trunk and the codebook; positions start as sines and cosines."""
    visual_tokenizer: Any = processor.visual_tokenizer
    width, side = recipe.hidden_size, recipe.image_size or IMAGE_SIDE
    vision = EfficientNetLiteVisionConfig(
        image_size=side,
        patch_size=side // GRID,
        hidden_size=width,
        num_hidden_layers=recipe.vision_layers,
        intermediate_size=2 * width,
        feature_strides=recipe.feature_strides,
        freeze_trunk=recipe.freeze_trunk,
    )
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=width,
        intermediate_size=int(2.5 * width),
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=width // 64,
        max_position_embeddings=processor.tokenizer.model_max_length,
        pad_token_id=processor.tokenizer.pad_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
        bos_token_id=None,
        # half of the dimensions hardly turn within one stream: attention finds a cell by its code of place, and a
        # thing by its name, wherever the words stand
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    )
    vlm = HybridInternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=processor.image_token_id,
        image_seq_length=recipe.image_tokens,
        downsample_ratio=token_side(recipe.image_tokens) / GRID,
    )
    config = ARGenSegConfig(
        vlm_config=vlm,
        visual_tokenizer_config=visual_tokenizer.config,
        gen_start_token_id=processor.gen_start_token_id,
        gen_end_token_id=processor.gen_end_token_id,
        visual_token_offset=processor.visual_token_offset,
        scale_attention=recipe.scale_attention or "block",
        visual_loss=recipe.visual_loss,
        visual_loss_weight=recipe.visual_loss_weight,
        tie_word_embeddings=True,
    )
    model = ARGenSegForConditionalGeneration(config)
    if recipe.pretrained_trunk:
        load_efficientnet_lite0(model.model.vlm.vision_tower)
    model.set_visual_tokenizer(processor.visual_tokenizer)
    start_at_sines(model)
    model.generation_config = GenerationConfig(
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        max_new_tokens=48,
    )
    return model


def look_closer(model: ARGenSegForConditionalGeneration, processor: ARGenSegProcessor, side: int) -> None:
    """Makes the vision tower see images of another side, with as many tokens and the same weights.

    Raises:
        ValueError: the trunk cannot take images of this side.
    """
    config = model.model.vlm.vision_tower.config
    changed = config.to_dict() | {"image_size": [side, side], "patch_size": [side // GRID] * 2}
    checked = EfficientNetLiteVisionConfig(**changed)
    if checked.folds != config.folds:
        raise ValueError(
            f"--image_size {side}: a token would be made of {checked.folds} by {checked.folds} places of the trunk's "
            f"feature maps, and the weights are for {config.folds}"
        )
    config.image_size, config.patch_size = checked.image_size, checked.patch_size
    processor.image_processor.size = type(processor.image_processor.size)(height=side, width=side)


def sines(sides: list[int], width: int) -> torch.Tensor:
    """2-D sines and cosines (tokens of all scales, width) of the centres of the cells of square grids in [0, 1]."""
    frequency = 2 ** torch.arange(width // 4).float().mul(5 / (width // 4)) * torch.pi
    grids = []
    for side in sides:
        centre = (torch.arange(side) + 0.5) / side
        angle = centre[:, None] * frequency
        wave = torch.cat([angle.sin(), angle.cos()], dim=1)  # (side, width / 2)
        rows, columns = wave[:, None].expand(-1, side, -1), wave[None].expand(side, -1, -1)
        grids.append(torch.cat([rows, columns], dim=-1).flatten(0, 1))
    return torch.cat(grids)


@torch.no_grad()
def start_at_sines(model: ARGenSegForConditionalGeneration, amplitude: float = 0.3) -> None:
    """The same code of place for image tokens and for the queries of every scale: attention finds them alike."""
    width = model.config.text_config.hidden_size
    tower = model.model.vlm.vision_tower
    tower.position_embeddings.copy_(amplitude * sines([tower.grid_size[0]], width))
    model.model.position_embedding.weight.copy_(
        amplitude * sines(model.config.visual_tokenizer_config.patch_nums, width)
    )


def adopt_visual_tokenizer(
    model: ARGenSegForConditionalGeneration, processor: ARGenSegProcessor, folder: str
) -> tuple[ARGenSegForConditionalGeneration, ARGenSegProcessor]:
    """Model and processor with the visual tokenizer in `folder`, which may have another codebook and other scales.

    Everything that is not about codes is kept: where things are is not learned anew. The rows of the codebook in
    embedding and head, and the projector of code features, start afresh unless the codes are the same; a scale of a
    side that the old tokenizer had keeps its embeddings.

    Raises:
        ValueError: a scale has a side that the old tokenizer had not, or the visual tokens are not the tail of the
            vocabulary.
    """
    new, old = load_visual_tokenizer(folder), processor.visual_tokenizer
    assert old is not None
    sides, old_sides = new.config.patch_nums, old.config.patch_nums
    codes = zip(new.quantize.parameters(), old.quantize.parameters(), strict=True)
    if sides == old_sides and all(torch.equal(a, b) for a, b in codes):
        return model, rebuild_processor(processor, new)
    if not set(sides) <= set(old_sides):
        raise ValueError(f"{folder} has the scales {sides}, the model {old_sides}: it has no embeddings for the others")
    if new.config.vocab_size < old.config.vocab_size:
        raise ValueError(
            f"{folder} has {new.config.vocab_size} codes, fewer than the model's {old.config.vocab_size}: the visual "
            "tokens beyond cannot be taken out of its vocabulary"
        )
    first = processor.visual_token_offset
    if first + old.config.vocab_size != len(processor.tokenizer):
        raise ValueError("the visual tokens are not the tail of the vocabulary")
    processor.tokenizer.add_tokens(
        [VISUAL_TOKEN.format(code) for code in range(old.config.vocab_size, new.config.vocab_size)],
        special_tokens=True,
    )
    config = copy.deepcopy(model.config)
    config.visual_tokenizer_config = new.config
    config.text_config.vocab_size = first + new.config.vocab_size
    fresh = ARGenSegForConditionalGeneration(config)
    state = fresh.state_dict()
    for name, tensor in model.state_dict().items():
        if name.startswith(("model.quantizer.", "model.generation_projector.")):
            continue
        if name in ("model.scale_embedding.weight", "model.position_embedding.weight"):
            rows = tensor.split(1 if "scale" in name else [side * side for side in old_sides])
            state[name] = torch.cat([rows[old_sides.index(side)] for side in sides])
        elif state[name].shape == tensor.shape and "embed_tokens" not in name and "lm_head" not in name:
            state[name] = tensor
        else:
            state[name][:first] = tensor[:first]
    fresh.load_state_dict(state)
    fresh.set_visual_tokenizer(new)
    fresh.generation_config = model.generation_config
    return fresh, rebuild_processor(processor, new)


def rebuild_processor(processor: ARGenSegProcessor, visual_tokenizer: Any) -> ARGenSegProcessor:
    """The same processor around another visual tokenizer."""
    return ARGenSegProcessor(
        processor.image_processor,
        processor.tokenizer,
        visual_tokenizer,
        chat_template=processor.chat_template,
        image_seq_length=processor.image_seq_length,
        segmentation_prompt=processor.segmentation_prompt,
        segmentation_answer=processor.segmentation_answer,
        mask_marker=processor.mask_marker,
    )
