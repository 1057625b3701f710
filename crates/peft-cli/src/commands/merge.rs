//! `peft merge`: the adapter folded into the model's own files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use peft_models::export::{Dtype, rewrite, save_model};
use peft_models::load::{HfTensor, Packing, export_weights};
use peft_models::weights::Weights;
use peft_models::{Origin, Pretrained};
use serde_json::{Value, json};

use crate::model::{adapted_keys, check_new_model, copy_generation_config, for_adapter, is_inside, load};
use crate::output::quoted;
use crate::{Context, Error, Result, device, methods};

/// Arguments of `peft merge`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  peft merge --model MODEL --adapter my-adapter --out merged\n\n\
                        The result is a Hugging Face directory in the model's own number format (F16 for a GGUF file), which every tool reads.")]
pub struct Args {
    /// The model that the adapter was trained on
    #[arg(long)]
    model: String,
    /// Folder with `adapter_config.json` and `adapter_model.safetensors`
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// Where the merged model goes
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Replace a model that is there already
    #[arg(long)]
    overwrite: bool,
}

/// Runs the command.
///
/// # Errors
/// When the model or the adapter cannot be read, they cannot be merged, or the result cannot be written.
pub fn run(args: &Args, context: &Context) -> Result<()> {
    check_new_model(&args.out, args.overwrite, &[args.model.as_ref(), &args.adapter])?;
    let device = device::open(&context.device)?;
    let method = methods::of_adapter(&args.adapter)?;
    let keys = adapted_keys(&args.adapter)?;
    let mut pretrained = load(&args.model, &Packing::AsStored, &device)?;
    let tied = pretrained.model.config().is_tied();
    let model = for_adapter(pretrained.model, &args.adapter)?;
    let untied = tied && !model.config().is_tied();
    if !untied && tied && keys.iter().any(|key| is_inside(key, "transformer.wte")) {
        let what = format!(
            "{}: the adapter changes the embedding table, which is also the output head of GPT-2",
            args.adapter.display()
        );
        return Err(Error::refused(what, "use the adapter without merging: every command takes --adapter"));
    }
    pretrained.model = method.merge(model, &args.adapter)?;
    if untied {
        pretrained.files.config["tie_word_embeddings"] = Value::Bool(false);
    }
    let changed = |name: &str| {
        let module = name.rsplit_once('.').map_or("", |(module, _)| module);
        keys.iter().any(|key| is_inside(key, module)) || (untied && name == "lm_head.weight")
    };
    let count = write(&pretrained, changed, &args.out)?;
    let (out, adapter) = (quoted(&args.out), quoted(&args.adapter));
    context.output.field("merged", format_args!("{adapter} into {out}: {count} tensors changed"))?;
    context.output.field("next", format_args!("peft generate --model {out} --prompt \"…\""))?;
    context.output.json(&json!({ "out": args.out, "changed": count, "untied": untied }))
}

/// Writes the merged model in the form that its origin allows; gives the number of tensors that differ from the base.
fn write(merged: &Pretrained, changed: impl Fn(&str) -> bool, out: &Path) -> Result<usize> {
    let tokenizer = merged.tokenizer().ok();
    let tensors = export_weights(&merged.model, changed)?;
    let count = tensors.len();
    match &merged.files.origin {
        Origin::Gguf(_) => save_model(&merged.model, &merged.files.config, tokenizer, Dtype::F16, out)?,
        Origin::Checkpoint(base) => {
            rewrite(base, as_named_in(base, tensors), &merged.files.config, tokenizer, out)?;
            copy_generation_config(base.path(), out)?;
        }
    }
    Ok(count)
}

/// GPT-2's own checkpoints leave out the outermost name; what replaces a tensor must be called as it is there.
fn as_named_in(base: &dyn Weights, tensors: BTreeMap<String, HfTensor>) -> BTreeMap<String, HfTensor> {
    let rename = |name: String| match name.strip_prefix("transformer.") {
        Some(short) if base.find(short).is_some() => short.to_owned(),
        _ => name,
    };
    tensors.into_iter().map(|(name, tensor)| (rename(name), tensor)).collect()
}
