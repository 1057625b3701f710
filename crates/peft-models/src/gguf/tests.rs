//! Against files that `tools/golden/gguf_files.py` makes with other implementations, and against damaged files.

use std::path::Path;

use serde_json::json;

use super::*;

fn testdata(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/gguf").join(name)
}

fn open(name: &str) -> Gguf {
    Gguf::open(testdata(name)).unwrap()
}

fn parse(bytes: &[u8]) -> Result<Gguf> {
    Gguf::parse(Path::new("memory.gguf"), bytes, bytes.len() as u64)
}

fn read(gguf: &Gguf, name: &str) -> Vec<f32> {
    gguf.read(gguf.find(name).unwrap()).unwrap()
}

#[test]
fn every_type_unpacks_bit_exactly() {
    let (packed, plain) = (open("types.gguf"), open("types_f32.gguf"));
    let mut types = Vec::new();
    for info in packed.tensors() {
        let bits = |gguf: &Gguf| read(gguf, &info.name).into_iter().map(f32::to_bits).collect::<Vec<_>>();
        let (found, expected) = (bits(&packed), bits(&plain));
        assert_eq!(found.len(), 1024);
        assert_eq!(info.shape, plain.find(&info.name).unwrap().shape);
        assert_eq!(found, expected, "{} {}", info.name, info.dtype);
        types.push(info.dtype.as_str());
    }
    assert_eq!(types, ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]);
}

/// The packed matrix of a tensor is the tensor, to the last bit, and takes no more bytes than its numbers, a scale in f32 for each run, and a table.
#[test]
fn blocks_are_repacked_number_for_number() {
    use burn::tensor::Device;
    use peft_core::kernels::PackedMatrix;

    let gguf = open("types.gguf");
    let mut repacked = Vec::new();
    for info in gguf.tensors() {
        let Some(data) = gguf.packed(info).unwrap() else { continue };
        let matrix = PackedMatrix::new(data, &Device::flex());
        let found: Vec<f32> = matrix.unpack().into_data().try_to_vec().unwrap();
        // Zeros may lose their sign: nothing that a product sees.
        assert_eq!(found, read(&gguf, &info.name), "{} {}", info.name, info.dtype);
        repacked.push((info.dtype.as_str(), matrix.bytes()));
    }
    let scales = |run: usize| 4 * 1024 / run;
    let (small, large) = (512 + 4 * 16, 1024 + 4 * 256);
    let expected = [
        ("Q4_0", small + scales(32)),
        ("Q4_1", small + 2 * scales(32)),
        ("Q8_0", large + scales(32)),
        ("Q4_K", small + 2 * scales(32)),
        ("Q5_K", large + 2 * scales(32)),
        ("Q6_K", large + scales(16)),
    ];
    assert_eq!(repacked, expected);
}

/// All tensors of the file but the embedding count from 0 in Hugging Face's order.
#[test]
fn llama_tensors_are_in_hugging_face_order() {
    let gguf = open("llama.gguf");
    let shapes: Vec<_> = gguf.tensors().iter().map(|t| (t.name.as_str(), t.shape.as_slice())).collect();
    assert_eq!(
        shapes,
        [
            ("model.embed_tokens.weight", [400, 16].as_slice()),
            ("model.layers.0.input_layernorm.weight", &[16]),
            ("model.layers.0.mlp.down_proj.weight", &[16, 24]),
            ("model.layers.0.mlp.gate_proj.weight", &[24, 16]),
            ("model.layers.0.mlp.up_proj.weight", &[24, 16]),
            ("model.layers.0.post_attention_layernorm.weight", &[16]),
            ("model.layers.0.self_attn.k_proj.weight", &[8, 16]),
            ("model.layers.0.self_attn.o_proj.weight", &[16, 16]),
            ("model.layers.0.self_attn.q_proj.bias", &[16]),
            ("model.layers.0.self_attn.q_proj.weight", &[16, 16]),
            ("model.layers.0.self_attn.v_proj.weight", &[8, 16]),
            ("model.norm.weight", &[16]),
        ]
    );
    assert_counts(&gguf, "model.embed_tokens.weight");
}

#[test]
fn gpt2_tensors_are_in_hugging_face_order() {
    let gguf = open("gpt2.gguf");
    for (name, shape) in [
        ("transformer.h.0.attn.c_attn.weight", [4, 12]),
        ("transformer.h.0.mlp.c_proj.weight", [16, 4]),
        ("transformer.wpe.weight", [8, 4]),
    ] {
        assert_eq!(gguf.find(name).unwrap().shape, shape, "{name}");
    }
    assert_eq!(gguf.tensors().len(), 16);
    assert_counts(&gguf, "");
}

fn assert_counts(gguf: &Gguf, except: &str) {
    for info in gguf.tensors().iter().filter(|info| info.name != except) {
        let expected: Vec<f32> = (0..info.shape.iter().product::<usize>()).map(|i| i as f32).collect();
        assert_eq!(gguf.read(info).unwrap(), expected, "{}", info.name);
    }
}

