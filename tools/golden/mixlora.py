"""Write testdata/mixtures/{mixlora,loramoe,mola}: adapters in the layout of TUDB-Labs' libraries on tiny llama, and logits by the papers' formulas.

The libraries themselves want a transformers of years ago, so nothing of them runs here."""

import shutil

from common import TESTDATA, difference, generator, provenance, write_json
from models import load, logits
from moe_models import lead

import torch
import transformers
from safetensors.torch import load_file, save_file

BASE = "models/llama"
EXPERTS, TOP = 4, 2
QV, MLP = ["q_proj", "v_proj"], ["gate_proj", "down_proj", "up_proj"]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
OLD_NAMES = {"gate_proj": "w1_proj", "down_proj": "w2_proj", "up_proj": "w3_proj"}
MIXLORA = dict(peft_type="MIXLORA", routing_strategy="mixlora", num_experts=EXPERTS, top_k=TOP)
# "kind/name": what the configuration says besides r 4, alpha 8, dropout 0.05.
CASES = {
    "mixlora/plain": MIXLORA | dict(target_modules=QV + MLP),
    "mixlora/rslora": MIXLORA | dict(target_modules=QV + MLP, use_rslora=True),
    "mixlora/experts_only": MIXLORA
    | dict(target_modules=["gate_proj", "up_proj"], expert_lora=dict(r=2, lora_alpha=6, lora_dropout=0.05)),
    "loramoe/plain": dict(
        peft_type="LORAMOE", routing_strategy="loramoe", num_experts=EXPERTS, target_modules=["q_proj"] + MLP
    ),
    "mola/plain": dict(
        peft_type="MOLA", routing_strategy="mola", num_experts=EXPERTS, top_k=TOP, target_modules=QV + ["down_proj"]
    ),
}
# Another seed where a choice of experts would hang on rounding.
SEEDS = {"mixtures/mola/plain": "mixtures/mola/plain/21"}


def config(fields):
    common = dict(bias="none", task_type="CAUSAL_LM", base_model_name_or_path=f"testdata/{BASE}")
    return common | dict(r=4, lora_alpha=8, lora_dropout=0.05) | fields


def scale(fields):
    return fields["lora_alpha"] / (fields["r"] ** 0.5 if fields.get("use_rslora") else fields["r"])


def factors(prefix, linear, rank, rng):
    """Random A and B for one linear layer."""
    a = 0.1 * torch.randn(rank, linear.in_features, generator=rng)
    b = 0.1 * torch.randn(linear.out_features, rank, generator=rng)
    return {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}


def gate(width, rng):
    return 0.5 * torch.randn(EXPERTS, width, generator=rng)


def weights(model, kind, fields, rng):
    """All tensors of an adapter. MixLoRA routes once for a feedforward block, the others in each layer they are on."""
    result, expert_rank = {}, (fields | fields.get("expert_lora", {}))["r"]
    for number, layer in enumerate(model.model.layers):
        if kind == "mixlora":
            result[f"{kind}.layers.{number}.mlp.moe_gate.weight"] = gate(32, rng)
        for name in fields["target_modules"]:
            block = "self_attn" if name in ATTENTION else "mlp"
            linear, prefix = getattr(getattr(layer, block), name), f"{kind}.layers.{number}.{block}.{name}"
            if block == "self_attn" and kind != "mola":
                result |= factors(prefix, linear, fields["r"], rng)
                continue
            if kind != "mixlora":
                result[f"{prefix}.moe_gate.weight"] = gate(linear.in_features, rng)
            for expert in range(EXPERTS):
                result |= factors(f"{prefix}.experts.{expert}", linear, expert_rank, rng)
    return result


def routing(router, x, count):
    """Softmax, the best `count`, brought to sum 1; all where there is no count."""
    probabilities = torch.softmax(x @ router.T, dim=-1)
    if count is None:
        return probabilities
    assert lead(probabilities, count) > 2e-4, "near tie of experts: choose another seed"
    best = probabilities.topk(count, dim=-1)
    best_weights = best.values / best.values.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, best.indices, best_weights)


