"""A small text tokenizer for models trained from scratch: byte-level BPE with InternVL's chat tokens and a codebook."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from processing.picture_spans import VISUAL_TOKEN

CHAT_TOKENS = ["<pad>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<gen_start>", "<gen_end>"]


def train_text_tokenizer(texts: Iterable[str], text_vocab_size: int, num_codes: int, context: int):
    """Trains BPE on `texts`; the ids of `num_codes` visual tokens follow the text vocabulary.

    The id of codebook entry j is that of entry 0 plus j, as the model asks for.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=text_vocab_size,
        special_tokens=CHAT_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        extra_special_tokens={
            "image_token": "<IMG_CONTEXT>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "gen_start_token": "<gen_start>",
            "gen_end_token": "<gen_end>",
        },
        model_max_length=context,
        padding_side="left",
    )
    tokenizer.add_tokens([VISUAL_TOKEN.format(code) for code in range(num_codes)], special_tokens=True)
    return tokenizer
