"""Every short cut gives the ids of the plain way: prefilled words, one image for many prompts, static caches, previews.

The model has learned its answers (see toy.py), so that drafts are kept, cut and refused by its own choice.
"""

import copy
import threading
import time
import weakref
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from tiny import left_padded
from torch.utils._python_dispatch import TorchDispatchMode
from toy import ABSENT, BOTH, REQUESTS, photograph
from transformers import CompileConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from modeling_argenseg import ARGenSegForConditionalGeneration, recordings, static_steps
from modeling_argenseg.cache_name import CACHE
from modeling_argenseg.recordings import fused_norms
from processing import ARGenSegProcessor

PROMPTS = [REQUESTS[0], *ABSENT, BOTH, REQUESTS[1]]
SIZES = [1, 4, 9, 16]
every_attention = pytest.mark.parametrize("attention", ["eager", "sdpa"])
both_scales = pytest.mark.parametrize("scale_attention", ["causal", "block"])
both_caches = pytest.mark.parametrize("cache", [None, "static"])


def load(folder: Path, attention: str = "sdpa", scale_attention: str = "causal") -> ARGenSegForConditionalGeneration:
    model = ARGenSegForConditionalGeneration.from_pretrained(folder, attn_implementation=attention)
    model.config.scale_attention = scale_attention
    return model.eval()


@pytest.fixture(scope="module")
def processor(toy_folder: Path) -> ARGenSegProcessor:
    return ARGenSegProcessor.from_pretrained(toy_folder)


@pytest.fixture(scope="module")
def inputs(processor: ARGenSegProcessor) -> Any:
    """All prompts on the photograph, left-padded, as one batch."""
    chats: list[Any] = [processor.build_segmentation_conversation(photograph(), prompt) for prompt in PROMPTS]
    return processor.apply_chat_template(chats, tokenize=True, return_dict=True, add_generation_prompt=True)


def single(inputs: Any, row: int) -> dict[str, torch.Tensor]:
    ids = inputs["input_ids"][row, inputs["attention_mask"][row].bool()]
    return {**left_padded([ids[None]]), "pixel_values": inputs["pixel_values"][row : row + 1]}


def answers(outputs: Any, inputs: Any) -> list[list[int]]:
    """What each row wrote, up to its end."""
    rows = outputs.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(2) + 1] if 2 in row else row for row in rows]


def run(model: Any, inputs: Any, **options: Any) -> Any:
    return model.generate(**inputs, do_sample=False, return_dict_in_generate=True, **options)


def passes(model: Any) -> list[int]:
    """Filled with the length of each pass of the language model from now on."""
    lengths: list[int] = []
    hook = lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1])  # noqa: E731
    model.model.language_model.register_forward_pre_hook(hook, with_kwargs=True)
    return lengths


