"""Write testdata/models-moe: tiny random language models with experts, their logits, what their routers give, and the loss that balances them."""

import json
import shutil

import models
from common import TESTDATA, difference, generator, write_json
from models import SEQ, VOCAB, greedy, load, logits, provenance

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config
from transformers import MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

MODELS = TESTDATA / "models-moe"
SIZES = models.SIZES | dict(max_position_embeddings=128)
QWEN = SIZES | dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20)
# Keys and values have other widths than the hidden size over the heads, the rotated part another than the rest.
LATENT = SIZES | dict(
    num_key_value_heads=4, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=6, v_head_dim=12,
    moe_intermediate_size=12, n_routed_experts=8, num_experts_per_tok=3, first_k_dense_replace=1,
)  # fmt: skip
# Of the three frequencies the first is kept, the second lies on the ramp, the third is divided by the factor.
YARN = dict(
    rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=32, beta_fast=4.0, beta_slow=1.0,
    mscale=1.0, mscale_all_dim=0.8,
)  # fmt: skip
GROUPS = dict(q_lora_rank=12, n_group=4, topk_group=2, routed_scaling_factor=2.5, rope_parameters=YARN)


def deepseek_v3(**changes):
    return DeepseekV3Config(**LATENT | dict(n_shared_experts=1) | changes)


CONFIGS = {
    "mixtral": MixtralConfig(**SIZES | dict(intermediate_size=24), num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=24),
    "qwen3_moe": Qwen3MoeConfig(**QWEN, head_dim=16, norm_topk_prob=True),
    # Experts in the second layer only: each second one has them, but the fourth is left out.
    "qwen3_moe_dense": Qwen3MoeConfig(
        **QWEN | dict(num_hidden_layers=4, intermediate_size=24), decoder_sparse_step=2, mlp_only_layers=[3]
    ),
    "deepseek_v2": DeepseekV2Config(**LATENT, q_lora_rank=None, n_shared_experts=2),
    "deepseek_v2_groups": DeepseekV2Config(
        **LATENT | GROUPS, n_shared_experts=1, topk_method="group_limited_greedy", attention_bias=True
    ),
    "deepseek_v3": deepseek_v3(**GROUPS),
    "deepseek_v3_plain": deepseek_v3(
        q_lora_rank=None, n_group=1, topk_group=1, norm_topk_prob=False, rope_interleave=False
    ),
}
# The same weights once more, as transformers 5 has them in memory.
FUSED = {"mixtral_fused": "mixtral", "qwen2_moe_fused": "qwen2_moe", "deepseek_v3_fused": "deepseek_v3"}
GREEDY = ["mixtral", "qwen2_moe", "deepseek_v3"]
BALANCED = ("mixtral", "qwen2_moe", "qwen3_moe")
# Another seed where a choice of experts or a greedy token would hang on rounding.
SEEDS = {"qwen3_moe": "models-moe/qwen3_moe/1"}
# Configuration fields that a loader may overlook; the logits must show each of them.
OVERLOOKED = {
    "qwen2_moe": dict(norm_topk_prob=True),
    "qwen3_moe": dict(norm_topk_prob=False),
    "deepseek_v2_groups": dict(routed_scaling_factor=1.0, topk_method="greedy", rope_parameters=YARN | dict(mscale=0)),
    "deepseek_v3": dict(routed_scaling_factor=1.0, norm_topk_prob=False, topk_group=4, rope_interleave=False),
}
# What configurations in the wild say besides; transformers reads none of it.
WILD = dict(aux_loss_alpha=0.001, ep_size=1, moe_layer_freq=1, seq_aux=True)
V4 = {
    "deepseek_v2_groups": WILD | dict(scoring_func="softmax"),
    "deepseek_v3": WILD | dict(scoring_func="sigmoid", topk_method="noaux_tc"),
}


def randomise(model, rng):
    models.randomise(model, rng)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=rng))


def lead(scores, chosen):
    """By how much the last chosen one leads the first that is not, at least; infinite where all are chosen."""
    best = scores.topk(min(chosen + 1, scores.shape[-1]), dim=-1).values
    return float("inf") if best.shape[-1] == chosen else (best[..., -2] - best[..., -1]).min().item()


