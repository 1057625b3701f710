//! The settings of `peft train`: one struct that the command line, the configuration file and a run that is resumed all fill in.

use std::path::{Path, PathBuf};

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::parser::ValueSource;
use clap::{ArgMatches, Args as _, Command, ValueEnum};
use peft_core::files::write_atomically;
use peft_core::{Bias, OneOrMany};
use peft_lora::InitWeights;
use peft_prompt::EncoderKind;
use peft_train::data::TaskKind;
use peft_train::{Schedule, TrainConfig};
use serde::{Deserialize, Deserializer, Serialize};
use toml::{Table, Value};

use crate::model::FrozenType;
use crate::packing::PackingArgs;
use crate::{Error, Result};

/// Everything that decides what a run computes. Each field is a long flag and, by the same name, a key of the configuration file.
#[derive(Clone, Debug, Serialize, Deserialize, clap::Args)]
#[serde(rename_all = "kebab-case")]
pub struct Settings {
    /// Hugging Face directory, .gguf file, hub id (owner/name), or `tiny`, the model inside this program
    #[arg(long)]
    pub model: Option<String>,
    /// What to learn from; its formats are below. Given more than once, each file is a task of its own for methods that tell tasks apart
    #[arg(long, value_name = "FILE")]
    #[serde(deserialize_with = "one_or_many", default)]
    pub data: Vec<PathBuf>,
    /// What an encoder does with the rows, where their labels leave that open
    #[arg(long, value_parser = named::<TaskKind>(&["classify", "regress", "tokens"]))]
    pub task: Option<TaskKind>,
    /// Where the adapter, checkpoints, metrics.jsonl, loss.svg and train.toml go
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Method, by its name in `peft methods`
    #[arg(long, default_value = "lora")]
    pub method: String,
    /// In the file only: where it runs. On the command line this is the global flag
    #[arg(skip)]
    pub device: Option<String>,

    /// Type of the frozen matrices and of the products with them; sums, adapters and optimizer are f32
    #[arg(long, value_enum, default_value_t, value_name = "TYPE")]
    pub precision: FrozenType,
    /// In which form the model comes into memory
    #[command(flatten)]
    #[serde(flatten)]
    pub packing: PackingArgs,