class TestSameIds:
    @both_caches
    @both_scales
    @every_attention
    def test_all_ways(self, toy_folder, processor, inputs, attention, scale_attention, cache) -> None:
        assert processor.tokenizer.eos_token_id == 2
        model = load(toy_folder, attention, scale_attention)
        rows = [single(inputs, row) for row in range(5)]
        plain = [answers(run(model, row, picture_prefill="never"), row)[0] for row in rows]
        fast = {"picture_answer_ids": processor.picture_answer_ids, "cache_implementation": cache}
        pictures = [row.count(processor.gen_start_token_id) for row in plain]
        assert pictures[0] == pictures[4] == 1 and pictures[1] == 0 and pictures[3] >= 1
        assert answers(run(model, inputs, **fast), inputs) == plain
        encoded = model.encode_image(**single(inputs, 1))
        assert answers(run(model, inputs, encoded_image=encoded, **fast), inputs) == plain
        without = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        assert answers(run(model, without, encoded_image=encoded, cache_implementation=cache), inputs) == plain
        for alone, expected in zip(rows, plain, strict=True):
            assert answers(run(model, alone, **fast), alone) == [expected]
            assert answers(run(model, alone, encoded_image=encoded, **fast), alone) == [expected]

    @pytest.mark.parametrize("limit", range(1, 14))
    def test_limits(self, toy_folder, processor, inputs, limit) -> None:
        model, ids = load(toy_folder), processor.picture_answer_ids
        plain = run(model, inputs, max_new_tokens=limit)
        fast = run(model, inputs, max_new_tokens=limit, picture_answer_ids=ids)
        assert torch.equal(plain.sequences, fast.sequences)
        assert plain.picture_scores == [pytest.approx(row, abs=1e-5) for row in fast.picture_scores]

    @pytest.mark.parametrize("change", [0, 3, -2])
    @both_caches
    def test_drafts_that_are_partly_wrong(self, toy_folder, processor, inputs, change, cache) -> None:
        """Wrong at once, in the middle, or only after the picture."""
        model, ids = load(toy_folder), list(processor.picture_answer_ids)
        ids[change] += 1
        fast = run(model, inputs, picture_answer_ids=ids, cache_implementation=cache)
        assert answers(fast, inputs) == answers(run(model, inputs), inputs)

    def test_prompts_that_end_in_gen_start(self, toy_folder, processor, inputs) -> None:
        model, alone = load(toy_folder), single(inputs, 0)
        ids = processor.picture_answer_ids
        before = torch.tensor([ids[: ids.index(processor.gen_start_token_id) + 1]])
        opened = left_padded([torch.cat([alone["input_ids"], before], dim=1), single(inputs, 1)["input_ids"]])
        pixels = inputs["pixel_values"][:2]
        plain = run(model, {**opened, "pixel_values": pixels})
        fast = run(model, {**opened, "pixel_values": pixels}, picture_answer_ids=ids)
        assert torch.equal(plain.sequences, fast.sequences) and [len(row) for row in fast.picture_scores] == [1, 0]

    @pytest.mark.parametrize("options", [{"repetition_penalty": 1.5}, {"output_logits": True}, {"max_time": 60.0}])
    def test_no_draft_where_every_step_counts(self, toy_folder, processor, inputs, options) -> None:
        model = load(toy_folder)
        plain = run(model, inputs, **options)
        lengths = passes(model)
        fast = run(model, inputs, picture_answer_ids=processor.picture_answer_ids, **options)
        assert torch.equal(plain.sequences, fast.sequences) and lengths[0] == inputs["input_ids"].shape[1]
        assert plain.logits is None or len(plain.logits) == len(fast.logits)

    def test_no_draft_where_the_prompt_is_read_in_chunks(self, toy_folder, processor, inputs) -> None:
        model = load(toy_folder)
        plain = run(model, inputs)
        fast = run(model, inputs, picture_answer_ids=processor.picture_answer_ids, prefill_chunk_size=8)
        assert torch.equal(plain.sequences, fast.sequences)

    def test_text_streamer(self, toy_folder, processor, inputs) -> None:
        model, alone = load(toy_folder), single(inputs, 0)

        class Words:
            def __init__(self) -> None:
                self.ids: list[int] = []

            def put(self, ids: torch.Tensor) -> None:
                self.ids += ids.flatten().tolist()

            def end(self) -> None:
                pass

        said = []
        for ids in (None, processor.picture_answer_ids):
            words = Words()
            run(model, alone, picture_answer_ids=ids, streamer=words)
            said.append(words.ids)
        assert said[0] == said[1] and len(said[0]) > alone["input_ids"].shape[1] + 3


