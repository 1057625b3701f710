"""An adapter as PEFT saves it, and what the model computes with it: what the generators of PEFT's adapters have in common."""

import json

from common import TESTDATA, difference, generator, write_json
from models import load, logits, provenance

from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

SETS = ("target_modules", "exclude_modules", "feedforward_modules", "target_parameters")


def save(model, directory, base):
    """save_pretrained, with the parts that vary between runs and machines (order of sets, base path) made fixed."""
    target = directory if model.active_adapter == "default" else directory.parent
    model.save_pretrained(target)
    (target / "README.md").unlink()
    fix_config(directory, base)


def fix_config(directory, base):
    path = directory / "adapter_config.json"
    fields = json.loads(path.read_text())
    fields["base_model_name_or_path"] = f"testdata/{base}"
    for key in SETS:
        if isinstance(fields.get(key), list):
            fields[key].sort()
    write_json(path, fields)


def causal_outputs(model, golden):
    return {"logits": logits(model, golden["tokens"])}


def unload(model):
    return model.merge_and_unload()


def write_case(
    path, base, config, randomise, script, load=load, outputs=causal_outputs, inputs=("tokens",), merge=unload, seed=None
):  # fmt: skip
    """Save the randomised adapter, load it again, merge it. Returns by how much it moves the logits, and merging moves them again."""
    directory, base_directory = TESTDATA / path, TESTDATA / base
    golden = load_file(base_directory / "logits.safetensors")
    model = get_peft_model(load(base_directory), config)
    randomise(model, generator(seed or path))
    adapted = outputs(model.eval(), golden)
    save(model, directory, base)
    again = outputs(PeftModel.from_pretrained(load(base_directory), directory).eval(), golden)
    assert all(difference(again[key], adapted[key]) < 1e-5 for key in adapted)

    merged = outputs(merge(model), golden)
    key = next(iter(adapted))
    tensors = {name: golden[name] for name in inputs} | adapted | {f"{key}_merged": merged[key]}
    save_file({name: value.contiguous() for name, value in tensors.items()}, directory / "logits.safetensors")
    provenance(directory, script, seed or path)
    moved, merge_error = (difference(adapted[key], other[key]) for other in (golden, merged))
    print(f"{path:36} moves the output by {moved:.3f}, merging by another {merge_error:.1e}")
    assert moved > 1e-2
    return moved, merge_error