    /// lora, unipelt: rank of the update [default: 8]
    #[arg(long, help_heading = "Method", value_name = "R")]
    pub rank: Option<usize>,
    /// The update is scaled by alpha / rank [default: the rank, that is a scale of one]
    #[arg(long, help_heading = "Method", value_name = "X")]
    pub alpha: Option<f64>,
    /// Probability that an input of the adapter is dropped
    #[arg(long, default_value_t = 0.0, help_heading = "Method", value_name = "P")]
    pub dropout: f64,
    /// Scale by alpha / sqrt(rank), for high ranks
    #[arg(long, default_value_t = false, num_args = 0..=1, require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set, hide_possible_values = true, help_heading = "Method")]
    pub rslora: bool,
    /// Train a bias next to the second factor
    #[arg(long, default_value_t = false, num_args = 0..=1, require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set, hide_possible_values = true, help_heading = "Method")]
    pub lora_bias: bool,
    /// Initial values of the adapter
    #[arg(long, value_enum, default_value_t = Init::Kaiming, help_heading = "Method")]
    pub init: Init,
    /// Another rank for some modules, as NAME=RANK; may be repeated
    #[arg(long, help_heading = "Method", value_name = "NAME=R")]
    #[serde(deserialize_with = "one_or_many", default)]
    pub rank_pattern: Vec<String>,
    /// Another alpha for some modules, as NAME=ALPHA; may be repeated
    #[arg(long, help_heading = "Method", value_name = "NAME=X")]
    #[serde(deserialize_with = "one_or_many", default)]
    pub alpha_pattern: Vec<String>,
    /// Mixtures: how many experts there are, or skills of poly [default: the method's]
    #[arg(long, help_heading = "Method", value_name = "N")]
    pub num_experts: Option<usize>,
    /// xlora: a folder with a trained LoRA, which stays as it is; one --experts for each
    #[arg(long, help_heading = "Method", value_name = "DIR")]
    #[serde(deserialize_with = "one_or_many", default)]
    pub experts: Vec<PathBuf>,
    /// xlora: each adapted layer mixes the experts in its own way
    #[arg(long, default_value_t = false, num_args = 0..=1, require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set, hide_possible_values = true, help_heading = "Method")]
    pub layerwise_scalings: bool,
    /// molora, mov, mixlora, xlora: each token goes through the best K experts alone [default: through all; mixlora: 2]
    #[arg(long, help_heading = "Method", value_name = "K")]
    pub top_k: Option<usize>,
    /// molora, mov, mixlora: each token goes through the fewest experts whose probabilities reach P together
    #[arg(long, help_heading = "Method", value_name = "P")]
    pub top_p: Option<f64>,
    /// molora, mov, loramoe, mixlora: other numbers of experts by the layer, from the first on: `8,8,4,4`
    #[arg(long, value_delimiter = ',', help_heading = "Method", value_name = "NUMBERS")]
    #[serde(deserialize_with = "one_or_many", default)]
    pub experts_per_layer: Vec<usize>,
    /// molora, mov, loramoe: experts that all tokens go through besides [default: 0]
    #[arg(long, help_heading = "Method", value_name = "N")]
    pub shared_experts: Option<usize>,
    /// molora, mov, mixlora: weight of the loss that keeps the router's numbers small [default: 0]
    #[arg(long, help_heading = "Method", value_name = "X")]
    pub z_loss: Option<f64>,
    /// molora, mov: weight of the loss that keeps all experts at work [default: 0]
    #[arg(long, help_heading = "Method", value_name = "X")]
    pub balance: Option<f64>,
    /// Width of the model over width of a bottleneck [default: 16; mam: 2]
    #[arg(long, help_heading = "Method", value_name = "X")]
    pub reduction_factor: Option<f64>,
    /// pill: width inside an expert [default: 8]
    #[arg(long, help_heading = "Method", value_name = "N")]
    pub adapter_dim: Option<usize>,
    /// Bottlenecks: an invertible adapter behind the embeddings besides (MAD-X), of half the model's width over X
    #[arg(long, help_heading = "Method", value_name = "X")]
    pub inv_adapter: Option<f64>,
    /// Prompt methods: length of the prompt [default: 20; mam: 30; llama-adapter and unipelt: 10]
    #[arg(long, help_heading = "Method", value_name = "N")]
    pub num_virtual_tokens: Option<usize>,
    /// llama-adapter: how many layers have a prompt, counted from the end [default: all]
    #[arg(long, help_heading = "Method", value_name = "N")]
    pub adapter_layers: Option<usize>,
    /// prompt, prefix: start from this text, cut or repeated to the length [default: from random tokens of the model]
    #[arg(long, help_heading = "Method", value_name = "TEXT")]
    pub prompt_text: Option<String>,
    /// prompt, prompt-bank, multitask: start from these labels, a virtual token for each, and from random tokens behind them
    #[arg(long, value_delimiter = ',', help_heading = "Method", value_name = "LABELS")]
    #[serde(deserialize_with = "one_or_many", default)]
    pub prompt_labels: Vec<String>,
    /// multitask: rank of what makes the shared prompt a task's own [default: 1]
    #[arg(long, help_heading = "Method", value_name = "R")]
    pub num_ranks: Option<usize>,
    /// p-tuning: this token's places in the text are those of the virtual tokens, in their order [default: in front]
    #[arg(long, help_heading = "Method", value_name = "TOKEN")]
    pub placeholder: Option<String>,
    /// p-tuning with an LSTM, for encoders: it reads a summary of the text too, so that texts get prompts of their own
    #[arg(long, default_value_t = false, num_args = 0..=1, require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set, hide_possible_values = true, help_heading = "Method")]
    pub input_conditioned: bool,
    /// prefix: an encoder computes the prefix during training
    #[arg(long, default_value_t = false, num_args = 0..=1, require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set, hide_possible_values = true, help_heading = "Method")]
    pub prefix_projection: bool,
    /// p-tuning: what computes the prompt [default: mlp]
    #[arg(long, value_enum, help_heading = "Method", value_name = "KIND")]
    pub encoder: Option<PromptEncoder>,
    /// Width of the encoder of a prompt [default: that of what it makes; mam: 800; unipelt: 512]
    #[arg(long, help_heading = "Method", value_name = "N")]
    pub encoder_hidden_size: Option<usize>,
    /// p-tuning: layers of an LSTM [default: 2]
    #[arg(long, help_heading = "Method", value_name = "N")]
    pub encoder_num_layers: Option<usize>,

