"""Write testdata/adapterhub: adapters saved by AdapterHub's library on the encoders of encoders.py, and what the models compute with each of them.

Runs in an environment of its own (requirements-adapterhub.txt): the library needs transformers 4. Names as arguments: only those cases are written, the others stay.
"""

import logging
import shutil
import sys

import common
from common import TESTDATA, difference, generator, write_json

import adapters
import torch
import transformers
from adapters import AdapterPlusConfig, BertAdapterModel, CompacterConfig, CompacterPlusPlusConfig, DoubleSeqBnConfig
from adapters import DistilBertAdapterModel, DoubleSeqBnInvConfig, Fuse, GPT2AdapterModel, IA3Config, LlamaAdapterModel
from adapters import LoRAConfig, ParBnConfig, RobertaAdapterModel, SeqBnConfig, SeqBnInvConfig
from adapters.composition import Average, BatchSplit, Parallel, Split, Stack
from adapters.configuration import DynamicAdapterFusionConfig, StaticAdapterFusionConfig
from safetensors.torch import load_file, save_file

HUB = TESTDATA / "adapterhub"
ADAPTER = "task"
MODELS = {"bert": BertAdapterModel, "roberta": RobertaAdapterModel, "distilbert": DistilBertAdapterModel}
DECODERS = {"gpt2": GPT2AdapterModel, "llama": LlamaAdapterModel}
ID2LABEL = {0: "negative", 1: "neutral", 2: "positive"}
SMALL = dict(reduction_factor=4)
ALL = dict(attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True)

# Methods on BERT and RoBERTa: Houlsby, Pfeiffer, Pfeiffer with an invertible adapter, parallel, Compacter, LoRA, (IA)³.
METHODS = {
    "double_seq_bn": DoubleSeqBnConfig(**SMALL),
    "seq_bn": SeqBnConfig(**SMALL),
    "seq_bn_inv": SeqBnInvConfig(**SMALL),
    "par_bn": ParBnConfig(**SMALL),
    "scaled_par_bn": ParBnConfig(scaling="learned", **SMALL),
    "compacter": CompacterConfig(**SMALL),
    "compacter_plus_plus": CompacterPlusPlusConfig(**SMALL),
    "lora": LoRAConfig(r=4, alpha=12),
    "ia3": IA3Config(),
}
# Only on bert: every option that changes the formula.
VARIANTS = {
    "seq_bn_ln_before": SeqBnConfig(ln_before=True, **SMALL),
    "seq_bn_ln_after": SeqBnConfig(ln_after=True, **SMALL),
    "seq_bn_residual_ln_after": SeqBnConfig(ln_after=True, adapter_residual_before_ln=True, **SMALL),
    "seq_bn_residual_after_ln": SeqBnConfig(residual_before_ln=False, **SMALL),
    "seq_bn_residual_post_add": SeqBnConfig(residual_before_ln="post_add", **SMALL),
    "seq_bn_no_original_ln_before": SeqBnConfig(original_ln_before=False, **SMALL),
    "seq_bn_channel": SeqBnConfig(scaling="channel", **SMALL),
    "seq_bn_gating": SeqBnConfig(use_gating=True, **SMALL),
    "seq_bn_drop": SeqBnConfig(leave_out=[0], **SMALL),
    "seq_bn_reduction": SeqBnConfig(reduction_factor={"1": 2, "default": 8}),
    "double_seq_bn_ln": DoubleSeqBnConfig(original_ln_before=True, ln_before=True, ln_after=True, **SMALL),
    "double_seq_bn_inv": DoubleSeqBnInvConfig(inv_adapter_reduction_factor=4, non_linearity="gelu", **SMALL),
    "adapter_plus": AdapterPlusConfig(stochastic_depth=0.0, **SMALL),
    "par_bn_both": ParBnConfig(mh_adapter=True, ln_before=True, ln_after=True, **SMALL),
    "compacter_own_rule": CompacterConfig(shared_phm_rule=False, factorized_phm_rule=True, **SMALL),
    "compacter_own_weight": CompacterConfig(factorized_phm_rule=True, factorized_phm_W=False, **SMALL),
    "compacter_shared_weight": CompacterPlusPlusConfig(shared_W_phm=True, phm_rank=2, phm_bias=False, **SMALL),
    "lora_all": LoRAConfig(r=4, alpha=12, **ALL),
    "lora_gating": LoRAConfig(r=4, alpha=12, use_gating=True),
    "ia3_all": IA3Config(**ALL),
}
FUSIONS = {
    "fusion": DynamicAdapterFusionConfig(),
    "fusion_static": StaticAdapterFusionConfig(),
    "fusion_options": DynamicAdapterFusionConfig(
        query_before_ln=True, residual_before=True, temperature=True, value_before_softmax=False
    ),
}
# What runs on two Pfeiffer adapters. The weights of Average are normalised, and the sum is then divided by the number of adapters once more.
COMPOSITIONS = {
    "a": Stack("a"),
    "b": Stack("b"),
    "stack": Stack("a", "b"),
    "average": Average("a", "b", weights=[0.3, 0.7]),
    "average_exact": Average("a", "b", weights=[0.6, 1.4], normalize_weights=False),
    "split": Split("a", "b", splits=[5, 7]),
    "batch_split": BatchSplit("a", "b", batch_sizes=[1, 1]),
    "parallel": Parallel("a", "b"),
    "stack_split": Stack("a", Split("b", "a", splits=[4, 8])),
}
# A language below a task: the adapter behind the embeddings is that of the first one, or there is none.
LANGUAGE = {"stack": Stack("a", "b"), "reverse": Stack("b", "a"), "average": COMPOSITIONS["average_exact"]}


