"""Time and memory of one LoRA training step in PyTorch + PEFT on the CPU, or of decoding one token: the other side of the Rust benchmark.

With `--base nf4` the linear layers are those of bitsandbytes, NF4 with double quantisation, computing in f32.

Llama with hidden 576, 9 query and 3 key/value heads, MLP 1536, tied embeddings; LoRA on all seven projections, AdamW. Prints one line of JSON; `rss_growth_mb` is the peak
resident memory above what the process held after importing its libraries (so it holds weights and optimizer too).
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


def resident_mb(field):
    """VmRSS (now) or VmHWM (peak) of this process, from /proc."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def pack(model):
    """Put bitsandbytes' linear layers in place of PyTorch's, but for the head; packing happens when they are moved."""
    import bitsandbytes

    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, torch.nn.Linear) and name != "lm_head":
                packed = bitsandbytes.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=torch.float32,
                    compress_statistics=True, quant_type="nf4",
                )  # fmt: skip
                packed.load_state_dict(child.state_dict())
                setattr(parent, name, packed.to("cpu"))
    return model


def build(args):
    config = LlamaConfig(
        vocab_size=args.vocab, hidden_size=576, intermediate_size=1536, num_hidden_layers=args.layers, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True, use_cache=args.decode,
    )  # fmt: skip
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(task_type="CAUSAL_LM", r=args.rank, lora_alpha=2 * args.rank, target_modules=projections)
    model = LlamaForCausalLM(config).to(getattr(torch, args.dtype))
    if args.base == "nf4":
        model = pack(model)
    return model.eval() if args.decode else get_peft_model(model, lora).train()


@torch.no_grad()
def decode(model, count):
    """Seconds of each of `count` tokens after a prompt of 16 and two more."""
    tokens, cache, seconds = torch.arange(1, 17)[None], None, []
    for _ in range(count + 3):
        start = time.perf_counter()
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        tokens, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        seconds.append(time.perf_counter() - start)
    return seconds[3:]


def train(model, args):
    """Seconds of each step."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    tokens = torch.randint(args.vocab, (args.batch, args.seq))
    seconds = []
    for _ in range(args.warmup + args.steps):
        start = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - start)
    return seconds[args.warmup :]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    for name, default in (("layers", 6), ("vocab", 8192), ("batch", 4), ("seq", 128), ("rank", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--base", choices=["f32", "nf4"], default="f32")
    parser.add_argument("--decode", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    before = resident_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew from here
    model = build(args)
    seconds = decode(model, args.steps) if args.decode else train(model, args)

    result = {
        "median_s": round(statistics.median(seconds), 4),
        "rss_growth_mb": round(resident_mb("VmHWM") - before, 1),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
