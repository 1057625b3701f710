//! `peft train`: an adapter from a data file.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use burn::module::Module;
use clap::ArgMatches;
use peft_core::files::{CONFIG_FILE, TENSOR_FILE};
use peft_core::{Peft, Report, scan};
use peft_models::{CausalLm, Pretrained};
use peft_train::data::{EncodeReport, Row, Sample, split};
use peft_train::{Evaluation, Outcome, Record, Summary, read_metrics, train};
use serde_json::json;

use crate::methods::Adaptation;
use crate::model::FrozenType;
use crate::output::{Output, before_after, bytes, evaluation, quoted, thousands};
use crate::rows::{self, Reading, report_json};
use crate::settings::{FILE, Init, Settings};
use crate::{Context, Error, Result, device, interrupt, methods, model};

/// Arguments of `peft train`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  peft train --model MODEL --data data.json --targets all-linear --out my-adapter
  peft train --model MODEL --data data.json --targets q_proj,v_proj --rank 16 --lr 1e-4 --steps 300 --eval-every 50 --out my-adapter
  peft train --config run.toml --out my-adapter --seed 2     # run.toml: model = \"…\", data = \"…\", targets = \"all-linear\"
  peft train --out my-adapter --resume                       # goes on from the newest checkpoint

Ctrl-C saves a checkpoint and ends; --resume goes on from there. On a CPU the result is bit for bit that of a run without a break.")]
pub struct Args {
    #[command(flatten)]
    settings: Settings,
    /// Go on from the newest checkpoint in --out, with the settings of that run
    #[arg(long, conflicts_with = "overwrite")]
    resume: bool,
    /// Replace an adapter that is in --out already
    #[arg(long)]
    overwrite: bool,
    /// A TOML file with any of these flags as keys; flags on the command line win
    #[arg(long, value_name = "FILE.toml")]
    config: Option<PathBuf>,
}

/// Runs the command; `given` says which flags were on the command line.
///
/// # Errors
/// When a setting makes no sense, something cannot be read or written, or training fails; what was saved before stays whole.
pub fn run(args: Args, given: &ArgMatches, context: &Context) -> Result<ExitCode> {
    let mut settings = args.settings;
    settings.device = Some(context.device.clone());
    let settings = settings.resolve(given, args.config.as_deref(), args.resume)?;
    let name = settings.device.as_deref().unwrap_or(&context.device);
    let out = Place { dir: settings.out()?, resume: args.resume, overwrite: args.overwrite };
    out.check()?;
    let method = methods::by_name(&settings.method)?.build(&settings)?;
    let config = settings.train_config(!context.output.json && std::io::stderr().is_terminal());
    config.check()?;
    let device = device::open(name)?.autodiff();
    let data = Data::read(&settings)?;

    let packing = method.packing(settings.packing.packing()?);
    let mut pretrained = model::load(settings.model()?, &packing, settings.precision.into(), &device)?;
    check_targets(&pretrained.model, method.as_ref())?;
    let total = pretrained.model.trainable().total;
    let adapted = method.attach(model::for_targets(pretrained.model, method.targets())?, settings.seed)?;
    // It shares all that is frozen. What was loaded goes: it may be dense where this is packed.
    pretrained.model = adapted.valid();
    let reading = Reading {
        train_on_prompt: settings.train_on_prompt,
        batch_size: settings.batch_size,
        pack: settings.pack,
        seed: settings.seed,
        ..Reading::new(&pretrained, settings.max_len)?
    };
    let Samples { train: samples, held_out, report } = data.samples(&reading, &settings)?;
    let parameters = adapted.trainable();
    let screen = context.output;
    let family = model::architecture(&pretrained.files.config);
    screen.field(
        "model",
        format_args!("{}: {family}, {} parameters, on {name}", pretrained.files.name, thousands(total)),
    )?;
    let packed = scan(&pretrained.model).sites.iter().filter(|site| site.packed.is_some()).count();
    if packed > 0 {
        let size = bytes((parameters.total_bytes - parameters.trainable_bytes) as u64);
        screen.field("", format_args!("{packed} layers packed; what is frozen takes {size} in memory"))?;
    }
    screen.field(
        "adapter",
        format_args!("{} on {} modules: {parameters}", settings.method, scan(&adapted).adapted.len()),
    )?;
    screen.field("data", format_args!("{}: {report}", quoted(settings.data()?)))?;
    screen.field("", format_args!("{} samples to train on, {} held out", samples.len(), held_out.len()))?;

    let batches = reading.batches(samples)?;
    let held_out = if held_out.is_empty() { None } else { Some(reading.batches(held_out)?) };
    out.prepare()?;
    settings.save(out.dir)?;
    let stop = interrupt::watch()?;
    let trained = method.trained(&adapted, &pretrained.files.name)?;
    let (_, mut summary) =
        train(adapted, trained.as_ref(), batches, held_out.as_ref(), &config, out.dir, args.resume, &device, &stop)?;
    // A run that was resumed was first measured by the run before it.
    summary.before = first_evaluation(out.dir)?.or(summary.before);
    tell(&summary, &pretrained, &data, &settings, screen)?;
    screen.json(&result_json(&summary, &parameters, &report, out.dir))?;
    Ok(if summary.outcome == Outcome::Interrupted { ExitCode::from(interrupt::EXIT_CODE) } else { ExitCode::SUCCESS })
}

