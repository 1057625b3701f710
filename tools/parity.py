"""Compare logits printed by `peft logits --json` with those of transformers and PEFT on the same files, in f32.

Exit status: 0 when the largest absolute difference is within the tolerance, 1 when it is not, 2 for unusable input.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="directory of the base model")
    parser.add_argument("--adapter", type=Path, help="directory of the adapter; none: the base model alone")
    parser.add_argument("--logits", required=True, type=Path, help="JSON with tokens, shape [1, T, V] and logits")
    parser.add_argument("--tokens", help="token ids that the file must be about, for example 3,14,15")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    return parser, parser.parse_args()


def main():
    parser, args = arguments()
    for directory in filter(None, (args.model, args.adapter)):
        if not directory.is_dir():
            parser.error(f"{directory} is not a directory")
    printed = json.loads(args.logits.read_text())
    given = [int(token) for token in args.tokens.split(",")] if args.tokens else None
    tokens = printed.get("tokens", given)
    if tokens is None or (given is not None and given != tokens):
        parser.error(f"{args.logits} is about the tokens {tokens}, --tokens says {given}")

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    if args.adapter:
        model = PeftModel.from_pretrained(model, args.adapter)
    with torch.no_grad():
        expected = model.eval()(input_ids=torch.tensor([tokens])).logits
    shape = list(expected.shape)
    if printed["shape"] != shape:
        parser.error(f"{args.logits} has logits of shape {printed['shape']}, the model's are {shape}")

    actual = torch.tensor(printed["logits"], dtype=torch.float32).reshape(shape)
    difference = (actual - expected).abs()
    worst, position = difference.max().item(), difference.amax(dim=(0, 2)).argmax().item()
    print(f"max abs difference {worst:.3e} at position {position} (largest |logit| {expected.abs().max():.3f})")
    return 0 if worst <= args.tolerance else 1  # NaN compares false and fails


if __name__ == "__main__":
    sys.exit(main())