def delta(tensors, prefix, x, scale):
    """s·B·A·x, or nothing where the layer has no adapter."""
    if f"{prefix}.lora_A.weight" not in tensors:
        return 0
    return scale * (x @ tensors[f"{prefix}.lora_A.weight"].T @ tensors[f"{prefix}.lora_B.weight"].T)


def attach(model, kind, tensors, fields):
    expert_scale = scale(fields | fields.get("expert_lora", {}))
    count = fields.get("top_k")

    def on_linear(prefix, linear):
        """y plus its adapter's share; of several adapters, each weighted by the layer's own router."""

        def forward(x):
            router = tensors.get(f"{prefix}.moe_gate.weight")
            y = torch.nn.functional.linear(x, linear.weight, linear.bias)
            if router is None:
                return y + delta(tensors, prefix, x, scale(fields))
            share = routing(router, x, count)
            experts = range(EXPERTS)
            return y + sum(
                share[..., e, None] * delta(tensors, f"{prefix}.experts.{e}", x, expert_scale) for e in experts
            )

        return forward

    def on_block(prefix, block):
        """MixLoRA: Σ wᵢ·FFNᵢ(x), where FFNᵢ has the adapter i on each of its layers."""

        def project(name, expert, x):
            return getattr(block, name)(x) + delta(tensors, f"{prefix}.{name}.experts.{expert}", x, expert_scale)

        def expert_output(expert, x):
            inner = block.act_fn(project("gate_proj", expert, x)) * project("up_proj", expert, x)
            return project("down_proj", expert, inner)

        def forward(x):
            share = routing(tensors[f"{prefix}.moe_gate.weight"], x, count)
            return sum(share[..., e, None] * expert_output(e, x) for e in range(EXPERTS))

        return forward

    for number, layer in enumerate(model.model.layers):
        for name, block in (("self_attn", layer.self_attn), ("mlp", layer.mlp)):
            prefix = f"{kind}.layers.{number}.{name}"
            if kind == "mixlora" and name == "mlp":
                block.forward = on_block(prefix, block)
                continue
            for target in fields["target_modules"]:
                if hasattr(block, target):
                    linear = getattr(block, target)
                    linear.forward = on_linear(f"{prefix}.{target}", linear)


def legacy(tensors):
    """The keys of the first releases."""
    result = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        if key.endswith("mlp.moe_gate.weight"):
            key = ".".join([*parts[:3], "gate.weight"])
        elif parts[3] == "mlp":
            key = ".".join([*parts[:3], "experts", parts[6], OLD_NAMES[parts[4]], *parts[7:]])
        result[key] = tensor
    return result


def save(path, tensors, fields, golden):
    directory = TESTDATA / path
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    torch.save(tensors, directory / "adapter_model.bin")
    write_json(directory / "adapter_config.json", fields)
    save_file(golden, directory / "logits.safetensors")
    provenance(directory, "mixlora.py", SEEDS.get(path, path), (torch, transformers))


def write_case(name, changes):
    kind, path = name.split("/")[0], f"mixtures/{name}"
    fields, model, base = config(changes), load(TESTDATA / BASE), load_file(TESTDATA / BASE / "logits.safetensors")
    tensors = weights(model, kind, fields, generator(SEEDS.get(path, path)))
    attach(model, kind, tensors, fields)
    golden = {"tokens": base["tokens"], "logits": logits(model, base["tokens"])}
    moved = difference(golden["logits"], base["logits"])
    print(f"{path:32} moves the logits by {moved:.3f}")
    assert moved > 1e-2
    save(path, tensors, fields, golden)
    if name == "mixlora/plain":
        targets = [OLD_NAMES.get(target, target) for target in fields["target_modules"]]
        old = fields | dict(routing_strategy="mixtral", target_modules=targets)
        save("mixtures/mixlora/legacy", legacy(tensors), old, golden)


def main():
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for name, changes in CASES.items():
        write_case(name, changes)


if __name__ == "__main__":
    main()