/// Where the run goes.
struct Place<'a> {
    dir: &'a Path,
    resume: bool,
    overwrite: bool,
}

impl Place<'_> {
    /// Refuses a folder that holds another run's work, before anything is read.
    fn check(&self) -> Result<()> {
        let checkpoints = self.checkpoints()?;
        if self.resume {
            let what = || format!("--resume: {} holds no checkpoint", self.dir.display());
            return if checkpoints.is_empty() {
                Err(Error::usage(what(), "leave --resume out to begin again"))
            } else {
                Ok(())
            };
        }
        let adapter = [CONFIG_FILE, TENSOR_FILE].iter().any(|name| self.dir.join(name).exists());
        if (adapter || !checkpoints.is_empty()) && !self.overwrite {
            let what = format!("--out {}: there is an adapter or a checkpoint already", self.dir.display());
            return Err(Error::usage(what, "--resume to go on, --overwrite to replace it, or another folder"));
        }
        Ok(())
    }

    /// Removes what would be mistaken for this run's; the adapter itself stays until the new one replaces it.
    fn prepare(&self) -> Result<()> {
        if self.resume {
            return Ok(());
        }
        let best = self.dir.join("best");
        for old in self.checkpoints()?.into_iter().chain(best.is_dir().then_some(best)) {
            std::fs::remove_dir_all(&old).map_err(Error::io(&old))?;
        }
        Ok(())
    }

    fn checkpoints(&self) -> Result<Vec<PathBuf>> {
        let entries = match std::fs::read_dir(self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(Error::io(self.dir)(e)),
        };
        let paths: std::io::Result<Vec<PathBuf>> = entries.map(|entry| Ok(entry?.path())).collect();
        let named =
            |path: &PathBuf| path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with("checkpoint-"));
        Ok(paths.map_err(Error::io(self.dir))?.into_iter().filter(named).collect())
    }
}

/// The rows of `--data` and of `--eval-data`.
struct Data {
    rows: Vec<Row>,
    held_out: Option<Vec<Row>>,
}

struct Samples {
    train: Vec<Sample>,
    held_out: Vec<Sample>,
    report: EncodeReport,
}

impl Data {
    fn read(settings: &Settings) -> Result<Self> {
        let rows = rows::read(settings.data()?, &settings.set)?;
        let held_out = settings.eval_data.as_ref().map(|path| rows::read(path, &settings.set)).transpose()?;
        Ok(Self { rows, held_out })
    }

