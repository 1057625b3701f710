"""Write testdata/mixtures: mixtures of adapters of PEFT (Poly, X-LoRA, Arrow) on tiny llama, and what it computes with each of them."""

import os
import shutil

import peft_case
from common import TESTDATA, difference, generator, seed
from models import load, logits, provenance
from moe_models import lead
from peft_case import save

import torch
import transformers
from peft import LoraConfig, PeftModel, PolyConfig, XLoraConfig, create_arrow_model, get_peft_model
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from peft.tuners.lora.config import ArrowConfig
from safetensors.torch import load_file, save_file

MIXTURES = TESTDATA / "mixtures"
BASE = "models/llama"
QV = ["q_proj", "v_proj"]

# The adapters that are mixed: the fields in which the LoraConfig differs from r 4, alpha 8, on q and v.
EXPERTS = {
    "0": dict(),
    "1": dict(lora_alpha=4),
    "2": dict(use_rslora=True),
    "narrow": dict(r=2, target_modules=["v_proj", "o_proj"]),
    "general_0": dict(),
    "general_1": dict(),
}
POLY = dict(r=3, n_tasks=3, n_skills=4, target_modules=[*QV, "down_proj"])
POLY_CASES = {"llama": dict(), "llama_splits": dict(n_splits=2)}
TASKS = (2, 0)

# name: the fields of XLoraConfig, and the experts where they are not 0, 1 and 2.
XLORA_CASES = {
    "plain": dict(),
    "layerwise": dict(layerwise_scalings=True, softmax_temperature=0.5),
    "depth_2": dict(layerwise_scalings=True, xlora_depth=2, xlora_size=8),
    "depth_3": dict(xlora_depth=3, xlora_size=8, xlora_dropout_p=0.0),
    "no_softmax": dict(layerwise_scalings=True, enable_softmax=False, global_scaling_weight=0.7),
    "top_k": dict(layerwise_scalings=True, top_k_lora=2),
    "top_k_softmax": dict(layerwise_scalings=True, top_k_lora=2, enable_softmax=False, enable_softmax_topk=True),
    "top_k_twice": dict(top_k_lora=2, enable_softmax_topk=True, softmax_temperature=0.5),
    "pass_value": dict(layerwise_scalings=True, scaling_pass_value=0.3),
    "uneven": dict(layerwise_scalings=True, experts=["0", "narrow"]),
}
# name: the fields of ArrowConfig, and the general adapters.
ARROW_CASES = {
    "plain": dict(top_k=2, router_temperature=0.5),
    "all": dict(top_k=3),
    "general": dict(top_k=2, use_gks=True, general=["general_0", "general_1"]),
}
# By how much a chosen expert leads one that is not, at least: far more than rounding moves them.
LEAD = 3e-4
# Another seed where the choice of the best hangs on rounding.
SEEDS = {
    "mixtures/xlora/top_k": "mixtures/xlora/top_k/4",
    "mixtures/xlora/top_k_twice": "mixtures/xlora/top_k_twice/19",
}


def golden_tokens():
    return load_file(TESTDATA / BASE / "logits.safetensors")["tokens"]


def rng(path):
    return generator(SEEDS.get(path, path))


def finish(path, golden):
    """Write what was computed, once it is sure that the mixture does something."""
    directory = TESTDATA / path
    plain = load_file(TESTDATA / BASE / "logits.safetensors")["logits"]
    moved = difference(plain, golden["logits"])
    print(f"{path:32} moves the logits by {moved:.3f}")
    assert moved > 1e-2
    save_file({name: value.contiguous() for name, value in golden.items()}, directory / "logits.safetensors")
    provenance(directory, "mixtures.py", SEEDS.get(path, path))


def write_expert(name, fields):
    """A plain LoRA adapter. One direction is much stronger than the rest, so that Arrow finds it in its few steps."""
    path = f"mixtures/experts/{name}"
    config = LoraConfig(**dict(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=QV) | fields)
    model, noise = get_peft_model(load(TESTDATA / BASE), config), generator(path)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=noise)
            parameter.data[(0,) if "lora_A" in key else (slice(None), 0)] *= 3
    save(model, TESTDATA / path, BASE)
    provenance(TESTDATA / path, "mixtures.py", path)