#[test]
fn configurations_are_those_of_hugging_face() {
    let llama = open("llama.gguf");
    assert_eq!(
        llama.config().unwrap(),
        json!({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
            "max_position_embeddings": 64, "vocab_size": 400, "attention_bias": true, "mlp_bias": false,
            "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": true,
        })
    );
    assert_eq!(llama.chat_template(), Some("{{ messages[0].content }}"));
    assert_eq!(
        open("gpt2.gguf").config().unwrap(),
        json!({
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 4, "n_inner": 16, "n_layer": 1,
            "n_head": 2, "n_positions": 8, "n_ctx": 8, "vocab_size": 10, "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new", "tie_word_embeddings": true,
        })
    );
    let message = open("types.gguf").config().unwrap_err().to_string();
    assert!(message.contains("types.gguf") && message.contains("`qwen2.embedding_length` is missing"), "{message}");
}

#[test]
fn tokenizers_agree_with_the_reference() {
    let json = std::fs::read_to_string(testdata("tokenizer.json")).unwrap();
    let expected: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&json).unwrap();
    assert_eq!(expected.len(), 5);
    for (name, cases) in expected {
        let gguf = open(&if name == "llama" { "llama.gguf".to_owned() } else { format!("bpe-{name}.gguf") });
        let tokenizer = gguf.tokenizer().unwrap();
        let special = gguf.special_tokens().unwrap();
        assert_eq!(special.add_bos, name.starts_with("llama"), "{name}");
        for case in cases.as_array().unwrap() {
            let text = case[0].as_str().unwrap();
            let mut ids: Vec<u32> = serde_json::from_value(case[1].clone()).unwrap();
            if name == "llama" {
                // SentencePiece itself adds none.
                ids.insert(0, special.bos.unwrap());
            }
            assert_eq!(tokenizer.encode(text, true).unwrap().get_ids(), ids, "{name} {text:?}");
            if !text.contains("<|") {
                let composed = text.replace("e\u{301}", "é");
                let decoded = tokenizer.decode(&ids, true).unwrap();
                assert_eq!(decoded, if name == "qwen2" { &composed } else { text }, "{name}");
            }
        }
    }
    let gguf = open("llama.gguf");
    let tokenizer = gguf.tokenizer().unwrap();
    assert_eq!(tokenizer.encode("</s>", false).unwrap().get_ids(), [2]);
    assert_eq!(tokenizer.decode(tokenizer.encode("日本 <s>x", false).unwrap().get_ids(), true).unwrap(), "日本  x");
}

#[test]
fn unknown_pre_tokenizers_are_named() {
    let mut bytes = std::fs::read(testdata("bpe-smollm.gguf")).unwrap();
    let at = bytes.windows(6).position(|window| window == b"smollm").unwrap();
    bytes[at..at + 6].copy_from_slice(b"bloomz");
    let message = parse(&bytes).unwrap().tokenizer().unwrap_err().to_string();
    assert!(message.contains("pre-tokenizer `bloomz`") && message.contains("qwen2"), "{message}");
}

#[test]
fn every_truncation_is_an_error() {
    for name in ["gpt2.gguf", "bpe-smollm.gguf"] {
        let bytes = std::fs::read(testdata(name)).unwrap();
        assert!(parse(&bytes).is_ok());
        // Alignment may pad the end of the last section; a file cut there has lost nothing.
        let end = bytes.iter().rposition(|&byte| byte != 0).unwrap();
        for length in 0..=end {
            let error = parse(&bytes[..length]).unwrap_err();
            assert!(matches!(error, Error::Format { .. }), "{name} cut to {length}: {error}");
        }
    }
}

/// No damage panics; sizes are bounded by the file, or this test would run out of memory.
#[test]
fn every_flipped_byte_is_survived() {
    let check = |bytes: &[u8]| {
        if let Ok(gguf) = parse(bytes) {
            let _ = (gguf.config(), gguf.special_tokens(), gguf.chat_template());
        }
    };
    // Whole headers of two files, and samples of a long one.
    for (name, header, step) in [("types.gguf", 1000, 1), ("gpt2.gguf", 1400, 1), ("llama.gguf", 12_000, 37)] {
        let bytes = std::fs::read(testdata(name)).unwrap();
        for at in (0..header).step_by(step) {
            for mask in [0x01, 0x80, 0xff] {
                let mut damaged = bytes.clone();
                damaged[at] ^= mask;
                check(&damaged);
            }
        }
    }
    // Building a tokenizer takes longer.
    for name in ["bpe-qwen2.gguf", "llama.gguf"] {
        let bytes = std::fs::read(testdata(name)).unwrap();
        for at in (0..10_000).step_by(53) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x01;
            if let Ok(tokenizer) = parse(&damaged).and_then(|gguf| gguf.tokenizer()) {
                let _ = tokenizer.encode("Hello 123", true);
            }
        }
    }
}