    /// Modules to adapt, by the end of their names: `q_proj,v_proj`; or all-linear for every linear layer but the head
    #[arg(long, value_delimiter = ',', help_heading = "Targets", value_name = "NAMES")]
    #[serde(deserialize_with = "one_or_many", default)]
    pub targets: Vec<String>,
    /// lora: parameters to adapt, by the end of their names: `experts.gate_up_proj,experts.down_proj`, or `gate.weight` for routers
    #[arg(long, value_delimiter = ',', help_heading = "Targets", value_name = "NAMES")]
    #[serde(deserialize_with = "one_or_many", default)]
    pub target_parameters: Vec<String>,
    /// ia3: of these, the modules whose input is scaled in place of their output: `down_proj`
    #[arg(long, value_delimiter = ',', help_heading = "Targets", value_name = "NAMES")]
    #[serde(deserialize_with = "one_or_many", default)]
    pub feedforward: Vec<String>,
    /// Modules to adapt, by a regular expression that matches the whole name
    #[arg(long, help_heading = "Targets", value_name = "REGEX")]
    pub target_regex: Option<String>,
    /// Modules to leave out
    #[arg(long, value_delimiter = ',', help_heading = "Targets", value_name = "NAMES")]
    #[serde(deserialize_with = "one_or_many", default)]
    pub exclude: Vec<String>,
    /// Adapt only these layers of the stack, from 0
    #[arg(long, value_delimiter = ',', help_heading = "Targets", value_name = "NUMBERS")]
    #[serde(deserialize_with = "one_or_many", default)]
    pub layers: Vec<usize>,
    /// Modules to train and save whole
    #[arg(long, value_delimiter = ',', help_heading = "Targets", value_name = "NAMES")]
    #[serde(deserialize_with = "one_or_many", default)]
    pub modules_to_save: Vec<String>,
    /// Biases of the base to train: only are those of the adapted layers
    #[arg(long, default_value = "none", value_parser = named::<Bias>(&["none", "all", "only"]), help_heading = "Targets")]
    pub bias: Bias,

    /// Replace {{NAME}} in the data, as NAME=VALUE; may be repeated
    #[arg(long, help_heading = "Data", value_name = "NAME=VALUE")]
    #[serde(deserialize_with = "one_or_many", default)]
    pub set: Vec<String>,
    /// Most tokens of a sample [default: 512, or what the model takes]
    #[arg(long, help_heading = "Data", value_name = "N")]
    pub max_len: Option<usize>,
    /// Learn the prompts too, not only the answers
    #[arg(long, default_value_t = false, num_args = 0..=1, require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set, hide_possible_values = true, help_heading = "Data")]
    pub train_on_prompt: bool,
    /// Put several samples into one row, apart from each other, instead of padding
    #[arg(long, default_value_t = false, num_args = 0..=1, require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set, hide_possible_values = true, help_heading = "Data")]
    pub pack: bool,
    /// Rows of a batch
    #[arg(long, default_value_t = 8, help_heading = "Data", value_name = "N")]
    pub batch_size: usize,
    /// A file to evaluate on, instead of holding out a part of the data; of several tasks one for each
    #[arg(long, help_heading = "Data", value_name = "FILE")]
    #[serde(deserialize_with = "one_or_many", default)]
    pub eval_data: Vec<PathBuf>,
    /// Part of the data to hold out; 0 for none
    #[arg(long, default_value_t = 0.1, help_heading = "Data", value_name = "X")]
    pub eval_fraction: f64,

    /// Passes over the data
    #[arg(long, default_value_t = 3.0, help_heading = "Training", value_name = "N")]
    pub epochs: f64,
    /// Part of a label's weight that goes to all labels alike; for encoders
    #[arg(long, default_value_t = 0.0, help_heading = "Training", value_name = "X")]
    pub label_smoothing: f64,
    /// Optimizer steps, instead of epochs
    #[arg(long, help_heading = "Training", value_name = "N")]
    pub steps: Option<usize>,
    /// Batches whose gradients make one step
    #[arg(long, default_value_t = 1, help_heading = "Training", value_name = "N")]
    pub accumulate: usize,
    /// Peak learning rate [default: what is usual for the method, see `peft methods`]
    #[arg(long, help_heading = "Training", value_name = "X")]
    pub lr: Option<f64>,
    /// Fraction of the steps during which the rate rises
    #[arg(long, default_value_t = 0.03, help_heading = "Training", value_name = "X")]
    pub warmup: f64,
    /// What follows
    #[arg(long, default_value = "linear", value_parser = named::<Schedule>(&["constant", "linear", "cosine"]), help_heading = "Training")]
    pub schedule: Schedule,
    /// Decoupled weight decay
    #[arg(long, default_value_t = 0.01, help_heading = "Training", value_name = "X")]
    pub weight_decay: f64,
    /// Bound on the norm of all gradients together; 0 for none
    #[arg(long, default_value_t = 1.0, help_heading = "Training", value_name = "X")]
    pub max_grad_norm: f64,
    /// LoRA+: factor on the learning rate of the second factor; 16 is usual
    #[arg(long, default_value_t = 1.0, help_heading = "Training", value_name = "X")]
    pub lora_plus: f64,
    /// Steps between evaluations; 0 for only the first and the last
    #[arg(long, default_value_t = 0, help_heading = "Training", value_name = "N")]
    pub eval_every: usize,
    /// Stop after this many evaluations without a better one; 0 for never
    #[arg(long, default_value_t = 0, help_heading = "Training", value_name = "N")]
    pub patience: usize,
    /// Steps between checkpoints; 0 for only the last
    #[arg(long, default_value_t = 0, help_heading = "Training", value_name = "N")]
    pub save_every: usize,
    /// Of initial values, dropout and the order of the data
    #[arg(long, default_value_t = 0, help_heading = "Training", value_name = "N")]
    pub seed: u64,
}

