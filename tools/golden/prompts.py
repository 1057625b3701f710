"""Write testdata/prompts: adapters of the prompt methods saved by PEFT, on the models of models.py and encoders.py, and what these compute with each of them."""

import shutil
import warnings
from functools import partial

import encoders
from common import TESTDATA, difference, generator, write_json
from models import load, provenance
from peft_case import save

import torch
import transformers
from peft import AdaptionPromptConfig, MultitaskPromptTuningConfig, PeftModel, PrefixTuningConfig
from peft import PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

PROMPTS = TESTDATA / "prompts"
VIRTUAL, SEQ, LENGTHS, TASKS, COLUMNS = 5, 6, (6, 3, 5), (2, 0, 1), 16
PROMPT_LENGTHS, NEW = (4, 2), 8
LSTM = dict(encoder_reparameterization_type="LSTM", encoder_hidden_size=6)

# name: class and fields of the configuration, beside the task's type and the number of virtual tokens.
METHODS = {
    "prompt_tuning": (PromptTuningConfig, dict()),
    "prefix_tuning": (PrefixTuningConfig, dict()),
    "prefix_projection": (PrefixTuningConfig, dict(prefix_projection=True, encoder_hidden_size=12)),
    "p_tuning_mlp": (PromptEncoderConfig, dict(encoder_hidden_size=12)),
    "p_tuning_lstm": (PromptEncoderConfig, dict(LSTM, encoder_num_layers=1)),
    "p_tuning_lstm_2": (PromptEncoderConfig, dict(LSTM, encoder_num_layers=2)),
    "multitask": (MultitaskPromptTuningConfig, dict(num_tasks=3, num_ranks=2)),
}
# "base/name": the number of layers. With a bias in the output projection, and on gpt2, the formula is another.
ADAPTION = {
    "llama/adaption_prompt": 1,
    "llama/adaption_prompt_all": 2,
    "llama_bias/adaption_prompt": 2,
    "gpt2/adaption_prompt": 2,
}
CAUSAL = ("llama", "qwen2", "gpt2")
GENERATED = ("prompt_tuning", "prefix_tuning", "p_tuning_mlp")
# Another seed where greedy decoding would come to a near tie.
SEEDS = {
    "prompts/llama/prompt_tuning": "prompts/llama/prompt_tuning/1",
    "prompts/llama/prefix_tuning": "prompts/llama/prefix_tuning/2",
    "prompts/qwen2/prefix_tuning": "prompts/qwen2/prefix_tuning/2",
    "prompts/qwen2/p_tuning_mlp": "prompts/qwen2/p_tuning_mlp/1",
    "prompts/gpt2/p_tuning_mlp": "prompts/gpt2/p_tuning_mlp/1",
}
# Prompt encoders know of a model only its width, which is 16 for the keys of llama and qwen2 and else 32.
ENCODED = {
    "llama": ("prefix_projection", "p_tuning_mlp", "p_tuning_lstm", "p_tuning_lstm_2"),
    "gpt2": ("prefix_projection",),
}

# base, of encoders.py: the task's type and the methods.
HEADS = {
    "bert_seqcls": ("SEQ_CLS", ("prompt_tuning", "prefix_tuning", "p_tuning_mlp")),
    "roberta_seqcls": ("SEQ_CLS", ("prompt_tuning", "prefix_tuning", "p_tuning_mlp")),
    "bert_tokcls": ("TOKEN_CLS", ("prompt_tuning", "prefix_tuning", "prefix_projection")),
    "roberta_tokcls": ("TOKEN_CLS", ("prefix_tuning",)),
    "bert_qa": ("QUESTION_ANS", ("prefix_tuning",)),
}
TEXT = ("tokens", "attention_mask", "token_type_ids")


def config(method, task):
    kind, fields = METHODS[method]
    return kind(task_type=task, num_virtual_tokens=VIRTUAL, **fields)


