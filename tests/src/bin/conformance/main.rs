//! Every check on one device: the laws for each method, the custom operations, golden logits, and a short training next to the same on Burn's default CPU backend.
//!
//! `cargo xtask test-backends` runs it once per backend. Exit code 0 when no check failed, 1 when one did, and 3 when the device cannot be
//! had; then the last line on standard error says why.

#[path = "../../../../crates/peft-adapter/tests/laws/statement.rs"]
mod adapter;
#[path = "../../../../crates/peft-lora/tests/statement/mod.rs"]
mod lora;
#[path = "../../../../crates/peft-moe/tests/laws/statement.rs"]
mod mixture;
mod models;
#[path = "../../../../crates/peft-prompt/tests/laws/statement.rs"]
mod prompt;

use std::process::ExitCode;

use burn::tensor::Device;
use clap::{Parser, ValueEnum};
use peft_adapter::BottleneckConfig;
use peft_core::{Composable, Method, Targets};
use peft_lora::LoraConfig;
use peft_moe::{MixtureConfig, RouterConfig};
use peft_testkit::{Check, Laws, composition_laws, operations, table};

/// Runs every check on one device.
#[derive(Parser)]
struct Arguments {
    /// Which backend
    #[arg(long, value_enum)]
    device: Name,
    /// Print one JSON object per check, as soon as it is known
    #[arg(long)]
    json: bool,
    /// Only the operations, models and methods with this in their names
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
}

/// A backend of Burn.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Name {
    /// Burn's default on the CPU
    Flex,
    /// The older CPU backend
    Ndarray,
    /// Vulkan with SPIR-V
    Vulkan,
    /// WebGPU with WGSL
    Wgpu,
    /// Apple's
    Metal,
    /// NVIDIA's
    Cuda,
    /// The kernel compiler on the CPU
    Cpu,
}

impl Name {
    /// What the command line `peft --device` calls it.
    fn device(self) -> &'static str {
        match self {
            Self::Flex => "cpu",
            Self::Ndarray => "ndarray",
            Self::Vulkan => "vulkan",
            Self::Wgpu => "wgpu",
            Self::Metal => "metal",
            Self::Cuda => "cuda",
            Self::Cpu => "cubecl-cpu",
        }
    }
}

const NO_DEVICE: u8 = 3;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // A driver that is half installed panics rather than saying so.
    let opened = std::panic::catch_unwind(|| peft_cli::device::open(arguments.device.device()));
    let device = match opened {
        Ok(Ok(device)) => device,
        Ok(Err(error)) => {
            eprintln!("{error}; {}", error.hint());
            return ExitCode::from(NO_DEVICE);
        }
        Err(_) => {
            eprintln!("the driver panicked when it was asked for a device");
            return ExitCode::from(NO_DEVICE);
        }
    };
    let report = |check: &Check| {
        if arguments.json {
            // A check holds text and numbers only, which always have a JSON form.
            println!("{}", serde_json::to_string(check).unwrap_or_default());
        } else {
            eprintln!("{}", check.name);
        }
    };
    let slow =
        (arguments.device == Name::Cpu).then_some("the backend compiles the kernels of a whole model for minutes");
    let cpu = matches!(arguments.device, Name::Flex | Name::Ndarray);
    let only = arguments.only.as_str();
    let runner = Runner { device: &device, fuses: !cpu, only, slow, report: &report };
    let mut checks = runner.methods();
    // Drivers may have f64 and yet no exponential of it.
    let wanted = |name: &String| name.contains(only) && (cpu || !name.ends_with("f64"));
    for (name, check) in operations().into_iter().filter(|(name, _)| wanted(name)) {
        let check = Check::run(name, || check(&device));
        report(&check);
        checks.push(check);
    }
    for (name, check) in models::checks().into_iter().filter(|(name, _)| name.contains(only)) {
        let check = match slow {
            Some(reason) => Check::skip(name, reason),
            None => Check::run(name, || check(&device)),
        };
        report(&check);
        checks.push(check);
    }
    if !arguments.json {
        print!("{}", table(&checks));
    }
    ExitCode::from(u8::from(checks.iter().any(Check::failed)))
}

/// How laws are looked at on this device.
struct Runner<'a> {
    device: &'a Device,
    /// Whether operations are fused into kernels.
    fuses: bool,
    /// What the names of those that are looked at have in them.
    only: &'a str,
    /// Why whole models are left out.
    slow: Option<&'a str>,
    report: &'a dyn Fn(&Check),
}

