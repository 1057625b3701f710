"""Write testdata/models: tiny random checkpoints in the Hugging Face layout and the logits transformers computes."""

import json
import shutil

import common
from common import TESTDATA, generator, write_json

import peft
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

VOCAB, SEQ = 96, 12
SIZES = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LLAMA3_ROPE = dict(
    rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip


def llama(**changes):
    return LlamaConfig(**SIZES | dict(rms_norm_eps=1e-5) | changes)


# head_dim 32 puts one RoPE wavelength (14.3) into the band between 32/4 and 32/1 that llama3 scaling interpolates.
CONFIGS = {
    "llama": llama(),
    "llama3_rope": llama(head_dim=32, rope_parameters=LLAMA3_ROPE),
    "llama_linear_rope": llama(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0)),
    "smollm2": llama(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=100000.0)),
    "llama_bias": llama(attention_bias=True, mlp_bias=True),
    "llama_sharded": llama(),
    "llama_bf16": llama(),
    "llama_f16": llama(),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral_sliding": MistralConfig(**SIZES, sliding_window=4),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    ),
}
DTYPES = {"llama_bf16": torch.bfloat16, "llama_f16": torch.float16}
GREEDY = ["llama", "smollm2", "gpt2"]
# Configuration fields that a loader may overlook; the logits must show each of them.
OVERLOOKED = {
    "llama3_rope": dict(rope_parameters=dict(rope_type="default", rope_theta=500000.0)),
    "llama_linear_rope": dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
    "smollm2": dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
    "mistral_sliding": dict(sliding_window=None),
}


def randomise(model, rng):
    """Fill every parameter with values that no initialisation has, so that an ignored one shows in the logits."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=rng)
        is_norm = parameter.dim() == 1 and name.endswith("weight")
        parameter.data = 1 + 0.2 * noise if is_norm else 0.25 * noise


def load(directory, **config_changes):
    """Read the checkpoint into f32: casting a live model up instead would keep its RoPE table in the low precision."""
    config = AutoConfig.from_pretrained(directory)
    for key, value in config_changes.items():
        setattr(config, key, value)
    options = dict(dtype=torch.float32, attn_implementation="eager", experts_implementation="eager")
    return AutoModelForCausalLM.from_pretrained(directory, config=config, **options).eval()


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=tokens, use_cache=False).logits.contiguous()


def greedy(model, tokens, count):
    """The `count` most probable next tokens; a near tie would make the test depend on rounding."""
    prompt = tokens.shape[1]
    for _ in range(count):
        best = logits(model, tokens)[0, -1].topk(2)
        assert best.values[0] - best.values[1] > 1e-2, "near tie in greedy decoding: choose another seed"
        tokens = torch.cat([tokens, best.indices[:1, None]], dim=1)
    return tokens[0, prompt:]


def provenance(directory, script, seed_name):
    common.provenance(directory, script, seed_name, (torch, transformers, peft))


def config_v4(directory):
    """config.json as transformers 4 wrote it: `rope_theta` and `rope_scaling` apart, `torch_dtype` for `dtype`."""
    config = json.loads((directory / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling, "torch_dtype": config.pop("dtype")}
    write_json(directory / "config_v4.json", dict(sorted(config.items())) | {"transformers_version": "4.46.0"})


def write_model(name, config):
    directory = TESTDATA / "models" / name
    shutil.rmtree(directory, ignore_errors=True)
    seed_name = f"models/{name}"
    rng = generator(seed_name)
    model = AutoModelForCausalLM.from_config(config)
    randomise(model, rng)
    shard = "60KB" if name == "llama_sharded" else "50GB"
    model.to(DTYPES.get(name, torch.float32)).save_pretrained(directory, max_shard_size=shard)
    provenance(directory, "models.py", seed_name)

    model = load(directory)
    tokens = torch.randint(VOCAB, (2, SEQ), generator=rng)
    golden = {"tokens": tokens, "logits": logits(model, tokens)}
    if name in GREEDY:
        golden["greedy"] = greedy(model, tokens[:1, :4], 8)
    save_file(golden, directory / "logits.safetensors")
    print(f"{name:18} {model.num_parameters():6} parameters, logits with std {golden['logits'].std():.2f}")

    if name in ("llama3_rope", "llama_linear_rope"):
        config_v4(directory)
    if name in OVERLOOKED:
        change = (logits(load(directory, **OVERLOOKED[name]), tokens) - golden["logits"]).abs().max()
        print(f"  without {next(iter(OVERLOOKED[name]))} the logits move by {change:.2f}")
        assert change > 1e-2


def main():
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for name, config in CONFIGS.items():
        write_model(name, config)


if __name__ == "__main__":
    main()
