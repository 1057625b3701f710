//! The recipe of the embedded model: a byte-level BPE tokenizer and a small Llama, both made from public-domain text.
//!
//! ```text
//! cargo xtask fetch sotu
//! cargo run -p peft-examples --example pretrain_tiny -- data/sotu out 1240
//! ```
//! Arguments: a folder of `.txt` files, the output folder, optimizer steps. Running it again resumes.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use burn::tensor::Device;
use peft::models::CausalLm;
use peft::models::config::ModelConfig;
use peft::models::export::save_model;
use peft::models::tokenizer::{SpecialTokens, Tokenizer};
use peft::train::data::{BatchOptions, Batches, EncodeOptions, Row, encode, split};
use peft::train::{NextToken, Schedule, TrainConfig, WholeModel, train};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, TokenizerBuilder,
};

const VOCAB: usize = 2048;
const END: &str = "<|end|>";
const SEED: u64 = 7;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(text), Some(out), Some(steps)) = (args.next(), args.next(), args.next()) else {
        return Err("usage: pretrain_tiny TEXT_FOLDER OUT STEPS".into());
    };
    let (out, steps) = (PathBuf::from(out), steps.parse()?);
    let texts = read_texts(Path::new(&text))?;
    println!("{} texts, {} characters", texts.len(), texts.iter().map(String::len).sum::<usize>());

    let tokenizer = tokenizer(&texts)?;
    let rows: Vec<Row> = texts.into_iter().map(|text| Row::Text { text }).collect();
    let (samples, report) = encode(&rows, &tokenizer, &EncodeOptions { max_len: 129, ..EncodeOptions::default() })?;
    println!("{report}");
    let (samples, held_out) = split(samples, 0.005, SEED)?;
    let options = BatchOptions { batch_size: 16, pack: Some(129), seed: SEED, pad: 0 };

    let device = Device::flex().autodiff();
    device.seed(SEED);
    let json = config();
    let model = CausalLm::new(&ModelConfig::from_json(&json, &out)?, &device);
    let whole = WholeModel { config: json.clone(), tokenizer: Some(tokenizer.clone()), others: Vec::new() };
    let settings = TrainConfig {
        steps,
        learning_rate: 2e-3,
        schedule: Schedule::Cosine,
        weight_decay: 0.1,
        eval_every: 250,
        save_every: 250,
        progress: true,
        ..TrainConfig::default()
    };
    let batches = Batches::new(samples, options.clone())?;
    let held_out = Batches::new(held_out, options)?;
    let never = AtomicBool::new(false);
    let (model, summary) =
        train(&NextToken, model, &whole, batches, Some(&held_out), &settings, &out, true, &device, &never)?;
    println!("{}", serde_json::to_string_pretty(&summary)?);
    save_model(&model, &json, Some(&tokenizer), peft::models::export::Dtype::F16, &out.join("f16"))?;
    Ok(())
}

fn read_texts(folder: &Path) -> Result<Vec<String>, Box<dyn Error>> {
    let mut paths = Vec::new();
    collect(folder, &mut paths)?;
    paths.sort();
    paths.iter().map(|path| Ok(std::fs::read_to_string(path)?)).collect()
}

fn collect(folder: &Path, paths: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, paths)?;
        } else if path.extension().is_some_and(|e| e == "txt") {
            paths.push(path);
        }
    }
    Ok(())
}

fn tokenizer(texts: &[String]) -> Result<Tokenizer, Box<dyn Error>> {
    let boxed = |e: tokenizers::Error| -> Box<dyn Error> { e };
    let end = AddedToken::from(END, true);
    let alphabet = ByteLevel::alphabet();
    let mut trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(VOCAB)
        .special_tokens(vec![end])
        .initial_alphabet(alphabet.into_iter().collect())
        .build();
    let bytes = || ByteLevel::default().add_prefix_space(false);
    let mut inner =
        TokenizerBuilder::<BPE, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>::new()
            .with_model(BPE::default())
            .with_pre_tokenizer(Some(bytes().into()))
            .with_post_processor(Some(bytes().into()))
            .with_decoder(Some(bytes().into()))
            .build()
            .map_err(boxed)?;
    inner.train(&mut trainer, texts.iter()).map_err(boxed)?;
    let json = inner.to_string(false).map_err(boxed)?;
    let inner = tokenizers::Tokenizer::from_bytes(json).map_err(boxed)?;
    let end = inner.token_to_id(END);
    Ok(Tokenizer::new(inner, SpecialTokens { bos: None, eos: end.into_iter().collect(), pad: end }, None)?)
}

fn config() -> serde_json::Value {
    serde_json::json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": true,
        "attention_bias": false,
        "mlp_bias": false,
        "bos_token_id": null,
        "eos_token_id": 0,
        "torch_dtype": "float16"
    })
}
