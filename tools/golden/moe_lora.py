"""Write testdata/lora-moe: LoRA adapters saved by PEFT on the models of moe_models.py, and adapters in the form of transformers 4."""

import shutil
import tempfile
import warnings

import moe_models
import peft_case
from common import TESTDATA, difference, generator, write_json
from lora import randomise
from models import load, logits, provenance

import torch
import transformers
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

LORA = TESTDATA / "lora-moe"
RANK, ALPHA = 2, 6
QV = ["q_proj", "v_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
PROJECTIONS = ["gate_proj", "up_proj", "down_proj"]
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]

# "base model/variant": the fields in which the LoraConfig differs from r 2, alpha 6.
CASES = {
    "mixtral/attention": dict(target_modules=QV),
    "mixtral/experts": dict(target_parameters=EXPERTS),
    "mixtral/gate_up": dict(target_parameters=["experts.gate_up_proj"]),
    "mixtral/down": dict(target_parameters=["mlp.experts.down_proj"]),
    "mixtral/router": dict(target_modules=["q_proj"], target_parameters=["gate.weight"]),
    "mixtral/patterns": dict(
        target_modules=["q_proj"],
        target_parameters=EXPERTS,
        use_rslora=True,
        rank_pattern={"experts.gate_up_proj": 3},
        alpha_pattern={"experts.down_proj": 5},
    ),
    "mixtral/all_linear": dict(target_modules="all-linear"),
    "qwen2_moe/experts": dict(target_parameters=EXPERTS),
    "qwen2_moe/shared": dict(target_modules=[f"shared_expert.{name}" for name in PROJECTIONS] + ["shared_expert_gate"]),
    "qwen2_moe/projections": dict(target_modules=PROJECTIONS),
    "qwen3_moe/attention": dict(target_modules=QV),
    "qwen3_moe/experts": dict(target_parameters=EXPERTS),
    "qwen3_moe/router": dict(target_parameters=["gate.weight"]),
    "qwen3_moe/projections": dict(target_modules=PROJECTIONS),
    "deepseek_v3/attention": dict(target_modules=LATENT),
    "deepseek_v3/experts": dict(target_parameters=EXPERTS),
}
# Adapters of transformers 4, where each expert had three linear layers: the names of the modules they are on.
OLD = {
    "mixtral": ["q_proj", "w1", "w2", "w3", "gate"],
    "qwen2_moe": ["q_proj", *PROJECTIONS],
    "qwen3_moe": ["q_proj", *PROJECTIONS],
    "deepseek_v3": ["o_proj", *PROJECTIONS],
}
# Here PEFT loses a part of them: that of the routed experts; that of the shared experts and of layers without experts.
LOST = ("qwen2_moe", "deepseek_v3")
# Another seed where a choice of experts would hang on rounding.
SEEDS = {
    path: f"{path}/1"
    for path in ("lora-moe/mixtral/per_expert", "lora-moe/qwen3_moe/attention", "lora-moe/qwen3_moe/projections")
}


def outputs(model, golden):
    return {"logits": logits(model, golden["tokens"])} | moe_models.routed(model, golden["tokens"])


def write_case(name, fields):
    base, variant = name.split("/")
    path = f"lora-moe/{name}"
    config = LoraConfig(**dict(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA) | fields)
    options = dict(outputs=outputs, seed=SEEDS.get(path))
    _, merge_error = peft_case.write_case(path, f"models-moe/{base}", config, randomise, "moe_lora.py", **options)
    assert merge_error < 2e-5
    return {"path": path, "base": base, "variant": variant}


def old_factors(weights, targets, rng):
    """Random factors for each matrix whose module has one of the names, under the keys of transformers 4."""
    factors = {}
    for key, weight in weights.items():
        module = key.removesuffix(".weight")
        if module != key and module.endswith(tuple(f".{name}" for name in targets)):
            prefix = f"base_model.model.{module}"
            factors[f"{prefix}.lora_A.weight"] = 0.1 * torch.randn(RANK, weight.shape[1], generator=rng)
            factors[f"{prefix}.lora_B.weight"] = 0.1 * torch.randn(weight.shape[0], RANK, generator=rng)
    return factors


def merged(base_directory, weights, factors):
    """The model with (alpha/r)·B·A added to each matrix of its file."""
    state = dict(weights)
    for key in factors:
        if key.endswith(".lora_A.weight"):
            prefix = key.removesuffix("lora_A.weight")
            delta = factors[prefix + "lora_B.weight"].double() @ factors[key].double()
            module = prefix.removeprefix("base_model.model.")
            state[module + "weight"] = (weights[module + "weight"].double() + ALPHA / RANK * delta).float()
    with tempfile.TemporaryDirectory() as directory:
        shutil.copy(base_directory / "config.json", directory)
        save_file(state, f"{directory}/model.safetensors", metadata={"format": "pt"})
        return load(directory)


def write_old(base):
    """An adapter as PEFT saved it beside transformers 4, the logits it means, and those PEFT 0.21 gives where they differ."""
    path = f"lora-moe/{base}/per_expert"
    directory, base_directory = TESTDATA / path, TESTDATA / "models-moe" / base
    directory.mkdir(parents=True)
    weights = load_file(base_directory / "model.safetensors")
    factors = old_factors(weights, OLD[base], generator(SEEDS.get(path, path)))
    save_file(factors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    fields = dict(peft_type="LORA", task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=sorted(OLD[base]))
    fields |= dict(base_model_name_or_path=f"testdata/models-moe/{base}", inference_mode=True, bias="none")
    write_json(directory / "adapter_config.json", fields)

    base_golden = load_file(base_directory / "logits.safetensors")
    golden = {"tokens": base_golden["tokens"]} | outputs(merged(base_directory, weights, factors), base_golden)
    by_peft = logits(PeftModel.from_pretrained(load(base_directory), directory).eval(), golden["tokens"])
    error = difference(golden["logits"], by_peft)
    print(
        f"{path:36} moves the output by {difference(golden['logits'], base_golden['logits']):.3f}, PEFT differs by {error:.1e}"
    )
    assert (error > 1e-2) == (base in LOST) and (error < 2e-5) == (base not in LOST)
    if base in LOST:
        golden["logits_peft"] = by_peft
    save_file(golden, directory / "logits.safetensors")
    provenance(directory, "moe_lora.py", SEEDS.get(path, path))
    return {"path": path, "base": base, "variant": "per_expert"}


def main():
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
    shutil.rmtree(LORA, ignore_errors=True)
    cases = [write_case(name, fields) for name, fields in CASES.items()] + [write_old(base) for base in OLD]
    write_json(LORA / "cases.json", cases)


if __name__ == "__main__":
    main()
