//! `peft train`: an adapter from a data file. What a model is decides what it learns: a language model to continue texts, an encoder to label them.

mod labels;
mod language;
mod place;

use std::collections::BTreeMap;
use std::fmt::Display;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use burn::module::Module;
use burn::tensor::Device;
use clap::ArgMatches;
use peft_core::{Peft, Report, Targets, scan};
use peft_models::ModelFiles;
use peft_models::config::Architecture;
use peft_train::data::{Batches, split};
use peft_train::{Evaluation, Objective, Outcome, Record, Summary, TrainConfig, Trained, read_metrics, train};
use serde_json::{Value, json};

use self::place::{Made, Place};
use crate::methods::Adaptation;
use crate::output::{Output, before_after, bytes, quoted, thousands};
use crate::settings::{FILE, Settings};
use crate::{Context, Error, Result, device, interrupt, methods, model};

/// Arguments of `peft train`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  peft train --model MODEL --data data.json --targets all-linear --out my-adapter
  peft train --model MODEL --data data.json --targets q_proj,v_proj --rank 16 --lr 1e-4 --steps 300 --eval-every 50 --out my-adapter
  peft train --model ENCODER --data labelled.csv --targets query,value --epochs 2 --out my-classifier
  peft train --config run.toml --out my-adapter --seed 2     # run.toml: model = \"…\", data = \"…\", targets = \"all-linear\"
  peft train --out my-adapter --resume                       # goes on from the newest checkpoint

Data of a language model: .json, .jsonl or .txt; rows of {\"text\"}, {\"prompt\",\"completion\"}, {\"instruction\",\"input\",\"output\"} or {\"messages\":[…]}.
Data of an encoder: .csv, .tsv, .json or .jsonl; rows of {\"text\",\"label\"} or {\"text\",\"text_pair\",\"label\"}, where the label is a name, a number or a list of \
names; or {\"tokens\":[…],\"labels\":[…]}. For pictures a folder with a folder for each class, or an IDX file (…-images-idx3-ubyte.gz, its labels beside it).

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
    let mut settings = settings.resolve(given, args.config.as_deref(), args.resume)?;
    let method = methods::by_name(&settings.method)?;
    // Written down, so that the run can be repeated.
    let learning_rate = *settings.lr.get_or_insert(method.learning_rate);
    let name = settings.device.as_deref().unwrap_or(&context.device);
    let place = Place { dir: settings.out()?, resume: args.resume, overwrite: args.overwrite };
    place.check(settings.model.as_deref())?;
    // What cannot be is refused before anything is read.
    method.build(&settings)?;
    settings.data()?;
    let config = settings.train_config(learning_rate, !context.output.json && std::io::stderr().is_terminal());
    config.check()?;
    let device = device::open(name)?.autodiff();
    let files = model::open(settings.model()?)?;
    let job = Job { settings: &settings, place, config, device: &device, name, screen: context.output };
    match files.architecture()? {
        Architecture::Decoder(_) => language::run(&job, files),
        Architecture::Encoder(config) => labels::run(&job, files, &config),
    }
}

/// A run as the user asked for it.
struct Job<'a> {
    settings: &'a Settings,
    place: Place<'a>,
    config: TrainConfig,
    device: &'a Device,
    /// Of the device.
    name: &'a str,
    screen: Output,
}

/// All that training starts from.
struct Start<'a, O: Objective> {
    objective: O,
    /// With the adapter.
    model: O::Model,
    trained: Box<dyn Trained<O::Model>>,
    batches: Batches<O::Example>,
    held_out: Option<Batches<O::Example>>,
    files: &'a ModelFiles,
    /// Parameters of the model without the adapter.
    parameters: usize,
    /// What became of the data, for people and for scripts.
    report: (&'a dyn Display, Value),
    /// Commands that go on from here.
    next: Vec<String>,
}

