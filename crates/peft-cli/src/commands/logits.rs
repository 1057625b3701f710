//! `peft logits`: the raw output of a model for given token ids, a text or a picture.

use burn::tensor::{Device, Int, Tensor, TensorData};
use peft_models::encoder::{Input, Text};
use peft_models::heads::Task;
use peft_models::{Pretrained, PretrainedEncoder};
use serde::Serialize;

use crate::content::ContentArgs;
use crate::model::{Loaded, ModelArgs};
use crate::output::print_json;
use crate::{Context, Error, Result, device};

/// Arguments of `peft logits`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  peft logits --model tiny --tokens 3,14,15
  peft logits --model ENCODER --adapter my-adapter --text \"…\"
  peft logits --model VIT --image picture.png

Prints {\"shape\":[…],\"logits\":[…],\"tokens\":[…]}: f32, row-major, each number in the fewest digits that give it back. The shape is [1,T,V] for a \
language model and for labels of tokens, [1,labels] for a label of the whole, [1,width] for an encoder without a head.")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Token ids
    #[arg(long, value_delimiter = ',', value_name = "IDS", conflicts_with_all = ["text", "image"], required_unless_present_any = ["text", "image"])]
    tokens: Vec<u32>,
    #[command(flatten)]
    content: ContentArgs,
}

#[derive(Serialize)]
struct Logits {
    shape: Vec<usize>,
    logits: Vec<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokens: Option<Vec<u32>>,
}

/// Runs the command.
///
/// # Errors
/// When the model or the adapter cannot be loaded, or the model cannot read what it is given.
pub fn run(args: &Args, context: &Context) -> Result<()> {
    let device = device::open(&context.device)?;
    let loaded = args.model.load(&device)?;
    let (logits, read) = args.model.for_task(|| match &loaded {
        Loaded::Decoder(pretrained) => of_decoder(args, pretrained, &device),
        Loaded::Encoder(pretrained) => of_encoder(args, pretrained, &device),
    })?;
    let mut shape = logits.dims().to_vec();
    if read.whole {
        shape.remove(1);
    }
    let failed = |e| Error::refused(format!("--device {}: the device failed: {e:?}", context.device), "--device cpu");
    let logits = logits.try_into_data().map_err(failed)?.iter::<f32>().collect();
    print_json(&Logits { shape, logits, tokens: read.ids })
}

/// What was read, and whether the output is about it as a whole.
struct Read {
    ids: Option<Vec<u32>>,
    whole: bool,
}

fn of_decoder(args: &Args, pretrained: &Pretrained, device: &Device) -> Result<(Tensor<3>, Read)> {
    let ids = match (&args.content.text, &args.content.image, &args.content.text_pair) {
        (Some(text), None, None) => pretrained.tokenizer()?.encode(text, true)?,
        (None, None, None) => args.tokens.clone(),
        _ => {
            let what = format!("{}: a language model reads one text", pretrained.files.name);
            return Err(Error::usage(what, "--text or --tokens"));
        }
    };
    let config = pretrained.model.config();
    check(&ids, config.vocab_size(), pretrained.model.max_tokens(), &pretrained.files.name)?;
    Ok((pretrained.model.forward(matrix(&ids, device)), Read { ids: Some(ids), whole: false }))
}

fn of_encoder(args: &Args, pretrained: &PretrainedEncoder, device: &Device) -> Result<(Tensor<3>, Read)> {
    let (model, config) = (&pretrained.model, pretrained.model.config());
    let whole = matches!(config.task, Task::Classification { .. } | Task::Embedding);
    let (input, ids) = if args.tokens.is_empty() {
        let (reader, prepared) = args.content.prepare(pretrained, false)?;
        (reader.input([&prepared], device)?, prepared.tokens().map(|tokens| tokens.ids.clone()))
    } else {
        if let (Some(vocab_size), Some(longest)) = (config.vocab_size(), model.max_tokens()) {
            check(&args.tokens, vocab_size, longest, &pretrained.files.name)?;
        }
        (Input::Text(Text::new(matrix(&args.tokens, device))), Some(args.tokens.clone()))
    };
    model.check(&input)?;
    Ok((model.forward(&input), Read { ids, whole }))
}

fn matrix(ids: &[u32], device: &Device) -> Tensor<2, Int> {
    let values: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
    Tensor::from_data(TensorData::new(values, [1, ids.len()]), device)
}

fn check(ids: &[u32], vocab_size: usize, longest: usize, name: &str) -> Result<()> {
    if let Some(id) = ids.iter().find(|id| **id as usize >= vocab_size) {
        let what = format!("--tokens: {id} is out of range; {name} has {vocab_size} tokens");
        return Err(Error::usage(what, format!("ids from 0 to {}", vocab_size - 1)));
    }
    if ids.len() > longest {
        let what = format!("--tokens: {} of them; {name} takes at most {longest}", ids.len());
        return Err(Error::usage(what, "give fewer"));
    }
    Ok(())
}
