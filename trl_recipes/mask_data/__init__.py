"""One's own masks, whatever their format, as a `datasets.Dataset`, as tokens and as batches.

    from trl_recipes.mask_data import MaskCollator, load_mask_data, tokenise_masks

    train = tokenise_masks(load_mask_data("my_masks/", "train"), processor)
    trainer = Trainer(model, args, train_dataset=train, data_collator=MaskCollator(processor))

`load_mask_data` lists the formats. `conversation_of` gives a row as a conversation with image and mask contents, for
trainers that tokenise by themselves.
"""

from .loading import has_split, load_mask_data, split_by_image
from .samples import BadSample, ReaderOptions
from .tokenising import MaskCollator, check_requests, conversation_of, target_masks, tokenise_masks

__all__ = [
    "BadSample",
    "MaskCollator",
    "ReaderOptions",
    "check_requests",
    "conversation_of",
    "has_split",
    "load_mask_data",
    "split_by_image",
    "target_masks",
    "tokenise_masks",
]
