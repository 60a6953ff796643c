"""The speed of drawing on a GPU, in a given number of seconds: what matters most first, each figure as soon as it is
known.

    python examples/benchmarks/gpu.py --seconds 95 --json figures.json                  # 8B, bf16, random weights
    python examples/benchmarks/gpu.py --device cpu --size tiny --seconds 60             # does all of it run?

What no longer fits is skipped, and what fails is reported and left out. Ways of drawing:
  plain        a dynamic cache, eager
  static       a static cache, eager
  recorded     a static cache; the scales' passes are CUDA graphs, recorded without a compiler
               (`CompileConfig(backend="cudagraphs")`)
  fused        as recorded, with torch's RMS norm in them (`options={"fused_norms": True}`)
  layers       as recorded, over decoder layers that inductor has compiled (`options={"compiled_layers": True}`);
               the first run compiles one graph for each scale

A floor counts the bytes of the weights that have to be read in all passes after the prefill, at the speed of a copy,
and vision, prefill and decoder as measured: as they run (eager), and for the strict one as CUDA graphs.
"""

# ruff: noqa: E402
import time

START = time.perf_counter()  # before torch is imported, which takes a while

import argparse
import gc
import os
import statistics
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all there is to load is here; asking costs seconds of those given

import torch
import transformers
from transformers import CompileConfig, DynamicCache, StaticCache

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import cases, modes
from benchmarks.floors import copy_bandwidth
from benchmarks.gpu_report import PARTS, Parts, Report, times
from benchmarks.stopwatch import now, peak_memory
from modeling_argenseg.cache_name import CACHE
from modeling_argenseg.recordings import GraphCache, Recording, write_to
from modeling_argenseg.static_steps import rounded_up

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RECORDED = ("recorded", "fused", "layers")  # ways


