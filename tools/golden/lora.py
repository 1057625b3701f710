"""Write testdata/lora: LoRA adapters saved by PEFT on the models of models.py, and the logits with each of them."""

import shutil

import peft_case
from common import TESTDATA, difference, generator, write_json
from models import load, logits, provenance
from peft_case import save

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

LORA = TESTDATA / "lora"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
QV = ["q_proj", "v_proj"]

# "base model/variant": the fields in which the LoraConfig differs from r 4, alpha 8, no dropout.
CASES = {
    "llama/plain": dict(target_modules=QV),
    "llama/all_linear": dict(target_modules="all-linear"),
    "llama/rslora": dict(target_modules=QV, use_rslora=True),
    "llama/dropout": dict(target_modules=QV, lora_dropout=0.1),
    # The first matching pattern wins, but PEFT sorts the patterns when it saves: only sorted ones load as they were.
    "llama/rank_alpha_pattern": dict(
        target_modules=[*QV, "down_proj"],
        rank_pattern={"^model.layers.0.self_attn.q_proj": 2, "down_proj": 3, r"layers\.1\..*_proj": 6},
        alpha_pattern={r"^model\.layers\.1\.self_attn\.q_proj$": 3, "down_proj": 5, "self_attn.v_proj": 12},
    ),
    "llama/embedding": dict(target_modules=["embed_tokens", "q_proj"]),
    "llama/layers": dict(target_modules=QV, layers_to_transform=[1], layers_pattern="layers"),
    "llama/exclude": dict(
        target_modules=[*QV, "down_proj"], exclude_modules=["0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    ),
    "llama/exclude_regex": dict(target_modules=[*QV, "down_proj"], exclude_modules=r".*\.1\.(mlp|self_attn)\.[dq].*"),
    "llama/regex_target": dict(target_modules=r"model\.layers\.\d+\.(self_attn\.[qk]_proj|mlp\.up_proj)"),
    "llama/modules_to_save": dict(target_modules=QV, modules_to_save=["lm_head", "model.norm"]),
    "llama/modules_to_save_suffix": dict(target_modules=QV, modules_to_save=["norm"]),
    "llama/lm_head": dict(target_modules=["lm_head", "q_proj"]),
    "llama_bias/lora_bias": dict(target_modules=[*QV, "down_proj"], lora_bias=True),
    "llama_bias/bias_all": dict(target_modules=QV, bias="all"),
    "llama_bias/bias_lora_only": dict(target_modules=QV, bias="lora_only"),
    "smollm2/plain": dict(target_modules=ATTENTION + MLP),
    "smollm2/embedding": dict(target_modules=["embed_tokens", "q_proj"]),
    "qwen2/plain": dict(target_modules=ATTENTION + MLP),
    "qwen2/embedding": dict(target_modules=["embed_tokens", "v_proj"]),
    "gpt2/plain": dict(target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True),
    "gpt2/all_linear": dict(target_modules="all-linear", fan_in_fan_out=True),
}
COMBINED = {"a": dict(r=4, lora_alpha=8), "b": dict(r=4, lora_alpha=2)}
WEIGHTS = [0.7, -0.4]


def config(**fields):
    return LoraConfig(**dict(task_type="CAUSAL_LM", r=4, lora_alpha=8) | fields)


def randomise(model, rng):
    """Random LoRA factors (at initialisation B = 0 would hide most errors); other trained parameters get moved."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = 0.1 * torch.randn(parameter.shape, generator=rng)
            parameter.data = noise if "lora_" in name else parameter.data + noise


def write_case(name, fields):
    base, variant = name.split("/")
    _, merge_error = peft_case.write_case(f"lora/{name}", f"models/{base}", config(**fields), randomise, "lora.py")
    # PEFT merges an embedding adapter into the table that a tied lm_head shares, which changes the output layer too.
    merge_exact = name not in ("smollm2/embedding", "qwen2/embedding")
    assert (merge_error < 2e-5) == merge_exact
    return {"path": f"lora/{name}", "base": base, "variant": variant, "merge_exact": merge_exact}


def write_combination():
    """Two adapters, sum_i w_i s_i B_i A_i per module in f64, and PEFT's "cat" adapter, which equals it exactly."""
    directory, base_directory = LORA / "llama" / "combine", TESTDATA / "models" / "llama"
    tokens = load_file(base_directory / "logits.safetensors")["tokens"]
    dense, rng = {}, generator("lora/llama/combine")
    for (name, fields), weight in zip(COMBINED.items(), WEIGHTS):
        model = get_peft_model(load(base_directory), config(target_modules=QV, **fields))
        randomise(model, rng)
        save(model, directory / name, "models/llama")
        add_dense(dense, directory / name, weight * fields["lora_alpha"] / fields["r"])
    save_file(dense, directory / "delta.safetensors")

    model = PeftModel.from_pretrained(load(base_directory), directory / "a", adapter_name="a")
    model.load_adapter(directory / "b", adapter_name="b")
    model.add_weighted_adapter(list(COMBINED), WEIGHTS, "cat", combination_type="cat")
    model.set_adapter("cat")
    combined = logits(model.eval(), tokens)
    model.delete_adapter("a")
    model.delete_adapter("b")
    save(model, directory / "cat", "models/llama")
    cat = add_dense({}, directory / "cat", 1.0)
    assert max(difference(cat[key], dense[key]) for key in dense) < 1e-6
    save_file({"tokens": tokens, "logits": combined}, directory / "logits.safetensors")
    provenance(directory, "lora.py", "lora/llama/combine")
    write_json(directory / "weights.json", dict(zip(COMBINED, WEIGHTS)))


def add_dense(dense, adapter, scale):
    """Add scale·B·A in f64 to dense[module path] for each module of a saved adapter."""
    factors = load_file(adapter / "adapter_model.safetensors")
    for key in factors:
        if key.endswith(".lora_A.weight"):
            prefix = key.removesuffix("lora_A.weight")
            module = prefix.removeprefix("base_model.model.").removesuffix(".")
            delta = scale * factors[prefix + "lora_B.weight"].double() @ factors[key].double()
            dense[module] = dense.get(module, 0) + delta
    return dense


def main():
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    shutil.rmtree(LORA, ignore_errors=True)
    write_json(LORA / "cases.json", [write_case(name, fields) for name, fields in CASES.items()])
    write_combination()


if __name__ == "__main__":
    main()
