//! Text files of rows: one JSON array, or one JSON object a line; and where in them something is wrong.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::Place;
use crate::{Error, Result};

/// A data file in memory.
pub(super) struct DataFile {
    path: PathBuf,
    /// How its name ends, in small letters.
    pub extension: String,
    text: String,
}

impl DataFile {
    /// Reads a file whose name must end in one of `extensions`; the last is named after an `or`.
    pub(super) fn open(path: &Path, extensions: &[&str]) -> Result<Self> {
        let error = |place, what: String| Error::Data { path: path.to_owned(), place, what };
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
        if !extensions.contains(&extension.as_str()) {
            let known = extensions.iter().map(|e| format!(".{e}")).collect::<Vec<_>>();
            let (last, first) = known.split_last().map_or(("", Vec::new()), |(l, f)| (l.as_str(), f.to_vec()));
            let what = format!("the name ends in {extension:?}; expected {} or {last}", first.join(", "));
            return Err(error(Place::Line(1), what));
        }
        let bytes = fs::read(path).map_err(Error::io(path))?;
        let text = String::from_utf8(bytes).map_err(|e| {
            let before = &e.as_bytes()[..e.utf8_error().valid_up_to()];
            let line = before.iter().filter(|&&b| b == b'\n').count() + 1;
            let column = before.iter().rev().take_while(|&&b| b != b'\n').count() + 1;
            error(Place::Column(line, column), "this byte is not UTF-8; convert the file to UTF-8".into())
        })?;
        let file = Self { path: path.to_owned(), extension, text };
        if file.text().trim().is_empty() {
            return Err(error(Place::Line(1), "the file is empty; expected at least one row".into()));
        }
        Ok(file)
    }

    pub(super) fn text(&self) -> &str {
        self.text.strip_prefix('\u{feff}').unwrap_or(&self.text)
    }

    pub(super) fn error(&self, place: Place, what: impl Into<String>) -> Error {
        Error::Data { path: self.path.clone(), place, what: what.into() }
    }

    /// The rows of a `.json` or `.jsonl` file, as `parse` reads each; it says what is wrong, and the error says where.
    pub(super) fn json_rows<R>(&self, parse: impl Fn(Value) -> std::result::Result<R, String>) -> Result<Vec<R>> {
        let text = self.text();
        let rows: Vec<R> = if self.extension == "json" && text.trim_start().starts_with('[') {
            let values: Vec<Value> = serde_json::from_str(text)
                .map_err(|e| self.error(Place::Column(e.line(), e.column()), json_error(&e)))?;
            let row = |(index, value)| parse(value).map_err(|what| self.error(Place::Row(index + 1), what));
            values.into_iter().enumerate().map(row).collect::<Result<_>>()?
        } else {
            let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
            let row = |(index, line): (usize, &str)| {
                let value = serde_json::from_str(line).map_err(|e| {
                    let what = format!(
                        "{}; expected one JSON object per line, or a .json file with one array",
                        json_error(&e)
                    );
                    self.error(Place::Column(index + 1, e.column()), what)
                })?;
                parse(value).map_err(|what| self.error(Place::Line(index + 1), what))
            };
            lines.map(row).collect::<Result<_>>()?
        };
        if rows.is_empty() {
            Err(self.error(Place::Line(1), "the array is empty; expected at least one row"))
        } else {
            Ok(rows)
        }
    }
}

/// The message of a JSON error without its place, which is reported apart.
fn json_error(error: &serde_json::Error) -> String {
    let message = error.to_string();
    let message = message.split(" at line ").next().unwrap_or(&message);
    format!("not valid JSON: {message}")
}

/// The text under `key`.
pub(super) fn text(row: &Map<String, Value>, key: &str) -> std::result::Result<String, String> {
    match row.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => Err(format!("{key:?}: expected a string, found {}", kind(other))),
        None => Err(format!("{key:?} is missing")),
    }
}

/// The keys of a row, for messages.
pub(super) fn keys(row: &Map<String, Value>) -> String {
    row.keys().take(12).map(|key| format!("{key:?}")).collect::<Vec<_>>().join(", ")
}

/// What a value is, for messages.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(items) if items.is_empty() => "an empty list",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
