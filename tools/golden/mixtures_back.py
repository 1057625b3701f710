"""Load mixtures that this workspace wrote with PEFT and compare what the model computes with testdata/mixtures.

    python tools/golden/mixtures_back.py DIRECTORY [--tolerance 1e-4]

DIRECTORY has the folders of testdata/mixtures, `poly/<case>` and `xlora/<case>`, the latter with their experts in them.
Folders that are missing are named and left out.
Exit status: 0 when all are within the tolerance, 1 when one is not, 2 when there is nothing to compare.
"""

import argparse
import sys
from pathlib import Path

from common import TESTDATA, difference
from mixtures import BASE, MIXTURES
from models import load

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    return parser.parse_args()


@torch.no_grad()
def compare(golden, adapter):
    golden = load_file(golden)
    model = PeftModel.from_pretrained(load(TESTDATA / BASE, use_cache=False), adapter).eval()
    inputs = {"input_ids": golden["tokens"], "use_cache": False}
    if "task_ids" in golden:
        inputs["task_ids"] = golden["task_ids"]
    return difference(model(**inputs).logits, golden["logits"])


def main():
    args = arguments()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    worst = []
    for case in sorted(path for kind in ("poly", "xlora") for path in (MIXTURES / kind).iterdir()):
        name = case.relative_to(MIXTURES)
        adapter = args.directory / name
        if not (adapter / "adapter_config.json").is_file():
            print(f"{name!s:24} missing")
            continue
        worst.append(compare(case / "logits.safetensors", adapter))
        print(f"{name!s:24} differs by {worst[-1]:.1e}")
    if not worst:
        sys.exit(2)
    sys.exit(max(worst) > args.tolerance)


if __name__ == "__main__":
    main()
