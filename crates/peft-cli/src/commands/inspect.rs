//! `peft inspect`: what a model or an adapter is made of, read from headers, without loading the weights.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::Module;
use burn::tensor::Device;
use peft_core::files::{CONFIG_FILE, peft_type, tensors_of};
use peft_core::scan;
use peft_models::CausalLm;
use peft_models::config::{Architecture, EncoderConfig, InputConfig, ModelConfig};
use peft_models::encoder::Naming;
use serde::Serialize;
use serde_json::{Value, json};

use crate::model::{architecture, open};
use crate::output::{bytes, table, thousands};
use crate::{Context, Error, Result, device, methods};

/// Arguments of `peft inspect`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  peft inspect tiny\n  peft inspect models/SmolLM2-135M.gguf\n  peft inspect my-adapter"
)]
pub struct Args {
    /// A model (Hugging Face directory, .gguf file, hub id, `tiny`) or an adapter's folder
    #[arg(value_name = "PATH")]
    what: String,
}

/// Runs the command.
///
/// # Errors
/// When it cannot be read.
pub fn run(args: &Args, context: &Context) -> Result<()> {
    let path = Path::new(&args.what);
    if path.join(CONFIG_FILE).is_file() { adapter(path, context) } else { model(&args.what, context) }
}

fn adapter(dir: &Path, context: &Context) -> Result<()> {
    let path = dir.join(CONFIG_FILE);
    let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
    let config: Value =
        serde_json::from_str(&text).map_err(|e| peft_core::Error::format(&path, format!("not JSON: {e}")))?;
    let method = peft_type(dir)?;
    let known = methods::of_adapter(dir).is_ok();
    let tensors = tensors_of(dir)?;
    let parameters: usize = tensors.values().map(|tensor| tensor.values.len()).sum();
    let size: usize = tensors.values().map(|tensor| size_of::<f32>() * tensor.values.len()).sum();
    let given = |key: &str| config.get(key).filter(|v| !v.is_null()).map_or_else(|| "not given".to_owned(), plain);
    let out = context.output;
    out.field("method", if known { method.clone() } else { format!("{method}, which this program does not know") })?;
    out.field("base", given("base_model_name_or_path"))?;
    if config.get("r").is_some() {
        out.field("rank", format_args!("{}, alpha {}", given("r"), given("lora_alpha")))?;
    }
    if config.get("target_modules").is_some() {
        out.field("targets", given("target_modules"))?;
    }
    if config.get("target_parameters").is_some_and(|names| !names.is_null()) {
        out.field("parameters", given("target_parameters"))?;
    }
    if let Some(parts) = parts(&config) {
        out.field("parts", parts.join(", "))?;
    }
    if config.get("num_virtual_tokens").is_some() {
        out.field("prompt", format_args!("{} virtual tokens", given("num_virtual_tokens")))?;
    }
    if config.get("adapter_len").is_some() {
        let (tokens, layers) = (given("adapter_len"), given("adapter_layers"));
        out.field("prompt", format_args!("{tokens} tokens in each of the last {layers} layers"))?;
    }
    out.field(
        "tensors",
        format_args!("{}, {} parameters, {}", tensors.len(), thousands(parameters), bytes(size as u64)),
    )?;
    let mut kinds: BTreeMap<(String, &[usize]), usize> = BTreeMap::new();
    for (key, tensor) in &tensors {
        *kinds.entry((short(key), &tensor.shape)).or_default() += 1;
    }
    let rows = kinds
        .iter()
        .map(|((name, shape), count)| vec![format!("  {name}"), format!("x {count}"), format!("{shape:?}")]);
    out.line(table(&rows.collect::<Vec<_>>()))?;
    out.json(&json!({
        "kind": "adapter",
        "method": method,
        "known": known,
        "base_model": config.get("base_model_name_or_path"),
        "tensors": tensors.len(),
        "parameters": parameters,
        "bytes": size,
        "config": config,
    }))
}

/// What a union is of, in either layout; bottlenecks have no name in AdapterHub's.
fn parts(config: &Value) -> Option<Vec<&str>> {
    let (list, key) = match config.get("parts") {
        Some(parts) => (parts, "peft_type"),
        None => (config.get("config")?.get("configs")?, "architecture"),
    };
    let name = |part| Value::get(part, key).and_then(Value::as_str).unwrap_or("bottleneck");
    Some(list.as_array()?.iter().map(name).collect())
}

/// Entries of a long list that are printed; `--json` has them all.
const SHOWN: usize = 8;

/// A JSON value as a person writes it.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(values) if values.len() > SHOWN => {
            let first: Vec<String> = values[..SHOWN].iter().map(plain).collect();
            format!("{}, and {} more", first.join(", "), values.len() - SHOWN)
        }
        Value::Array(values) => values.iter().map(plain).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

/// What a key says apart from the layer's number: `q_proj.lora_A.weight`.
fn short(key: &str) -> String {
    let words: Vec<&str> = key.split('.').collect();
    let after_number = words.iter().rposition(|word| word.parse::<usize>().is_ok()).map_or(0, |at| at + 1);
    let rest = &words[after_number..];
    rest[rest.len().saturating_sub(3)..].join(".")
}

/// Layers of one name.
#[derive(Serialize)]
struct Adaptable {
    name: String,
    kind: String,
    count: usize,
    d_in: usize,
    d_out: usize,
}

