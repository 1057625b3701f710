//! Prompt methods as the settings of `peft train` ask for them, and what their prompts start from.

use burn::module::Module;
use burn::tensor::{Int, Tensor};
use peft_core::{Method, Targets, attach, rng_of};
use peft_models::{CausalLm, Encoder, ModelFiles};
use peft_prompt::{
    Besides, EncoderKind, MultitaskPromptTuningConfig, PTuningConfig, PrefixTuningConfig, PromptAdapter,
    PromptBankConfig, PromptInit, PromptTuningConfig, start_at,
};
use peft_train::{AdapterOf, Trained};
use rand::RngExt;

use super::configure::{initial, only, refuse_targets};
use super::{Adaptation, Adapts};
use crate::settings::{Init, Settings};
use crate::{Error, Result};

/// Virtual tokens, where nothing is said.
const TOKENS: usize = 20;

/// Settings of what stands in front of all blocks.
const OF_PREFIXES: [&str; 2] = ["num-virtual-tokens", "prompt-text"];
/// Settings of virtual tokens.
const OF_PROMPTS: [&str; 3] = ["num-virtual-tokens", "prompt-text", "prompt-labels"];

/// A prompt method, with what its prompt starts from.
pub(super) struct Prompted<M> {
    method: M,
    start: Start,
    /// The text of the token whose places the prompt takes.
    placeholder: Option<String>,
}

impl<M> Prompted<M> {
    fn new(method: M, start: Start) -> Self {
        Self { method, start, placeholder: None }
    }
}

/// What prompts of a length start from.
struct Start {
    from: Origin,
    prompts: usize,
    tokens: usize,
}

enum Origin {
    /// What the method says.
    Own,
    /// What the model makes of random tokens.
    Vocabulary,
    /// What it makes of a text, cut or repeated.
    Text(String),
    /// What it makes of labels, the mean of the tokens of each, and behind them of random tokens.
    Labels(Vec<String>),
}

/// Prompt tuning.
pub(super) fn prompt(settings: &Settings) -> Result<Prompted<PromptTuningConfig>> {
    only(settings, "prompt", &OF_PROMPTS)?;
    refuse_targets(settings, "prompt")?;
    let start = start(settings, 1)?;
    let prompt_tuning_init = match start.from {
        // PEFT has no word for labels; what is learned is in the file.
        Origin::Own | Origin::Labels(_) => PromptInit::Random,
        Origin::Vocabulary => PromptInit::SampleVocab,
        Origin::Text(_) => PromptInit::Text,
    };
    let method = PromptTuningConfig {
        num_virtual_tokens: tokens(settings),
        prompt_tuning_init,
        prompt_tuning_init_text: settings.prompt_text.clone(),
        besides: besides(settings),
    };
    Ok(Prompted::new(method, start))
}

/// Multitask prompt tuning: a task for each file of data.
pub(super) fn multitask(settings: &Settings) -> Result<Prompted<MultitaskPromptTuningConfig>> {
    only(settings, "multitask", &[&OF_PROMPTS[..], &["num-ranks"]].concat())?;
    refuse_targets(settings, "multitask")?;
    let usual = MultitaskPromptTuningConfig::new(tokens(settings), settings.data.len().max(1));
    let method = MultitaskPromptTuningConfig {
        num_ranks: settings.num_ranks.unwrap_or(usual.num_ranks),
        besides: besides(settings),
        ..usual
    };
    Ok(Prompted::new(method, start(settings, 1)?))
}

/// A prompt for each file of data.
pub(super) fn bank(settings: &Settings) -> Result<Prompted<PromptBankConfig>> {
    only(settings, "prompt-bank", &OF_PROMPTS)?;
    refuse_targets(settings, "prompt-bank")?;
    let tasks = settings.data.len().max(1);
    let method = PromptBankConfig { besides: besides(settings), ..PromptBankConfig::new(tokens(settings), tasks) };
    Ok(Prompted::new(method, start(settings, tasks)?))
}

/// Prefix tuning; P-tuning v2 by its other name.
pub(super) fn prefix(settings: &Settings, name: &str) -> Result<Prompted<PrefixTuningConfig>> {
    only(settings, name, &[&OF_PREFIXES[..], &["prefix-projection", "encoder-hidden-size"]].concat())?;
    refuse_targets(settings, name)?;
    if settings.encoder_hidden_size.is_some() && !settings.prefix_projection {
        return Err(Error::usage("--encoder-hidden-size: there is no encoder", "--prefix-projection"));
    }
    let method = PrefixTuningConfig {
        num_virtual_tokens: tokens(settings),
        prefix_projection: settings.prefix_projection,
        encoder_hidden_size: settings.encoder_hidden_size,
        layers_to_transform: (!settings.layers.is_empty()).then(|| settings.layers.clone()),
        besides: besides(settings),
        ..PrefixTuningConfig::default()
    };
    let mut start = start(settings, 1)?;
    if settings.prefix_projection {
        if settings.prompt_text.is_some() || settings.init != Init::Kaiming {
            let what = "--prefix-projection: an encoder computes the prefix, so it cannot start from what is given";
            return Err(Error::usage(what, "leave out --prompt-text and --init, or the encoder"));
        }
        start.from = Origin::Own;
    }
    Ok(Prompted::new(method, start))
}

