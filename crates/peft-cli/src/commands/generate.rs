//! `peft generate`: continue a text, or answer a message.

use peft_models::chat::Message;
use peft_models::{Sampling, generate};
use serde_json::json;

use crate::model::ModelArgs;
use crate::{Context, Error, Result, device};

/// Arguments of `peft generate`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  peft generate --model tiny --prompt \"The people\"\n  \
                        peft generate --model MODEL --adapter my-adapter --chat \"Who are you?\" --temperature 0.7 --top-p 0.9")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// A text to continue
    #[arg(long, value_name = "TEXT", required_unless_present = "chat", conflicts_with = "chat")]
    prompt: Option<String>,
    /// A message to answer, by the model's chat template
    #[arg(long, value_name = "TEXT")]
    chat: Option<String>,
    /// What the model is told before the message
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    /// Most tokens to add
    #[arg(long, default_value_t = 128, value_name = "N")]
    max_new_tokens: usize,
    /// 0 takes the most likely token, 1 draws as the model says, more draws wilder
    #[arg(long, default_value_t = 0.0, value_name = "X")]
    temperature: f64,
    /// Draw only among that many of the most likely tokens; 0 for all
    #[arg(long, default_value_t = 0, value_name = "N")]
    top_k: usize,
    /// Draw only among the most likely tokens that together have this probability
    #[arg(long, default_value_t = 1.0, value_name = "P")]
    top_p: f64,
    /// The same seed draws the same text
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
}

/// Runs the command.
///
/// # Errors
/// When the model or the adapter cannot be loaded, or the prompt does not fit.
pub fn run(args: &Args, context: &Context) -> Result<()> {
    if !(args.temperature.is_finite() && args.temperature >= 0.0) {
        return Err(Error::usage(
            format!("--temperature {}: expected 0 or more", args.temperature),
            "--temperature 0.7",
        ));
    }
    if !(args.top_p > 0.0 && args.top_p <= 1.0) {
        return Err(Error::usage(format!("--top-p {}: expected a probability above 0", args.top_p), "--top-p 0.9"));
    }
    let device = device::open(&context.device)?;
    let pretrained = args.model.load_decoder(&device)?;
    let tokenizer = pretrained.tokenizer()?;
    let prompt = match (&args.prompt, &args.chat) {
        (_, Some(message)) => {
            let system = args.system.iter().map(Message::system);
            let messages: Vec<Message> = system.chain([Message::user(message)]).collect();
            tokenizer.encode(&tokenizer.render_chat(&messages, true)?, false)?
        }
        (prompt, None) => tokenizer.encode(prompt.as_deref().unwrap_or_default(), true)?,
    };
    let sampling = Sampling { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p, seed: args.seed };
    let stop = &tokenizer.special().eos;
    let (mut stream, mut text, mut failed) = (tokenizer.decode_stream(true), String::new(), None);
    let mut show = |id: u32| -> Result<()> {
        let piece = stream.push(id)?;
        text.push_str(&piece);
        context.output.text(piece)
    };
    let each = |id| {
        failed = show(id).err();
        failed.is_none()
    };
    let most = args.max_new_tokens;
    let tokens = args.model.for_task(|| generate(&pretrained.model, &prompt, most, sampling, stop, &device, each))?;
    if let Some(error) = failed {
        return Err(error);
    }
    let rest = stream.finish()?;
    context.output.line(&rest)?;
    text.push_str(&rest);
    let stopped = tokens.last().is_some_and(|last| stop.contains(last));
    context.output.json(&json!({
        "prompt_tokens": prompt.len(),
        "new_tokens": tokens.len(),
        "text": text,
        "tokens": tokens,
        "finish": if stopped { "stop" } else { "length" },
    }))
}