def randomise(model, rng):
    """Everything that is trained gets values that no initialisation has; gates and saved heads are moved."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=rng)
            if "modules_to_save" in name:
                parameter.data += 0.3 * noise
            elif name.endswith("adaption_gate"):
                parameter.data = 1 + 0.3 * noise
            else:
                is_prompt = name.endswith(("embedding.weight", "adaption_prompt")) or "prefix_task" in name
                parameter.data = (0.7 if is_prompt else 0.4) * noise


def padded(rows, width, left):
    """Rows of tokens brought to one width by token 0, and their mask."""
    tokens, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for row, given in enumerate(rows):
        place = slice(width - len(given), None) if left else slice(len(given))
        tokens[row, place], mask[row, place] = given, 1
    return tokens, mask


def causal_inputs():
    """The inputs of all causal cases: a full batch, the beginnings of its rows padded on either side, and prompts to continue."""
    tokens = torch.randint(3, 96, (len(LENGTHS), SEQ), generator=generator("prompts/inputs"))
    rows = [row[:length] for row, length in zip(tokens, LENGTHS)]
    prompts = [row[:length] for row, length in zip(tokens, PROMPT_LENGTHS)]
    inputs = {"tokens": tokens, "task_ids": torch.tensor(TASKS)}
    inputs["tokens_left"], inputs["mask_left"] = padded(rows, SEQ, left=True)
    inputs["tokens_right"], inputs["mask_right"] = padded(rows, SEQ, left=False)
    inputs["prompt"], inputs["prompt_mask"] = padded(prompts, max(PROMPT_LENGTHS), left=True)
    return inputs


@torch.no_grad()
def causal_logits(model, tokens, mask=None, **tasks):
    """The first columns of the logits of real tokens; zero at padding."""
    result = model(input_ids=tokens, attention_mask=mask, **tasks).logits
    result = result[:, -tokens.shape[1] :, :COLUMNS]  # without the virtual tokens, where they have logits
    return result.contiguous() if mask is None else result * mask[..., None]


def causal_outputs(model, inputs, method):
    tasks = {"task_ids": inputs["task_ids"]} if method == "multitask" else {}
    result = {"logits": causal_logits(model, inputs["tokens"], **tasks)}
    result["logits_left"] = causal_logits(model, inputs["tokens_left"], inputs["mask_left"], **tasks)
    # What follows a token changes nothing for it, so logits with padding on the right need no place in the file.
    right = causal_logits(model, inputs["tokens_right"], inputs["mask_right"], **tasks)
    assert difference(right, result["logits"] * inputs["mask_right"][..., None]) < 1e-5
    result["loss"] = loss(model, inputs["tokens_right"], inputs["mask_right"], **tasks)
    if method in GENERATED:
        result["greedy"], _ = greedy(model, inputs)
    return result


@torch.no_grad()
def loss(model, tokens, mask, **tasks):
    """The mean over all real tokens that something predicts: after virtual tokens also the first one of each row."""
    labels = tokens.masked_fill(mask == 0, -100)
    return model(input_ids=tokens, attention_mask=mask, labels=labels, **tasks).loss[None]


def greedy(model, inputs):
    """What PEFT's `generate` adds to the prompts, without an end, and by how much the best token leads at least."""
    options = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True)
    model.generation_config.eos_token_id = None
    result = model.generate(input_ids=inputs["prompt"], attention_mask=inputs["prompt_mask"], **options)
    best = torch.stack(result.logits).topk(2, dim=-1).values
    return result.sequences[:, -NEW:].contiguous(), (best[..., 0] - best[..., 1]).min()


def write_case(path, base, load, config, outputs, plain):
    """Save the randomised adapter, load it again, write what was computed. `plain` are the logits without it."""
    directory = TESTDATA / path
    model = get_peft_model(load(TESTDATA / base), config)
    start = {name: parameter.clone() for name, parameter in model.named_parameters()}
    randomise(model, generator(SEEDS.get(path, path)))
    assert all(p.requires_grad != p.equal(start[name]) for name, p in model.named_parameters())
    result = outputs(model.eval())
    save(model, directory, base)
    again = outputs(PeftModel.from_pretrained(load(TESTDATA / base), directory).eval())
    assert all(difference(again[key], result[key]) < 1e-5 for key in result)
    save_file({name: value.contiguous() for name, value in result.items()}, directory / "logits.safetensors")
    moved = difference(plain, result["logits"])
    print(f"{path:40} moves the logits by {moved:.3f}")
    assert moved > 1e-2
    return model, directory


def write_causal(base, method, config, inputs):
    path, name = f"prompts/{base}/{method}", f"models/{base}"
    plain = causal_logits(load(TESTDATA / name), inputs["tokens"])
    outputs = partial(causal_outputs, inputs=inputs, method=method)
    model, directory = write_case(path, name, load, config, outputs, plain)
    if method in GENERATED:
        assert greedy(model, inputs)[1] > 1e-2, "near tie in greedy decoding: choose another seed"
    if method in ENCODED.get(base, ()):
        state = model.prompt_encoder["default"].state_dict()
        save_file({key: value.contiguous() for key, value in state.items()}, directory / "encoder.safetensors")
    return {"path": path, "base": name, "method": method}


@torch.no_grad()
def head_outputs(model, inputs):
    """The output of the head; where it has one for each token, of real tokens, and zero at padding."""
    logits = encoders.outputs(model, inputs)["logits"]
    mask = inputs["attention_mask"]
    return {"logits": logits if logits.dim() == 2 else logits[:, -mask.shape[1] :] * mask[..., None]}


def write_head(base, task, method):
    path, name = f"prompts/{base}/{method}", f"encoders/{base}"
    golden = load_file(TESTDATA / name / "logits.safetensors")
    inputs = {key: golden[key] for key in TEXT if key in golden}
    load_head = partial(encoders.load, kind=encoders.CASES[base][0])
    write_case(path, name, load_head, config(method, task), partial(head_outputs, inputs=inputs), golden["logits"])
    return {"path": path, "base": name, "method": method}


def main():
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Position ids are not supported")
    shutil.rmtree(PROMPTS, ignore_errors=True)
    PROMPTS.mkdir()
    inputs = causal_inputs()
    save_file(inputs, PROMPTS / "inputs.safetensors")
    cases = [write_causal(base, name, config(name, "CAUSAL_LM"), inputs) for base in CAUSAL for name in METHODS]
    for name, layers in ADAPTION.items():
        adaption = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=layers)
        cases.append(write_causal(*name.split("/"), adaption, inputs))
    cases += [write_head(base, task, method) for base, (task, methods) in HEADS.items() for method in methods]
    write_json(PROMPTS / "cases.json", cases)
    provenance(PROMPTS, "prompts.py", "prompts/inputs")


if __name__ == "__main__":
    main()