class TestWork:
    def test_one_prefill_and_the_scales(self, toy_folder, processor, inputs) -> None:
        model, alone, ids = load(toy_folder), single(inputs, 0), processor.picture_answer_ids
        at, lengths = ids.index(processor.gen_start_token_id) + 1, passes(model)
        run(model, alone, picture_answer_ids=ids)
        after = len(ids) - at - 1  # what follows the picture is read with the last scale; the end is not read
        assert lengths == [alone["input_ids"].shape[1] + at, 4, 9, 16 + 1 + after]

    def test_the_image_is_read_once(self, toy_folder, processor, inputs) -> None:
        model = load(toy_folder)
        looked, lengths = [], passes(model)
        model.model.vlm.vision_tower.register_forward_hook(lambda *args: looked.append(1))
        encoded = model.encode_image(**single(inputs, 0))
        for _ in range(2):  # the handle is not used up
            run(model, inputs, encoded_image=encoded, picture_answer_ids=processor.picture_answer_ids)
        assert looked == [1] and lengths[0] == encoded.length
        ids = processor.picture_answer_ids
        at = ids.index(processor.gen_start_token_id) + 1
        assert lengths[1] == inputs["input_ids"].shape[1] - encoded.length + at

    def test_padding_of_the_encoded_prompt_is_left_out(self, toy_folder, inputs) -> None:
        model, alone = load(toy_folder), single(inputs, 0)
        plain = model.encode_image(**alone)
        padded = model.encode_image(**alone | left_padded([alone["input_ids"]], extra=3))
        assert torch.equal(padded.input_ids, plain.input_ids)
        for (keys, values), (other_keys, other_values) in zip(padded.layers, plain.layers, strict=True):
            assert torch.equal(keys, other_keys) and torch.equal(values, other_values)

    def test_always_draws(self, toy_folder, processor, inputs) -> None:
        model, ids = load(toy_folder), processor.picture_answer_ids
        outputs = run(model, inputs, picture_answer_ids=ids, picture_prefill="always")
        assert [len(row) >= 1 for row in outputs.picture_scores] == [True] * 5
        plain = run(model, inputs)
        both = zip(answers(outputs, inputs), answers(plain, inputs), plain.picture_scores, strict=True)
        assert [fast == slow for fast, slow, scores in both if scores] == [True] * 3

    def test_mistakes(self, toy_folder, processor, inputs) -> None:
        model = load(toy_folder)
        encoded = model.encode_image(**single(inputs, 0))
        with pytest.raises(ValueError, match="one prompt"):
            model.encode_image(**inputs)
        with pytest.raises(ValueError, match="no image"):
            model.encode_image(torch.tensor([[300, 301, 302]]))
        for ids in (torch.tensor([[3, 4, 5]]), encoded.input_ids[None]):
            with pytest.raises(ValueError, match="prompt 0 does not begin .* and go on after them"):
                run(model, {"input_ids": ids}, encoded_image=encoded)
        alone, pixels = single(inputs, 0), inputs["pixel_values"]
        with pytest.raises(ValueError, match="show something else than encoded_image"):
            run(model, alone | {"pixel_values": pixels[:1].flip(-1)}, encoded_image=encoded)
        two = torch.cat([alone["input_ids"], encoded.input_ids[-1:][None], alone["input_ids"][:, -1:]], dim=1)
        with pytest.raises(ValueError, match="an image beside that of encoded_image"):
            run(model, {"input_ids": two}, encoded_image=encoded)

    def test_an_answer_that_ends_before_its_picture(self, toy_folder, processor, inputs) -> None:
        model, ids = load(toy_folder), processor.picture_answer_ids
        ends = [processor.tokenizer.eos_token_id, ids[2]]
        assert ids[2] != processor.gen_start_token_id and ids.index(processor.gen_start_token_id) > 2
        fast = run(model, inputs, picture_answer_ids=ids, eos_token_id=ends)
        assert answers(fast, inputs) == answers(run(model, inputs, eos_token_id=ends), inputs)


