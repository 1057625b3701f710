"""Write testdata/bnb: tiny models, what transformers and bitsandbytes make of them in 4 bits, and the logits of both."""

import shutil

from common import TESTDATA, generator, write_json
from models import SEQ, SIZES, VOCAB, load, logits, randomise

import bitsandbytes
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, LlamaConfig

BNB = TESTDATA / "bnb"

# Columns are multiples of 64: bitsandbytes' own dequantisation on the CPU is wrong for others.
CONFIGS = {
    "llama": LlamaConfig(**SIZES | dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, rms_norm_eps=1e-5)),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=64, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2
    ),
}
# name: model, type, whether the block statistics are quantised too.
CASES = {
    "llama_nf4": ("llama", "nf4", True),
    "llama_fp4": ("llama", "fp4", False),
    "gpt2_nf4": ("gpt2", "nf4", True),
}


def write_logits(directory, model, tokens):
    save_file({"tokens": tokens, "logits": logits(model, tokens)}, directory / "logits.safetensors")


def main():
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    shutil.rmtree(BNB, ignore_errors=True)
    tokens = torch.randint(VOCAB, (2, SEQ), generator=generator("bnb/tokens"))
    for name, config in CONFIGS.items():
        model = AutoModelForCausalLM.from_config(config)
        randomise(model, generator(f"bnb/{name}"))
        model.save_pretrained(BNB / name)
        write_logits(BNB / name, load(BNB / name), tokens)
    for name, (base, kind, nested) in CASES.items():
        packing = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
        options = dict(dtype=torch.float32, attn_implementation="eager", device_map="cpu")
        model = AutoModelForCausalLM.from_pretrained(BNB / base, quantization_config=packing, **options).eval()
        model.save_pretrained(BNB / name)
        write_logits(BNB / name, model, tokens)
        change = (logits(model, tokens) - logits(load(BNB / base), tokens)).abs().max()
        print(f"{name}: packing moves the logits by {change:.2f}")
    versions = {module.__name__: module.__version__ for module in (torch, transformers, bitsandbytes)}
    write_json(BNB / "provenance.json", versions | {"script": "tools/golden/bnb.py"})


if __name__ == "__main__":
    main()