def base_model(base):
    model = MODELS[base].from_pretrained(TESTDATA / "encoders" / f"{base}_seqcls", attn_implementation="eager")
    for name in list(model.heads):
        model.delete_head(name)
    model.config.name_or_path = f"testdata/encoders/{base}_seqcls"  # the library writes it into each file
    return model.eval()


def inputs(base):
    golden = load_file(TESTDATA / "encoders" / f"{base}_seqcls" / "logits.safetensors")
    return {name: golden[name] for name in ("tokens", "attention_mask", "token_type_ids") if name in golden}


def randomise(model, known, rng):
    """Fill what was added to the model: norms and factors about one, products of three matrices a little larger."""
    for name, parameter in model.named_parameters():
        if name not in known:
            noise = torch.randn(parameter.shape, generator=rng)
            is_norm = "adapter_norm" in name and name.endswith("weight")
            is_factor = name.endswith("scaling") or (name.endswith("lora_B") and parameter.shape[1] == 1)
            is_product = any(part in name for part in ("phm_rule", ".W", "shared_parameters"))
            parameter.data = 1 + 0.3 * noise if is_norm or is_factor else (0.5 if is_product else 0.3) * noise


@torch.no_grad()
def outputs(model, given):
    arguments = {"input_ids" if name == "tokens" else name: value for name, value in given.items()}
    result = model(**arguments, output_hidden_states=True)
    hidden = result.hidden_states[-1]
    return {"logits": result.logits, "hidden": hidden} if model.active_head else {"hidden": hidden}


def finish(directory, seed_name, tensors):
    save_file({name: value.contiguous() for name, value in tensors.items()}, directory / "logits.safetensors")
    common.provenance(directory, "adapterhub.py", seed_name, (torch, transformers, adapters))


def check_again(base, load, given, expected):
    """The model anew with what was saved: it must compute the same."""
    model = base_model(base)
    load(model)
    again = outputs(model.eval(), given)
    assert again.keys() == expected.keys()
    assert all(difference(again[name], expected[name]) < 1e-5 for name in again)


def report(name, base, given, result):
    plain = outputs(base_model(base), given)["hidden"]
    moved = difference(plain, result[:, -plain.shape[1] :])  # without a prompt
    print(f"{name:36} moves the hidden states by {moved:.3f}")
    assert moved > 1e-2


def write_adapter(base, variant, config, layers=2, safetensors=True):
    # With ln_before the state has the same norm under two names, which safetensors refuses.
    safetensors = safetensors and not config.get("ln_before")
    name = f"{base}_{variant}"
    directory, seed_name = HUB / name, f"adapterhub/{name}"
    model, given = base_model(base), inputs(base)
    known = {name for name, _ in model.named_parameters()}
    model.add_adapter(ADAPTER, config=config)
    model.add_classification_head(ADAPTER, num_labels=3, layers=layers, id2label=ID2LABEL)
    model.set_active_adapters(ADAPTER)
    randomise(model, known, generator(seed_name))
    result = outputs(model.eval(), given)
    directory.mkdir(parents=True)
    model.save_adapter(str(directory), ADAPTER, with_head=True, use_safetensors=safetensors)
    check_again(base, lambda model: load_adapter(model, directory, safetensors), given, result)
    report(name, base, given, result["hidden"])
    finish(directory, seed_name, given | result)


def load_adapter(model, directory, safetensors):
    model.load_adapter(str(directory), set_active=True, use_safetensors=safetensors)


def decoder(base):
    """A language model with a head of the library's own: it alone runs an invertible adapter backwards."""
    model = DECODERS[base].from_pretrained(TESTDATA / "models" / base, attn_implementation="eager")
    model.config.name_or_path = f"testdata/models/{base}"
    return model.eval()


def write_decoder(base, variant, config):
    name = f"{base}_{variant}"
    directory, seed_name = HUB / name, f"adapterhub/{name}"
    given = {"tokens": load_file(TESTDATA / "models" / base / "logits.safetensors")["tokens"]}
    model, head = decoder(base), "default"
    known = {name for name, _ in model.named_parameters()}
    model.add_adapter(ADAPTER, config=config)
    model.set_active_adapters(ADAPTER)
    model.active_head = head
    randomise(model, known, generator(seed_name))
    result = outputs(model.eval(), given)
    directory.mkdir(parents=True)
    model.save_adapter(str(directory), ADAPTER, with_head=False, use_safetensors=True)
    again = decoder(base)
    load_adapter(again, directory, True)
    again.active_head = head
    assert difference(outputs(again.eval(), given)["logits"], result["logits"]) < 1e-5
    finish(directory, seed_name, given | result)