/// P-tuning.
pub(super) fn p_tuning(settings: &Settings) -> Result<Prompted<PTuningConfig>> {
    let own = ["num-virtual-tokens", "encoder", "encoder-hidden-size", "encoder-num-layers", "dropout"];
    only(settings, "p-tuning", &[&own[..], &["placeholder", "input-conditioned"]].concat())?;
    refuse_targets(settings, "p-tuning")?;
    initial(settings, "p-tuning", &[(Init::Kaiming, ())])?;
    let usual = PTuningConfig::default();
    let method = PTuningConfig {
        num_virtual_tokens: tokens(settings),
        encoder_reparameterization_type: settings.encoder.map_or(EncoderKind::Mlp, EncoderKind::from),
        encoder_hidden_size: settings.encoder_hidden_size,
        encoder_num_layers: settings.encoder_num_layers.unwrap_or(usual.encoder_num_layers),
        encoder_dropout: settings.dropout,
        input_conditioned: settings.input_conditioned,
        besides: besides(settings),
        ..usual
    };
    // What makes no sense is said before anything is read.
    Method::check(&method)?;
    let start = Start { from: Origin::Own, prompts: 1, tokens: method.num_virtual_tokens };
    Ok(Prompted { placeholder: settings.placeholder.clone(), ..Prompted::new(method, start) })
}

fn tokens(settings: &Settings) -> usize {
    settings.num_virtual_tokens.unwrap_or(TOKENS)
}

pub(super) fn besides(settings: &Settings) -> Besides {
    if settings.modules_to_save.is_empty() { Besides::default() } else { Besides::modules(&settings.modules_to_save) }
}

/// A text or labels if there are some; else what is usual, that is tokens of the model's own, since prompts that start at random values learn slowly. For so many prompts.
fn start(settings: &Settings, prompts: usize) -> Result<Start> {
    let from = match (&settings.prompt_text, &settings.prompt_labels[..], settings.init) {
        (Some(text), [], Init::Kaiming) => Origin::Text(text.clone()),
        (None, [], Init::Kaiming) => Origin::Vocabulary,
        (None, labels, Init::Kaiming) => Origin::Labels(labels.to_vec()),
        (None, [], Init::Random) => Origin::Own,
        (None, [], init) => {
            let what = format!("--init {}: a prompt has no such initial values", init.name());
            return Err(Error::usage(what, "leave it out, --init random, --prompt-text, or --prompt-labels"));
        }
        _ => {
            let what = "of --prompt-text, --prompt-labels and --init more than one is given";
            return Err(Error::usage(what, "give one of them"));
        }
    };
    Ok(Start { from, prompts, tokens: tokens(settings) })
}

impl Start {
    /// The tokens that each virtual one starts from the mean of, prompt by prompt.
    fn ids(&self, files: &ModelFiles, vocabulary: usize, seed: u64) -> Result<Option<Vec<Vec<u32>>>> {
        let (n, mut rng) = (self.tokens, rng_of("prompts", seed));
        let mut random =
            |count| -> Vec<Vec<u32>> { (0..count).map(|_| vec![rng.random_range(0..vocabulary as u32)]).collect() };
        let encoded = |flag: &str, text: &str| {
            let ids = files.tokenizer()?.encode(text, false)?;
            let none = || Error::usage(format!("{flag}: there is no token in `{text}`"), "give some text");
            if ids.is_empty() { Err(none()) } else { Ok(ids) }
        };
        let one = match &self.from {
            Origin::Own => return Ok(None),
            Origin::Vocabulary => return Ok(Some(random(self.prompts * n))),
            Origin::Text(text) => {
                encoded("--prompt-text", text)?.into_iter().cycle().take(n).map(|id| vec![id]).collect()
            }
            Origin::Labels(labels) => {
                let labels = labels.iter().map(|label| encoded("--prompt-labels", label));
                let mut ids = labels.collect::<Result<Vec<_>>>()?;
                if ids.len() > n {
                    let what = format!("--prompt-labels: {} labels, for {n} virtual tokens", ids.len());
                    return Err(Error::usage(what, "fewer labels, or more --num-virtual-tokens"));
                }
                ids.extend(random(n - ids.len()));
                ids
            }
        };
        Ok(Some(vec![one; self.prompts].concat()))
    }
}

