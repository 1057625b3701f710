"""Write the cases of testdata/adapterhub/prompt_cases.json: prefixes, prompts and gates of AdapterHub's library, beside the cases of adapterhub.py and after them."""

import logging
import shutil

from adapterhub import HUB, MODELS, write_adapter
from common import write_json

import torch
from adapters import IA3Config, LoRAConfig, MAMConfig, ParBnConfig, PrefixTuningConfig, PromptTuningConfig, SeqBnConfig
from adapters import UniPELTConfig

PREFIX = dict(prefix_length=4)
BOTTLENECK = dict(PREFIX, bottleneck_size=8)
SMALL = dict(reduction_factor=8)

# On both models: a plain prefix, a prompt, and all that has gates.
METHODS = {
    "prefix_tuning_flat": PrefixTuningConfig(flat=True, **PREFIX),
    "prompt_tuning": PromptTuningConfig(prompt_length=4),
    "unipelt": UniPELTConfig(PrefixTuningConfig(**BOTTLENECK), SeqBnConfig(**SMALL), LoRAConfig(r=2, alpha=6)),
    "ia3_gating": IA3Config(use_gating=True),
}
# Only on bert. LoRA with gates is a case of adapterhub.py.
VARIANTS = {
    "prefix_tuning": PrefixTuningConfig(**BOTTLENECK),
    "prefix_gating": PrefixTuningConfig(use_gating=True, **BOTTLENECK),
    "prefix_gating_own": PrefixTuningConfig(
        flat=True, use_gating=True, shared_gating=False, leave_out=[0], **PREFIX
    ),
    "mam": MAMConfig(PrefixTuningConfig(non_linearity="relu", **BOTTLENECK), ParBnConfig(**SMALL)),
    "prompt_tuning_after_bos": PromptTuningConfig(prompt_length=4, combine="prefix_after_bos"),
}


def has_prefix(config):
    return any(isinstance(part, PrefixTuningConfig) for part in getattr(config, "configs", [config]))


def write_case(base, variant, config):
    shutil.rmtree(HUB / f"{base}_{variant}", ignore_errors=True)
    # The state names a prefix once for the model and once more for each layer, which safetensors refuses.
    return write_adapter(base, variant, config, layers=1, safetensors=not has_prefix(config))


def main():
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    cases = [write_case(base, variant, config) for base in MODELS for variant, config in METHODS.items()]
    cases += [write_case("bert", variant, config) for variant, config in VARIANTS.items()]
    write_json(HUB / "prompt_cases.json", cases)


if __name__ == "__main__":
    main()
