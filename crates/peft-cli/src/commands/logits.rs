//! `peft logits`: the raw output of a model for given token ids.

use burn::tensor::{Int, Tensor, TensorData};
use serde::Serialize;

use crate::model::ModelArgs;
use crate::output::print_json;
use crate::{Context, Error, Result, device};

/// Arguments of `peft logits`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  peft logits --model tiny --tokens 3,14,15\n\n\
                        Prints {\"shape\":[1,T,V],\"logits\":[…],\"tokens\":[…]}: f32, row-major, each number in the fewest digits that give it back.")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Token ids
    #[arg(long, value_delimiter = ',', required = true, value_name = "IDS")]
    tokens: Vec<u32>,
}

#[derive(Serialize)]
struct Logits<'a> {
    shape: [usize; 3],
    logits: Vec<f32>,
    tokens: &'a [u32],
}

/// Runs the command.
///
/// # Errors
/// When the model or the adapter cannot be loaded, or a token is out of range.
pub fn run(args: &Args, context: &Context) -> Result<()> {
    let device = device::open(&context.device)?;
    let pretrained = args.model.load(&device)?;
    let config = pretrained.model.config();
    let (vocab_size, longest) = (config.vocab_size(), config.max_positions());
    if let Some(id) = args.tokens.iter().find(|id| **id as usize >= vocab_size) {
        let what = format!("--tokens: {id} is out of range; {} has {vocab_size} tokens", pretrained.files.name);
        return Err(Error::usage(what, format!("ids from 0 to {}", vocab_size - 1)));
    }
    if args.tokens.len() > longest {
        let what =
            format!("--tokens: {} of them; {} takes at most {longest}", args.tokens.len(), pretrained.files.name);
        return Err(Error::usage(what, "give fewer"));
    }
    let ids: Vec<i64> = args.tokens.iter().map(|id| i64::from(*id)).collect();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, args.tokens.len()]), &device);
    let logits = pretrained.model.forward(ids);
    let shape = logits.dims();
    let failed = |e| Error::refused(format!("--device {}: the device failed: {e:?}", context.device), "--device cpu");
    let logits = logits.try_into_data().map_err(failed)?.iter::<f32>().collect();
    print_json(&Logits { shape, logits, tokens: &args.tokens })
}
