"""Write testdata/quant: weights that bitsandbytes packed on the CPU, beside the dense weights, with the keys of its checkpoints."""

import shutil

from common import TESTDATA, generator, write_json

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import save_file

QUANT = TESTDATA / "quant"

# name: shape, dtype, block, type, whether the block statistics are quantised too. An odd shape ends in a short block and half a byte; more than
# 256 blocks need two blocks of statistics.
CASES = {
    "nf4": ((32, 96), torch.float32, 64, "nf4", False),
    "nf4_nested": ((160, 128), torch.float32, 64, "nf4", True),
    "nf4_nested_bf16": ((48, 96), torch.bfloat16, 64, "nf4", True),
    "nf4_f16_32": ((48, 32), torch.float16, 32, "nf4", False),
    "nf4_odd": ((7, 13), torch.float32, 64, "nf4", False),
    "nf4_odd_nested": ((33, 35), torch.float32, 32, "nf4", True),
    "nf4_4096": ((64, 96), torch.float32, 4096, "nf4", True),
    "fp4": ((32, 96), torch.float32, 64, "fp4", False),
    "fp4_nested": ((160, 128), torch.float32, 128, "fp4", True),
    "fp4_odd": ((7, 13), torch.bfloat16, 64, "fp4", False),
}


def main():
    torch.set_num_threads(1)
    shutil.rmtree(QUANT, ignore_errors=True)
    QUANT.mkdir(parents=True)
    for name, (shape, dtype, block, kind, nested) in CASES.items():
        dense = (0.05 * torch.randn(shape, generator=generator(name))).to(dtype)
        dense[0, :5] = 0
        packed, state = quantize_4bit(dense, blocksize=block, compress_statistics=nested, quant_type=kind)
        tensors = {"dense": dense, "w.weight": packed}
        tensors |= {f"w.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        # The formula, not `dequantize_4bit`: that is wrong on the CPU where the columns are no multiple of 64.
        if shape[1] % 64 == 0:
            tensors["unpacked"] = dequantize_4bit(packed, state)
        save_file({key: value.contiguous() for key, value in tensors.items()}, QUANT / f"{name}.safetensors")
    versions = {module.__name__: module.__version__ for module in (torch, bitsandbytes)}
    write_json(QUANT / "provenance.json", versions | {"script": "tools/golden/quant.py"})


if __name__ == "__main__":
    main()
