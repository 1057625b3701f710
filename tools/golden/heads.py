"""Write testdata/peft_heads: adapters saved by PEFT on encoders with a head, and what the models of encoders.py compute with each of them."""

import json
import re
import shutil

import ia3
import lora
from encoders import CASES, PROCESSORS, load, outputs
from common import TESTDATA, write_json
from peft_case import write_case

import torch
import transformers
from peft import IA3Config, LNTuningConfig, LoraConfig
from safetensors.torch import load_file, save_file

HEADS = TESTDATA / "peft_heads"
TEXT = ("tokens", "attention_mask", "token_type_ids")


def low_rank(task, *targets, **changes):
    return LoraConfig(**dict(task_type=task, r=4, lora_alpha=8, target_modules=list(targets)) | changes)


# base: variant: configuration. The task's type makes PEFT train and save the head, by modules_to_save.
ADAPTERS = {
    "bert_seqcls": {
        "lora_qv": low_rank("SEQ_CLS", "query", "value"),
        "lora_all_linear": low_rank("SEQ_CLS", target_modules="all-linear"),
        "ia3": IA3Config(task_type="SEQ_CLS"),
        "ln_tuning": LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"]),
    },
    "roberta_seqcls": {
        "lora_qv": low_rank("SEQ_CLS", "query", "value"),
        "lora_all_linear": low_rank("SEQ_CLS", target_modules="all-linear"),
        "ia3": IA3Config(task_type="SEQ_CLS"),
    },
    "bert_tokcls": {"lora_qv": low_rank("TOKEN_CLS", "query", "value")},
    "bert_qa": {"lora_qv": low_rank("QUESTION_ANS", "query", "value")},
    "bert_base": {"lora_qv": low_rank("FEATURE_EXTRACTION", "query", "value")},
    "vit_imgcls": {"lora_qv": low_rank(None, "q_proj", "v_proj", modules_to_save=["classifier"])},
    "dinov2_imgcls": {"lora_qv": low_rank(None, "q_proj", "v_proj", modules_to_save=["classifier"])},
}
# The names that layers had in transformers 4, and still have in the files of the models.
V4 = [
    (r"\.q_proj\b", ".attention.query"),
    (r"\.v_proj\b", ".attention.value"),
    (r"\bvit\.layers\.", "vit.encoder.layer."),
]


def case_outputs(model, golden, inputs):
    """The output with all inputs, and for text without the mask."""
    given = {name: golden[name] for name in inputs}
    result = outputs(model, given)
    if "attention_mask" in given:
        del given["attention_mask"]
        key = next(iter(result))
        result[f"{key}_unmasked"] = outputs(model, given)[key]
    return result


def merge_in_place(model):
    """PEFT 0.21 cannot unload (IA)³ from RoBERTa: it takes the saved head, a module of two layers, for one with a weight."""
    model.merge_adapter()
    return model


def write_v4(directory):
    """The adapter in `directory` as it was written when the model's layers had the names of transformers 4."""
    target = directory / "v4"
    target.mkdir()
    tensors = load_file(directory / "adapter_model.safetensors")
    for pattern, name in V4:
        tensors = {re.sub(pattern, name, key): tensor for key, tensor in tensors.items()}
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    fields = json.loads((directory / "adapter_config.json").read_text())
    write_json(target / "adapter_config.json", fields | {"target_modules": ["query", "value"]})


def write_base(base, adapters):
    inputs = ["pixels"] if base in PROCESSORS else TEXT[:3] if base.startswith("bert") else TEXT[:2]
    for variant, config in adapters.items():
        _, merge_error = write_case(
            f"peft_heads/{base}_{variant}", f"encoders/{base}", config,
            lora.randomise if isinstance(config, LoraConfig) else ia3.randomise, "heads.py", inputs=inputs,
            load=lambda directory: load(directory, CASES[base][0]),
            outputs=lambda model, golden: case_outputs(model, golden, inputs), merge=merge_in_place,
        )  # fmt: skip
        assert merge_error < 2e-5
        if base in PROCESSORS:
            write_v4(HEADS / f"{base}_{variant}")
        yield {"path": f"peft_heads/{base}_{variant}", "base": base, "variant": variant, "merge_exact": True}


def main():
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    shutil.rmtree(HEADS, ignore_errors=True)
    listed = [case for base, adapters in ADAPTERS.items() for case in write_base(base, adapters)]
    write_json(HEADS / "cases.json", listed)


if __name__ == "__main__":
    main()