impl Job<'_> {
    /// Says what is about to be trained, trains it, and says what came of it.
    fn go<O: Objective>(&self, start: Start<'_, O>) -> Result<ExitCode> {
        let report = start.model.trainable();
        self.announce(&start, &report)?;
        self.place.prepare(self.made()?)?;
        self.settings.save(self.place.dir)?;
        let stop = interrupt::watch()?;
        let Start { objective, model, trained, batches, held_out, files: _, parameters: _, report: (_, data), next } =
            start;
        let (held_out, resume, dir) = (held_out.as_ref(), self.place.resume, self.place.dir);
        let (_, mut summary) = train(
            &objective,
            model,
            trained.as_ref(),
            batches,
            held_out,
            &self.config,
            dir,
            resume,
            self.device,
            &stop,
        )?;
        // A run that was resumed was first measured by the run before it.
        summary.before = first_evaluation(dir)?.or(summary.before);
        self.tell(&summary, &next)?;
        self.screen.json(&json!({
            "outcome": summary.outcome,
            "steps": summary.steps,
            "kept_step": summary.kept_step,
            "seconds": summary.seconds,
            "before": summary.before,
            "after": summary.after,
            "parameters": report,
            "data": data,
            "out": dir,
        }))?;
        let interrupted = summary.outcome == Outcome::Interrupted;
        Ok(if interrupted { ExitCode::from(interrupt::EXIT_CODE) } else { ExitCode::SUCCESS })
    }

    fn announce<O: Objective>(&self, start: &Start<'_, O>, report: &Report) -> Result<()> {
        let Self { screen, settings, name, .. } = self;
        let (family, total) = (model::architecture(&start.files.config), thousands(start.parameters));
        screen.field("model", format_args!("{}: {family}, {total} parameters, on {name}", start.files.name))?;
        let found = scan(&start.model);
        let packed = found.sites.iter().filter(|site| site.packed.is_some()).count();
        if packed > 0 {
            let size = bytes((report.total_bytes - report.trainable_bytes) as u64);
            screen.field("", format_args!("{packed} layers packed; what is frozen takes {size} in memory"))?;
        }
        let on = if found.adapted.is_empty() { String::new() } else { format!(" on {} modules", found.adapted.len()) };
        screen.field("adapter", format_args!("{}{on}: {report}", settings.method))?;
        screen.field("data", format_args!("{}: {}", names(settings.data()?), start.report.0))?;
        let held_out = start.held_out.as_ref().map_or(0, |batches| batches.samples().len());
        let samples = start.batches.samples().len();
        screen.field("", format_args!("{samples} samples to train on, {held_out} held out"))
    }

    fn tell(&self, summary: &Summary, next: &[String]) -> Result<()> {
        let (screen, steps, out) = (self.screen, summary.steps, quoted(self.place.dir));
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
                screen
                    .field("held out", format_args!("{} (step {})", before_after(before, after), summary.kept_step))?;
            }
            (Some(before), None) => screen.field("held out", format_args!("before training {before}"))?,
            _ => {}
        }
        let made: Vec<&str> =
            self.made()?.files().iter().copied().filter(|name| self.place.dir.join(name).exists()).collect();
        let made = made.join(", ");
        screen.field("files", format_args!("{out}: {made}, metrics.jsonl, loss.svg, {FILE}, checkpoint-{steps}/"))?;
        if summary.outcome == Outcome::Interrupted {
            return screen.field("resume", format_args!("peft train --out {out} --resume"));
        }
        for (at, command) in next.iter().enumerate() {
            screen.field(if at == 0 { "next" } else { "" }, command)?;
        }
        Ok(())
    }

    fn made(&self) -> Result<Made> {
        let adapter = methods::by_name(&self.settings.method)?.peft_type().is_some();
        Ok(if adapter { Made::Adapter } else { Made::Model })
    }

    /// Puts aside what is evaluated on: `--eval-data` as it was read, or a part of the data.
    fn hold_out<T>(&self, all: Vec<T>, given: Option<Vec<T>>) -> Result<(Vec<T>, Vec<T>)> {
        let settings = self.settings;
        Ok(match given {
            Some(held_out) => (all, held_out),
            None if settings.eval_fraction == 0.0 => (all, Vec::new()),
            None if all.len() < 2 => {
                let what = format!("{}: nothing can be held out of one sample", names(settings.data()?));
                return Err(Error::usage(what, "--eval-fraction 0, or more data"));
            }
            None => split(all, settings.eval_fraction, settings.seed)?,
        })
    }
}

/// Files by name.
fn names(files: &[PathBuf]) -> String {
    files.iter().map(quoted).collect::<Vec<_>>().join(", ")
}

/// Refuses settings that are for the other kind of model.
fn refuse(flags: &[(&str, bool)], what: &str) -> Result<()> {
    match flags.iter().find(|(_, given)| *given) {
        Some((flag, _)) => Err(Error::usage(format!("--{flag} is for {what}"), "leave it out")),
        None => Ok(()),
    }
}

/// Without targets there is nothing to adapt: the names to choose from are the useful part of that error.
fn check_targets<T: Module>(model: &T, method: &dyn Adaptation) -> Result<()> {
    let missing = |targets: &Targets| targets.target_modules.is_none();
    if !method.targets().is_some_and(missing) {
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
        Record::Step(_) | Record::Experts(_) => None,
    }))
}
