"""Write testdata/matching.json: which module names PEFT's own functions match, and which rank or alpha they look up."""

from common import TESTDATA, write_json

import peft
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

Q0 = "model.layers.0.self_attn.q_proj"
Q1 = "model.layers.1.self_attn.q_proj"
Q11 = "model.layers.11.self_attn.q_proj"
DOWN1 = "model.layers.1.mlp.down_proj"
EXPERT = "model.layers.3.mlp.experts.5.w1"
ENCODER2 = "encoder.layer.2.attention.self.query"
GPT = "transformer.h.1.mlp.c_proj"

# (module name, target_modules, further LoraConfig fields)
TARGETS = [
    # A list matches whole names and suffixes that begin after a dot.
    ("q_proj", ["q_proj"], {}),
    (Q0, ["q_proj"], {}),
    (Q0, ["proj"], {}),
    (Q0, ["Q_proj"], {}),
    (Q0, ["v_proj", "q_proj"], {}),
    (Q0, ["self_attn"], {}),
    (Q0, ["model"], {}),
    ("model.layers.0.self_attn.fused_q_proj", ["q_proj"], {}),
    ("model.layers.0.self_attn.q_proj.linear", ["q_proj"], {}),
    # Items may hold dots; they are text, not patterns.
    (GPT, ["mlp.c_proj"], {}),
    ("transformer.h.1.attn.c_proj", ["mlp.c_proj"], {}),
    ("transformer.h.1.gated_mlp.c_proj", ["mlp.c_proj"], {}),
    (GPT, ["mlp?c_proj"], {}),
    (Q1, ["1.self_attn.q_proj"], {}),
    (Q11, ["1.self_attn.q_proj"], {}),
    (Q0, [r"self_attn\.q_proj"], {}),
    (Q0, [".q_proj"], {}),
    (Q0, [], {}),
    # A string is a regular expression that matches the whole name.
    (Q0, "q_proj", {}),
    (Q0, r".*\.q_proj", {}),
    (Q0, r".*q_pro", {}),
    (Q0, r"model\.layers\.[02]\..*_(proj|lin)", {}),
    (Q1, r"model\.layers\.[02]\..*_(proj|lin)", {}),
    (Q0, r".*layers\.\d+\.self_attn.q_proj$", {}),
    (Q0, r"^model.*", {}),
    (DOWN1, r".*(q_proj|v_proj)|.*mlp.*", {}),
    (Q0, r"(?i).*Q_PROJ", {}),
    (Q0, r"model|.*v_proj", {}),
    (Q0, r".*v_proj|self_attn\.q_proj", {}),
    # Layer indices: a list or one number, the first numbered segment after a dot counts.
    (Q1, ["q_proj"], dict(layers_to_transform=[1])),
    (Q0, ["q_proj"], dict(layers_to_transform=[1])),
    (Q0, ["q_proj"], dict(layers_to_transform=[])),
    (Q1, ["q_proj"], dict(layers_to_transform=1)),
    (Q11, ["q_proj"], dict(layers_to_transform=1)),
    (Q0, ["q_proj"], dict(layers_to_transform=0)),
    (Q0, ["v_proj"], dict(layers_to_transform=0)),
    ("model.embed.q_proj", ["q_proj"], dict(layers_to_transform=[0, 1])),
    ("layers.1.q_proj", ["q_proj"], dict(layers_to_transform=[1])),
    ("model.layers.1", ["1"], dict(layers_to_transform=[1])),
    # A full name in the list wins over the layer indices.
    (Q0, [Q0], dict(layers_to_transform=[1])),
    (Q0, ["layers.0.self_attn.q_proj"], dict(layers_to_transform=[1])),
    ("q_proj", ["q_proj"], dict(layers_to_transform=[1])),
    # Nested numbers: the layer, not the expert.
    (EXPERT, ["w1"], dict(layers_to_transform=[3])),
    (EXPERT, ["w1"], dict(layers_to_transform=[5])),
    (EXPERT, ["w1"], dict(layers_to_transform=[3], layers_pattern="layers")),
    (EXPERT, ["w1"], dict(layers_to_transform=[5], layers_pattern="experts")),
    (EXPERT, ["w1"], dict(layers_to_transform=[3], layers_pattern="experts")),
    # layers_pattern: one, several (the first that matches decides), none, a wrong one, at the root.
    (Q1, ["q_proj"], dict(layers_to_transform=[1], layers_pattern="layers")),
    (Q1, ["q_proj"], dict(layers_to_transform=[1], layers_pattern="h")),
    (Q1, ["q_proj"], dict(layers_to_transform=[1], layers_pattern=["h", "layers"])),
    (Q1, ["q_proj"], dict(layers_to_transform=[1], layers_pattern=[])),
    (Q1, ["q_proj"], dict(layers_to_transform=[1], layers_pattern="")),
    (Q1, ["q_proj"], dict(layers_to_transform=[1], layers_pattern="layer.")),
    (Q1, ["q_proj"], dict(layers_to_transform=[1], layers_pattern="ayers")),
    (EXPERT, ["w1"], dict(layers_to_transform=[5], layers_pattern=["layers", "experts"])),
    (EXPERT, ["w1"], dict(layers_to_transform=[5], layers_pattern=["experts", "layers"])),
    (ENCODER2, ["query"], dict(layers_to_transform=2, layers_pattern="layer")),
    (ENCODER2, ["query"], dict(layers_to_transform=2, layers_pattern="encoder.layer")),
    (GPT, ["c_proj"], dict(layers_to_transform=[0, 1], layers_pattern=["h"])),
    ("h.1.mlp.c_proj", ["c_proj"], dict(layers_to_transform=[1], layers_pattern="h")),
    ("h.1.mlp.c_proj", ["c_proj"], dict(layers_to_transform=[0], layers_pattern="h")),
    # Exclusion comes first: by list (name or dotted suffix) or by a pattern for the whole name.
    (Q0, ["q_proj"], dict(exclude_modules=["q_proj"])),
    (Q0, ["q_proj"], dict(exclude_modules=[Q0])),
    (Q1, ["q_proj"], dict(exclude_modules=[Q0])),
    (Q0, ["q_proj"], dict(exclude_modules=["self_attn"])),
    (Q0, ["q_proj"], dict(exclude_modules=["proj"])),
    (Q0, [Q0], dict(exclude_modules=["self_attn.q_proj"])),
    (Q0, ["q_proj"], dict(exclude_modules=[])),
    (Q0, ["q_proj"], dict(exclude_modules="q_proj")),
    (Q0, ["q_proj"], dict(exclude_modules=r".*\.0\..*")),
    (Q1, ["q_proj"], dict(exclude_modules=r".*\.0\..*")),
    (Q0, ["q_proj"], dict(exclude_modules=r"model|q_proj")),
    (Q0, r".*q_proj", dict(exclude_modules=r"model\.layers\.0\..*")),
    # A module in modules_to_save, or inside one, gets no adapter.
    ("lm_head", ["lm_head"], dict(modules_to_save=["lm_head"])),
    ("score.dense", ["dense"], dict(modules_to_save=["score"])),
    ("model.score.head.dense", ["dense"], dict(modules_to_save=["score"])),
    ("model.old_score.dense", ["dense"], dict(modules_to_save=["score"])),
    ("model.score_head.dense", ["dense"], dict(modules_to_save=["score"])),
    (Q0, r".*_proj", dict(modules_to_save=["layers.0"])),
    (Q1, r".*_proj", dict(modules_to_save=["layers.0"])),
]

