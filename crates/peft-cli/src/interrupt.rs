//! Ctrl-C: the first saves, the second ends.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use peft_train::Stop;

use crate::{Error, Result};

/// The exit code of a program that was interrupted, as shells have it: 128 + SIGINT.
pub const EXIT_CODE: u8 = 130;

/// A flag that is set at the first Ctrl-C (or SIGTERM); the second ends the program.
///
/// # Errors
/// When the system does not let us listen.
pub fn watch() -> Result<Arc<Stop>> {
    let stop = Arc::new(Stop::new(false));
    let flag = Arc::clone(&stop);
    let handler = move || {
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(i32::from(EXIT_CODE));
        }
        eprintln!("saving a checkpoint, once more to quit at once");
    };
    ctrlc::set_handler(handler).map_err(|e| {
        Error::refused(format!("cannot listen for Ctrl-C: {e}"), "start the program in an ordinary shell")
    })?;
    Ok(stop)
}