def as_recorded(**options: bool) -> dict[str, Any]:
    """Options of `generate` for passes that are recorded, on a CPU as well."""
    config = CompileConfig(backend="cudagraphs", options=options or None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


class Measurement:
    """All steps, on one model. `ways` are the options of `generate` for each way of drawing."""

    def __init__(self, report: Report, args: argparse.Namespace) -> None:
        self.report, self.args = report, args
        self.device = torch.device(args.device)
        self.ways: dict[str, dict[str, Any]] = {
            "plain": {},
            "static": {"cache_implementation": "static", "disable_compile": True},
            "recorded": as_recorded(),
            "fused": as_recorded(fused_norms=True),
            "layers": as_recorded(compiled_layers=True),
        }
        self.case: cases.Case
        self.totals: dict[str, float] = {}
        self.parts: dict[str, dict[str, float]] = {}
        self.codes: dict[str, torch.Tensor] = {}
        self.bandwidth = self.released_ms = 0.0

    def run_all(self) -> None:
        slow = 1 if self.args.size == "8b" else 0  # a toy on a CPU takes what it takes
        for name, (seconds, run) in self.steps().items():
            if name == "build" or not self.args.only or name in self.args.only:
                self.report.step(name, slow * seconds, run)

    def steps(self) -> dict[str, tuple[float, Callable[[], None]]]:
        """Name -> (seconds that it may take for 8B, what to run). First what no CUDA graph can spoil."""
        return {
            "build": (0, self.build),
            "plain": (4, lambda: self.one_prompt("plain", 3)),
            "released": (5, self.released),
            "recorded": (4, lambda: self.one_prompt("recorded", 7)),
            "layers": (60, lambda: self.one_prompt("layers", 7)),
            "linear maps": (2, self.linear_maps),
            "static": (3, lambda: self.one_prompt("static", 2)),
            "fused": (4, lambda: self.one_prompt("fused", 7)),
            "sequential recorded": (4, lambda: self.sequential("recorded")),
            "prompts": (6, lambda: self.throughput("prompts", shared=True)),
            "images": (6, lambda: self.throughput("images", shared=False)),
            "sequential eager": (10, lambda: self.sequential("plain")),
            "strict floor": (3, self.strict_floor),
            "tiny": (6, self.tiny),
            "tiny compiled": (25, self.tiny_compiled),
            "tiny layers": (25, self.tiny_layers),
        }

    def build(self) -> None:
        report, args = self.report, self.args
        report.add("torch", torch.__version__)
        report.add("transformers", transformers.__version__)
        cuda = self.device.type == "cuda"
        report.add("device", torch.cuda.get_device_name(self.device) if cuda else "cpu")
        self.bandwidth = copy_bandwidth(self.device, 1024 if cuda else 64)
        report.add("copy bandwidth, GB/s, read and written", self.bandwidth / 1e9)
        begin = now(self.device)
        self.case = cases.build(args.size, args.device, DTYPES[args.dtype])
        report.add(f"building {args.size}, s", now(self.device) - begin)
        net = self.case.model
        text = net.config.text_config
        report.add("parameters", net.num_parameters())
        kinds: dict[str, int] = {}
        for weight in net.parameters():
            kind = f"{str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"
            kinds[kind] = kinds.get(kind, 0) + weight.numel()
        report.add("parameters by type", kinds)
        report.add("language model", f"{text.num_hidden_layers} x {text.hidden_size}, vocabulary {text.vocab_size}")
        report.add("scales", list(net.config.patch_nums))
        report.add("prompt", len(self.case.prompts[0]))
        report.add("attention", net.model.language_model.config._attn_implementation)
        report.add("cuDNN attention", torch.backends.cuda.cudnn_sdp_enabled())

    def ours(self, way: str, count: int = 1, shared: bool = False) -> torch.Tensor:
        """One run, the decoder in bf16."""
        self.case.visual_tokenizer.decode_dtype = torch.bfloat16
        return modes.ours(self.case, count, shared, **self.ways[way])

    def one_prompt(self, way: str, count: int) -> None:
        report = self.report
        begin = now(self.device)
        self.codes[way] = self.ours(way)
        report.add(f"one prompt, {way}: first run, s", now(self.device) - begin)
        if way in RECORDED:
            self.say_what_was_recorded()
        found = times(lambda: self.ours(way), self.device, count)
        self.totals[way] = statistics.median(found)
        report.add(f"one prompt, {way}: ms, median of {count}", self.totals[way])
        report.add(f"one prompt, {way}: ms, fastest and slowest", [round(min(found), 2), round(max(found), 2)])
        self.faster(f"one prompt, {way}", 1, self.totals[way])
        parts = Parts(self.case)
        with parts.watching():
            for _ in range(3):
                self.ours(way)
        self.parts[way] = {part: 1000 * seconds / 3 for part, seconds in parts.seconds.items()}
        report.add(f"one prompt, {way}: ms of parts", {k: round(v, 2) for k, v in self.parts[way].items()})
        for other, codes in self.codes.items():
            if other != way:
                differ = int((codes != self.codes[way]).sum())
                report.add(f"ids that differ, {way} and {other}, of {codes.numel()}", differ)
        if way in RECORDED:
            measured = {part: self.parts[way][part] for part in PARTS if part != "drawing"}
            floor = measured | {"drawing": self.drawing_floor()}
            self.compare("floor, with vision, prefill and decoder as they run", floor, way)
            self.each_pass(way)
        if way == "plain":
            same = torch.equal(self.ours(way), self.codes[way])
            report.add("ids are the same in a second plain run", same)

    def say_what_was_recorded(self) -> None:
        recorded = self.case.model._scale_graphs
        graph_caches = getattr(recorded, "graph_caches", [])
        graphs = [graph for graph_cache in graph_caches for graph in graph_cache.graphs.values()]
        good = sum(graph is not None for graph in graphs)
        self.report.add("recorded passes, and refused", [good, len(graphs) - good])
        if getattr(recorded, "calls", {}):
            self.report.add("compiled layers, and whether all could be", [len(recorded.calls), recorded.compiles])

    def each_pass(self, way: str) -> None:
        """Milliseconds of the recorded pass of each scale, by its length, played alone."""
        graphs = self.case.model._scale_graphs.graph_caches[0].graphs
        played = {
            f"{length} of {limit} columns": round(statistics.median(times(graph._play, self.device, 5)), 3)
            for (_, length, limit), graph in sorted(graphs.items())
            if graph is not None
        }
        self.report.add(f"one prompt, {way}: ms of each recorded pass", played)

    @torch.inference_mode()
    def linear_maps(self) -> None:
        """The layers' products with their weights and nothing else, which no pass can undercut with these libraries."""
        layers, dtype = self.case.model.model.language_model.layers, self.case.model.dtype
        weights = [module.weight for module in layers.modules() if isinstance(module, torch.nn.Linear)]
        size = sum(weight.numel() * weight.element_size() for weight in weights)
        for rows in (4, 25, 100, 256):
            inputs = {
                str(width): torch.randn(1, rows, width, dtype=dtype, device=self.device)
                for width in {weight.shape[1] for weight in weights}
            }

            def run(**inputs: torch.Tensor) -> torch.Tensor:
                return [torch.nn.functional.linear(inputs[str(w.shape[1])], w) for w in weights][-1]

            taken = statistics.median(times(partial(Recording(run, inputs), inputs), self.device, 5))
            self.report.add(f"linear maps of one pass alone, {rows} rows: ms", taken)
            self.report.add(f"linear maps of one pass alone, {rows} rows: GB/s", size / taken / 1e6)

    def drawing_floor(self) -> float:
        """Milliseconds to read all weights that drawing one picture reads."""
        net = self.case.model
        passes = len(net.config.patch_nums) - 1
        body = sum(p.numel() * p.element_size() for p in net.model.language_model.layers.parameters())
        row = net.lm_head.in_features * net.lm_head.weight.element_size()
        heads = row * (net.config.visual_vocab_size * passes + net.lm_head.out_features)  # the text that follows, too
        self.report.add("read by drawing, GB of layers, passes, GB of heads", [body / 1e9, passes, heads / 1e9])
        return 1000 * (body * passes + heads) / self.bandwidth

    def compare(self, title: str, floor: dict[str, float], way: str) -> None:
        parts, total, title = self.parts[way], self.totals[way], f"{way}: {title}"
        rows: list[list[Any]] = [["part", "floor ms", "ours ms", "times"]]
        rows += [[part, floor[part], parts[part], parts[part] / floor[part]] for part in PARTS]
        rows.append(["rest", 0.0, total - sum(parts.values()), "-"])
        lowest = sum(floor.values())
        rows.append(["total", lowest, total, total / lowest])
        self.report.table(title, rows)
        self.report.add(f"{title}: one prompt takes so many times it (at most 1.5)", total / lowest)

    @torch.inference_mode()
    def after_prefill(self, cache: Any) -> Any:
        """A cache that holds the first prompt."""
        net, ids = self.case.model, self.case.prompts[0][None]
        features = net.get_image_features(self.case.pixel_values, return_dict=True).pooler_output
        embeds = net.model.insert_image_features(net.model.embed_stream(ids), ids, features)
        net.model.language_model(inputs_embeds=embeds, **{CACHE: cache}, use_cache=True)
        return cache

    @torch.inference_mode()
    def sequential(self, way: str) -> None:
        """256 tokens, one a pass, without vision, prefill and decoder; only the visual rows of the head."""
        net, steps = self.case.model, modes.SEQUENTIAL_STEPS
        config, length = net.config.get_text_config(), len(self.case.prompts[0])
        warm = 3
        if way == "recorded":
            cache = StaticCache(config=config, max_cache_len=rounded_up(length + warm + steps))
        else:
            cache = DynamicCache(config=config)
        self.after_prefill(cache)

        def step(token: torch.Tensor, cache: Any, **inputs: torch.Tensor) -> torch.Tensor:
            embeds = net.get_input_embeddings()(token)
            hidden = net.model.language_model(inputs_embeds=embeds, **{CACHE: cache}, use_cache=True, **inputs)
            return net.visual_logits(hidden.last_hidden_state).argmax(-1) + net.config.visual_token_offset

        token = torch.tensor([[net.config.gen_start_token_id]], device=self.device)
        call: Callable[[torch.Tensor], torch.Tensor] = partial(step, cache=cache)
        if way == "recorded":
            call = self.recorded_step(step, cache, token)
        for _ in range(warm):
            token = call(token)
        begin = now(self.device)
        for _ in range(steps):
            token = call(token)
        taken = 1000 * (now(self.device) - begin)
        self.report.add(f"sequential drawing, {way}: ms for {steps} steps", taken)
        for ours in self.ways:
            if ours in self.parts:
                name = f"drawing, {ours} scale passes against {steps} {way} steps: share (at most 0.1)"
                self.report.add(name, self.parts[ours]["drawing"] / taken)

    def recorded_step(self, step: Callable[..., torch.Tensor], cache: Any, token: torch.Tensor) -> Callable:
        """One sequential step as a CUDA graph; its mask and positions are made outside."""
        graph_cache = GraphCache(cache)
        graph_cache.adopt(cache)
        limit = cache.layers[0].get_max_length()
        columns = torch.arange(limit, device=self.device)
        lowest = torch.full((limit,), -torch.inf, dtype=self.case.model.dtype, device=self.device)

        def run(token: torch.Tensor, places: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            write_to(graph_cache.cache, places, limit)
            return step(token, graph_cache.cache, position_ids=places[None], attention_mask=mask[None, None])

        def tensors(token: torch.Tensor) -> dict[str, torch.Tensor]:
            places = graph_cache.places(1)
            return {"token": token, "places": places, "mask": lowest.masked_fill(columns <= places, 0)[None]}

        recording = Recording(run, tensors(token))

        def call(token: torch.Tensor) -> torch.Tensor:
            token = recording(tensors(token))
            graph_cache.add(1)
            return token

        return call

    def throughput(self, what: str, shared: bool) -> None:
        report, count = self.report, self.args.count
        begin = now(self.device)
        self.ours("recorded", count, shared)
        report.add(f"{count} {what}: first run, s", now(self.device) - begin)
        with peak_memory(self.device) as peak:
            found = statistics.median(times(lambda: self.ours("recorded", count, shared), self.device, 3, warm=0))
        report.add(f"{count} {what}, recorded: ms", found)
        report.add(f"{count} {what}, recorded: masks/s", 1000 * count / found)
        report.add(f"{count} {what}, recorded: peak GB", peak[0] * 2**20 / 1e9)
        self.faster(f"{count} {what}, recorded", count, found)
        plain = statistics.median(times(lambda: self.ours("plain", count, shared), self.device, 2))
        report.add(f"{count} {what}, plain: masks/s", 1000 * count / plain)
        self.faster(f"{count} {what}, plain", count, plain)
        self.say_what_was_recorded()

    def released(self) -> None:
        report, case = self.report, self.case
        case.visual_tokenizer.decode_dtype = None
        run = lambda: modes.released(case, SimpleNamespace(phase=None))  # noqa: E731
        with peak_memory(self.device) as peak:
            found = statistics.median(times(run, self.device, 3))
        report.add("released procedure, eager: ms a mask", found)
        report.add("released procedure, eager: masks/s", 1000 / found)
        report.add("released procedure, eager: peak GB", peak[0] * 2**20 / 1e9)
        self.released_ms = found
        self.faster("one prompt, plain", 1, self.totals.get("plain"))

    def faster(self, what: str, masks: int, taken: float | None) -> None:
        if self.released_ms and taken:
            name = f"{what}: times the masks per second of the released procedure, eager"
            self.report.add(name, self.released_ms * masks / taken)

    @torch.inference_mode()
    def strict_floor(self) -> None:
        """Vision, prefill and decoder as CUDA graphs."""
        net, case = self.case.model, self.case
        length = len(case.prompts[0]) + len(case.before)
        embeds = net.get_input_embeddings()(torch.ones(1, length, dtype=torch.long, device=self.device))
        causal = torch.ones(1, 1, length, length, dtype=torch.bool, device=self.device).tril()
        codes = self.codes["plain"]
        case.visual_tokenizer.decode_dtype = torch.bfloat16

        def prefill(embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            hidden = net.model.language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
            return net.lm_head(hidden.last_hidden_state[:, -1 - len(case.before) :])

        work: dict[str, tuple[Callable[..., torch.Tensor], dict[str, torch.Tensor]]] = {
            "vision": (
                lambda pixels: net.get_image_features(pixels, return_dict=True).pooler_output,
                {"pixels": case.pixel_values},
            ),
            "prefill": (prefill, {"embeds": embeds, "mask": causal}),
            "decoder": (lambda codes: case.visual_tokenizer.decode(codes), {"codes": codes}),
        }
        found = {"drawing": self.drawing_floor()}
        for part, (run, tensors) in work.items():
            recording = Recording(run, tensors)
            play = lambda recording=recording, tensors=tensors: recording(tensors)  # noqa: E731
            found[part] = statistics.median(times(play, self.device, 7))
            self.report.add(f"{part} as a CUDA graph, ms", found[part])
        for way in RECORDED:
            if way in self.parts:
                self.compare("strict floor, with vision, prefill and decoder as CUDA graphs", found, way)

    def tiny(self) -> None:
        """The small published model, in fp32: ms a mask, and the same ids in all ways."""
        begin = now(self.device)
        self.case = cases.build("tiny", self.args.device, torch.float32)
        self.report.add("tiny: loading, s", now(self.device) - begin)
        reference = modes.released(self.case, SimpleNamespace(phase=None))
        for way in ("plain", "static", "recorded", "fused"):  # what takes a compiler has steps of its own
            differ = int((self.ours(way) != reference).sum())
            taken = statistics.median(times(partial(self.ours, way), self.device, 7))
            self.report.add(f"tiny, {way}: ms a mask", taken)
            self.report.add(f"tiny, {way}: ids that are not the released procedure's, of {reference.numel()}", differ)
        count = self.args.count
        taken = statistics.median(times(lambda: self.ours("recorded", count, True), self.device, 5))
        self.report.add(f"tiny, {count} prompts on one image, recorded: ms a mask", taken / count)

    def tiny_compiled(self) -> None:
        """The default of `cache_implementation="static"` on a GPU: torch.compile, one graph a scale."""
        self.ways["compiled"] = {"cache_implementation": "static"}
        if not self.tiny_by_compiler("compiled"):
            return
        self.case.prompts = self.case.prompts[1:]  # of another length
        differ = int((self.ours("compiled") != self.ours("plain")).sum())
        self.report.add("tiny, compiled: ids that differ for another prompt", differ)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        self.report.add("tiny, compiled: graphs after all that", graphs)

    def tiny_layers(self) -> None:
        """Recorded over compiled layers: one graph for each shape."""
        if self.tiny_by_compiler("layers"):
            self.say_what_was_recorded()

    def tiny_by_compiler(self, way: str) -> bool:
        """The small model in fp32, in a way that takes a compiler: the same ids, from how many graphs. False where it
        cannot be measured."""
        if self.device.type != "cuda":
            self.report.add(f"tiny, {way}", "only on a GPU")
            return False
        counters = torch._dynamo.utils.counters
        counters.clear()
        self.case = cases.build("tiny", self.args.device, torch.float32)
        self.case.model._scale_graphs = None
        begin, plain = now(self.device), self.ours("plain")
        differ = int((self.ours(way) != plain).sum())
        self.report.add(f"tiny, {way}: first run, s", now(self.device) - begin)
        self.report.add(f"tiny, {way}: ids that differ from the plain way's", differ)
        self.report.add(f"tiny, {way}: graphs", counters["stats"]["unique_graphs"])
        taken = statistics.median(times(lambda: self.ours(way), self.device, 7, warm=3))
        self.report.add(f"tiny, {way}: ms a mask", taken)
        return True


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", *cases.SIZES], default="8b", help="which model (default: 8b)")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (default: cuda)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="of the model (default: bfloat16)")
    parser.add_argument("--count", type=int, default=8, help="images, or prompts on one image (default: 8)")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="steps to run (default: all, as listed in the code)")
    parser.add_argument("--seconds", type=float, default=95, help="to stop after, the start of Python included")
    parser.add_argument("--json", type=Path, help="all figures, rewritten after each")
    parser.add_argument("--cudnn-attention", action="store_true", help="leave cuDNN's attention on: it plans for long")
    return parser


def stop(report: Report) -> None:
    """In a thread, when time is up, whatever runs: all figures so far have been written."""
    print("time is up", flush=True)
    sys.stderr.flush()
    os._exit(0)


def main(arguments: list[str] | None = None) -> int:
    args = make_parser().parse_args(arguments)
    report = Report(args.json, args.seconds, START)
    report.add("imported", True)
    watchdog = threading.Timer(max(report.left, 0.1), stop, [report])
    watchdog.daemon = True
    watchdog.start()
    torch.set_grad_enabled(False)
    torch.backends.cuda.enable_cudnn_sdp(args.cudnn_attention)
    gc.disable()
    try:
        Measurement(report, args).run_all()
    finally:
        watchdog.cancel()
        gc.enable()
        torch.set_grad_enabled(True)
    report.add("done", True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
