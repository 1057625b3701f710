//! Running other programs: with their output shown, captured, or watched line by line under a time limit.

use crate::error::{Error, Result};
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// How many of a program's last output lines go into an error.
const KEPT_LINES: usize = 20;

/// Runs a program whose output the user sees.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().map_err(|source| cannot_start(command, source))?;
    if status.success() { Ok(()) } else { Err(failed(command, status, "")) }
}

/// Runs a program quietly and returns its standard output; what it printed is part of the error if it fails.
pub(crate) fn capture(command: &mut Command) -> Result<String> {
    let Output { status, stdout, stderr } =
        command.stdin(Stdio::null()).output().map_err(|source| cannot_start(command, source))?;
    let stdout = String::from_utf8_lossy(&stdout).into_owned();
    if status.success() {
        Ok(stdout)
    } else {
        Err(failed(command, status, &format!("{stdout}{}", String::from_utf8_lossy(&stderr))))
    }
}

/// Whether a program starts and ends well; what it prints is dropped.
pub(crate) fn succeeds(command: &mut Command) -> bool {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// How a watched program ended.
pub(crate) struct Watched {
    /// Its exit status, or `None` when the time limit ended it.
    pub(crate) status: Option<ExitStatus>,
    /// Everything it wrote to standard error.
    pub(crate) stderr: String,
}

impl Watched {
    /// The last line of standard error that says something.
    pub(crate) fn last_words(&self) -> &str {
        self.stderr.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or("it printed no reason")
    }
}

/// Runs a program, hands each line of its standard output to `line` as it comes, and kills it when `limit` has passed.
pub(crate) fn watch(command: &mut Command, limit: Duration, mut line: impl FnMut(&str)) -> Result<Watched> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|source| cannot_start(command, source))?;
    let deadline = Instant::now() + limit;
    let (sender, lines) = mpsc::channel();
    let stdout = child.stdout.take().map(|pipe| {
        thread::spawn(move || {
            for line in BufReader::new(pipe).split(b'\n').map_while(std::io::Result::ok) {
                // The receiver is gone once the time limit has passed; the rest is only drained.
                sender.send(String::from_utf8_lossy(&line).into_owned()).ok();
            }
        })
    });
    let stderr = child.stderr.take().map(|mut pipe| {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            pipe.read_to_end(&mut bytes).ok();
            String::from_utf8_lossy(&bytes).into_owned()
        })
    });
    let in_time = loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(text) => line(&text),
            Err(RecvTimeoutError::Timeout) => break false,
            Err(RecvTimeoutError::Disconnected) => break true,
        }
    };
    let status = finish(&mut child, if in_time { deadline } else { Instant::now() })
        .map_err(|source| cannot_start(command, source))?;
    if let Some(reader) = stdout {
        reader.join().ok();
    }
    let stderr = stderr.and_then(|reader| reader.join().ok()).unwrap_or_default();
    Ok(Watched { status, stderr })
}

/// Waits for the end of a program until `deadline`, then kills it; `None` when it had to be killed.
fn finish(child: &mut Child, deadline: Instant) -> std::io::Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// The command as a user would type it.
pub(crate) fn spelled(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

fn cannot_start(command: &Command, source: std::io::Error) -> Error {
    let program = command.get_program().to_string_lossy().into_owned();
    let hint = match program.as_str() {
        "npm" => "install Node.js with npm (Debian: apt-get install npm)".to_owned(),
        "python3" => "install Python 3 with pip (Debian: apt-get install python3-pip)".to_owned(),
        "apt-get" | "dpkg" | "dpkg-query" => "this command needs Debian or a system derived from it".to_owned(),
        "cargo" | "rustup" => "install Rust with rustup".to_owned(),
        other => format!("is `{other}` installed?"),
    };
    Error::Start { program, source, hint }
}

fn failed(command: &Command, status: ExitStatus, output: &str) -> Error {
    let lines: Vec<_> = output.lines().collect();
    let output = lines[lines.len().saturating_sub(KEPT_LINES)..].join("\n");
    Error::Command { command: spelled(command), status: status.to_string(), output }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn watch_passes_lines_on_and_keeps_stderr() {
        let mut seen = Vec::new();
        let script = "echo one; echo two; echo reason >&2; exit 3";
        let end = watch(&mut shell(script), Duration::from_secs(10), |line| seen.push(line.to_owned())).unwrap();
        assert_eq!(seen, ["one", "two"]);
        assert_eq!(end.status.and_then(|status| status.code()), Some(3));
        assert_eq!(end.last_words(), "reason");
    }

    #[test]
    fn watch_ends_a_program_at_its_limit() {
        let begun = Instant::now();
        let end = watch(&mut shell("echo one; exec sleep 30"), Duration::from_millis(200), |_| ()).unwrap();
        assert!(end.status.is_none());
        assert!(begun.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_failure_shows_what_the_program_printed() {
        let message = capture(&mut shell("echo broken >&2; exit 1")).unwrap_err().to_string();
        assert!(message.contains("broken") && message.contains("exit status: 1"), "{message}");
    }

    #[test]
    fn a_missing_program_is_named() {
        let message = run(&mut Command::new("no-such-program-here")).unwrap_err().to_string();
        assert!(message.contains("no-such-program-here"), "{message}");
    }
}
