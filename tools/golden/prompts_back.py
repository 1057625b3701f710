"""Load adapters that this workspace wrote with PEFT and compare what the models compute with testdata/prompts.

    python tools/golden/prompts_back.py DIRECTORY [--tolerance 1e-4]

DIRECTORY has the folders of testdata/prompts, `<base>/<method>/`, each with `adapter_config.json` and `adapter_model.safetensors`
that hold what the folder in testdata holds. Folders that are missing are named and left out.
Exit status: 0 when all are within the tolerance, 1 when one is not, 2 when there is nothing to compare.
"""

import argparse
import json
import sys
import warnings
from functools import partial
from pathlib import Path

import encoders
from common import TESTDATA, difference
from models import load
from prompts import PROMPTS, TEXT, causal_outputs, head_outputs

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    return parser.parse_args()


def base_model(case):
    """The model of a case, and the function that computes all of the case's tensors with an adapted model."""
    directory = TESTDATA / case["base"]
    if directory.parent.name == "models":
        inputs = load_file(PROMPTS / "inputs.safetensors")
        return load(directory), partial(causal_outputs, inputs=inputs, method=case["method"])
    golden = load_file(directory / "logits.safetensors")
    inputs = {name: golden[name] for name in TEXT if name in golden}
    return encoders.load(directory, encoders.CASES[directory.name][0]), partial(head_outputs, inputs=inputs)


def compare(case, adapter):
    """The largest difference in any tensor of the case; tokens are compared as numbers."""
    golden = load_file(TESTDATA / case["path"] / "logits.safetensors")
    model, outputs = base_model(case)
    result = outputs(PeftModel.from_pretrained(model, adapter).eval())
    return max(difference(result[name], golden[name]) for name in golden)


def main():
    args = arguments()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Position ids are not supported")
    worst = []
    for case in json.loads((PROMPTS / "cases.json").read_text()):
        adapter = args.directory / Path(case["path"]).relative_to("prompts")
        if not (adapter / "adapter_config.json").is_file():
            print(f"{case['path']:40} missing")
            continue
        worst.append(compare(case, adapter))
        print(f"{case['path']:40} differs by {worst[-1]:.1e}")
    if not worst:
        sys.exit(2)
    sys.exit(max(worst) > args.tolerance)


if __name__ == "__main__":
    main()
