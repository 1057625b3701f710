//! `peft convert`: an adapter from AdapterHub's layout into PEFT's, or back.

use std::path::PathBuf;

use peft_core::files::{CONFIG_FILE, is_hub};
use peft_models::heads::{HUB_HEAD_FILES, has_hub_head, rename_hub_head};
use serde_json::json;

use crate::output::quoted;
use crate::{Context, Error, Result, methods};

/// Arguments of `peft convert`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  peft convert --adapter my-houlsby --name sentiment --out for-adapterhub\n\n\
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
