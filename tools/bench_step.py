"""Time and memory of one LoRA training step in PyTorch + PEFT, or of decoding one token: the other side of the Rust benchmark.

With `--base nf4` the linear layers are those of bitsandbytes, NF4 with double quantisation, computing in f32.

A Llama with tied embeddings; LoRA on all seven projections, AdamW. Prints one line of JSON; `memory_mib` is the peak of resident memory, or of the memory in use on the GPU,
above what there was after importing the libraries (so it holds weights and optimizer too).
"""

import argparse
import json
import os
import statistics
import subprocess
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


def memory_mib(args, field):
    """What is in use: of the GPU all, else a field of this process."""
    if args.device == "cpu":
        return resident_mb(field)
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return float(subprocess.run(query, capture_output=True, check=True).stdout)


def pack(model, args):
    """Put bitsandbytes' linear layers in place of PyTorch's, but for the head; packing happens when they are moved."""
    import bitsandbytes

    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, torch.nn.Linear) and name != "lm_head":
                packed = bitsandbytes.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=getattr(torch, args.dtype),
                    compress_statistics=True, quant_type="nf4",
                )  # fmt: skip
                packed.load_state_dict(child.state_dict())
                setattr(parent, name, packed.to(args.device))
    return model


def build(args):
    config = LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.intermediate, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.kv_heads, max_position_embeddings=2048, tie_word_embeddings=True,
        use_cache=args.decode,
    )  # fmt: skip
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(task_type="CAUSAL_LM", r=args.rank, lora_alpha=2 * args.rank, target_modules=projections)
    # Made where it is to be: filling a large model on the host takes minutes.
    with torch.device(args.device):
        model = LlamaForCausalLM(config).to(getattr(torch, args.dtype))
    if args.base == "nf4":
        model = pack(model, args)
    return model.eval() if args.decode else get_peft_model(model, lora).train()


@torch.no_grad()
def decode(model, count):
    """Seconds of each of `count` tokens after a prompt of 16 and two more."""
    tokens, cache, seconds = torch.arange(1, 17, device=model.device)[None], None, []
    for _ in range(count + 3):
        start = time.perf_counter()
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        tokens, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        tokens.tolist()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return seconds[3:]


def train(model, args):
    """Seconds of each step."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    tokens = torch.randint(args.vocab, (args.batch, args.seq), device=args.device)
    seconds = []
    for _ in range(args.warmup + args.steps):
        start = time.perf_counter()
        for _ in range(args.accumulate):
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
    shape = (("layers", 6), ("vocab", 8192), ("hidden", 576), ("heads", 9), ("kv-heads", 3), ("intermediate", 1536))
    for name, default in (*shape, ("batch", 4), ("seq", 128), ("accumulate", 1), ("rank", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--base", choices=["f32", "nf4"], default="f32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--decode", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    before = memory_mib(args, "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew from here
    model = build(args)
    seconds = decode(model, args.steps) if args.decode else train(model, args)

    result = {
        "median_s": round(statistics.median(seconds), 4),
        "memory_mib": round(memory_mib(args, "VmHWM") - before, 1),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