/// What computes a prompt during training, by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum PromptEncoder {
    /// Three linear layers
    Mlp,
    /// A long short-term memory in both directions, and two linear layers
    Lstm,
}

impl From<PromptEncoder> for EncoderKind {
    fn from(encoder: PromptEncoder) -> Self {
        match encoder {
            PromptEncoder::Mlp => Self::Mlp,
            PromptEncoder::Lstm => Self::Lstm,
        }
    }
}

/// Initial values of an adapter by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Init {
    /// As Hugging Face PEFT: the adapter starts as the identity
    Kaiming,
    /// The same with a normal distribution; ssf: as the paper, near the identity
    Gaussian,
    /// What packing the base loses, as far as the rank goes; with --quantize
    Loftq,
    /// No identity: for tests
    Random,
}

impl Init {
    /// What `--init` takes.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

impl From<Init> for InitWeights {
    fn from(init: Init) -> Self {
        match init {
            // The values come from the packed base then.
            Init::Kaiming | Init::Loftq => Self::Kaiming,
            Init::Gaussian => Self::Gaussian,
            Init::Random => Self::Random,
        }
    }
}

/// The settings of a run, beside what it wrote.
pub const FILE: &str = "train.toml";

/// What may differ when a run is resumed: how long it goes on, what it writes on the way, and where it runs.
const MAY_CHANGE: [&str; 7] = ["device", "epochs", "steps", "eval-every", "patience", "save-every", "out"];

impl Settings {
    /// Puts the layers together: defaults, then the run in `out` if it is resumed, then the configuration file, then the command line.
    ///
    /// # Errors
    /// When a file cannot be read, a key is unknown or its value of the wrong type, or a resumed run would not be the same any more.
    pub fn resolve(self, given: &ArgMatches, config: Option<&Path>, resume: bool) -> Result<Self> {
        let mut table = to_table(&self)?;
        let explicit = |key: &str| given.value_source(&key.replace('-', "_")) == Some(ValueSource::CommandLine);
        let file = config.map(|path| read(path, &table)).transpose()?.unwrap_or_default();
        let in_file: Vec<String> = file.keys().cloned().collect();
        table.extend(file.into_iter().filter(|(key, _)| !explicit(key)));
        let wanted = table.clone();
        let settings: Self = table.try_into().map_err(|e| invalid(&e))?;
        if !resume {
            return Ok(settings);
        }
        let out = settings.out()?;
        let path = out.join(FILE);
        if !path.is_file() {
            let what = format!("--resume: there is no run in {}", out.display());
            return Err(Error::usage(what, "leave --resume out to begin one"));
        }
        let mut saved = read(&path, &wanted)?;
        for (key, value) in &wanted {
            let asked = explicit(key) || in_file.contains(key);
            if !asked || saved.get(key) == Some(value) {
                continue;
            }
            if !MAY_CHANGE.contains(&key.as_str()) {
                let was = saved.get(key).map_or_else(|| "the default".to_owned(), Value::to_string);
                let what = format!("--{key} is {value}, but the run in {} was begun with {was}", out.display());
                return Err(Error::usage(what, "leave it out to resume, or begin a run in another folder"));
            }
            saved.insert(key.clone(), value.clone());
        }
        saved.try_into().map_err(|e| invalid(&e))
    }

