"""The SentencePiece tokenizer of a released checkpoint, against SentencePiece itself."""

import json
import random
import re

import pytest

from processing.released_tokenizer import VISUAL_TOKEN, build_from_sentencepiece, load_released_tokenizer

sentencepiece = pytest.importorskip("sentencepiece")

CODES = 16
UNUSED = [f"[UNUSED_TOKEN_{i}]" for i in range(6)]
ADDED = "<img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box> <mask> <ge_start> <ge_end> <MASK_CONTEXT>"
WORDS = "the left dog red cat ball segment picture 图像 分割 狗 猫 左边 please perform instructions result 中文 hello"
TEXTS = [
    "hello", " hello", "  the  dog ", "", " ", "\n", "a\nb\n\n", "\tcat", "图像 分割狗。", "é€🙂", "▁the", "123 45",
    "the[UNUSED_TOKEN_3]dog [UNUSED_TOKEN_1]", "[UNUSED_TOKEN_9]", "<0x41>", "Sure, the segmentation result: .",
]  # fmt: skip


@pytest.fixture(scope="module", params=[True, False], ids=["dummy prefix", "no prefix"])
def model_file(request, tmp_path_factory):
    """Trained as InternLM2's: BPE with bytes to fall back on, text as it is, unused pieces at the end."""
    prefix = tmp_path_factory.mktemp("sentencepiece") / "tokenizer"
    rng = random.Random(0)
    lines = (" ".join(rng.choices(WORDS.split(), k=rng.randint(3, 12))) + rng.choice(".! ") for _ in range(600))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(prefix), model_type="bpe", vocab_size=450, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=request.param,
        allow_whitespace_only_pieces=True, split_digits=True, user_defined_symbols=UNUSED, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    return prefix.with_suffix(".model")


@pytest.fixture(scope="module")
def reference(model_file):
    return sentencepiece.SentencePieceProcessor(model_file=str(model_file))


def write_folder(folder, model_file, reference, visual=True, shift=0):
    """As released: two pieces renamed, the other added tokens after the pieces, `<ge_start>` before the codebook."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model_file.read_bytes())
    size = reference.get_piece_size()
    names = ADDED.split() + ([VISUAL_TOKEN.format(code) for code in range(CODES)] if visual else [])
    ids = {"<|im_end|>": reference.piece_to_id(UNUSED[4]), "<|im_start|>": reference.piece_to_id(UNUSED[5])}
    ids |= {name: size + i + shift for i, name in enumerate(names)}
    (folder / "added_tokens.json").write_text(json.dumps(ids))
    special = {str(number): {"content": name, "special": True} for name, number in ids.items() if name[0] == "<"}
    special |= {str(i): {"content": reference.id_to_piece(i), "special": True} for i in range(3)}
    settings = {"tokenizer_class": "InternLM2Tokenizer", "auto_map": {"AutoTokenizer": ["a.B", None]}}
    settings |= {"added_tokens_decoder": special, "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return ids, size + len(ADDED.split()) + CODES


@pytest.fixture(scope="module")
def loaded(model_file, reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    ids, vocab_size = write_folder(folder, model_file, reference)
    return load_released_tokenizer(folder, vocab_size, CODES), ids


def expected_ids(text, reference, ids):
    """As the released tokenizer does it: added tokens are cut out, SentencePiece reads what is between."""
    pieces = re.split("(" + "|".join(re.escape(name) for name in ids) + ")", text)
    result = [reference.bos_id()]
    for piece in pieces:
        result += [ids[piece]] if piece in ids else reference.encode(piece)
    return result


def random_texts(names, count=1500):
    rng = random.Random(1)
    parts = [*"the dogcat .,\n\t  图像分割狗猫é€🙂12", " picture", "▁", "  ", *UNUSED[:3], *names]
    return ["".join(rng.choices(parts, k=rng.randint(2, 25))) for _ in range(count)]


def test_pieces_alone(model_file, reference):
    tokenizer = build_from_sentencepiece(model_file, {})
    for text in [*TEXTS, *random_texts(())]:
        ids = reference.encode(text)
        if text not in UNUSED:  # see the builder: an unused piece that is all of the text gets no space before it
            assert tokenizer.encode(text).ids == [reference.bos_id(), *ids], text


def test_added_tokens(loaded, reference):
    tokenizer, ids = loaded
    assert all(tokenizer.convert_tokens_to_ids(name) == number for name, number in ids.items())
    plain = [text for text in random_texts(list(ids), 600) if not any(unused in text for unused in UNUSED)]
    assert len(plain) > 50
    prompt = "<|im_start|>user\n<img><IMG_CONTEXT></img>\n the dog<|im_end|>\n<ge_start><visual token 000003>"
    for text in [*TEXTS, *plain, prompt]:
        assert tokenizer(text)["input_ids"] == expected_ids(text, reference, ids), text


def test_decoding_gives_the_text_back(loaded):
    tokenizer, _ = loaded
    for text in ("hello world", " the  dog\n\n图像 🙂", "the left dog"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_survives_saving(loaded, tmp_path):
    tokenizer, _ = loaded
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    for text in [*TEXTS, *random_texts(["<img>"], 100)]:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_visual_tokens_are_added_where_they_belong(model_file, reference, tmp_path):
    _, vocab_size = write_folder(tmp_path, model_file, reference, visual=False)
    tokenizer = load_released_tokenizer(tmp_path, vocab_size, CODES)
    assert tokenizer.convert_tokens_to_ids(VISUAL_TOKEN.format(CODES - 1)) == vocab_size - 1


def change(folder, name, content):
    (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder, size: size + 1, "tokenizer.model does not fit the weights: '<ge_start>' has the id"),
        (lambda folder, size: change(folder, "tokenizer.model", b"junk"), "is not a SentencePiece model"),
        (lambda folder, size: (folder / "tokenizer.model").unlink(), "neither tokenizer.json nor tokenizer.model"),
        (lambda folder, size: change(folder, "added_tokens.json", b"{"), "added_tokens.json is not JSON"),
        (lambda folder, size: change(folder, "added_tokens.json", b'{"<img>": 0}'), "gives the id 0 to '<img>'"),
        (lambda folder, size: change(folder, "added_tokens.json", b'{"<new>": 9999}'), "should have the id 9999"),
        (lambda folder, size: change(folder, "tokenizer.json", b"{}"), "tokenizer.json cannot be read"),
    ],
)
def test_bad_tokenizers(model_file, reference, tmp_path, damage, message):
    _, vocab_size = write_folder(tmp_path, model_file, reference)
    vocab_size = damage(tmp_path, vocab_size) or vocab_size
    with pytest.raises(ValueError, match=message):
        load_released_tokenizer(tmp_path, vocab_size, CODES)


def test_added_tokens_out_of_place(model_file, reference, tmp_path):
    _, vocab_size = write_folder(tmp_path, model_file, reference, shift=1)
    with pytest.raises(ValueError, match=r"the added token .* should have the id"):
        load_released_tokenizer(tmp_path, vocab_size, CODES)
