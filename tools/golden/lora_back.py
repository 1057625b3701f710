"""Load an adapter that this workspace wrote with PEFT and compare its logits with those that this workspace gives.

    peft logits --json --model MODEL --adapter ADAPTER --tokens 3,14,15 > LOGITS
    python tools/golden/lora_back.py MODEL ADAPTER LOGITS [--tolerance 1e-4]

Exit status: 0 when they are within the tolerance and PEFT had a place for every tensor, else 1.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

from common import difference
from models import load, logits

import torch
import transformers
from peft import PeftModel
from peft.utils import load_peft_weights, set_peft_model_state_dict


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "adapter", "logits"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    return parser.parse_args()


def main():
    args = arguments()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("error", UserWarning)
    ours = json.loads(args.logits.read_text())
    base = load(args.model)
    tokens = torch.tensor([ours["tokens"]])
    plain = logits(base, tokens)
    model = PeftModel.from_pretrained(base, args.adapter).eval()
    result = set_peft_model_state_dict(model, load_peft_weights(args.adapter))
    missing = [key for key in result.missing_keys if "lora_" in key]
    theirs = logits(model, tokens)
    error = difference(theirs, torch.tensor(ours["logits"]).reshape(theirs.shape))
    print(f"the adapter moves logits by {difference(theirs, plain):.3f}; ours differ by {error:.1e}")
    for key in missing + result.unexpected_keys:
        print(f"no counterpart: {key}")
    sys.exit(bool(missing or result.unexpected_keys) or not error < args.tolerance)


if __name__ == "__main__":
    main()