#[derive(Default, Serialize)]
struct Stored {
    tensors: usize,
    parameters: usize,
    bytes: u64,
}

fn model(name: &str, context: &Context) -> Result<()> {
    let files = open(name)?;
    let tokenizer = files.tokenizer().ok();
    let chat_template = tokenizer.is_some_and(|tokenizer| tokenizer.chat_template().is_some());
    let mut dtypes: BTreeMap<&str, Stored> = BTreeMap::new();
    for info in files.origin.weights().tensors() {
        let stored = dtypes.entry(&info.dtype).or_default();
        stored.tensors += 1;
        stored.parameters += info.shape.iter().product::<usize>();
        stored.bytes += info.bytes;
    }
    let total = |of: fn(&Stored) -> u64| dtypes.values().map(of).sum::<u64>();
    let (parameters, size) = (total(|s| s.parameters as u64) as usize, total(|s| s.bytes));
    let family = architecture(&files.config);
    let device = device::open(&context.device)?;
    let shape = match files.architecture()? {
        Architecture::Decoder(config) => Shape::of_decoder(&config, &device),
        Architecture::Encoder(config) => Shape::of_encoder(&config, &device),
    };

    let out = context.output;
    out.field("model", format_args!("{family}, {} parameters, {}", thousands(parameters), bytes(size)))?;
    out.field("shape", &shape.text)?;
    for (dtype, stored) in &dtypes {
        out.field("stored", format_args!("{dtype}: {} tensors, {}", stored.tensors, bytes(stored.bytes)))?;
    }
    let yes = |is: bool| if is { "yes" } else { "no" };
    out.field("texts", format_args!("tokenizer: {}, chat template: {}", yes(tokenizer.is_some()), yes(chat_template)))?;
    out.line("adaptable modules (for --targets):")?;
    let row = |m: &Adaptable| {
        vec![format!("  {}", m.name), format!("x {}", m.count), m.kind.clone(), format!("{} -> {}", m.d_in, m.d_out)]
    };
    out.line(table(&shape.modules.iter().map(row).collect::<Vec<_>>()))?;
    let mut json = json!({
        "kind": "model",
        "architecture": family,
        "parameters": parameters,
        "bytes": size,
        "dtypes": dtypes,
        "tokenizer": tokenizer.is_some(),
        "chat_template": chat_template,
        "modules": shape.modules,
    });
    if let (Value::Object(json), Value::Object(shape)) = (&mut json, shape.json) {
        json.extend(shape);
    }
    out.json(&json)
}

/// What the configuration says, and the layers that adapters know. Random weights are never made for it.
struct Shape {
    text: String,
    json: Value,
    modules: Vec<Adaptable>,
}

impl Shape {
    fn of_decoder(config: &ModelConfig, device: &Device) -> Self {
        let (layers, vocab_size, positions) = (config.num_layers(), config.vocab_size(), config.max_positions());
        let head = if config.is_tied() { "output head tied to the embedding" } else { "output head of its own" };
        let (tokens, places) = (thousands(vocab_size), thousands(positions));
        Self {
            text: format!("{layers} layers, {tokens} tokens, {places} positions, {head}"),
            json: json!({
                "layers": layers,
                "vocab_size": vocab_size,
                "max_positions": positions,
                "tied": config.is_tied(),
            }),
            modules: adaptable(&CausalLm::new(config, device)),
        }
    }

    fn of_encoder(config: &EncoderConfig, device: &Device) -> Self {
        let layers = config.num_hidden_layers;
        let input = match config.input {
            InputConfig::Text { vocab_size, .. } => {
                let positions = config.max_tokens().unwrap_or_default();
                format!("{} tokens, {} positions", thousands(vocab_size), thousands(positions))
            }
            InputConfig::Image { image_size, patch_size, .. } => {
                format!("pictures of {image_size} × {image_size}, patches of {patch_size} × {patch_size}")
            }
        };
        let labels = config.task.labels();
        let head = match (config.task.outputs(), labels.len()) {
            (None, _) => "no head".to_owned(),
            (Some(_), 0) => "a head for the start and the end of answers".to_owned(),
            (Some(_), 1..=SHOWN) => format!("a head for {}", labels.join(", ")),
            (Some(_), count) => format!("a head for {count} labels"),
        };
        Self {
            text: format!("{layers} layers, {input}, {head}"),
            json: json!({
                "layers": layers,
                "vocab_size": config.vocab_size(),
                "max_positions": config.max_tokens(),
                "labels": labels,
            }),
            modules: adaptable(&config.init(0, device).renamed(Naming::Modules)),
        }
    }
}

/// By the last part of their names, in the model's order.
fn adaptable<M: Module>(model: &M) -> Vec<Adaptable> {
    let mut found: Vec<Adaptable> = Vec::new();
    for site in scan(model).sites {
        let name = site.path.rsplit('.').next().unwrap_or_default();
        let (kind, d_in, d_out) = (format!("{:?}", site.kind), site.d_in, site.d_out);
        let same = |m: &&mut Adaptable| (m.name.as_str(), &m.kind, m.d_in, m.d_out) == (name, &kind, d_in, d_out);
        match found.iter_mut().find(same) {
            Some(module) => module.count += 1,
            None => found.push(Adaptable { name: name.to_owned(), kind, count: 1, d_in, d_out }),
        }
    }
    found
}
