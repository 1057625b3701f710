"""Write testdata/encoders: tiny random encoders and vision models in the Hugging Face layout, and what transformers computes with them."""

import json
import shutil
import string

from common import TESTDATA, generator, write_json
from models import provenance, randomise

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertConfig, DistilBertConfig, Dinov2Config, RobertaConfig, ViTConfig
from transformers import BertForQuestionAnswering, BertForSequenceClassification, BertForTokenClassification, BertModel
from transformers import BertTokenizer, BitImageProcessorPil, Dinov2ForImageClassification, ViTImageProcessorPil
from transformers import DistilBertForQuestionAnswering, DistilBertForSequenceClassification, RobertaTokenizer
from transformers import RobertaForSequenceClassification, RobertaForTokenClassification, ViTForImageClassification

ENCODERS = TESTDATA / "encoders"
SEQ, PADDED = 12, 4
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
TEXT = SIZES | dict(intermediate_size=64)
SENTIMENT = ["negative", "neutral", "positive"]
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
TOPICS = ["sport", "science", "trade", "weather"]


def labels(names):
    return dict(id2label=dict(enumerate(names)), label2id={name: index for index, name in enumerate(names)})


def bert(names=(), **changes):
    return BertConfig(**TEXT, vocab_size=96, max_position_embeddings=64, **(labels(names) if names else {}), **changes)


def roberta(names):
    """As in the published checkpoints: positions start after the padding index, one token type, LayerNorm's epsilon 1e-5."""
    sizes = dict(vocab_size=320, max_position_embeddings=66, type_vocab_size=1, layer_norm_eps=1e-5)
    return RobertaConfig(**TEXT, **sizes, **labels(names))


def distilbert(names=()):
    sizes = dict(vocab_size=96, max_position_embeddings=64, dim=32, hidden_dim=64, n_layers=2, n_heads=4)
    return DistilBertConfig(**sizes, **(labels(names) if names else {}))


CASES = {
    "bert_seqcls": (BertForSequenceClassification, bert(SENTIMENT)),
    "bert_multi": (BertForSequenceClassification, bert(TOPICS, problem_type="multi_label_classification")),
    "bert_regression": (BertForSequenceClassification, bert(["score"])),
    "bert_tokcls": (BertForTokenClassification, bert(TAGS)),
    "bert_qa": (BertForQuestionAnswering, bert()),
    "bert_base": (BertModel, bert()),
    "roberta_seqcls": (RobertaForSequenceClassification, roberta(SENTIMENT)),
    "roberta_tokcls": (RobertaForTokenClassification, roberta(TAGS)),
    "distilbert_seqcls": (DistilBertForSequenceClassification, distilbert(SENTIMENT)),
    "distilbert_qa": (DistilBertForQuestionAnswering, distilbert()),
    "vit_imgcls": (ViTForImageClassification, ViTConfig(**TEXT, image_size=32, patch_size=8, **labels(TOPICS))),
    "dinov2_imgcls": (
        Dinov2ForImageClassification,
        Dinov2Config(**SIZES, mlp_ratio=2, image_size=28, patch_size=7, **labels(TOPICS)),
    ),
}
# What transformers does with a picture of another size: ViT squeezes it, DINOv2 scales the short edge and cuts out the middle.
PROCESSORS = {
    "vit_imgcls": ViTImageProcessorPil(size=dict(height=32, width=32)),
    "dinov2_imgcls": BitImageProcessorPil(
        size=dict(shortest_edge=32),
        crop_size=dict(height=28, width=28),
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ),  # fmt: skip
}
CORPUS = [
    "the film was good and the actors were better than the last time",
    "the film was not good, and the end was worse than the start",
    "where is the train to London? it left at 9 in the morning",
    "this is the best thing that I have seen in the world",
]
WORDS = "the an is was were not good bad film ##ing ##ed ##er ##est ##ly ##ter and of to in it train left thing".split()
PAIRS = [
    ("the film was good", None, 16),
    ("Where is the train?", "It left at 9.", 16),
    ("the actors were better than the last time, and the end was worse", None, 16),
    ("this is the best thing that I have seen in the world", "was it?", 16),
    ("was it?", "this is the best thing that I have seen in the world", 16),
    ("the train left the town and the film was the best thing", "was the end worse than the start of the film?", 24),
    ("Café №5  isn't\tnaïve — 漢字", None, 32),
    ("", None, 4),
]


def bert_tokenizer():
    """96 pieces: the special ones, characters alone and inside of words, some words."""
    characters = string.ascii_lowercase + string.digits
    inner = [f"##{letter}" for letter in string.ascii_lowercase]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *inner, *".,?!'-", *WORDS]
    return BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, model_max_length=64)


