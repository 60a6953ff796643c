"""The tokenizer of a released checkpoint, built without its remote code: InternLM2's SentencePiece model as a fast one.

The released code reads `tokenizer.model` with the SentencePiece library, after cutting out the added tokens. Here the
same pieces become a BPE of `tokenizers`; tests hold the ids against SentencePiece itself. Known to differ: a text that
is one user-defined piece and nothing else (`[UNUSED_TOKEN_3]`) has no space before it, and an unused piece that an
added token renames (`<|im_end|>` does) is no longer found under its old name. A folder that has `tokenizer.json` needs
none of this.
"""

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf

from .picture_spans import VISUAL_TOKEN

# what stands before the first visual token, nearest last
BEFORE_VISUAL = ("<ge_start>", "<ge_end>", "<MASK_CONTEXT>")
NORMAL, USER_DEFINED, BPE_MODEL = 1, 4, 2  # SentencePiece's enumerations
SPACE = "▁"


def load_released_tokenizer(folder: Path, vocab_size: int, num_codes: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a released folder.

    Visual tokens that the folder leaves out are added, if they come to stand where the model has them.

    Args:
        folder: holds `tokenizer.json`, or `tokenizer.model` with `added_tokens.json` or `tokenizer_config.json`.
        vocab_size: rows of the model's head; the last `num_codes` of them are the codebook.

    Raises:
        ValueError: no tokenizer, one that cannot be read, or one whose ids do not fit the model.
    """
    settings = read_json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").exists():
        source = folder / "tokenizer.json"
        try:
            backend = Tokenizer.from_file(str(source))
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(f"{source} cannot be read: {error}") from error
    elif (folder / "tokenizer.model").exists():
        source = folder / "tokenizer.model"
        backend = build_from_sentencepiece(source, read_added_tokens(folder), settings.get("add_bos_token", True))
    else:
        raise ValueError(f"{folder} has neither tokenizer.json nor tokenizer.model")
    first = vocab_size - num_codes
    _add_visual_tokens(backend, num_codes, first)
    check_ids(backend, source, first, num_codes)
    special = {name: _content(settings.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    defaults = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=settings.get("model_max_length", 8192),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **{name: token or defaults[name] for name, token in special.items()},
    )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file. Raises ValueError for anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return content


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def read_added_tokens(folder: Path) -> dict[int, AddedToken]:
    """The added tokens by id, of `tokenizer_config.json` (with their flags) and `added_tokens.json` (all special).

    Raises:
        ValueError: the two files contradict each other.
    """
    added: dict[int, AddedToken] = {}
    for number, token in read_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {}).items():
        flags = {name: token.get(name, False) for name in ("lstrip", "rstrip", "single_word")}
        added[int(number)] = AddedToken(token["content"], normalized=False, special=token.get("special", True), **flags)
    for content, number in read_json(folder / "added_tokens.json").items():
        if number in added and added[number].content != content:
            raise ValueError(
                f"{folder / 'added_tokens.json'} gives the id {number} to {content!r}, tokenizer_config.json to "
                f"{added[number].content!r}"
            )
        added.setdefault(number, AddedToken(content, normalized=False, special=True))
    return added


def build_from_sentencepiece(file: Path, added: dict[int, AddedToken], add_bos: bool = True) -> Tokenizer:
    """A SentencePiece BPE model, with the added tokens of its folder, as a fast tokenizer.

    An added token with the id of a piece takes its place (InternLM2 names some of its unused pieces in this way).

    Raises:
        ValueError: not a SentencePiece BPE model, or an added token cannot have its id.
    """
    proto = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except Exception as error:  # DecodeError of whichever protobuf there is
        raise ValueError(f"{file} is not a SentencePiece model: {error}") from error
    if not proto.pieces or proto.trainer_spec.model_type != BPE_MODEL:
        raise ValueError(f"{file} is not a SentencePiece model of the BPE kind")
    names = [added[i].content if i in added else piece.piece for i, piece in enumerate(proto.pieces)]
    vocabulary = {name: i for i, name in enumerate(names)}
    unknown = names[proto.trainer_spec.unk_id]
    model = BPE(vocabulary, _merges(proto), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    user_defined = [p.piece for i, p in enumerate(proto.pieces) if p.type == USER_DEFINED and i not in added]
    tokenizer.normalizer = _normalizer(proto.normalizer_spec, user_defined)
    tokenizer.decoder = _decoder(proto.normalizer_spec.add_dummy_prefix)
    tokenizer.add_tokens([AddedToken(piece, normalized=True, special=False) for piece in user_defined])
    tokenizer.add_tokens([added[number] for number in sorted(added)])
    for number, token in added.items():
        if tokenizer.token_to_id(token.content) != number:
            raise ValueError(
                f"{file}: the added token {token.content!r} should have the id {number} and gets "
                f"{tokenizer.token_to_id(token.content)}; the added tokens do not belong to this model"
            )
    if add_bos:
        bos = names[proto.trainer_spec.bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, proto.trainer_spec.bos_id)]
        )
    return tokenizer


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Every way to make a piece out of two, in the order in which SentencePiece prefers the result."""
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces) if piece.type == NORMAL}
    merges = []
    for piece in sorted(ids, key=lambda piece: (-proto.pieces[ids[piece]].score, ids[piece])):
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = [cut for cut in cuts if cut[0] in ids and cut[1] in ids]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def _normalizer(spec: Any, user_defined: list[str]) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        # Not before a user-defined piece alone: tokenizers sends these through here too, to know what to look for.
        alone = "|".join(map(re.escape, user_defined))
        steps.append(normalizers.Replace(Regex(rf"\A(?!(?:{alone})\z)" if alone else r"\A"), SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _decoder(add_dummy_prefix: bool) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)] if add_dummy_prefix else steps)


def _add_visual_tokens(tokenizer: Tokenizer, num_codes: int, first: int) -> None:
    """Adds the visual tokens if there are none and the next free id is the first visual one."""
    if tokenizer.token_to_id(VISUAL_TOKEN.format(0)) is None and tokenizer.get_vocab_size() == first:
        names = [VISUAL_TOKEN.format(code) for code in range(num_codes)]
        tokenizer.add_tokens([AddedToken(name, normalized=False, special=True) for name in names])


def check_ids(tokenizer: Tokenizer, source: Path, first: int, num_codes: int) -> None:
    """Check that the picture vocabulary stands where the model has it: visual tokens from `first` on, in order.

    Raises:
        ValueError: a token is missing or has another id; names the file, the token and both ids.
    """
    wanted = {name: first - 3 + i for i, name in enumerate(BEFORE_VISUAL)}
    wanted |= {VISUAL_TOKEN.format(code): first + code for code in range(num_codes)}
    for token, number in wanted.items():
        if tokenizer.token_to_id(token) != number:
            raise ValueError(
                f"{source} does not fit the weights: {token!r} has the id {tokenizer.token_to_id(token)}, and the "
                f"model has it at {number} (its last {num_codes} ids are the visual tokens, after "
                f"{', '.join(BEFORE_VISUAL)})"
            )
    for token in ("<IMG_CONTEXT>", "<img>", "</img>", "<|im_start|>", "<|im_end|>"):
        found = tokenizer.token_to_id(token)
        if found is None or found >= first:
            raise ValueError(f"{source} does not fit the weights: it lacks {token!r}")
