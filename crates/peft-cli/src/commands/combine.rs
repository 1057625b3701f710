//! `peft combine`: several LoRA adapters of one model into one, or into a mixture.

use std::path::{Path, PathBuf};

use peft_core::AdapterFile;
use peft_core::files::CONFIG_FILE;
use peft_lora::{Combination, LoraConfig, combine};
use peft_moe::ArrowConfig;
use serde_json::json;

use crate::output::quoted;
use crate::{Context, Error, Result};

/// Arguments of `peft combine`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  peft combine --adapter style=0.7 --adapter facts=0.3 --out both\n  \
                        peft combine --how arrow --adapter law --adapter code --adapter prose --top-k 2 --out all\n\n\
                        The result adds the weighted sum of what the adapters add, exactly, unless --how svd gives it a lower rank. \
                        With --how arrow each token goes through the adapters that act on it most (arXiv:2405.11157); nothing is trained.")]
pub struct Args {
    /// An adapter's folder and its weight [default: 1]; to be repeated
    #[arg(long = "adapter", value_name = "DIR=WEIGHT", required = true, value_parser = weighted)]
    adapters: Vec<(PathBuf, f64)>,
    /// Factors side by side, summed where one is shared, the best approximation of a given --rank, or a mixture that chooses token by token
    #[arg(long, value_enum, default_value_t = How::Cat)]
    how: How,
    /// Rank of the result, for --how svd
    #[arg(long, value_name = "R")]
    rank: Option<usize>,
    /// Through how many adapters a token goes, for --how arrow [default: 3, or all where there are fewer]
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// What the scores of adapters are divided by, for --how arrow [default: 1]
    #[arg(long, value_name = "X")]
    temperature: Option<f64>,
    /// An adapter of general knowledge, to be taken out of the others first, for --how arrow; may be repeated
    #[arg(long, value_name = "DIR")]
    general: Vec<PathBuf>,
    /// Where the combined adapter goes
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Replace an adapter that is there already
    #[arg(long)]
    overwrite: bool,
}

/// How adapters are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum How {
    Cat,
    Linear,
    Svd,
    Arrow,
}

/// Runs the command.
///
/// # Errors
/// When an adapter cannot be read, they do not fit each other, or the result cannot be written.
pub fn run(args: &Args, context: &Context) -> Result<()> {
    if args.out.join(CONFIG_FILE).exists() && !args.overwrite {
        let what = format!("--out {}: there is an adapter already", args.out.display());
        return Err(Error::usage(what, "give another folder, or --overwrite"));
    }
    let of_arrow = [
        ("top-k", args.top_k.is_some()),
        ("temperature", args.temperature.is_some()),
        ("general", !args.general.is_empty()),
    ];
    if let (Some((flag, _)), false) = (of_arrow.iter().find(|(_, given)| *given), args.how == How::Arrow) {
        return Err(Error::usage(format!("--{flag} is for --how arrow"), "--how arrow, or leave it out"));
    }
    let how = match (args.how, args.rank) {
        (How::Cat, None) => Combination::Cat,
        (How::Linear, None) => Combination::Linear,
        (How::Svd, Some(rank)) => Combination::Svd { rank },
        (How::Svd, None) => return Err(Error::usage("--how svd needs a rank", "--rank 8")),
        (How::Arrow, None) => return mixture(args, context),
        (How::Cat | How::Linear | How::Arrow, Some(_)) => {
            return Err(Error::usage("--rank is for --how svd: elsewhere the rank follows", "--how svd, or no --rank"));
        }
    };
    let read = |(dir, weight): &(PathBuf, f64)| Ok((AdapterFile::<LoraConfig>::read(dir)?, *weight));
    let adapters = args.adapters.iter().map(read).collect::<Result<Vec<_>>>()?;
    let combined = combine(&adapters, how)?;
    combined.write(&args.out)?;
    let (out, rank) = (quoted(&args.out), combined.method.rank);
    context.output.field("combined", format_args!("{} adapters into {out}, rank {rank}", adapters.len()))?;
    context.output.field("next", format_args!("peft generate --model MODEL --adapter {out} --prompt \"…\""))?;
    context.output.json(&json!({ "out": args.out, "adapters": adapters.len(), "rank": rank }))
}

fn mixture(args: &Args, context: &Context) -> Result<()> {
    if let Some((dir, weight)) = args.adapters.iter().find(|(_, weight)| *weight != 1.0) {
        let what = format!("--adapter {}={weight}: with --how arrow tokens choose the weights", dir.display());
        return Err(Error::usage(what, "leave the weight out"));
    }
    let read = |dir: &PathBuf| Ok(AdapterFile::<LoraConfig>::read(dir)?);
    let tasks = args.adapters.iter().map(|(dir, _)| read(dir)).collect::<Result<Vec<_>>>()?;
    let general = args.general.iter().map(read).collect::<Result<Vec<_>>>()?;
    let plain = ArrowConfig::default();
    let arrow = ArrowConfig {
        top_k: args.top_k.unwrap_or(plain.top_k.min(tasks.len())),
        router_temperature: args.temperature.unwrap_or(plain.router_temperature),
        use_gks: !general.is_empty(),
    };
    arrow.mixture(&tasks, &general)?.write(&args.out)?;
    let (out, best) = (quoted(&args.out), arrow.top_k);
    context.output.field("combined", format_args!("{} adapters into {out}, the best {best} a token", tasks.len()))?;
    context.output.field("next", format_args!("peft generate --model MODEL --adapter {out} --prompt \"…\""))?;
    context.output.json(&json!({ "out": args.out, "adapters": tasks.len(), "top_k": best }))
}

/// `DIR=WEIGHT`, or a folder alone.
fn weighted(text: &str) -> std::result::Result<(PathBuf, f64), String> {
    let (dir, weight) = match text.rsplit_once('=') {
        Some((dir, weight)) if !Path::new(text).exists() => (dir, weight),
        _ => return Ok((text.into(), 1.0)),
    };
    let weight = weight.parse().map_err(|_| format!("the weight `{weight}` is not a number; expected {dir}=0.5"))?;
    Ok((dir.into(), weight))
}

#[cfg(test)]
mod tests {
    use super::weighted;

    #[test]
    fn a_weight_follows_the_folder() {
        assert_eq!(weighted("a/b=0.25"), Ok(("a/b".into(), 0.25)));
        assert_eq!(weighted("a/b"), Ok(("a/b".into(), 1.0)));
        assert!(weighted("a/b=much").unwrap_err().contains("`much`"));
    }
}
