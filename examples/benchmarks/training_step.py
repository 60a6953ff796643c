"""What a training step costs in memory, and what tokens that are made beforehand save in time.

    python examples/benchmarks/training_step.py                     # memory at the released vocabulary
    python examples/benchmarks/training_step.py --throughput        # tokens cached, or made in the loop
    python examples/benchmarks/training_step.py --width 512 --layers 8 --rows 4

Memory is the peak of one step (forward and backward of the language model, streams with one picture each) above what is
held before it, which are weights and gradients. "plain" keeps the logits of every position, "parts" is what the model
does in training. Each runs in a process of its own. Throughput compares steps on tokens read from memory with steps
whose masks go through the VAR tokenizer first.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.cases import FIRST_NEW_ID, SMALL_VISION, Size, layers
from benchmarks.stopwatch import peak_memory
from modeling_argenseg import ARGenSegForConditionalGeneration, VARTokenizer, VARTokenizerConfig


def model_of(args: argparse.Namespace) -> Any:
    heads = max(1, args.width // 64)
    text = layers(args.layers, args.width, heads, 2 * args.width, num_key_value_heads=heads)
    torch.manual_seed(0)
    return ARGenSegForConditionalGeneration(Size(text, {**SMALL_VISION, "num_hidden_layers": 1}).config()).train()


def streams(config: Any, rows: int, prompt: int) -> dict[str, torch.Tensor]:
    """Prompts without labels, then a picture and a few words with labels."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(10, 1000, (rows, prompt + 12), generator=generator)
    codes = torch.randint(config.visual_vocab_size, (rows, config.picture_length), generator=generator)
    start = torch.full((rows, 1), FIRST_NEW_ID)
    ids = torch.cat([words[:, :-2], start, codes + config.visual_token_offset, words[:, -2:]], dim=1)
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "labels": labels}


def memory_of(args: argparse.Namespace, plain: bool, answer: Any) -> None:
    """Puts [peak MB of a step above what was held, loss, seconds] into a queue."""
    torch.set_num_threads(args.threads)
    net = model_of(args)
    batch = streams(net.config, args.rows, args.prompt)
    for parameter in net.parameters():  # gradients are held before as well, as they are from the second step on
        parameter.grad = torch.zeros_like(parameter)
    with peak_memory(net.device) as held:
        pass
    begin = time.perf_counter()
    with peak_memory(net.device) as peak:
        loss = net(**batch, skip_logits=not plain).loss
        loss.backward()
    answer.put([peak[0] - held[0], loss.item(), time.perf_counter() - begin])


def memory(args: argparse.Namespace) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    found: dict[str, float] = {}
    for name, plain in (("plain", True), ("parts", False)):
        answer = context.SimpleQueue()
        process = context.Process(target=memory_of, args=(args, plain, answer))
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"the {name} step failed (exit code {process.exitcode}); is there memory enough?")
        megabytes, loss, seconds = answer.get()
        found |= {f"{name}: peak MB": megabytes, f"{name}: loss": loss, f"{name}: seconds": seconds}
        print(f"{name}: {megabytes:.0f} MB above what is held before the step, loss {loss:.6f}, {seconds:.2f} s")
    found["parts / plain"] = found["parts: peak MB"] / found["plain: peak MB"]
    print(f"parts / plain: {found['parts / plain']:.3f}; the losses differ by "
          f"{abs(found['parts: loss'] - found['plain: loss']):.2g}")  # fmt: skip
    return found


def throughput(args: argparse.Namespace) -> dict[str, float]:
    """Pictures a second, with their tokens at hand and with the VAR tokenizer in the loop."""
    torch.set_num_threads(args.threads)
    net, tokenizer = model_of(args), VARTokenizer(VARTokenizerConfig()).eval()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)
    batch = streams(net.config, args.rows, args.prompt)
    pictures = torch.randn(args.rows, 3, 256, 256).clamp(-1, 1)
    first = args.prompt + 11
    found = {}
    for name in ("cached", "in the loop"):
        for step in range(args.steps + 1):  # the first warms up
            if step == 1:
                begin = time.perf_counter()
            if name == "in the loop":
                ids = tokenizer.encode(pictures) + net.config.visual_token_offset
                for key in ("input_ids", "labels"):
                    batch[key][:, first : first + ids.shape[1]] = ids
            net(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found[f"{name}: pictures a second"] = args.steps * args.rows / (time.perf_counter() - begin)
        print(f"tokens {name}: {found[f'{name}: pictures a second']:.3f} pictures a second")
    found["cached / in the loop"] = found["cached: pictures a second"] / found["in the loop: pictures a second"]
    print(f"cached / in the loop: {found['cached / in the loop']:.2f}")
    return found


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256, help="hidden size of the language model (default: 256)")
    parser.add_argument("--layers", type=int, default=4, help="its layers (default: 4)")
    parser.add_argument("--rows", type=int, default=2, help="streams in a batch (default: 2)")
    parser.add_argument("--prompt", type=int, default=300, help="tokens of a prompt (default: 300)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--throughput", action="store_true", help="time steps instead")
    parser.add_argument("--steps", type=int, default=3, help="steps to time (default: 3)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser


def main(arguments: list[str] | None = None) -> dict[str, float]:
    args = make_parser().parse_args(arguments)
    found = throughput(args) if args.throughput else memory(args)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