impl Runner<'_> {
    /// The laws of every method.
    fn methods(&self) -> Vec<Check> {
        let mut checks = self.laws("lora", lora::laws(lora::lora()));
        checks.extend(self.laws("lora-gated", lora::gated().brief()));
        checks.extend(self.laws("ia3", adapter::ia3_laws(adapter::ia3())));
        checks.extend(self.laws("ia3-gated", adapter::gated_ia3().brief()));
        checks.extend(self.laws("ssf", adapter::ssf_laws(adapter::ssf())));
        checks.extend(self.laws("ln-tuning", adapter::ln_tuning_laws()));
        checks.extend(self.laws("bitfit", adapter::bitfit_laws(adapter::bitfit())));
        for (name, method) in [
            ("houlsby", BottleneckConfig::houlsby(4.0)),
            ("pfeiffer", BottleneckConfig::pfeiffer(4.0)),
            ("parallel", BottleneckConfig::parallel(4.0)),
            ("compacter", BottleneckConfig::compacter(4.0)),
            ("invertible", BottleneckConfig::pfeiffer(4.0).with_inv_adapter(2.0)),
        ] {
            checks.extend(self.laws(name, adapter::bottleneck_laws(method)));
        }
        checks.extend(self.compositions());
        checks.extend(self.laws("prompt", prompt::prompt()));
        checks.extend(self.laws("prefix", prompt::prefix()));
        checks.extend(self.laws("p-tuning", prompt::p_tuning()));
        checks.extend(self.laws("llama-adapter", prompt::llama_adapter()));
        let best = MixtureConfig::new(mixture::expert(), 3, RouterConfig::TopK { k: 2 });
        checks.extend(self.laws("mixture of the best", mixture::lora_laws(best.with_shared(1))));
        for (name, laws) in mixture::other_routers() {
            checks.extend(self.laws(&format!("mixture {name}"), laws));
        }
        checks.extend(self.laws("mixture of ia3", mixture::vectors().brief()));
        checks.extend(self.laws("mixture of bottlenecks", mixture::bottlenecks().brief()));
        checks.extend(self.laws("pill", mixture::pill()));
        checks.extend(self.laws("multitask", prompt::multitask()));
        let by_task = RouterConfig::Task { num_tasks: 2, embedding_dim: 5 };
        let by_task = MixtureConfig::new(mixture::expert(), 3, by_task);
        checks.extend(self.laws("mixlora", mixture::mixlora_laws()));
        checks.extend(self.laws("mixture by task", mixture::lora_laws(by_task).brief()));
        checks.extend(self.laws("poly", mixture::poly_laws(mixture::poly())));
        for apart in [false, true] {
            let name = if apart { "pill without gates" } else { "pill with one expert" };
            checks.extend(self.laws(name, mixture::pill_without_gate(apart).brief()));
        }
        checks
    }

    /// The laws of one method, whose name comes before theirs.
    fn laws<M: Method>(&self, method: &str, mut laws: Laws<M>) -> Vec<Check> {
        if !method.contains(self.only) {
            return Vec::new();
        }
        if self.fuses {
            laws = laws.fused();
        }
        if let Some(reason) = self.slow {
            laws = laws.skip("encoder", reason);
        }
        let named = |check: &Check| Check { name: format!("{method} {}", check.name), ..check.clone() };
        let checks = laws.run_with(self.device, |check| (self.report)(&named(check)));
        checks.iter().map(named).collect()
    }

    /// The laws of a composition of bottlenecks, and of one of LoRA.
    fn compositions(&self) -> Vec<Check> {
        let bottlenecks =
            [BottleneckConfig::pfeiffer(4.0), BottleneckConfig::houlsby(8.0), BottleneckConfig::parallel(2.0)];
        let loras = [2, 3, 4].map(|rank| LoraConfig::new(rank, Targets::modules(["up", "down"])));
        let places = "a place is there for adapters alone";
        let mut checks = self.composed("composed bottlenecks", bottlenecks, Some(places));
        checks.extend(self.composed("composed lora", loras, None));
        checks
    }

    fn composed<M: Composable>(&self, name: &str, adapters: [M; 3], unaware: Option<&str>) -> Vec<Check> {
        match composition_laws(adapters) {
            Ok(laws) => self.laws(name, unaware.into_iter().fold(laws, |laws, reason| laws.skip("unaware", reason))),
            Err(error) => vec![Check::run(name, || Err(error.into()))],
        }
    }
}
