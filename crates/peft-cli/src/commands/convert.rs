//! `peft convert`: an adapter from AdapterHub's layout into PEFT's, or back; or one task out of an adapter for several.

use std::path::{Path, PathBuf};

use peft_core::files::{CONFIG_FILE, is_hub};
use peft_core::{AdapterFile, Method};
use peft_lora::LoraConfig;
use peft_models::heads::{HUB_HEAD_FILES, has_hub_head, rename_hub_head};
use peft_moe::{MixtureConfig, PolyConfig, task_lora};
use peft_prompt::MultitaskPromptTuningConfig;
use peft_train::TASK_FILE;
use serde_json::json;

use crate::output::quoted;
use crate::{Context, Error, Result, methods};

/// Arguments of `peft convert`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  peft convert --adapter my-houlsby --name sentiment --out for-adapterhub\n  \
                        peft convert --adapter my-moelora --task-id 1 --out task-1     # a plain LoRA, which merges\n\n\
                        The layout of the folder is recognised; the result has the other one. AdapterHub's head goes along, under the adapter's name; what PEFT's layout holds whole has no place in AdapterHub's. \
                        A folder of MixLoRA's authors becomes one in PEFT's layout.")]
pub struct Args {
    /// The adapter's folder, in either layout
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// Where the converted adapter goes
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The adapter's name, which AdapterHub's layout writes into each key
    #[arg(long, default_value = "adapter")]
    name: String,
    /// moelora, poly, multitask: what the adapter is for this task alone, as a plain LoRA or prompt; numbered from 0 as the files of data were
    #[arg(long, value_name = "N", conflicts_with = "name")]
    task_id: Option<usize>,
    /// Replace an adapter that is there already
    #[arg(long)]
    overwrite: bool,
}

/// Runs the command.
///
/// # Errors
/// When the adapter cannot be read, has no form in the other layout, or cannot be written.
pub fn run(args: &Args, context: &Context) -> Result<()> {
    if args.out.join(CONFIG_FILE).exists() && !args.overwrite {
        let what = format!("--out {}: there is an adapter already", args.out.display());
        return Err(Error::usage(what, "give another folder, or --overwrite"));
    }
    if args.name.is_empty() || args.name.contains(['.', '/', '\\']) {
        let what = format!("--name {:?}: a name is part of each key, between dots", args.name);
        return Err(Error::usage(what, "letters, digits, - and _"));
    }
    let method = methods::of_adapter(&args.adapter)?;
    if let Some(task) = args.task_id {
        return of_task(args, method.peft_type(), task, context);
    }
    let hub = is_hub(&args.adapter)? || !method.is_written();
    method.convert(&args.adapter, (!hub).then_some(&args.name), &args.out).map_err(|error| match error {
        Error::Adapter(error @ peft_core::Error::Config { .. }) => Error::Refused {
            what: format!("--adapter {}: {error}", args.adapter.display()),
            hint: "only what is built here and exists in both layouts is converted".to_owned(),
        },
        other => other,
    })?;
    // In PEFT's layout, which has no names, a head keeps its own.
    if !hub && has_hub_head(&args.adapter) {
        rename_hub_head(&args.adapter, &args.name, &args.out)?;
    } else {
        for name in HUB_HEAD_FILES.iter().filter(|name| args.adapter.join(name).is_file()) {
            let to = args.out.join(name);
            std::fs::copy(args.adapter.join(name), &to).map_err(Error::io(&to))?;
        }
    }
    let layout = if hub { "PEFT" } else { "AdapterHub" };
    context.output.field("layout", format_args!("{layout}'s"))?;
    context.output.field("files", quoted(&args.out))?;
    context.output.json(&json!({ "layout": layout, "out": args.out }))
}

type OfTask = fn(&Path, usize, &Path) -> peft_core::Result<()>;

/// The methods by task, and what writes an adapter of theirs as it is for one task.
const BY_TASK: [(&str, OfTask); 3] = [
    (MixtureConfig::<LoraConfig>::PEFT_TYPE, |dir, task, out| task_lora(&AdapterFile::read(dir)?, task)?.write(out)),
    (PolyConfig::PEFT_TYPE, |dir, task, out| PolyConfig::lora_of(&AdapterFile::read(dir)?, task)?.write(out)),
    (MultitaskPromptTuningConfig::PEFT_TYPE, |dir, task, out| {
        MultitaskPromptTuningConfig::prompt_of(&AdapterFile::read(dir)?, task)?.write(out)
    }),
];

fn of_task(args: &Args, peft_type: &str, task: usize, context: &Context) -> Result<()> {
    let Some((_, write)) = BY_TASK.iter().find(|(known, _)| *known == peft_type) else {
        let known: Vec<&str> = BY_TASK.iter().map(|(known, _)| *known).collect();
        let what = format!("--task-id: {} is of {peft_type}", quoted(&args.adapter));
        return Err(Error::usage(what, format!("an adapter of {}", known.join(", "))));
    };
    write(&args.adapter, task, &args.out)?;
    // What the labels of an encoder mean stays what it is.
    let (from, to) = (args.adapter.join(TASK_FILE), args.out.join(TASK_FILE));
    if from.is_file() {
        std::fs::copy(from, &to).map_err(Error::io(&to))?;
    } else if to.is_file() {
        std::fs::remove_file(&to).map_err(Error::io(&to))?;
    }
    context.output.field("task", task)?;
    context.output.field("files", quoted(&args.out))?;
    context.output.json(&json!({ "layout": "PEFT", "task": task, "out": args.out }))
}
