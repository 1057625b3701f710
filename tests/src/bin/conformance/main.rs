//! Every check on one device: the laws for LoRA, the custom operations, golden logits, and a short training next to the same on Burn's default CPU backend.
//!
//! `cargo xtask test-backends` runs it once per backend. Exit code 0 when no check failed, 1 when one did, and 3 when the device cannot be
//! had; then the last line on standard error says why.

mod models;
#[path = "../../../../crates/peft-lora/tests/statement/mod.rs"]
mod statement;

use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use peft_testkit::{Check, operations, table};

/// Runs every check on one device.
#[derive(Parser)]
struct Arguments {
    /// Which backend
    #[arg(long, value_enum)]
    device: Name,
    /// Print one JSON object per check, as soon as it is known
    #[arg(long)]
    json: bool,
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
    let mut laws = statement::laws(statement::lora());
    let cpu = matches!(arguments.device, Name::Flex | Name::Ndarray);
    if !cpu {
        laws = laws.fused();
    }
    if let Some(reason) = slow {
        laws = laws.skip("encoder", reason);
    }
    let mut checks = laws.run_with(&device, report);
    // Drivers may have f64 and yet no exponential of it.
    for (name, check) in operations().into_iter().filter(|(name, _)| cpu || !name.ends_with("f64")) {
        let check = Check::run(name, || check(&device));
        report(&check);
        checks.push(check);
    }
    for (name, check) in models::checks() {
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
