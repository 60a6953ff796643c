"""From a plain vision-language model to a folder that trains and draws: what is kept, what is new, what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import own_masks
import pytest
import tiny
import tiny_released
import tiny_vlms
import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, Qwen3VLConfig, pipeline

from modeling_argenseg import VARTokenizer
from processing.chat_template import internvl_format, make_chat_template
from trl_recipes import from_vlm, sft
from trl_recipes.chat_format import read_chat_format
from trl_recipes.lora import read_metrics
from trl_recipes.visual_tokenizers import load_visual_tokenizer

KINDS = {"internvl": tiny_vlms.internvl, "llava": tiny_vlms.llava, "qwen3_vl": tiny_vlms.qwen3_vl}
SIDES = {"internvl": 28, "llava": 28, "qwen3_vl": 16}
IMAGE_TOKENS = {"internvl": 1, "llava": 4, "qwen3_vl": 4}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("visual_tokenizer")
    tiny.visual_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in KINDS.items()}


@pytest.fixture(scope="module")
def started(plain, pictures, tmp_path_factory) -> dict[str, Path]:
    """Folders that the command wrote."""
    folders = {}
    for name, vlm in plain.items():
        folders[name] = tmp_path_factory.mktemp("started") / name
        size = ("--image_size", "16") if name == "qwen3_vl" else ()
        from_vlm.main(command(vlm, pictures, folders[name], *size))
    return folders


def command(vlm: Path, pictures: Path, output: Path, *more: str) -> list[str]:
    return ["--vlm", str(vlm), "--visual_tokenizer", str(pictures), "--output", str(output), *more]


def load(folder: Path):
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval(), AutoProcessor.from_pretrained(folder)


every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_the_tokens_of_pictures_follow_those_of_the_tokenizer(kind, plain, started):
    model, processor = load(started[kind])
    before = len(AutoTokenizer.from_pretrained(plain[kind]))
    config = model.config
    assert (config.gen_start_token_id, config.gen_end_token_id, config.visual_token_offset) == (
        before, before + 1, before + 2,
    )  # fmt: skip
    assert processor.gen_start_token_id == before and processor.visual_token_offset == before + 2
    assert (
        processor.visual_vocab_size == tiny.CODES
        and config.scale_attention == "block"
        and config.visual_loss == "scale"
    )
    assert processor.image_token_id == config.image_token_id
    rows = len(processor.tokenizer)
    assert config.text_config.vocab_size == max(rows, before + tiny_vlms.SPARE_ROWS)
    assert processor.tokenizer.model_max_length == 512  # the language model's positions, not the tokenizer's 4096


def test_answers_are_not_left_to_chance(plain, pictures, tmp_path):
    """Sampling and penalties of a published vision-language model would also keep words from being read at once."""
    own = dict(do_sample=True, temperature=0.7, top_p=0.8, repetition_penalty=1.05, eos_token_id=[257, 256])
    vlm = changed(plain["qwen3_vl"], tmp_path / "vlm", "generation_config.json", **own)
    from_vlm.main(command(vlm, pictures, tmp_path / "out", "--image_size", "16"))
    model, processor = load(tmp_path / "out")
    config = model.generation_config
    assert not config.do_sample and config.repetition_penalty is None and config.max_new_tokens == 256
    assert config.eos_token_id == [256, 257, processor.tokenizer.eos_token_id]
    assert config.picture_answer_ids == processor.picture_answer_ids


@every_kind
def test_images_are_squashed_not_cut(kind, plain, started):
    _, processor = load(started[kind])
    image = np.zeros((40, 200, 3), np.uint8)
    image[:, :40] = image[:, -40:] = 255  # both ends of a wide image
    inputs = processor(images=Image.fromarray(image), text=processor.image_token)
    assert inputs["pixel_values"].shape == (1, 3, SIDES[kind], SIDES[kind])
    row = inputs["pixel_values"][0, 0, 8]
    assert row[0] > row[SIDES[kind] // 2] and row[-1] > row[SIDES[kind] // 2]
    settings = json.loads((plain[kind] / "preprocessor_config.json").read_text())
    assert list(processor.image_processor.image_mean) == settings["image_mean"]
    assert list(processor.image_processor.image_std) == settings["image_std"]
    assert (inputs["input_ids"] == processor.image_token_id).sum() == IMAGE_TOKENS[kind]


CHATS = {
    "internvl": (
        "<|im_start|>user\n<img><IMG_CONTEXT></img>\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n"
    ),
    "qwen3_vl": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>q<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n"
    ),
    "llava": "<s>USER: <image>\nq ASSISTANT: a</s> USER: r ASSISTANT:",
}


@every_kind
def test_the_chat_format_is_that_of_the_vision_language_model(kind, started):
    _, processor = load(started[kind])
    user, again = ([{"type": "text", "text": text}] for text in "qr")
    conversation = [
        {"role": "user", "content": [{"type": "image"}, *user]},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": again},
    ]
    assert processor.apply_chat_template(conversation, add_generation_prompt=True) == CHATS[kind]


@every_kind
def test_what_the_assistant_says_is_marked_with_its_end(kind, started):
    _, processor = load(started[kind])
    mask = np.ones((40, 60), bool)
    conversation = processor.build_segmentation_conversation(own_masks.photograph(0), "it", mask)
    inputs = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    spoken = inputs["input_ids"][0][torch.as_tensor(inputs["assistant_masks"])[0].bool()]
    words = processor.tokenizer.decode([i for i in spoken if i < processor.gen_start_token_id])
    assert words.strip() == "Sure, the segmentation result: ." + processor.tokenizer.eos_token
    assert spoken[-1] == processor.tokenizer.eos_token_id and int((spoken >= processor.visual_token_offset).sum()) == 30
    bos = processor.tokenizer.bos_token_id
    assert bos is None or (inputs["input_ids"][0] == bos).sum() == 1


def test_an_answer_ends_as_the_generation_configuration_says(plain, pictures, tmp_path):
    """A tokenizer may call another token the end of text than the one that ends a turn."""
    vlm = changed(plain["internvl"], tmp_path / "vlm", "tokenizer_config.json", eos_token="<|endoftext|>")
    tokenizer = AutoTokenizer.from_pretrained(vlm)
    turn, text = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    settings = json.loads((vlm / "generation_config.json").read_text()) | {"eos_token_id": [turn]}
    (vlm / "generation_config.json").write_text(json.dumps(settings))
    from_vlm.main(command(vlm, pictures, tmp_path / "out"))
    model, processor = load(tmp_path / "out")
    conversation = processor.build_segmentation_conversation(own_masks.photograph(0), "it", "mask.png")
    assert processor.apply_chat_template(conversation).endswith("Sure, the segmentation result: <mask>.<|im_end|>\n")
    assert model.generation_config.eos_token_id == sorted([turn, text])


@every_kind
def test_it_says_in_words_what_it_said(kind, plain, started):
    before = AutoModelForImageTextToText.from_pretrained(plain[kind]).eval()
    model, processor = load(started[kind])
    content = [{"type": "image", "image": own_masks.photograph(1)}, {"type": "text", "text": "And this?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    words = model.config.gen_start_token_id
    own = from_vlm.own_inputs(before, model, inputs)
    torch.testing.assert_close(
        model(**inputs).logits[..., :words], before(**own).logits[..., :words], atol=1e-4, rtol=1e-4
    )
    with torch.no_grad():
        model.model.vlm.language_model.layers[0].self_attn.o_proj.weight.neg_()
    with pytest.raises(ValueError, match=r"cannot be built on: asked about an image, its logits differ by \d+%"):
        from_vlm.check_words(before, model, processor)


@every_kind
def test_it_learns_to_draw_by_the_recipe_of_trl(kind, started, tmp_path):
    data = own_masks.as_jsonl(tmp_path / "own")
    changes = dict(max_steps=60, eval_steps=60, save_steps=60)
    sft.main(own_masks.trl_command("sft_full", started[kind], data, tmp_path / "out", **changes))
    measured = read_metrics(tmp_path / "out")
    assert measured[0]["t_acc"] == 0 and measured[-1]["t_acc"] == 1  # fraction of things that are there and are drawn
    before, after = (
        AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in (started[kind], tmp_path / "out")
    )
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    tower = {name for name in moved if ".visual." in name or ".vision_tower." in name}
    assert any("multi_modal_projector" in name or "merger" in name for name in moved)
    assert all("merger" in name for name in tower) and not any("quantizer" in name for name in moved)
    pipe = pipeline("image-segmentation", model=str(tmp_path / "out"))
    (segment,) = pipe(own_masks.photograph(0), text=own_masks.PROMPTS["square"])
    assert segment["mask"].size == (own_masks.WIDTH, own_masks.HEIGHT)
    assert pipe.model.generation_config.picture_answer_ids == pipe.processor.picture_answer_ids


@every_kind
@pytest.mark.parametrize("batch_size", [None, 3])
def test_the_pipeline_draws_what_generate_draws(kind, batch_size, started, monkeypatch):
    """With random weights in its new parts, too, so that it draws anything at all."""
    model, processor = load(started[kind])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.requires_grad else None
    options = dict(picture_prefill="always", do_sample=False, max_new_tokens=12, return_dict_in_generate=True)
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    images = [Image.fromarray(noise), own_masks.photograph(0)]
    texts, expected, found = ["it", "the other one"], [], []
    for image in images:
        chats = [processor.build_segmentation_conversation(image, text) for text in texts]
        inputs = processor.apply_chat_template(chats, tokenize=True, return_dict=True, add_generation_prompt=True)
        expected += [row[0] for row in model.generate(**inputs, **options).picture_token_logprobs]
    assert not torch.allclose(expected[0], expected[2], atol=1e-3)
    pipe, generate = pipeline("image-segmentation", model=model, processor=processor), model.generate

    def spy(**inputs):
        outputs = generate(**inputs)
        found.extend(row[0] for row in outputs.picture_token_logprobs)
        return outputs

    monkeypatch.setattr(model, "generate", spy)
    pipe(images, text=[texts, texts], batch_size=batch_size, **options)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), atol=1e-4, rtol=1e-4)


def changed(vlm: Path, folder: Path, file: str, **changes) -> Path:
    shutil.copytree(vlm, folder)
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
    return folder


def refused(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        from_vlm.main(arguments)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages | length }}", "writes a text 0 times"),
        ("{% for m in messages %}{{ loop.index }}{{ m['content'][-1]['text'] }}{% endfor %}", "before later turns"),
        (
            "{% for m in messages %}{{ m['content'][-1]['text'] }}{{ loop.length }}{% endfor %}",
            "otherwise when something",
        ),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}", "can only concatenate str"),
        (  # an image between role and text, as llava-interleave writes it
            "{% for m in messages %}{{ m['role'] + ' ' }}{% for b in m['content'] %}"
            "{{ '\n' + b['text'] if b['type'] == 'text' else '<image>' }}{% endfor %}{% endfor %}",
            "'user \\\\n' otherwise when something follows: 'user <image>",
        ),
    ],
)
def test_a_template_that_does_more_is_refused(template, message, plain, pictures, tmp_path):
    vlm = changed(plain["llava"], tmp_path / "vlm", "chat_template.json", chat_template=template)
    output = tmp_path / "out"
    refused(command(vlm, pictures, output), f"cannot be read off its template .*{message}.*--chat_template")
    assert not output.exists()


def test_the_template_of_the_processor_goes_before_that_of_the_tokenizer(plain, pictures, tmp_path):
    vlm = changed(plain["llava"], tmp_path / "vlm", "tokenizer_config.json", chat_template="{{ messages | length }}")
    from_vlm.main(command(vlm, pictures, tmp_path / "out"))
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}]
    assert load(tmp_path / "out")[1].apply_chat_template(conversation) == "<s>USER: <image>\nq "


def test_a_template_of_ones_own(plain, pictures, tmp_path):
    vlm = changed(plain["llava"], tmp_path / "vlm", "chat_template.json")
    (vlm / "chat_template.json").unlink()
    refused(command(vlm, pictures, tmp_path / "out"), "has no chat template: give a template with --chat_template")
    mine = tmp_path / "mine.jinja"
    mine.write_text(make_chat_template(internvl_format("<image>", "(", ")", system="Be brief.")))
    from_vlm.main(command(vlm, pictures, tmp_path / "out", "--chat_template", str(mine)))
    _, processor = load(tmp_path / "out")
    conversation = processor.build_segmentation_conversation(own_masks.photograph(0), "it")
    text = processor.apply_chat_template(conversation)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n(<image>)\nPlease")


SYSTEM = "{% if messages[0]['role'] != 'system' %}S:You help. {% endif %}"
TURNS = "{% for m in messages %}{{ {'system': 'S:', 'user': 'U:', 'assistant': 'A:'}[m['role']] }}"
TEXTS = "{% for b in m['content'] %}{{ b['text'] if b['type'] == 'text' else '#' }}{% endfor %}"
END = "{{ '</s>' if m['role'] == 'assistant' else ' ' }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"


@pytest.mark.parametrize(
    ("template", "system", "image"),
    [
        (SYSTEM + TURNS + TEXTS + END, True, "[#]"),  # a default system message, an image where it stands
        (TURNS + TEXTS + END, True, "[#]"),
        (TURNS.replace("'S:'", "'SYSTEM: '").replace("'U:'", "'QUESTION: '") + TEXTS + END, True, "[#]"),
        ("{{ raise_exception('no') if messages[0]['role'] == 'system' }}" + TURNS + TEXTS + END, False, "[#]"),
        (TURNS + TEXTS.replace("'#'", "''") + END, True, "[#]\n"),  # images are not written at all
    ],
)
def test_what_is_read_off_a_template_writes_the_same(template, system, image, plain):
    tokenizer = AutoTokenizer.from_pretrained(plain["llava"])
    chat = read_chat_format(tokenizer, template, "#", "[#]", ["</s>"])
    assert chat.image == image and chat.end == "</s>" and ("system" in chat.before) == system
    made = make_chat_template(chat)
    turns = [("system", "be"), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    conversation = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    for start in (0, 1) if system else (1,):
        for end in range(start + 1, 6):
            for prompt in {turns[end - 1][0] == "user", False}:
                texts = [
                    tokenizer.apply_chat_template(
                        conversation[start:end], chat_template=one, tokenize=False, add_generation_prompt=prompt
                    )
                    for one in (template, made)
                ]
                assert texts[0] == texts[1]
    if not system:
        with pytest.raises(TemplateError, match="knows no turns of the role system"):
            tokenizer.apply_chat_template(conversation, chat_template=made, tokenize=False)


def test_what_is_not_there_or_of_another_kind_is_told(plain, pictures, tmp_path):
    vlm, output = plain["llava"], tmp_path / "out"
    refused(command(tmp_path / "none", pictures, output), "no model folder")
    refused(command(vlm, tmp_path / "none", output), "no model folder")
    refused(command(vlm, tmp_path / "none.pth", output), "no file")
    refused(command(vlm, vlm, output), "this is a llava, and no visual tokenizer")
    refused(command(vlm, pictures, vlm), "is not empty: choose another folder")
    refused(command(vlm, pictures, output, "--image_size", "56"), "--image_size 56: the vision tower .* for 28 x 28")
    refused(command(plain["qwen3_vl"], pictures, output, "--image_size", "20"), "covers 8 pixels; take a multiple")
    assert from_vlm.image_geometry(tiny.qwen_vl_config(Qwen3VLConfig)) == ((128, 128), [16, 16])
    refused(command(changed(vlm, tmp_path / "a", "config.json", image_token_index=5000), pictures, output), "id 5000")
    nameless = changed(vlm, tmp_path / "b", "tokenizer_config.json", eos_token=None)
    refused(command(nameless, pictures, output), "no eos_token")


def test_visual_tokenizers_are_found_in_a_model_and_in_a_pth(started, pictures, tmp_path):
    expected = load_visual_tokenizer(str(pictures)).state_dict()
    in_model = load_visual_tokenizer(str(started["llava"])).state_dict()
    assert all(torch.equal(tensor, in_model[name]) for name, tensor in expected.items())
    vae = VARTokenizer(tiny_released.visual_tokenizer_config()).state_dict()
    torch.save(vae, tmp_path / "vae.pth")
    in_file = load_visual_tokenizer(str(tmp_path / "vae.pth"))
    assert all(torch.equal(tensor, in_file.state_dict()[name]) for name, tensor in vae.items())
    assert in_file.config.num_tokens == 680
