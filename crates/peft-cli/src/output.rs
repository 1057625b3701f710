//! What goes to standard output: lines for people, or one JSON object for scripts.

use std::fmt::Display;
use std::io::{self, Write};
use std::path::Path;

use peft_train::Evaluation;
use serde::Serialize;

use crate::{Error, Result};

/// Who reads the output.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// A script does.
    pub json: bool,
}

impl Output {
    /// Prints a line, unless a script reads.
    ///
    /// # Errors
    /// When standard output is closed.
    pub fn line(self, text: impl Display) -> Result<()> {
        if self.json { Ok(()) } else { self.text(format_args!("{text}\n")) }
    }

    /// Prints a line that begins with a short title, unless a script reads.
    ///
    /// # Errors
    /// When standard output is closed.
    pub fn field(self, title: &str, text: impl Display) -> Result<()> {
        self.line(format_args!("{title:<9} {text}"))
    }

    /// Prints at once and without a line's end, unless a script reads.
    ///
    /// # Errors
    /// When standard output is closed.
    pub fn text(self, text: impl Display) -> Result<()> {
        if self.json {
            return Ok(());
        }
        let mut out = io::stdout().lock();
        write!(out, "{text}").and_then(|()| out.flush()).map_err(Error::io("standard output"))
    }

    /// Prints a JSON object on one line, if a script reads.
    ///
    /// # Errors
    /// When standard output is closed.
    pub fn json(self, value: &impl Serialize) -> Result<()> {
        if self.json { print_json(value) } else { Ok(()) }
    }
}

/// Prints a JSON object on one line.
///
/// # Errors
/// When standard output is closed.
pub fn print_json(value: &impl Serialize) -> Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, value)
        .map_err(io::Error::from)
        .and_then(|()| writeln!(out))
        .map_err(Error::io("standard output"))
}

/// A number with its thousands apart: `134,515,008`.
pub fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().filter_map(|group| std::str::from_utf8(group).ok()).collect();
    groups.join(",")
}

/// A number of bytes: `12.3 MiB`.
pub fn bytes(count: u64) -> String {
    let mut value = count as f64;
    for unit in ["B", "KiB", "MiB"] {
        if value < 1024.0 {
            return if unit == "B" { format!("{count} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.2} GiB")
}

/// What training changed.
pub fn before_after(before: &Evaluation, after: &Evaluation) -> String {
    let changes = before.readable().zip(after.readable());
    let changes = changes.map(|((name, before), (_, after))| format!("{name} {before} -> {after}"));
    changes.collect::<Vec<_>>().join(", ")
}

/// Columns of equal width, two blanks apart.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        cells.join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// A word as a shell reads it.
pub fn quoted(word: impl AsRef<Path>) -> String {
    let word = word.as_ref().display().to_string();
    let plain = |c: char| c.is_alphanumeric() || "-_./:=,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) { word } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(
            ["0", "999", "1,000", "134,515,008"],
            [0, 999, 1000, 134_515_008].map(thousands).each_ref().map(String::as_str)
        );
        assert_eq!(["0 B", "1.5 KiB", "3.00 GiB"], [0, 1536, 3 << 30].map(bytes).each_ref().map(String::as_str));
    }

    #[test]
    fn words_are_quoted_only_where_a_shell_needs_it() {
        assert_eq!(quoted("out/a-1.gguf"), "out/a-1.gguf");
        assert_eq!(quoted("my model's"), r"'my model'\''s'");
    }

    #[test]
    fn columns_line_up() {
        let row = |cells: [&str; 2]| cells.map(str::to_owned).to_vec();
        assert_eq!(table(&[row(["a", "bb"]), row(["ccc", ""])]), "a    bb\nccc");
    }
}
