//! The command line `peft`.

use std::process::ExitCode;

fn main() -> ExitCode {
    match peft_cli::run(std::env::args_os()) {
        Ok(code) => code,
        Err(error) => error.report(),
    }
}