def router_lead(config, gate, router_logits):
    """By how much the chosen experts lead, in the scores that choose them. A near tie would make tests depend on rounding."""
    if config.model_type == "deepseek_v3":
        scores, best = router_logits.sigmoid() + gate.e_score_correction_bias, 2
    else:
        scores, best = router_logits.softmax(dim=-1), 1
    leads = []
    if config.model_type == "deepseek_v3" or getattr(config, "topk_method", "") == "group_limited_greedy":
        groups = scores.unflatten(-1, (config.n_group, -1))
        group_scores = groups.topk(best, dim=-1).values.sum(dim=-1)
        leads.append(lead(group_scores, config.topk_group))
        chosen = torch.zeros_like(group_scores).scatter(-1, group_scores.topk(config.topk_group).indices, 1)
        scores = groups.masked_fill(chosen[..., None] == 0, -1.0).flatten(-2)
    return min(leads + [lead(scores, config.num_experts_per_tok)])


@torch.no_grad()
def routed(model, tokens):
    """The logits of each router, before softmax or sigmoid, by the number of the layer."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    blocks = {number: layer.mlp for number, layer in enumerate(base.model.layers) if hasattr(layer.mlp, "experts")}
    gates = {number: getattr(block.gate, "base_layer", block.gate) for number, block in blocks.items()}
    per_layer = model(input_ids=tokens, use_cache=False, output_router_logits=True).router_logits
    assert len(per_layer) == len(gates)
    for gate, router_logits in zip(gates.values(), per_layer):
        assert router_lead(model.config, gate, router_logits) > 1e-3, "near tie of experts: choose another seed"
    return {f"router_logits.{number}": value.contiguous() for number, value in zip(gates, per_layer)}


@torch.no_grad()
def balance(model, tokens):
    """The auxiliary loss, without and with padding, and the whole loss with the auxiliary one in it."""
    mask = torch.ones_like(tokens)
    mask[1, -4:] = 0
    options = dict(input_ids=tokens, use_cache=False, output_router_logits=True)
    plain, masked = model(**options, labels=tokens), model(**options, attention_mask=mask)
    losses = {"loss": plain.loss, "aux_loss": plain.aux_loss, "aux_loss_masked": masked.aux_loss}
    return {"attention_mask": mask} | {name: value[None] for name, value in losses.items()}


def config_v4(directory, fields):
    """config.json as it is in the wild, where the scaling of RoPE has its kind under `type`; the logits must stay."""
    models.config_v4(directory)
    path = directory / "config_v4.json"
    config = json.loads(path.read_text()) | fields
    config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")
    write_json(path, dict(sorted(config.items())))


def write_model(name, config, fused=False):
    directory, source = MODELS / name, FUSED.get(name, name)
    seed_name = SEEDS.get(source, f"models-moe/{source}")
    rng = generator(seed_name)
    model = AutoModelForCausalLM.from_config(config)
    randomise(model, rng)
    model.save_pretrained(directory, save_original_format=not fused)
    provenance(directory, "moe_models.py", seed_name)

    model = load(directory)
    tokens = torch.randint(VOCAB, (2, SEQ), generator=rng)
    golden = {"tokens": tokens, "logits": logits(model, tokens)} | routed(model, tokens)
    if source in GREEDY:
        golden["greedy"] = greedy(model, tokens[:1, :4], 8)
    if source in BALANCED:
        golden |= balance(model, tokens)
    save_file(golden, directory / "logits.safetensors")
    print(f"{name:20} {model.num_parameters():6} parameters, logits with std {golden['logits'].std():.2f}")
    if not fused:
        check(directory, golden)


def check(directory, golden):
    """Each field that a loader may overlook shows in the logits, and the older form of the configuration gives the same."""
    name, tokens = directory.name, golden["tokens"]
    for field, value in OVERLOOKED.get(name, {}).items():
        change = difference(logits(load(directory, **{field: value}), tokens), golden["logits"])
        print(f"  with another {field} the logits move by {change:.2f}")
        assert change > 1e-2
    if name in V4:
        config_v4(directory, V4[name])
        older = transformers.AutoConfig.from_pretrained(directory / "config_v4.json")
        options = dict(config=older, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager")
        model = AutoModelForCausalLM.from_pretrained(directory, **options).eval()
        assert difference(logits(model, tokens), golden["logits"]) < 1e-6


def main():
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    shutil.rmtree(MODELS, ignore_errors=True)
    for name, config in CONFIGS.items():
        write_model(name, config)
    for name, source in FUSED.items():
        write_model(name, CONFIGS[source], fused=True)


if __name__ == "__main__":
    main()