/// A file without metadata and with these tensor rows: name, dimensions as stored, type, offset.
fn header(tensors: &[(&str, &[u64], u32, u64)], data: usize) -> Vec<u8> {
    let string = |text: &str| [(text.len() as u64).to_le_bytes().as_slice(), text.as_bytes()].concat();
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend(2_u64.to_le_bytes());
    bytes.extend(string("general.architecture"));
    bytes.extend(8_u32.to_le_bytes());
    bytes.extend(string("gpt2"));
    bytes.extend(string("gpt2.attention.head_count"));
    bytes.extend(4_u32.to_le_bytes());
    bytes.extend(2_u32.to_le_bytes());
    for (name, dims, kind, offset) in tensors {
        bytes.extend(string(name));
        bytes.extend((dims.len() as u32).to_le_bytes());
        bytes.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
        bytes.extend(kind.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
    }
    bytes.resize(bytes.len().next_multiple_of(32) + data, 0);
    bytes
}

#[test]
fn contradictions_are_named() {
    const A: &str = "token_embd.weight";
    const B: &str = "position_embd.weight";
    assert_eq!(parse(&header(&[(A, &[4, 2], 0, 0), (B, &[4, 2], 0, 32)], 64)).unwrap().tensors().len(), 2);
    for (bytes, expected) in [
        (header(&[(A, &[4, 2], 0, 0), (A, &[4, 2], 0, 32)], 64), "is there twice"),
        (header(&[(A, &[4, 4], 0, 0), (B, &[4, 2], 0, 32)], 96), "overlap"),
        (header(&[(A, &[4, 2], 0, 0)], 31), "only 31 bytes of data"),
        (header(&[(A, &[4, 2], 0, 7)], 64), "not a multiple of 32"),
        (header(&[(A, &[4, 2], 0, u64::MAX - 31)], 64), "only 64 bytes"),
        (header(&[(A, &[1 << 40, 1 << 40], 0, 0)], 64), "dimension of"),
        (header(&[(A, &[1 << 31, 1 << 31], 0, 0)], 64), "only 64 bytes"),
        (header(&[(A, &[4, 0], 0, 0)], 64), "dimension of 0"),
        (header(&[(A, &[], 0, 0)], 64), "rank 0"),
        (header(&[(A, &[2; 5], 0, 0)], 64), "rank 5"),
        (header(&[(A, &[33, 1], 8, 0)], 64), "Q8_0 blocks"),
        (header(&[(A, &[4, 2], 99, 0)], 64), "tensor type 99"),
        (header(&[("blk.0.ffn_up.weight", &[8], 0, 0)], 64), "does not go with Transposed"),
        (header(&[("blk.0.attn_moon.weight", &[8], 0, 0)], 64), "attn_moon"),
    ] {
        let message = parse(&bytes).unwrap_err().to_string();
        assert!(message.contains("memory.gguf") || message.contains("type 99"), "{message}");
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn counts_and_lengths_beyond_the_file_are_refused() {
    let good = header(&[], 0);
    // Tensor count, metadata count, length of the first key.
    for at in [8, 16, 24] {
        for claim in [u64::MAX, 1 << 62, 1 << 33, good.len() as u64] {
            let mut bytes = good.clone();
            bytes[at..at + 8].copy_from_slice(&claim.to_le_bytes());
            let message = parse(&bytes).unwrap_err().to_string();
            assert!(message.contains(&format!("claims {claim}")), "{message}");
        }
    }
}

#[test]
fn arrays_may_nest_only_a_little() {
    let nested = |depth: usize| {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(0_u64.to_le_bytes());
        bytes.extend(1_u64.to_le_bytes());
        bytes.extend([1_u64.to_le_bytes().as_slice(), b"k", &9_u32.to_le_bytes()].concat());
        for _ in 0..depth {
            bytes.extend([9_u32.to_le_bytes().as_slice(), &1_u64.to_le_bytes()].concat());
        }
        bytes.extend([0_u32.to_le_bytes().as_slice(), &0_u64.to_le_bytes()].concat());
        parse(&bytes).unwrap_err().to_string()
    };
    assert!(nested(2).contains("`general.architecture` is missing"), "{}", nested(2));
    assert!(nested(100_000).contains("nests arrays more than 4 deep"));
}

#[test]
fn unread_types_and_versions_say_what_to_do() {
    let gguf = parse(&header(&[("token_embd.weight", &[32, 1], 6, 0)], 64)).unwrap();
    assert_eq!(gguf.tensors()[0].dtype, "Q5_0");
    let mut bytes = header(&[], 0);
    bytes[4] = 1;
    assert!(parse(&bytes).unwrap_err().to_string().contains("GGUF version 1"));
    bytes[4..8].copy_from_slice(&[0, 0, 0, 3]);
    assert!(parse(&bytes).unwrap_err().to_string().contains("big-endian"));
    assert!(parse(b"PK\x03\x04").unwrap_err().to_string().contains("does not start with `GGUF`"));
    assert!(matches!(Gguf::open("/nowhere.gguf").unwrap_err(), Error::Io { .. }));
}