def write_bin(base, variant, config):
    write_adapter(base, variant, config, safetensors=False)
    write_legacy(HUB / f"{base}_{variant}")


def write_legacy(source):
    """The files of `source`, saved by torch.save, also in the form that it had before version 1.6 and that many published adapters have."""
    target = source / "legacy"
    target.mkdir()
    for path in sorted(source.glob("*.bin")):
        torch.save(torch.load(path, weights_only=True), target / path.name, _use_new_zipfile_serialization=False)
    for path in source.glob("*_config.json"):
        shutil.copy(path, target)


def two_adapters(base, seed_name, first=SeqBnConfig(**SMALL)):
    model = base_model(base)
    known = {name for name, _ in model.named_parameters()}
    for adapter, config in ("a", first), ("b", SeqBnConfig(**SMALL)):
        model.add_adapter(adapter, config=config)
    rng = generator(seed_name)
    randomise(model, known, rng)
    return model, rng


def save_two(model, directory):
    directory.mkdir(parents=True)
    for adapter in ("a", "b"):
        model.save_adapter(str(directory / adapter), adapter, with_head=False, use_safetensors=True)


def load_two(model, directory):
    for adapter in ("a", "b"):
        model.load_adapter(str(directory / adapter), use_safetensors=True)


def load_fusion(model, directory):
    load_two(model, directory)
    model.load_adapter_fusion(str(directory), set_active=True, use_safetensors=True)
    model.active_head = ADAPTER


def write_fusion(base, variant, config):
    name = f"{base}_{variant}"
    directory, seed_name = HUB / name, f"adapterhub/{name}"
    model, rng = two_adapters(base, seed_name)
    given = inputs(base)
    known = {name for name, _ in model.named_parameters()}
    model.add_adapter_fusion(Fuse("a", "b"), config=config)
    model.add_classification_head(ADAPTER, num_labels=3, id2label=ID2LABEL)
    randomise(model, known, rng)
    model.set_active_adapters(Fuse("a", "b"))
    model.active_head = ADAPTER
    result = outputs(model.eval(), given)
    save_two(model, directory)
    model.save_adapter_fusion(str(directory), Fuse("a", "b"), with_head=ADAPTER, use_safetensors=True)
    check_again(base, lambda model: load_fusion(model, directory), given, result)
    report(name, base, given, result["hidden"])
    finish(directory, seed_name, given | result)


def composed(model, given, setups):
    hidden = {}
    for name, setup in setups.items():
        model.set_active_adapters(setup)
        model.active_head = None
        hidden[name] = outputs(model.eval(), given)["hidden"]
    return hidden


def write_compositions(base, variant, setups, first=SeqBnConfig(**SMALL)):
    directory, seed_name = HUB / f"{base}_{variant}", f"adapterhub/{base}_{variant}"
    model, _ = two_adapters(base, seed_name, first)
    given = inputs(base)
    hidden = composed(model, given, setups)
    save_two(model, directory)
    again = base_model(base)
    load_two(again, directory)
    assert all(difference(value, hidden[name]) < 1e-5 for name, value in composed(again, given, setups).items())
    finish(directory, seed_name, given)
    (directory / "logits.safetensors").unlink()
    tensors = {name: value.contiguous() for name, value in (given | hidden).items()}
    save_file(tensors, directory / "composition.safetensors")


def main():
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    asked = sys.argv[1:]
    if not asked:
        shutil.rmtree(HUB, ignore_errors=True)
    cases = []

    def write(base, variant, writer, *arguments, listed=True, **options):
        if not asked or f"{base}_{variant}" in asked:
            shutil.rmtree(HUB / f"{base}_{variant}", ignore_errors=True)
            writer(base, variant, *arguments, **options)
        if listed:
            cases.append({"path": f"adapterhub/{base}_{variant}", "base": f"{base}_seqcls", "variant": variant})

    for base in ("bert", "roberta"):
        for variant, config in METHODS.items():
            write(base, variant, write_adapter, config)
    for variant, config in VARIANTS.items():
        write("bert", variant, write_adapter, config)
    write("bert", "seq_bn_one_layer", write_adapter, METHODS["seq_bn"], layers=1)
    write("bert", "seq_bn_bin", write_bin, METHODS["seq_bn"])
    # Where modules have other names.
    for variant in ("double_seq_bn_inv", "lora_all", "ia3_all"):
        write("distilbert", variant, write_adapter, VARIANTS[variant])
    for variant, config in FUSIONS.items():
        write("bert", variant, write_fusion, config)
    write("roberta", "fusion", write_fusion, FUSIONS["fusion"])
    write_json(HUB / "cases.json", cases)
    write("bert", "composition", write_compositions, COMPOSITIONS, listed=False)
    write("bert", "language", write_compositions, LANGUAGE, SeqBnInvConfig(**SMALL), listed=False)
    for base in DECODERS:
        write(base, "seq_bn_inv", write_decoder, SeqBnInvConfig(**SMALL), listed=False)
    write("llama", "lora_all", write_decoder, VARIANTS["lora_all"], listed=False)


if __name__ == "__main__":
    main()