def roberta_tokenizer():
    """320 pieces: the special ones, all bytes, the merges of a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=319, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary = model["vocab"] | {"<mask>": len(model["vocab"])}
    return RobertaTokenizer(vocab=vocabulary, merges=[tuple(pair) for pair in model["merges"]], model_max_length=64)


TOKENIZERS = {"bert_seqcls": bert_tokenizer, "roberta_seqcls": roberta_tokenizer}


def write_tokenizer(directory, tokenizer, config):
    assert len(tokenizer) == config.vocab_size and tokenizer.pad_token_id == config.pad_token_id
    tokenizer.save_pretrained(directory)
    if config.model_type == "bert":  # older checkpoints have this file and no tokenizer.json
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        (directory / "vocab.txt").write_text("".join(f"{piece}\n" for piece, _ in vocabulary))
    cases = []
    for text, pair, length in PAIRS:
        encoding = tokenizer(text, pair, max_length=length, truncation=True, padding="max_length")
        cases.append({"text": text, "pair": pair, "max_length": length} | dict(encoding))
    write_json(directory / "encodings.json", cases)


def text_inputs(config, rng):
    """Two rows with the special tokens of the model's family at their places, the second row padded on the right."""
    first, separator = (0, 2) if config.model_type == "roberta" else (2, 3)
    tokens = torch.randint(5, config.vocab_size - 1, (2, SEQ), generator=rng)
    tokens[:, 0], tokens[0, SEQ // 2 - 1], tokens[0, -1], tokens[1, -1 - PADDED] = first, *[separator] * 3
    tokens[1, -PADDED:] = config.pad_token_id
    mask = torch.ones_like(tokens)
    mask[1, -PADDED:] = 0
    inputs = {"tokens": tokens, "attention_mask": mask}
    if config.model_type == "bert":
        inputs["token_type_ids"] = torch.zeros_like(tokens)
        inputs["token_type_ids"][0, SEQ // 2 :] = 1
    return inputs


@torch.no_grad()
def outputs(model, inputs):
    """What the model's head gives; for a model without a head the hidden states, and the embedding that sentence-transformers makes of them."""
    names = {"tokens": "input_ids", "pixels": "pixel_values"}
    result = model(**{names.get(name, name): value for name, value in inputs.items()})
    if "start_logits" in result:
        return {"logits": torch.stack([result.start_logits, result.end_logits], dim=-1)}
    if "logits" in result:
        return {"logits": result.logits}
    hidden = result.last_hidden_state
    if "attention_mask" not in inputs:
        return {"hidden": hidden}
    weights = inputs["attention_mask"][:, :, None].to(hidden.dtype)
    mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    embedding = torch.nn.functional.normalize(mean, p=2, dim=1)
    return {"hidden": hidden, "pooled": result.pooler_output, "embedding": embedding}


def load(directory, kind):
    return kind.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def picture(rng):
    """45 by 37 pixels: a slope in each colour, and noise that shows how pixels are averaged."""
    y, x = torch.meshgrid(torch.arange(37.0), torch.arange(45.0), indexing="ij")
    slopes = torch.stack([5 * x, 6 * y, 255 - 3 * (x + y)], dim=-1)
    pixels = (slopes + 40 * torch.randn(slopes.shape, generator=rng)).clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.numpy())


def write_images(directory, processor, rng):
    """A picture and what the processor makes of it. The published files name the class without the backend that we have here."""
    processor.save_pretrained(directory)
    path = directory / "preprocessor_config.json"
    fields = json.loads(path.read_text())
    fields["image_processor_type"] = fields["image_processor_type"].removesuffix("Pil")
    write_json(path, fields)
    image = picture(rng)
    image.save(directory / "image.png")
    return processor(image, return_tensors="pt")["pixel_values"]


def add_position_ids(directory, config):
    """A buffer that older versions of transformers wrote, as the published sentence models have it."""
    tensors = load_file(directory / "model.safetensors")
    tensors["embeddings.position_ids"] = torch.arange(config.max_position_embeddings)[None]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def text_golden(name, model, rng):
    """Logits with the mask and without; both the mask and the token types must show."""
    inputs = text_inputs(model.config, rng)
    golden = outputs(model, inputs)
    key = next(iter(golden))
    for left_out in ("attention_mask", "token_type_ids"):
        if left_out in inputs:
            other = outputs(model, {field: value for field, value in inputs.items() if field != left_out})[key]
            assert (other - golden[key]).abs().max() > 1e-2, f"{left_out} does not show in {name}"
            if left_out == "attention_mask":
                golden[f"{key}_unmasked"] = other
    return inputs | golden


def vision_golden(directory, model, rng):
    processed = write_images(directory, PROCESSORS[directory.name], rng)
    inputs = {"pixels": torch.randn((2, *processed.shape[1:]), generator=rng)}
    image = {"processed": processed, "processed_logits": outputs(model, {"pixels": processed})["logits"]}
    return inputs | outputs(model, inputs) | image


def write_case(name, kind, config):
    directory, seed_name = ENCODERS / name, f"encoders/{name}"
    rng = generator(seed_name)
    model = kind(config)
    randomise(model, rng)
    model.save_pretrained(directory)
    if name == "bert_base":
        add_position_ids(directory, config)
    if name in TOKENIZERS:
        write_tokenizer(directory, TOKENIZERS[name](), config)
    model = load(directory, kind)
    golden = vision_golden(directory, model, rng) if name in PROCESSORS else text_golden(name, model, rng)
    save_file({key: value.contiguous() for key, value in golden.items()}, directory / "logits.safetensors")
    provenance(directory, "encoders.py", seed_name)
    deviation = next(value for key, value in golden.items() if key in ("logits", "hidden")).std()
    print(f"{name:18} {model.num_parameters():6} parameters, output with std {deviation:.2f}")


def main():
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    shutil.rmtree(ENCODERS, ignore_errors=True)
    for name, (kind, config) in CASES.items():
        write_case(name, kind, config)


if __name__ == "__main__":
    main()
