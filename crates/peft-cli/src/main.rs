//! The command line `peft`.

use std::process::ExitCode;

fn main() -> ExitCode {
    // This thread is one of those that compute; else it wakes one for each operation, and sleeps. Where that cannot be, all is only slower.
    let _ = rayon::ThreadPoolBuilder::new().use_current_thread().build_global();
    match peft_cli::run(std::env::args_os()) {
        Ok(code) => code,
        Err(error) => error.report(),
    }
}
