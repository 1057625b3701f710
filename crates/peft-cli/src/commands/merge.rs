//! `peft merge`: the adapter folded into the model's own files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use peft_core::{Site, scan};

use peft_models::config::Architecture;
use peft_models::export::{Dtype, rewrite, save_model};
use peft_models::load::{HfTensor, Packing, Precision, export_weights};
use peft_models::weights::Weights;
use peft_models::{ModelFiles, Origin, Pretrained, stacked};
use peft_quant::{LayerTruth, Quantization, merge_truth};
use peft_train::{Trained as _, WholeModel};
use serde_json::{Value, json};

use crate::model::{
    adapted_keys, check_new_model, copy_generation_config, for_adapter, is_inside, load, load_encoder, open,
};
use crate::output::{quoted, table};
use crate::packing::PackingArgs;
use crate::{Context, Error, Result, device, methods};

/// Arguments of `peft merge`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  peft merge --model MODEL --adapter my-adapter --out merged
  peft merge --model MODEL --quantize nf4 --adapter my-qlora --out merged              # into the model's own weights
  peft merge --model MODEL --quantize nf4 --into unpacked --adapter my-qlora --out merged

The result is a Hugging Face directory in the model's own number format (F16 for a GGUF file), which every tool reads. With --quantize it also says, \
layer by layer, whether packing loses more than the adapter adds; `peft quantize` on the result is a step of its own.")]
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
    /// Into which weights, where the adapter was trained over packed ones
    #[arg(long, value_enum, default_value_t = Into::Original)]
    into: Into,
    /// Replace a model that is there already
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    packing: PackingArgs,
}

/// What an adapter is merged into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Into {
    /// The model's own weights
    Original,
    /// What the packed weights stand for, which is what the adapter has seen
    Unpacked,
}

/// Runs the command.
///
/// # Errors
/// When the model or the adapter cannot be read, they cannot be merged, or the result cannot be written.
pub fn run(args: &Args, context: &Context) -> Result<()> {
    check_new_model(&args.out, args.overwrite, &[args.model.as_ref(), &args.adapter])?;
    let device = device::open(&context.device)?;
    let files = open(&args.model)?;
    if let Architecture::Encoder(_) = files.architecture()? {
        return encoder(args, files, &device, context);
    }
    let method = methods::of_adapter(&args.adapter)?;
    let keys = adapted_keys(&args.adapter)?;
    let packing = args.packing.packing()?;
    let (loaded, quantization) = match (&packing, args.into) {
        (Packing::Quantize(quantization) | Packing::Requantize(quantization), Into::Original) => {
            (Packing::Dense, Some(quantization))
        }
        (Packing::Quantize(quantization) | Packing::Requantize(quantization), Into::Unpacked) => {
            (packing.clone(), Some(quantization))
        }
        (Packing::AsStored | Packing::Dense, _) => (packing.clone(), None),
    };
    let mut pretrained = Pretrained::from_files(files, &loaded, Precision::F32, &device)?;
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
    let sites = scan(&model).sites.into_iter().filter(|site| site.packed.is_some());
    // The weights of experts have the name of their layer.
    let name = |site: Site| if site.experts.is_some() { site.path } else { format!("{}.weight", site.path) };
    let unpacked: BTreeSet<String> = sites.map(name).collect();
    if args.into == Into::Unpacked && unpacked.is_empty() {
        let what = format!("--into unpacked: no weight of {} is packed", args.model);
        return Err(Error::usage(what, "--quantize with the type that the adapter was trained over"));
    }
    pretrained.model = method.merge(model, &args.adapter)?;
    if untied {
        pretrained.files.config["tie_word_embeddings"] = Value::Bool(false);
    }
    let changed = |name: &str| {
        let module = name.rsplit_once('.').map_or("", |(module, _)| module);
        let adapted = keys.iter().any(|key| is_inside(key, module));
        adapted || unpacked.contains(name) || (untied && name == "lm_head.weight")
    };
    let count = write(&mut pretrained, changed, &args.out)?;
    let truth = quantization.map(|quantization| truth(args, quantization, &device)).transpose()?.flatten();
    let (out, adapter) = (quoted(&args.out), quoted(&args.adapter));
    context.output.field("merged", format_args!("{adapter} into {out}: {count} tensors changed"))?;
    if let Some(truth) = &truth {
        tell(truth, context)?;
    }
    context.output.field("next", format_args!("peft generate --model {out} --prompt \"…\""))?;
    context.output.json(&json!({ "out": args.out, "changed": count, "untied": untied, "truth": truth }))
}

