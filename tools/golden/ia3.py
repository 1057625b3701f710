"""Write testdata/ia3, testdata/ln_tuning and testdata/beft: (IA)³, LN tuning and BEFT adapters saved by PEFT on the models of models.py, and the logits with each of them."""

import shutil

from common import TESTDATA, write_json
from peft_case import write_case

import torch
import transformers
from peft import BeftConfig, IA3Config, LNTuningConfig

KV = ["k_proj", "v_proj"]

# "base model/variant": the fields of the configuration. (IA)³ scales the input of feedforward modules and the output of all others, bias included.
IA3 = {
    "llama/default": dict(),
    "llama/attention": dict(target_modules=KV, feedforward_modules=[]),
    "llama/feedforward": dict(target_modules=[*KV, "down_proj"], feedforward_modules=["down_proj"]),
    "llama/modules_to_save": dict(
        target_modules=[*KV, "down_proj"], feedforward_modules=["down_proj"], modules_to_save=["lm_head"]
    ),
    "llama/regex": dict(
        target_modules=r".*\.(self_attn\.[kv]|mlp\.(up|down))_proj", feedforward_modules=r".*\.[01]\.mlp\.down_proj"
    ),
    "llama/exclude": dict(
        target_modules=[*KV, "down_proj"], feedforward_modules=["down_proj"], exclude_modules=["0.self_attn.k_proj"]
    ),
    # A list of feedforward modules would not load again: PEFT wants a part of the target modules, which it writes as full names.
    "llama_bias/all_linear": dict(target_modules="all-linear", feedforward_modules=r".*\.down_proj"),
    "qwen2/attention": dict(target_modules=KV, feedforward_modules=[]),
    "qwen2/feedforward": dict(target_modules=["q_proj", *KV, "down_proj"], feedforward_modules=["down_proj"]),
    "gpt2/default": dict(fan_in_fan_out=True),
    "gpt2/attention": dict(target_modules=["c_attn", "attn.c_proj"], feedforward_modules=[], fan_in_fan_out=True),
    "gpt2/feedforward": dict(
        target_modules=["c_attn", "c_fc", "c_proj"], feedforward_modules=["c_proj"], fan_in_fan_out=True
    ),
}
LN_TUNING = {
    "llama/default": dict(),
    "llama/final": dict(target_modules=["norm"]),
    "llama/modules_to_save": dict(target_modules=["input_layernorm", "norm"], modules_to_save=["lm_head"]),
    "gpt2/default": dict(),
    "gpt2/regex": dict(target_modules=r".*\.(1\.ln_[12]|ln_f)"),
}
# PEFT's name for a trained difference of biases. Only of linear layers; merging needs a bias to merge into.
BEFT = {
    "qwen2/default": dict(),
    "llama_bias/linear": dict(target_modules=r".*_proj"),
    "llama_bias/modules_to_save": dict(target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]),
}


def randomise(model, rng):
    """Move what is trained away from its start: from one, from the base's values."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=rng)


def write_method(method, kind, cases):
    shutil.rmtree(TESTDATA / method, ignore_errors=True)
    listed = []
    for name, fields in cases.items():
        base, variant = name.split("/")
        config = kind(task_type="CAUSAL_LM", **fields)
        _, merge_error = write_case(f"{method}/{name}", f"models/{base}", config, randomise, "ia3.py")
        assert merge_error < 2e-5
        listed.append({"path": f"{method}/{name}", "base": base, "variant": variant, "merge_exact": True})
    write_json(TESTDATA / method / "cases.json", listed)


def main():
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    write_method("ia3", IA3Config, IA3)
    write_method("ln_tuning", LNTuningConfig, LN_TUNING)
    write_method("beft", BeftConfig, BEFT)


if __name__ == "__main__":
    main()
