"""Makes testdata/gguf: small GGUF files, and what other implementations read from them.

Run with a Python that has gguf, numpy, sentencepiece and tokenizers:

    python tools/golden/gguf_files.py

- types.gguf and types_f32.gguf: the same tensors, random blocks of every type that is read, and what `gguf` unpacks.
- llama.gguf, gpt2.gguf: every tensor counts 0, 1, 2, ... in Hugging Face's order; written as llama.cpp's converter would.
- bpe-*.gguf: one byte-level vocabulary, trained without splitting so that splitting matters, under several names of splits.
- tokenizer.json: texts and the ids that `tokenizers` and `sentencepiece` give.
"""

import io
import json
import math
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
import sentencepiece
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

OUT = Path(__file__).parents[2] / "testdata" / "gguf"
SEED = 20250101

# Byte positions of the f16 scales in a block: everything else may be any bits.
SCALES = {
    Type.F32: [], Type.F16: [0], Type.BF16: [], Type.Q4_0: [0], Type.Q4_1: [0, 2],
    Type.Q8_0: [0], Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208],
}

CORPUS = [
    "The year 2024 had 366 days, and 123 of them were warm; 1,000,000 people didn't notice.",
    "They're sure it's fine: we've 42 apples, I'LL take 12, you'd take 30.",
    "fn main() {\n    let x = 123;\n\n    println!(\"{x}\");\n}\n",
    "Spaces   and\ttabs,  and  more   spaces.\r\nNew lines\n\nand café, naïve, Ünïcödé, 漢字, 🙂.",
]
TEXTS = CORPUS + [
    "Hello world 123",
    " leading  spaces\n\n\tand tabs ",
    "cafe\u0301 decomposed, x²½ and ٣٤",
    "<|user|>Hi there<|end|>\n",
    "2024 20245 it's it'S the<|end|>",
    "\u00a0odd\u2009spaces\u3000here",
    "",
]
SPECIAL = ["<|begin|>", "<|end|>", "<|user|>"]


