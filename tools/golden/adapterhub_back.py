"""Load in AdapterHub's library what is written here, and compare what the model computes with the golden files.

Runs by hand, in the environment of adapterhub.py: adapterhub_back.py FROM [NAME ...]. FROM is the program: each adapter of testdata/adapterhub goes through `peft convert` into PEFT's layout
and back, under another name. Or it is a folder of what the tests wrote: ADAPTERHUB_BACK=FOLDER cargo nextest run -p peft-tests adapterhub. NAMES are cases; without them all. What the program
refuses is printed with its message; anything else that fails ends the script with 1.
"""

import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path

from adapterhub import ADAPTER, DECODERS, FUSIONS, HUB, base_model, decoder, inputs, outputs
from common import TESTDATA, difference

import torch
from adapters import Fuse
from safetensors.torch import load_file

BOUND = 1e-4
RENAMED = "renamed"


class Refused(Exception):
    pass


def convert(peft, adapter, out, *options):
    """The adapter in the other layout."""
    run = subprocess.run([peft, "convert", "--adapter", adapter, "--out", out, *options], capture_output=True, text=True)
    if run.returncode:
        raise Refused(" ".join(run.stderr.split()))


def back(source, adapter, name, scratch):
    """The adapter in PEFT's layout and back."""
    peft = source.resolve()
    there, again = scratch / "peft", scratch / name
    convert(peft, adapter, there, "--overwrite")
    convert(peft, there, again, "--name", name)
    return again


def computed(source, path, variant, scratch):
    """What the library computes with the converted case, and what it should."""
    directory = TESTDATA / path
    base = directory.name.split("_")[0]
    golden = load_file(directory / "logits.safetensors")
    if base in DECODERS:
        model, given, head = decoder(base), {"tokens": golden["tokens"]}, "default"
    else:
        model, given, head = base_model(base), inputs(base), None
    if variant in FUSIONS:
        for name in ("a", "b"):
            model.load_adapter(str(back(source, directory / name, name, scratch)), use_safetensors=True)
        # A fusion is not written, so it is that of the library over the adapters of the program.
        model.load_adapter_fusion(str(directory), set_active=True, use_safetensors=True)
        model.set_active_adapters(Fuse("a", "b"))
        head = ADAPTER
    else:
        written = source / path if source.is_dir() else back(source, directory, RENAMED, scratch)
        model.load_adapter(str(written), set_active=True, use_safetensors=True)
    # Else the head is the one that the library finds beside the adapter and activates.
    model.active_head = head or model.active_head
    return outputs(model.eval(), given), golden


def check(source, path, variant):
    """The largest difference."""
    with tempfile.TemporaryDirectory() as scratch:
        found, golden = computed(source, path, variant, Path(scratch))
    assert "logits" in found, "the head is not there"
    return max(difference(value, golden[name]) for name, value in found.items())


def main():
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    source, *names = sys.argv[1:]
    source = Path(source)
    lists = [json.loads((HUB / name).read_text()) for name in ("cases.json", "prompt_cases.json")]
    cases = [(case["path"], case["variant"]) for part in lists for case in part]
    cases += [(f"adapterhub/{base}_seq_bn_inv", "seq_bn_inv") for base in DECODERS]
    cases.append(("adapterhub/llama_lora_all", "lora_all"))
    worst, seen, refused, failed = 0.0, 0, 0, 0
    for path, variant in cases:
        name = path.split("/")[1]
        if name not in names if names else source.is_dir() and not (source / path).exists():
            continue
        seen += 1
        try:
            found = check(source, path, variant)
            worst = max(worst, found)
            failed += not found < BOUND
            print(f"{name:36} {found:.1e}")
        except Refused as message:
            refused += 1
            print(f"{name:36} refused: {message}")
        except Exception as error:  # whatever the library says of the file
            failed += 1
            print(f"{name:36} FAILED: {type(error).__name__}: {error}")
    print(f"{seen} cases, {refused} refused, {failed} failed, largest difference {worst:.1e}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
