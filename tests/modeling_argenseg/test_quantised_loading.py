"""Half precision and quantised weights: what draws keeps its precision, and the model still draws."""

import importlib.metadata
import itertools
from typing import Any

import pytest
import tiny
import torch
import toy
from accelerate.utils import send_to_device
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, TorchAoConfig

CUDA = torch.cuda.is_available()
BITSANDBYTES = "4/8-bit weights of bitsandbytes need a CUDA GPU and `pip install bitsandbytes`"
TORCHAO = "needs `pip install torchao` (left out by default: where it is installed, every import takes twice as long)"
PICTURE_PATH = ("generation_projector", "quantizer", "scale_embedding", "position_embedding")


def installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.fixture(params=["internvl", "llava", "hybrid"])
def folder(request, tmp_path):
    vlm = {"internvl": tiny.internvl_config, "llava": tiny.llava_config, "hybrid": tiny.hybrid_config}[request.param]()
    tiny.model(vlm).save_pretrained(tmp_path)
    return tmp_path


def masks(model: Any, processor: Any) -> list[list[torch.Tensor]]:
    """What the toy model draws for all that it knows."""
    prompts = [*toy.REQUESTS, toy.BOTH, *toy.ABSENT]
    chats = [processor.build_segmentation_conversation(toy.photograph(), prompt) for prompt in prompts]
    inputs = processor.apply_chat_template(chats, tokenize=True, return_dict=True, add_generation_prompt=True)
    inputs = send_to_device(inputs, model.device)
    outputs = model.generate(**inputs, return_dict_in_generate=True)
    sizes = [toy.photograph().size[::-1]] * len(prompts)
    start = inputs["input_ids"].shape[1]
    answers = processor.post_process_segmentation(outputs, target_sizes=sizes, labels=prompts, prompt_length=start)
    return [[torch.as_tensor(segment["mask"]) for segment in answer["segments"]] for answer in answers]


def check_same_masks(model: Any, toy_folder: Any, alike: float) -> None:
    processor = AutoProcessor.from_pretrained(toy_folder)
    expected = masks(AutoModelForImageTextToText.from_pretrained(toy_folder), processor)
    found = masks(model, processor)
    assert [len(answer) for answer in found] == [len(answer) for answer in expected] == [1, 1, 2, 0, 0]
    for one, other in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert (one == other).float().mean() >= alike


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_leaves_the_picture_path(folder, dtype):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    whole = {name for name, tensor in model.named_parameters() if tensor.dtype == torch.float32}
    kept = ("quantizer",) if dtype == torch.bfloat16 else ("quantizer", "generation_projector")
    assert whole == {name for name, _ in model.named_parameters() if name.split(".")[1] in kept}
    assert model.lm_head.weight.dtype == model.get_input_embeddings().weight.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_half_precision_draws_the_same(toy_folder, dtype, attention):
    model = AutoModelForImageTextToText.from_pretrained(toy_folder, dtype=dtype, attn_implementation=attention)
    check_same_masks(model, toy_folder, alike=0.98)


@pytest.mark.parametrize("scale_attention", ["causal", "block"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains(scale_attention, dtype, tmp_path):
    tiny.model(scale_attention=scale_attention).save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=dtype).train()
    ids = tiny.stream(tiny.IMAGE, tiny.CAT, tiny.GEN_START, tiny.pictures(1), 5)
    model(ids, pixel_values=tiny.images(1), labels=ids).loss.backward()
    for part in (model.model.generation_projector[0].weight, model.model.scale_embedding.weight, model.lm_head.weight):
        assert part.grad.isfinite().all() and part.grad.any()


def test_device_map_auto(toy_folder):
    """On a machine without a GPU this is the CPU, and on one with several the model is spread over them."""
    model = AutoModelForImageTextToText.from_pretrained(toy_folder, device_map="auto")
    check_same_masks(model, toy_folder, alike=0.98 if CUDA else 1.0)


def quantised_names(model: torch.nn.Module) -> set[str]:
    return {name for name, tensor in model.named_parameters() if type(tensor.data) is not torch.Tensor}


def check_picture_path(names: set[str]) -> None:
    """The language model is quantised, and nothing that draws is."""
    assert len([name for name in names if name.startswith("model.vlm.language_model.layers.")]) == 14
    assert not [name for name in names if name.split(".")[1] in PICTURE_PATH or "lm_head" in name or "embed" in name]


@pytest.mark.skipif(not installed("torchao"), reason=TORCHAO)
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
class TestTorchao:
    def load(self, folder: Any, kind: str) -> Any:
        from torchao import quantization

        config = TorchAoConfig(quant_type=getattr(quantization, kind)())
        return AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config, dtype=torch.float32)

    def test_it_leaves_the_picture_path(self, folder, kind):
        check_picture_path(quantised_names(self.load(folder, kind)))

    def test_it_draws_nearly_the_same(self, toy_folder, kind):
        check_same_masks(self.load(toy_folder, kind), toy_folder, alike=0.9)

    def test_it_is_saved_and_loaded(self, toy_folder, kind, tmp_path):
        model = self.load(toy_folder, kind)
        model.save_pretrained(tmp_path)
        again = AutoModelForImageTextToText.from_pretrained(tmp_path)
        assert quantised_names(again) == quantised_names(model) and quantised_names(model)
        ids = tiny.stream(5, 6, 7)
        with torch.no_grad():
            torch.testing.assert_close(again(ids).logits, model(ids).logits)


@pytest.mark.skipif(installed("torchao"), reason="torchao is there")
def test_without_torchao_the_error_says_what_to_install(folder):
    with pytest.raises((ImportError, ValueError), match="pip install torchao"):
        config = TorchAoConfig(quant_type="int8_weight_only")
        AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config)


@pytest.mark.gpu
@pytest.mark.skipif(not (CUDA and installed("bitsandbytes")), reason=BITSANDBYTES)
@pytest.mark.parametrize("options", [{"load_in_8bit": True}, {"load_in_4bit": True}])
def test_bitsandbytes_leaves_the_picture_path(folder, options):
    config = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16, **options)
    model = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    check_picture_path({name for name, tensor in model.named_parameters() if tensor.dtype in (torch.int8, torch.uint8)})
    ids = tiny.stream(tiny.CAT, 5).to(model.device)
    tiny.generate(model, {"input_ids": ids}, [tiny.GEN_START, tiny.DONE])


@pytest.mark.parametrize("options", [{"load_in_8bit": True}, {"load_in_4bit": True}])
def test_bitsandbytes_would_leave_the_picture_path(folder, options):
    """Which modules its quantiser would convert, asked of the quantiser itself; its kernels need a GPU."""
    from transformers.quantizers.auto import AutoHfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    model = AutoModelForImageTextToText.from_pretrained(folder)
    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(**options))
    skipped = quantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    check_picture_path({f"{name}.weight" for name in linear if should_convert_module(name, skipped)})