def types():
    """The same tensors twice: as random blocks, and unpacked."""
    random = np.random.default_rng(SEED)
    packed, plain = GGUFWriter(OUT / "types.gguf", "qwen2"), GGUFWriter(OUT / "types_f32.gguf", "qwen2")
    for writer in (packed, plain):
        writer.add_head_count(1)
    for layer, (kind, scales) in enumerate(SCALES.items()):
        elements, size = GGML_QUANT_SIZES[kind]
        blocks = random.integers(0, 256, (1024 // elements, size), dtype=np.uint8)
        for at in scales:
            halves = np.clip(random.normal(0, 1, len(blocks)), -4, 4).astype(np.float16)
            halves[0] = 6e-8  # subnormal
            blocks[:, at : at + 2] = halves[:, None].view(np.uint8)
        if kind in (Type.F32, Type.BF16):  # finite, small exponent
            blocks[:, -1] = (blocks[:, -1] & 0x80) | 0x3E
        rows = blocks.reshape(2, -1)
        name = f"blk.{layer}.ffn_up.weight"
        packed.add_tensor(name, rows, raw_dtype=kind)
        plain.add_tensor(name, dequantize(rows, kind).astype(np.float32))
    finish(packed)
    finish(plain)


def counting(*shape):
    return np.arange(math.prod(shape), dtype=np.float32).reshape(shape)


def interleave(weight, heads):
    """llama.cpp's order of the rows of a query or key projection."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def llama():
    """One layer of a Llama with grouped key heads, biases, Llama 3.1's rotation and a SentencePiece tokenizer."""
    hidden, heads, kv_heads, head_dim, ffn, theta = 16, 2, 1, 8, 24, 500000.0
    model = spm()
    vocab = model.get_piece_size()
    writer = GGUFWriter(OUT / "llama.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_block_count(1)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_uint16("test.u16", 7)
    writer.add_array("test.bytes", [1, 2, 3])
    writer.add_array("test.flags", [True, False])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([model.id_to_piece(i) for i in range(vocab)])
    writer.add_token_scores([model.get_score(i) for i in range(vocab)])
    kinds = []
    for i in range(vocab):
        kind = 2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1
        kinds.append(kind)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(model.bos_id())
    writer.add_eos_token_id(model.eos_id())
    writer.add_unk_token_id(model.unk_id())
    writer.add_chat_template("{{ messages[0].content }}")

    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    wavelengths, factor, context = 2 * math.pi / frequencies, 8.0, 8192
    smooth = (context / wavelengths - 1) / (4 - 1)
    middle = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelengths < context / 4, 1, np.where(wavelengths > context, factor, middle))
    writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))

    writer.add_tensor("token_embd.weight", counting(vocab, 2).repeat(hidden // 2, axis=1).astype(np.float16))
    writer.add_tensor("output_norm.weight", counting(hidden))
    writer.add_tensor("blk.0.attn_norm.weight", counting(hidden))
    writer.add_tensor("blk.0.ffn_norm.weight", counting(hidden))
    writer.add_tensor("blk.0.attn_q.weight", interleave(counting(heads * head_dim, hidden), heads))
    writer.add_tensor("blk.0.attn_q.bias", interleave(counting(heads * head_dim), heads))
    writer.add_tensor("blk.0.attn_k.weight", interleave(counting(kv_heads * head_dim, hidden), kv_heads))
    writer.add_tensor("blk.0.attn_v.weight", counting(kv_heads * head_dim, hidden))
    writer.add_tensor("blk.0.attn_output.weight", counting(hidden, heads * head_dim))
    writer.add_tensor("blk.0.ffn_gate.weight", counting(ffn, hidden))
    writer.add_tensor("blk.0.ffn_up.weight", counting(ffn, hidden))
    writer.add_tensor("blk.0.ffn_down.weight", counting(hidden, ffn))
    finish(writer)
    return [[text, model.encode(text)] for text in TEXTS if "\u0301" not in text and "<|" not in text and text]


def spm():
    """A SentencePiece model as Llama's: BPE, bytes for the unknown, no normalisation."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4), model_writer=model, model_type="bpe", vocab_size=400, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, character_coverage=0.98, minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def gpt2():
    """One layer of a GPT-2, which has `Conv1D` where llama.cpp has linear layers."""
    hidden = 4
    writer = GGUFWriter(OUT / "gpt2.gguf", "gpt2")
    writer.add_context_length(8)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(4 * hidden)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_layer_norm_eps(1e-5)
    writer.add_tensor("token_embd.weight", counting(10, hidden))
    writer.add_tensor("position_embd.weight", counting(8, hidden))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", counting(hidden))
        writer.add_tensor(f"{name}.bias", counting(hidden))
    conv1d = {"attn_qkv": (hidden, 3 * hidden), "attn_output": (hidden, hidden)}
    conv1d |= {"ffn_up": (hidden, 4 * hidden), "ffn_down": (4 * hidden, hidden)}
    for name, (d_in, d_out) in conv1d.items():
        writer.add_tensor(f"blk.0.{name}.weight", np.ascontiguousarray(counting(d_in, d_out).T))
        writer.add_tensor(f"blk.0.{name}.bias", counting(d_out))
    finish(writer)


def bpe():
    """One vocabulary under several names of splits, with the pre-tokenizers of the published tokenizer.json files."""
    contractions = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

    def split(numbers):
        pattern = pre_tokenizers.Split(Regex(contractions + numbers + rest), behavior="isolated")
        return [pattern, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]

    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    steps = {
        "gpt-2": [words],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), words],
        "llama-bpe": split(r"\p{N}{1,3}"),
        "qwen2": split(r"\p{N}"),
    }
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=460, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False)
    # Pieces of the corpus, or whole texts would become tokens.
    pieces = [text[i : i + 9] for text in CORPUS for i in range(0, len(text), 2)]
    trained.train_from_iterator(pieces, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [tuple(merge) for merge in model["merges"]]

    expected = {}
    for name, pre_tokenizer in steps.items():
        reference = Tokenizer(models.BPE(vocab=model["vocab"], merges=merges, ignore_merges=name == "llama-bpe"))
        reference.pre_tokenizer = pre_tokenizers.Sequence(pre_tokenizer)
        reference.decoder = decoders.ByteLevel()
        if name == "qwen2":
            reference.normalizer = normalizers.NFC()
        reference.add_special_tokens(SPECIAL)
        writer = GGUFWriter(OUT / f"bpe-{name}.gguf", "llama")
        writer.add_head_count(1)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
        writer.add_token_merges([" ".join(merge) for merge in merges])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        finish(writer)
        bos = [0] if name == "llama-bpe" else []
        expected[name] = [[text, bos + reference.encode(text).ids] for text in TEXTS]
    return expected


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    types()
    gpt2()
    expected = {"llama": llama()} | bpe()
    (OUT / "tokenizer.json").write_text(json.dumps(expected, ensure_ascii=False, indent=0) + "\n")
    packages = {name: version(name) for name in ("gguf", "numpy", "sentencepiece", "tokenizers")}
    provenance = {"made_by": "tools/golden/gguf_files.py", "seed": SEED, "python": platform.python_version()} | packages
    (OUT / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")


if __name__ == "__main__":
    main()