# ([(pattern, value)], module name, default). Python dictionaries keep their order: the first pattern that matches wins.
PATTERNS = [
    ([], Q0, 8),
    ([("q_proj", 4)], Q0, 8),
    ([("proj", 4)], Q0, 8),
    ([("q_proj", 4)], "q_proj", 8),
    ([("v_proj", 4)], Q0, 8),
    ([(Q0, 2)], Q0, 8),
    ([("self_attn.q_proj", 4)], Q0, 8),
    ([("q_proj", 4), (Q0, 2)], Q0, 8),
    ([(Q0, 2), ("q_proj", 4)], Q0, 8),
    ([(Q0, 2), ("q_proj", 4)], Q1, 8),
    ([(r".*_proj", 3), ("q_proj", 4)], Q0, 8),
    ([(r"layers\.1\..*_proj", 16)], Q1, 8),
    ([(r"layers\.1\..*_proj", 16)], Q11, 8),
    ([(r"1\.self_attn\.q_proj", 16)], Q11, 8),
    ([("^q_proj", 4)], Q0, 8),
    ([("^q_proj", 4)], "q_proj", 8),
    ([(r"^model\.layers\.0\.self_attn\.q_proj", 5)], Q0, 8),
    ([(r"^model\.layers\.0", 5)], Q0, 8),
    ([(r"^model\.layers\.0\..*$", 5)], Q0, 8),
    ([(r"^layers\.0\..*", 5)], Q0, 8),
    ([("q_proj|v_proj", 6)], Q0, 8),
    ([("k_proj", 1), ("q_proj|v_proj", 6), ("q_proj", 7)], Q0, 8),
    ([("self_attn", 6)], Q0, 8),
    ([("q_proj.", 6)], Q0, 8),
    ([("mlp?c_proj", 6)], GPT, 8),
    ([("mlp.c_proj", 6)], "transformer.h.1.mlpXc_proj", 8),
    ([("q_proj", 2.5)], Q0, 16),
]


def target_vector(key, targets, fields):
    expected = bool(check_target_module_exists(LoraConfig(target_modules=targets, **fields), key))
    names = ("layers_to_transform", "layers_pattern", "exclude_modules", "modules_to_save")
    return {"key": key, "target_modules": targets} | {name: fields.get(name) for name in names} | {"expected": expected}


def pattern_vector(pairs, key, default):
    pattern = dict(pairs)
    expected = pattern.get(get_pattern_key(pattern.keys(), key), default)
    return {"pattern": pattern, "key": key, "default": default, "expected": expected}


def main():
    targets = [target_vector(*case) for case in TARGETS]
    patterns = [pattern_vector(*case) for case in PATTERNS]
    provenance = {"peft": peft.__version__, "script": "tools/golden/matching.py"}
    write_json(TESTDATA / "matching.json", {"provenance": provenance, "targets": targets, "patterns": patterns})
    matches = sum(vector["expected"] for vector in targets)
    print(f"{len(targets)} target vectors ({matches} match), {len(patterns)} pattern vectors")


if __name__ == "__main__":
    main()