class TestStatic:
    @both_scales
    def test_pictures_in_the_history(self, toy_folder, processor, inputs, scale_attention) -> None:
        model, alone = load(toy_folder, "sdpa", scale_attention), single(inputs, 3)
        plain = run(model, alone)
        model.generation_config.cache_implementation = "static"
        assert torch.equal(run(model, alone).sequences, plain.sequences)
        lengths = []
        for extra in (0, 4):
            answer = plain.sequences[:, alone["input_ids"].shape[1] : -1]
            ids = torch.cat([plain.sequences[:, :-1], *[answer] * extra], dim=1)
            again = {**left_padded([ids], extra=2), "pixel_values": alone["pixel_values"]}
            out = run(model, again, max_new_tokens=3)
            lengths.append(getattr(out, CACHE).layers[0].get_max_length())
            dynamic = run(model, again, max_new_tokens=3, cache_implementation="dynamic", output_logits=True)
            static = run(model, again, max_new_tokens=3, output_logits=True)
            for one, other in zip(dynamic.logits, static.logits, strict=True):
                torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        assert lengths[0] % 128 == 0 and lengths[1] > lengths[0]

    def test_a_small_cache_grows(self, toy_folder, processor, inputs) -> None:
        from transformers import StaticCache

        model, alone = load(toy_folder), single(inputs, 3)
        plain = run(model, alone)
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=alone["input_ids"].shape[1] + 2)
        out = run(model, alone, **{CACHE: cache})
        assert torch.equal(out.sequences, plain.sequences)
        assert getattr(out, CACHE).layers[0].get_max_length() > cache.layers[0].get_max_length()

    @both_scales
    def test_one_graph_a_scale(self, toy_folder, processor, inputs, scale_attention) -> None:
        """Compiled with a backend that needs no compiler; counted by torch itself."""
        counters = torch._dynamo.utils.counters
        torch._dynamo.reset()
        counters.clear()
        model, ids = load(toy_folder, "sdpa", scale_attention), processor.picture_answer_ids
        plain = answers(run(model, inputs), inputs)
        config = CompileConfig(backend="eager", mode=None, fullgraph=True)
        config._compile_all_devices = True
        options = {"cache_implementation": "static", "compile_config": config, "picture_answer_ids": ids}
        graphs = []
        for row in (0, 4, 0):
            alone = single(inputs, row)
            assert answers(run(model, alone, **options), alone) == [plain[row]]
            graphs.append(counters["stats"]["unique_graphs"])
        assert graphs == [len(SIZES) - 1] * 3
        assert not counters["graph_break"]


