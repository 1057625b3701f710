//! The command line `peft`.

use std::process::ExitCode;

fn main() -> ExitCode {
    #[cfg(any(feature = "flex", feature = "ndarray"))]
    peft_kernels::prepare_process();
    match peft_cli::run(std::env::args_os()) {
        Ok(code) => code,
        Err(error) => error.report(),
    }
}