/// What a model makes of tokens, as a prompt has it.
pub(super) trait Reads: Module {
    /// Number of tokens there are.
    fn vocabulary(&self) -> usize;
    /// Most tokens of a text.
    fn room(&self) -> usize;
    /// `[n, width]`
    fn embeddings(&self, ids: Tensor<2, Int>) -> Tensor<3>;
    /// `[n, 2·blocks, kv_heads, head_dim]`
    fn past(&self, ids: Tensor<2, Int>) -> Tensor<4>;
}

impl Reads for CausalLm {
    fn vocabulary(&self) -> usize {
        self.config().vocab_size()
    }

    fn room(&self) -> usize {
        self.max_tokens()
    }

    fn embeddings(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        self.embed(ids)
    }

    fn past(&self, ids: Tensor<2, Int>) -> Tensor<4> {
        self.past_of(ids)
    }
}

impl Reads for Encoder {
    fn vocabulary(&self) -> usize {
        self.config().vocab_size().unwrap_or_default()
    }

    fn room(&self) -> usize {
        self.max_tokens().unwrap_or_default()
    }

    fn embeddings(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        self.embed(ids)
    }

    fn past(&self, ids: Tensor<2, Int>) -> Tensor<4> {
        self.past_of(ids)
    }
}

/// What a prompt method starts from, of all that a model makes of tokens.
pub(super) trait Prompts: Method<Adapter = PromptAdapter> {
    /// Whether it is virtual tokens, rather than keys and values.
    const TOKENS: bool = true;

    fn values<T: Reads>(&self, model: &T, ids: Tensor<2, Int>) -> Result<Vec<f32>> {
        Ok(model.embeddings(ids).into_data().iter().collect())
    }

    /// The same in the places of a token.
    fn placed(self, token: u32) -> Self {
        let _ = token;
        self
    }
}

impl Prompts for PromptTuningConfig {}

impl Prompts for MultitaskPromptTuningConfig {}

impl Prompts for PromptBankConfig {}

impl Prompts for PTuningConfig {
    fn placed(self, token: u32) -> Self {
        self.in_place_of(token)
    }
}

impl Prompts for PrefixTuningConfig {
    const TOKENS: bool = false;

    fn values<T: Reads>(&self, model: &T, ids: Tensor<2, Int>) -> Result<Vec<f32>> {
        Ok(self.of_text(model.past(ids))?.into_data().iter().collect())
    }
}

impl<M: Prompts> Prompted<M> {
    /// The method on a model with these files.
    fn on(&self, files: &ModelFiles) -> Result<M> {
        let Some(text) = &self.placeholder else { return Ok(self.method.clone()) };
        let ids = files.tokenizer()?.encode(text, false)?;
        match ids[..] {
            [id] => Ok(self.method.clone().placed(id)),
            _ => {
                let what = format!("--placeholder {text}: that is {} tokens of {}", ids.len(), files.name);
                Err(Error::usage(what, "a text that is one token, and that is in no other text, as [unused1] of BERT"))
            }
        }
    }
}

impl<T: Reads, M: Prompts> Adapts<T> for Prompted<M> {
    fn attach(&self, model: T, files: &ModelFiles, seed: u64) -> Result<T> {
        let vocabulary = model.vocabulary();
        // What has no place for prompts has no vocabulary, and what is empty or too long does not fit: all of it is refused as it is attached.
        let fits = vocabulary > 0 && (1..model.room()).contains(&self.start.tokens);
        let ids = if fits { self.start.ids(files, vocabulary, seed)? } else { None };
        let method = self.on(files)?;
        let Some(ids) = ids else { return Ok(attach(model, &method, seed)?) };
        let device = model.devices().into_iter().next().unwrap_or_default();
        let all: Vec<i64> = ids.iter().flatten().copied().map(i64::from).collect();
        let all = Tensor::<1, Int>::from_data(&all[..], &device.without_autodiff()).unsqueeze();
        let values = method.values(&model.valid(), all)?;
        Ok(start_at(model, &method, &means(&values, &ids), seed)?)
    }

    fn trained(&self, _model: &T, files: &ModelFiles) -> Result<Box<dyn Trained<T>>> {
        Ok(Box::new(AdapterOf::on(self.on(files)?, files)?))
    }
}

impl<M: Prompts> Adaptation for Prompted<M> {
    fn targets(&self) -> Option<&Targets> {
        None
    }

    fn reads_ahead(&self) -> bool {
        M::TOKENS
    }
}

/// The mean of each group's rows.
fn means(values: &[f32], groups: &[Vec<u32>]) -> Vec<f32> {
    let width = values.len() / groups.iter().map(Vec::len).sum::<usize>().max(1);
    let mut rest = values;
    let mean = |group: &Vec<u32>| {
        let (rows, behind) = rest.split_at(group.len() * width);
        rest = behind;
        let sum = |at: usize| rows.iter().skip(at).step_by(width).sum::<f32>();
        (0..width).map(|at| sum(at) / group.len() as f32).collect::<Vec<f32>>()
    };
    groups.iter().flat_map(mean).collect()
}
