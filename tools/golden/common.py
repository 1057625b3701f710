"""What all generators of golden files have in common."""

import json
import os
import zlib
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

TESTDATA = Path(__file__).resolve().parents[2] / "testdata"


def seed(name):
    """Every seed is the CRC-32 of a name, so a new case leaves the bytes of the others as they are."""
    return zlib.crc32(name.encode())


def generator(name):
    return torch.Generator().manual_seed(seed(name))


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


def provenance(directory, script, seed_name, modules):
    versions = {module.__name__: module.__version__ for module in modules}
    write_json(directory / "provenance.json", versions | {"seed": seed(seed_name), "script": f"tools/golden/{script}"})


def difference(a, b):
    return (a - b).abs().max().item()