class NoHost(TorchDispatchMode):
    """Fails where a recording on a GPU would: at values that are read, or come from, outside."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        assert not any(part in name for part in ("_local_scalar_dense", "nonzero", "lift_fresh", "equal.")), name
        return func(*args, **(kwargs or {}))


def deeper(model: Any, count: int) -> Any:
    """With so many layers; those that are added do little."""
    text, layers = model.config.get_text_config(), model.model.language_model.layers
    for index in range(len(layers), count):
        layer = copy.deepcopy(layers[index % 2])
        layer.self_attn.layer_idx = index
        with torch.no_grad():
            layer.self_attn.o_proj.weight *= 0.01
            layer.mlp.down_proj.weight *= 0.01
        layers.append(layer)
    text.num_hidden_layers = count
    return model


def counts_graphs(model: Any, options: dict[str, Any]) -> list[Any]:
    """Nothing has been recorded, and layers are compiled without a compiler. Filled with the graphs from now on."""
    graphs: list[Any] = []

    def counted(graph: torch.fx.GraphModule, examples: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model._scale_graphs = static_steps.RecordedScales(model.model.language_model, options["compile_config"])
    model._scale_graphs.compile = lambda step: torch.compile(step, backend=counted, dynamic=False, fullgraph=True)
    return graphs


def refuses(step: Any) -> Any:
    raise RuntimeError("no compiler")


class AsksItsCache(LlamaDecoderLayer):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert kwargs[CACHE] is None or kwargs[CACHE].get_seq_length() >= 0
        return super().forward(*args, **kwargs)


class AnotherSignature(LlamaDecoderLayer):
    """Called with its cache in another argument."""

    def __call__(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        return super().__call__(hidden_states, layer_past=kwargs.pop(CACHE, None), **kwargs)

    def forward(self, hidden_states: torch.Tensor, layer_past: Any = None, **kwargs: Any) -> Any:
        return super().forward(hidden_states, **{CACHE: layer_past}, **kwargs)


class TestRecorded:
    """Everything but the recording itself: without a GPU, playing a graph is running it on its fixed tensors."""

    @pytest.fixture
    def options(self, processor) -> dict[str, Any]:
        config = CompileConfig(backend="cudagraphs")
        config._compile_all_devices = True
        ids = processor.picture_answer_ids
        return {"cache_implementation": "static", "compile_config": config, "picture_answer_ids": ids}

    @both_scales
    @every_attention
    def test_same_ids(self, toy_folder, processor, inputs, options, attention, scale_attention) -> None:
        model = load(toy_folder, attention, scale_attention)
        plain = answers(run(model, inputs), inputs)
        encoded = model.encode_image(**single(inputs, 1))
        for _ in range(2):  # recorded, and played; all rows, then one after the other, one with two pictures
            assert answers(run(model, inputs, **options), inputs) == plain
            assert answers(run(model, inputs, encoded_image=encoded, **options), inputs) == plain
            for row in (0, 3, 4):
                alone = single(inputs, row)
                with torch.inference_mode(row == 3):
                    assert answers(run(model, alone, **options), alone) == [plain[row]]
        graph_caches = model._scale_graphs.graph_caches
        assert [graph_cache.cache.layers[0].keys.shape[0] for graph_cache in graph_caches] == [1, 5]
        assert all(None not in graph_cache.graphs.values() for graph_cache in graph_caches)

    def test_one_recording_a_scale_reads_fixed_places(self, toy_folder, processor, inputs, options) -> None:
        model, played = load(toy_folder), []
        alone, other = single(inputs, 0), single(inputs, 4)
        plain = [answers(run(model, one), one) for one in (alone, other)]
        run(model, alone, **options)
        model._scale_graphs.graph_caches = []

        def record(call, device):
            """Gives what a graph would: the first result's place, from the places that the first run read."""
            with NoHost():
                place = call()

            def play() -> torch.Tensor:
                played.append(place.data_ptr())
                return place.copy_(call())

            return play

        model._scale_graphs.record = record
        lengths = passes(model)
        for one, expected in zip((alone, other, alone), [*plain, plain[0]], strict=True):
            assert answers(run(model, one, **options), one) == expected
        assert len(played) == 3 * 3 and len(set(played)) == 3 and len(model._scale_graphs.graph_caches) == 1
        assert len(lengths) == 3 * (1 + 3) + 3  # three prefills, three pictures, and each scale once to be recorded

    def test_caches_that_were_handed_out_stay_as_they_are(self, toy_folder, inputs, options) -> None:
        model, first, second = load(toy_folder), single(inputs, 0), single(inputs, 4)
        kept = run(model, first, **options)
        held = [layer.keys.clone() for layer in getattr(kept, CACHE).layers]
        used = [int(layer.cumulative_length) for layer in getattr(kept, CACHE).layers]
        run(model, second, **options)
        for keys, length, layer in zip(held, used, getattr(kept, CACHE).layers, strict=True):
            assert torch.equal(layer.keys, keys) and int(layer.cumulative_length) == length

    def test_what_cannot_be_recorded_runs_as_usual(self, toy_folder, inputs, options) -> None:
        model, alone = load(toy_folder), single(inputs, 0)
        plain = answers(run(model, alone), alone)

        def refuse(call, device):
            call()
            raise RuntimeError("operation not permitted when stream is capturing")

        run(model, alone, **options)
        model._scale_graphs.record, model._scale_graphs.graph_caches = refuse, []
        with pytest.warns(UserWarning, match="could not be recorded.*not permitted"):
            assert answers(run(model, alone, **options), alone) == plain

    def test_fused_norms(self, toy_folder, inputs, options) -> None:
        model, alone = load(toy_folder), single(inputs, 0)
        plain = answers(run(model, alone), alone)
        options["compile_config"].options = {"fused_norms": True}
        calls: list[Any] = []
        norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
        for _ in range(2):
            assert answers(run(model, alone, **options), alone) == [plain[0]]
        assert norms and not any("forward" in vars(norm) for norm in norms)
        with fused_norms(model):
            assert all("forward" in vars(norm) for norm in norms)
            hidden = torch.randn(2, 3, norms[0].weight.shape[0])
            calls = [norm(hidden) for norm in norms]
        for norm, found in zip(norms, calls, strict=True):
            torch.testing.assert_close(found, norm(hidden))

    @pytest.mark.parametrize("scale_attention, fused", [("causal", False), ("block", True)])
    def test_one_compiled_layer_for_all(self, toy_folder, inputs, options, scale_attention, fused) -> None:
        model = deeper(load(toy_folder, "sdpa", scale_attention), 4)
        options["compile_config"].options = {"compiled_layers": True, "fused_norms": fused}
        pair = {name: value[[0, 4]] for name, value in inputs.items()}
        longer = left_padded([single(inputs, 0)["input_ids"]], extra=100)
        cases = [{**single(inputs, 0), **longer}, single(inputs, 0), single(inputs, 4), single(inputs, 3), pair]
        plain = [answers(run(model, one), one) for one in cases]
        graphs = counts_graphs(model, options)
        found = []
        for again in (False, True):
            for one, expected in zip(cases, plain, strict=True):
                with torch.inference_mode(again):
                    assert answers(run(model, one, **options), one) == expected
                found.append(len(graphs))
        graph_caches = model._scale_graphs.graph_caches
        assert not [graph for graph_cache in graph_caches for graph in graph_cache.graphs.values() if graph is None]
        recorded = {(id(graph_cache), *key[1:]) for graph_cache in graph_caches for key in graph_cache.graphs}
        assert len(graphs) == len(model._scale_graphs.calls) == len(recorded)
        assert found == [3, 6, 6, 6, 9, 9, 9, 9, 9, 9], "lengths of scales, times the three shapes of caches"
        assert copy.deepcopy(model)._scale_graphs.calls == {}
        model._scale_graphs.graph_caches = []  # what was compiled is kept
        assert answers(run(model, cases[1], **options), cases[1]) == plain[1] and len(graphs) == found[-1]
        assert not any("forward" in vars(module) for module in model.model.language_model.modules())

    @pytest.mark.slow
    def test_compiled_by_inductor(self, toy_folder, inputs, options) -> None:
        model, alone = deeper(load(toy_folder), 3), single(inputs, 0)
        plain = answers(run(model, alone), alone)
        options["compile_config"].options = {"compiled_layers": True}
        counters = torch._dynamo.utils.counters
        counters.clear()
        assert answers(run(model, alone, **options), alone) == plain
        assert counters["stats"]["unique_graphs"] == len(SIZES) - 1 and not counters["graph_break"]
        assert model._scale_graphs.compiles

    @pytest.mark.parametrize(
        "change, why",
        [
            (lambda layers, graphs: setattr(graphs, "compile", refuses), "RuntimeError: no compiler"),
            (lambda layers, graphs: setattr(layers[1].mlp, "layer_idx", 0), "writes to another part"),
            (lambda layers, graphs: setattr(layers[1], "forward", layers[1].forward), "has been replaced"),
            (lambda layers, graphs: setattr(layers[1], "__class__", AsksItsCache), "no attribute 'get_seq_length'"),
            (lambda layers, graphs: setattr(layers[1], "__class__", AnotherSignature), f"as {CACHE}"),
        ],
        ids=["compiler", "shared part", "own forward", "cache", "signature"],
    )
    def test_layers_that_cannot_be_compiled_are_recorded_as_they_are(
        self, toy_folder, inputs, options, change, why
    ) -> None:
        model, alone = load(toy_folder), single(inputs, 0)
        options["compile_config"].options = {"compiled_layers": True}
        counts_graphs(model, options)
        change(model.model.language_model.layers, model._scale_graphs)
        plain = answers(run(model, alone), alone)
        with pytest.warns(UserWarning) as warned:
            assert answers(run(model, alone, **options), alone) == plain
        (said,) = [str(one.message) for one in warned if "could not be compiled" in str(one.message)]
        assert why in said
        graphs = model._scale_graphs.graph_caches[0].graphs
        assert len(graphs) == len(SIZES) - 1 and None not in graphs.values()

    def test_weights_that_moved_are_recorded_anew(self, toy_folder, inputs, options) -> None:
        model, alone = load(toy_folder), single(inputs, 0)
        run(model, alone, **options)
        before = list(model._scale_graphs.graph_caches[0].graphs.values())
        norm = model.model.language_model.norm
        norm.weight = torch.nn.Parameter(norm.weight.detach().clone())
        run(model, alone, **options)
        assert not set(before) & set(model._scale_graphs.graph_caches[0].graphs.values())
        assert copy.deepcopy(model)._scale_graphs.graph_caches == []

    def test_adapters_that_were_switched_are_recorded_anew(self, toy_folder, inputs, options) -> None:
        model, alone = load(toy_folder), single(inputs, 0)
        run(model, alone, **options)  # without any
        torch.manual_seed(0)
        config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, lora_alpha=64)
        model.add_adapter(config)
        played = []
        for switch in (None, model.disable_adapters, None, model.enable_adapters):
            if switch is not None:
                switch()
            run(model, alone, **options)
            played.append(set(model._scale_graphs.graph_caches[0].graphs.values()))
        assert played[1] == played[2] and not played[0] & played[1] and not played[1] & played[3]
        layers = [one for one in model.model.language_model.modules() if isinstance(one, LoraLayer)]
        for change in (lambda one: one.scale_layer(0.5), lambda one: one.merge()):
            for layer in layers:
                change(layer)
            run(model, alone, **options)
            played.append(set(model._scale_graphs.graph_caches[0].graphs.values()))
        assert not played[3] & played[4] and not played[4] & played[5]