@torch.no_grad()
def write_poly(name, fields):
    path, tokens = f"mixtures/poly/{name}", golden_tokens()
    config = PolyConfig(**dict(task_type="CAUSAL_LM") | POLY | fields)
    model, noise = get_peft_model(load(TESTDATA / BASE), config).eval(), rng(path)
    for key, parameter in model.named_parameters():
        if "poly_" in key:
            scale = 1.0 if "module_logits" in key else 0.3
            parameter.data = scale * torch.randn(parameter.shape, generator=noise)
    save(model, TESTDATA / path, BASE)
    inputs = dict(input_ids=tokens, task_ids=torch.tensor(TASKS), use_cache=False)
    computed = model(**inputs).logits
    again = PeftModel.from_pretrained(load(TESTDATA / BASE), TESTDATA / path).eval()
    assert difference(again(**inputs).logits, computed) < 1e-5
    finish(path, {"tokens": tokens, "task_ids": inputs["task_ids"], "logits": computed})


@torch.no_grad()
def write_xlora(name, fields):
    """The file is written here with all layers of the classifier: PEFT 0.21 leaves out those whose number is also the name of an expert."""
    path, tokens = f"mixtures/xlora/{name}", golden_tokens()
    directory = TESTDATA / path
    paths = [f"testdata/mixtures/experts/{expert}" for expert in fields.pop("experts", ["0", "1", "2"])]
    adapters = {str(number): path for number, path in enumerate(paths)}
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=adapters, **fields)
    model, noise = get_peft_model(load(TESTDATA / BASE, use_cache=False), config).eval(), rng(path)
    prefix = "base_model.internal_xlora_classifier."
    classifier = {key: value for key, value in model.named_parameters() if key.startswith(prefix)}
    for parameter in classifier.values():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=noise)
    computed, scalings = logits(model, tokens), model.get_latest_scalings()
    if config.top_k_lora:
        assert lead(scalings, config.top_k_lora) > LEAD, "near tie of experts: choose another seed"
    config.inference_mode, config.base_model_name_or_path = True, f"testdata/{BASE}"
    config.save_pretrained(directory)
    save_file(classifier, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    again = PeftModel.from_pretrained(load(TESTDATA / BASE, use_cache=False), directory).eval()
    assert difference(logits(again, tokens), computed) < 1e-5
    finish(path, {"tokens": tokens, "logits": computed, "scalings": scalings})


@torch.no_grad()
def write_arrow(name, fields):
    path, tokens = f"mixtures/arrow/{name}", golden_tokens()
    directory = TESTDATA / path
    general = [str(MIXTURES / "experts" / expert) for expert in fields.pop("general", [])]
    tasks = [str(MIXTURES / "experts" / expert) for expert in ("0", "1", "2")]
    arrow = ArrowConfig(rng_seed=seed(SEEDS.get(path, path)), **fields)
    torch.manual_seed(arrow.rng_seed)  # for the router's own factors, which are saved and mean nothing
    model = create_arrow_model(load(TESTDATA / BASE), tasks, arrow, general).eval()
    computed = logits(model, tokens)

    golden, leads = {"tokens": tokens, "logits": computed}, []
    golden["start"] = torch.randn(32, generator=torch.Generator().manual_seed(arrow.rng_seed))
    for key, module in model.named_modules():
        if isinstance(module, ArrowLoraLinearLayer):
            layer = key.removeprefix("base_model.model.").removesuffix(".lora_arrow.arrow_router")
            golden[f"prototypes.{layer}"] = module.prototypes
            module.register_forward_pre_hook(
                lambda module, inputs: leads.append(lead((inputs[0] @ module.prototypes.T).abs(), module.top_k))
            )
    logits(model, tokens)
    assert min(leads) > LEAD, "near tie of experts: choose another seed"
    model.save_pretrained(MIXTURES / "saved", selected_adapters=["arrow_router"])
    shutil.rmtree(directory, ignore_errors=True)
    shutil.move(MIXTURES / "saved" / "arrow_router", directory)
    shutil.rmtree(MIXTURES / "saved")
    peft_case.fix_config(directory, BASE)
    finish(path, golden)


def main():
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    os.chdir(TESTDATA.parent)
    for kind in ("experts", "poly", "xlora", "arrow"):
        shutil.rmtree(MIXTURES / kind, ignore_errors=True)
    writers = (
        (write_expert, EXPERTS),
        (write_poly, POLY_CASES),
        (write_xlora, XLORA_CASES),
        (write_arrow, ARROW_CASES),
    )
    for write, cases in writers:
        for name, fields in cases.items():
            write(name, dict(fields))


if __name__ == "__main__":
    main()