    /// Writes [`FILE`] into `dir`, from which the run can be resumed or repeated.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let mut table = to_table(self)?;
        table.remove("out");
        Ok(write_atomically(dir, &[(FILE, table.to_string().as_bytes())])?)
    }

    /// `--model`.
    ///
    /// # Errors
    /// When neither the command line nor a file names one.
    pub fn model(&self) -> Result<&str> {
        self.model
            .as_deref()
            .ok_or_else(|| missing("model", "a Hugging Face directory, a .gguf file, a hub id, or tiny"))
    }

    /// `--data`, a file for each task.
    ///
    /// # Errors
    /// When neither the command line nor a file names one, or those to evaluate on are not as many.
    pub fn data(&self) -> Result<&[PathBuf]> {
        match &self.data[..] {
            [] => Err(missing("data", "a file of rows, such as .jsonl or .csv")),
            files if self.eval_data.is_empty() || self.eval_data.len() == files.len() => Ok(files),
            files => {
                let what = format!("--eval-data: {} files, where --data has {}", self.eval_data.len(), files.len());
                Err(Error::usage(what, "one for each, in the same order"))
            }
        }
    }

    /// `--out`.
    ///
    /// # Errors
    /// When neither the command line nor a file names one.
    pub fn out(&self) -> Result<&Path> {
        self.out.as_deref().ok_or_else(|| missing("out", "a folder"))
    }

    /// What the training loop needs of them; the learning rate may be the method's.
    pub fn train_config(&self, learning_rate: f64, progress: bool) -> TrainConfig {
        TrainConfig {
            steps: self.steps.unwrap_or(0),
            epochs: self.epochs,
            accumulate: self.accumulate,
            learning_rate,
            warmup: self.warmup,
            schedule: self.schedule,
            weight_decay: self.weight_decay,
            max_grad_norm: self.max_grad_norm,
            lora_plus: self.lora_plus,
            eval_every: self.eval_every,
            save_every: self.save_every,
            patience: self.patience,
            seed: self.seed,
            progress,
            ..TrainConfig::default()
        }
    }
}

/// Reads a configuration file and checks every key and value against `defaults`, which hold all others.
fn read(path: &Path, defaults: &Table) -> Result<Table> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let table: Table = text.parse().map_err(|e: toml::de::Error| {
        let line = e.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
        Error::usage(
            format!("{}, line {line}: {}", path.display(), e.message()),
            "one `flag = value` a line, texts in \"quotes\"",
        )
    })?;
    let known = keys();
    for (key, value) in &table {
        if !known.contains(key) {
            let what = format!("{}: there is no setting `{key}`", path.display());
            let nearest = known.iter().min_by_key(|name| strsim::levenshtein(name, key)).map_or("", String::as_str);
            return Err(Error::usage(what, format!("`{nearest}`; keys are the long flags of `peft train --help`")));
        }
        let mut probe = defaults.clone();
        probe.insert(key.clone(), value.clone());
        probe.try_into::<Settings>().map_err(|e| {
            let what = format!("{}: `{key}`: {}", path.display(), e.message());
            Error::usage(what, format!("`peft train --help` explains --{key}"))
        })?;
    }
    Ok(table)
}

/// The names that a configuration file may use.
fn keys() -> Vec<String> {
    let command = Settings::augment_args(Command::new("settings"));
    let flags = command.get_arguments().filter_map(|arg| arg.get_long().map(str::to_owned));
    flags.chain(["device".to_owned()]).collect()
}

fn to_table(settings: &Settings) -> Result<Table> {
    Table::try_from(settings)
        .map_err(|e| Error::usage(format!("a setting cannot be written down: {e}"), "give a smaller number"))
}

fn invalid(error: &toml::de::Error) -> Error {
    Error::usage(error.message(), "`peft train --help` explains every setting")
}

fn missing(flag: &str, what: &str) -> Error {
    Error::usage(
        format!("--{flag} is missing"),
        format!("--{flag} with {what}, or `{flag} = \"…\"` in the --config file"),
    )
}

/// Values that the type itself knows by name.
fn named<T: for<'de> Deserialize<'de> + Clone + Send + Sync + 'static>(
    names: &'static [&'static str],
) -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(names).try_map(|name| serde_json::from_value::<T>(serde_json::Value::String(name)))
}

/// A list, or one value in its place.
pub(crate) fn one_or_many<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> std::result::Result<Vec<T>, D::Error> {
    Ok(match OneOrMany::deserialize(deserializer)? {
        OneOrMany::One(value) => vec![value],
        OneOrMany::Many(values) => values,
    })
}