class FakeCuda:
    """What `record_cuda_graph` calls of torch.cuda. Notes the order, and on which stream the work is given."""

    class CUDAGraph:
        def pool(self) -> str:
            return f"pool of {id(self)}"

        def replay(self) -> None:
            pass

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream_now, self.log = "main", []
        self.fails = False
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "CUDAGraph", self.CUDAGraph)
        monkeypatch.setattr(cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(cuda, "Stream", lambda: self.named("side"))
        monkeypatch.setattr(cuda, "current_stream", lambda: self.named(self.stream_now))
        monkeypatch.setattr(cuda, "set_stream", lambda stream: setattr(self, "stream_now", stream.name))
        monkeypatch.setattr(cuda, "stream", self.stream)
        monkeypatch.setattr(cuda, "graph", self.graph)
        monkeypatch.setattr(recordings, "_streams", {})
        monkeypatch.setattr(recordings, "_graphs", weakref.WeakKeyDictionary())

    def named(self, name: str) -> Any:
        return SimpleNamespace(name=name, wait_stream=lambda other: self.log.append(f"{name} waits for {other.name}"))

    @contextmanager
    def stream(self, stream: Any) -> Any:
        before, self.stream_now = self.stream_now, stream.name
        yield
        self.stream_now = before

    @contextmanager
    def graph(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Any:
        """As torch's: where the end fails, the stream stays as it is."""
        self.stream_now, self.pool = stream.name, pool
        self.log.append("recording")
        yield
        if self.fails:
            raise RuntimeError("the recording was invalidated")
        self.stream_now = "main"


class TestRecordingOnCuda:
    """The order of calls, with torch.cuda replaced."""

    def test_order_and_memory(self, monkeypatch) -> None:
        fake = FakeCuda(monkeypatch)

        def work() -> torch.Tensor:
            fake.log.append(f"work on {fake.stream_now}")
            return torch.ones(2)

        device = torch.device("cuda:0")
        play = recordings.record_cuda_graph(work, device)
        assert fake.log == ["side waits for main", "work on side", "recording", "work on side", "main waits for side"]
        assert fake.pool is None and play() is play() and fake.stream_now == "main"
        recordings.record_cuda_graph(work, device)  # is dropped at once
        assert fake.pool.startswith("pool of") and len(recordings._graphs) == 1
        del play
        recordings.record_cuda_graph(work, device)
        assert fake.pool is None  # nothing to share memory with is alive

    def test_a_recording_that_fails_gives_the_stream_back(self, monkeypatch) -> None:
        fake = FakeCuda(monkeypatch)
        fake.fails = True
        with pytest.raises(RuntimeError, match="invalidated"):
            recordings.record_cuda_graph(lambda: torch.ones(2), torch.device("cuda:0"))
        assert fake.stream_now == "main" and not recordings._graphs


class TestPreviews:
    @pytest.mark.parametrize("scales", [1, 2, 4])
    def test_stop_at_scale(self, toy_folder, processor, inputs, scales) -> None:
        model, count = load(toy_folder), sum(SIZES[:scales])
        whole = run(model, inputs)
        early = run(model, inputs, picture_stop_at_scale=scales)
        start = processor.gen_start_token_id
        for a, b in zip(answers(whole, inputs), answers(early, inputs), strict=True):
            if start not in a:
                assert a == b
                continue
            at = a.index(start) + 1
            assert b[: at + count] == a[: at + count] and (scales == 4 or not any(t > 2 for t in b[at + count :]))
        options = {"prompt_length": inputs["input_ids"].shape[1]}
        found = processor.post_process_segmentation(early, stop_at_scale=scales, **options)
        assert [bool(one["segments"]) for one in found] == [True, False, False, True, True]
        if scales < 4:
            with pytest.raises(ValueError, match="cut after"):
                processor.post_process_segmentation(early, **options)

    def test_stream(self, toy_folder, processor, inputs) -> None:
        model, threads = load(toy_folder), set(threading.enumerate())
        stream = model.stream(**inputs, picture_answer_ids=processor.picture_answer_ids, return_dict_in_generate=True)
        seen = list(stream)
        plain = run(model, inputs)
        assert torch.equal(stream.outputs.sequences, plain.sequences) and set(threading.enumerate()) <= threads
        first = seen[:4]
        assert [one.scale for one in first] == [1, 2, 3, 4] and [one.complete for one in first] == [False] * 3 + [True]
        assert first[0].rows.tolist() == [0, 3, 4]
        assert [one.codes.shape[1] for one in first] == [1, 5, 14, 30]
        masks, _ = processor.decode_masks(first[1].codes, [(40, 60)] * 3)
        assert masks[0].shape == (40, 60)
        answer = answers(plain, inputs)[0]
        at = answer.index(processor.gen_start_token_id) + 1
        assert (first[3].codes[0] + processor.visual_token_offset).tolist() == answer[at : at + 30]

    def test_a_stream_has_the_autocast_of_its_listener(self, toy_folder, processor, inputs) -> None:
        model, ids = load(toy_folder), processor.picture_answer_ids
        options = {"picture_answer_ids": ids, "return_dict_in_generate": True}
        with torch.autocast("cpu", torch.bfloat16):
            stream = model.stream(**single(inputs, 0), **options)
            list(stream)
            plain = run(model, single(inputs, 0), picture_answer_ids=ids)
        assert stream.outputs.picture_scores == plain.picture_scores
        assert plain.picture_scores != run(model, single(inputs, 0), picture_answer_ids=ids).picture_scores

    def test_a_listener_may_leave(self, toy_folder, processor, inputs) -> None:
        model, threads = load(toy_folder), set(threading.enumerate())
        lengths, begun = passes(model), 0
        # who listens keeps up
        model.model.language_model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
        for partial in model.stream(**single(inputs, 0), picture_answer_ids=processor.picture_answer_ids):
            if partial.scale == 2:
                begun = len(lengths)
                break
        assert set(threading.enumerate()) <= threads
        assert 2 <= begun <= len(lengths) <= begun + 1  # the pass that was under way is the last

    def test_errors_reach_the_listener(self, toy_folder, inputs) -> None:
        with pytest.raises(ValueError, match="must be one of"):
            list(load(toy_folder).stream(**inputs, picture_prefill="perhaps"))