/// An encoder with the adapter and its head, as a model in f32.
fn encoder(args: &Args, files: ModelFiles, device: &Device, context: &Context) -> Result<()> {
    if args.packing.quantize.is_some() || args.into == Into::Unpacked {
        let what = "--quantize and --into: what packing loses is compared for language models";
        return Err(Error::usage(what, "leave them out: an encoder is merged into its own weights"));
    }
    let mut merged = load_encoder(files, Some(&args.adapter), Packing::Dense, Precision::F32, device)?;
    merged.model = methods::of_adapter(&args.adapter)?.merge(merged.model, &args.adapter)?;
    merged.files.config.as_object_mut().and_then(|config| config.remove("quantization_config"));
    WholeModel::of(&merged.files)?.save(&merged.model, &args.out)?;
    let count = adapted_keys(&args.adapter)?.len();
    let (out, adapter) = (quoted(&args.out), quoted(&args.adapter));
    context.output.field("merged", format_args!("{adapter} into {out}: {count} tensors of the adapter"))?;
    context.output.field("next", format_args!("peft predict --model {out} --text \"…\""))?;
    context.output.json(&json!({ "out": args.out, "tensors": count }))
}

/// What packing loses beside what the adapter adds. `None` for an adapter that belongs to the packed weights and has no meaning on the model's own.
fn truth(args: &Args, quantization: &Quantization, device: &Device) -> Result<Option<Vec<LayerTruth>>> {
    let base = for_adapter(load(&args.model, &Packing::Dense, Precision::F32, device)?.model, &args.adapter)?;
    match methods::of_adapter(&args.adapter)?.merge(base.clone(), &args.adapter) {
        Ok(merged) => Ok(Some(merge_truth(&base, &merged, quantization)?)),
        Err(Error::Adapter(peft_core::Error::Base { .. })) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Layers that are printed; `--json` has them all.
const SHOWN: usize = 5;

fn tell(truth: &[LayerTruth], context: &Context) -> Result<()> {
    let mut order: Vec<&LayerTruth> = truth.iter().collect();
    order.sort_by(|a, b| b.ratio().total_cmp(&a.ratio()));
    let titles = ["  layer", "packing loses", "at most", "adapter adds", "at most", "ratio"].map(str::to_owned);
    let row = |layer: &&LayerTruth| {
        let LayerTruth { path, largest_error, mean_error, largest_delta, mean_delta } = layer;
        let number = |value: &f32| format!("{value:.2e}");
        let [mean_error, largest_error, mean_delta, largest_delta] =
            [mean_error, largest_error, mean_delta, largest_delta].map(number);
        vec![format!("  {path}"), mean_error, largest_error, mean_delta, largest_delta, format!("{:.2}", layer.ratio())]
    };
    let rows: Vec<Vec<String>> = [titles.to_vec()].into_iter().chain(order.iter().take(SHOWN).map(row)).collect();
    context.output.line(table(&rows))?;
    let drowned = truth.iter().filter(|layer| layer.drowned()).count();
    if drowned > 0 {
        let text = format_args!(
            "packing loses more than the adapter adds in {drowned} of {} layers: packing the merged model again would drown it there; keep \
             the adapter apart, or merge into 16 bits and leave it so",
            truth.len()
        );
        context.output.field("warning", text)?;
    }
    Ok(())
}

/// Writes the merged model in the form that its origin allows; gives the number of tensors that differ from the base.
fn write(merged: &mut Pretrained, changed: impl Fn(&str) -> bool, out: &Path) -> Result<usize> {
    let unpacked = match &merged.files.origin {
        Origin::Gguf(_) => Some(Dtype::F16),
        Origin::Checkpoint(base) => base.unpacked_dtype()?,
    };
    if unpacked.is_some() {
        // All weights are dense now.
        merged.files.config.as_object_mut().and_then(|config| config.remove("quantization_config"));
    }
    let tokenizer = merged.tokenizer().ok();
    let tensors = export_weights(&merged.model, changed)?;
    let (count, config) = (tensors.len(), &merged.files.config);
    match (&merged.files.origin, unpacked) {
        (Origin::Checkpoint(base), None) => rewrite(base, as_named_in(base, tensors), config, tokenizer, out)?,
        (_, dtype) => save_model(&merged.model, config, tokenizer, dtype.unwrap_or(Dtype::F32), out)?,
    }
    copy_generation_config(merged.files.origin.weights().path(), out)?;
    Ok(count)
}

/// GPT-2's own checkpoints leave out the outermost name; what replaces a tensor must be called as it is there.
fn as_named_in(base: &dyn Weights, tensors: BTreeMap<String, HfTensor>) -> BTreeMap<String, HfTensor> {
    let rename = |name: String| match name.strip_prefix("transformer.") {
        Some(short) if base.find(short).is_some() => short.to_owned(),
        _ => name,
    };
    stacked::as_in(base, tensors).into_iter().map(|(name, tensor)| (rename(name), tensor)).collect()
}