    fn samples(&self, reading: &Reading<'_>, settings: &Settings) -> Result<Samples> {
        let data = settings.data()?;
        let (all, report) = reading.samples(&self.rows, data)?;
        let (train, held_out) = match (&self.held_out, &settings.eval_data) {
            (Some(rows), Some(path)) => (all, reading.samples(rows, path)?.0),
            _ if settings.eval_fraction == 0.0 => (all, Vec::new()),
            _ if all.len() < 2 => {
                let what = format!("{}: nothing can be held out of one sample", data.display());
                return Err(Error::usage(what, "--eval-fraction 0, or more data"));
            }
            _ => split(all, settings.eval_fraction, settings.seed)?,
        };
        Ok(Samples { train, held_out, report })
    }

    /// Whether the model learns to answer, rather than to continue.
    fn is_chat(&self) -> bool {
        self.rows.iter().any(|row| matches!(row, Row::Chat { .. } | Row::Instruction { .. }))
    }
}

/// Without targets there is nothing to adapt: the names to choose from are the useful part of that error.
fn check_targets(model: &CausalLm, method: &dyn Adaptation) -> Result<()> {
    if method.targets().target_modules.is_some() {
        return Ok(());
    }
    let mut names: BTreeMap<String, usize> = BTreeMap::new();
    for site in scan(model).sites {
        *names.entry(site.path.rsplit('.').next().unwrap_or_default().to_owned()).or_default() += 1;
    }
    let names: Vec<String> = names.iter().map(|(name, count)| format!("{name} x {count}")).collect();
    let what = format!("--targets is missing; the modules of this model are: {}", names.join(", "));
    Err(Error::usage(what, "--targets all-linear, which takes every linear layer but the output head"))
}

fn first_evaluation(dir: &Path) -> Result<Option<Evaluation>> {
    let records = read_metrics(&dir.join("metrics.jsonl"))?;
    Ok(records.into_iter().find_map(|record| match record {
        Record::Eval(e) => Some(e.evaluation),
        Record::Step(_) => None,
    }))
}

fn tell(summary: &Summary, pretrained: &Pretrained, data: &Data, settings: &Settings, screen: Output) -> Result<()> {
    let (dir, steps) = (settings.out()?, summary.steps);
    let out = quoted(dir);
    let took = format!("step {steps}, {:.1} s", summary.seconds);
    screen.field(
        "training",
        match summary.outcome {
            Outcome::Finished => format!("finished at {took}"),
            Outcome::Stopped => format!("ended at {took}: the held-out loss no longer falls"),
            Outcome::Interrupted => format!("interrupted at {took}; a checkpoint is saved"),
        },
    )?;
    match (&summary.before, &summary.after) {
        (Some(before), Some(after)) => {
            screen.field("held out", format_args!("{} (step {})", before_after(before, after), summary.kept_step))?;
        }
        (Some(before), None) => screen.field("held out", format_args!("before training {}", evaluation(before)))?,
        _ => {}
    }
    screen.field(
        "files",
        format_args!("{out}: {TENSOR_FILE}, {CONFIG_FILE}, metrics.jsonl, loss.svg, {FILE}, checkpoint-{steps}/"),
    )?;
    if summary.outcome == Outcome::Interrupted {
        return screen.field("resume", format_args!("peft train --out {out} --resume"));
    }
    let bf16 = if settings.precision == FrozenType::Bf16 { " --precision bf16" } else { "" };
    let model = quoted(&pretrained.files.name) + &settings.packing.flags();
    // What belongs to the packed weights cannot be merged into others.
    let into = if settings.init == Init::Loftq { " --into unpacked" } else { "" };
    let prompt =
        if data.is_chat() && pretrained.tokenizer()?.chat_template().is_some() { "--chat" } else { "--prompt" };
    screen.field("next", format_args!("peft generate --model {model}{bf16} --adapter {out} {prompt} \"…\""))?;
    screen.field("", format_args!("peft merge --model {model}{into} --adapter {out} --out merged"))
}

fn result_json(summary: &Summary, parameters: &Report, report: &EncodeReport, out: &Path) -> serde_json::Value {
    json!({
        "outcome": summary.outcome,
        "steps": summary.steps,
        "kept_step": summary.kept_step,
        "seconds": summary.seconds,
        "before": summary.before,
        "after": summary.after,
        "parameters": parameters,
        "data": report_json(report),
        "out": out,
    })
}
