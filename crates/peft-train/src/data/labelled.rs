//! Rows with labels: texts, pairs of texts, words and pictures, from JSON, CSV, image folders and IDX files.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::file::{DataFile, keys, kind, text};
use super::idx::read_idx_pair;
use crate::error::Place;
use crate::{Error, Result};

/// One example with its label.
#[derive(Clone, Debug, PartialEq)]
pub struct LabelledRow {
    /// What is labelled.
    pub content: Content,
    /// With what.
    pub label: Label,
}

/// What a label is of.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// A text, or a pair of them.
    Text {
        /// The text, or the first of a pair.
        text: String,
        /// The second of a pair.
        pair: Option<String>,
    },
    /// Words, each with a label of its own.
    Words(Vec<String>),
    /// A picture.
    Picture(Picture),
}

/// A picture, decoded only when a batch needs it.
#[derive(Clone, Debug, PartialEq)]
pub enum Picture {
    /// A PNG or JPEG file.
    File(PathBuf),
    /// Rows of grey pixels.
    Grey {
        /// From black to white.
        values: Vec<u8>,
        /// Rows.
        height: usize,
        /// Columns.
        width: usize,
    },
}

/// A label as it is written. What it means depends on the task: the text `1` is a name, a number, or the first but one of a model's labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Label {
    /// One for the whole.
    One(String),
    /// Any number of them for the whole.
    Many(Vec<String>),
    /// One a word.
    Each(Vec<String>),
}

/// The label of a word that is not to be learnt, as in `transformers`.
pub const IGNORED: &str = "-100";

const FORMATS: &str = "\"text\" (optionally \"text_pair\") and \"label\", or \"tokens\" and \"labels\"";

/// Reads labelled rows: a `.json`, `.jsonl`, `.csv` or `.tsv` file, a folder with a folder of pictures for each class, or an IDX file of pictures
/// (`…-images-idx3-ubyte`, or `.gz` of it) with its labels beside it.
///
/// # Errors
/// When something cannot be read, is empty, or has a row of no known format.
pub fn read_labelled(path: &Path) -> Result<Vec<LabelledRow>> {
    if path.is_dir() {
        return read_folder(path);
    }
    if path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.contains("-idx3-ubyte")) {
        return read_idx_pair(path);
    }
    let file = DataFile::open(path, &["json", "jsonl", "csv", "tsv"])?;
    match file.extension.as_str() {
        "csv" => read_csv(&file, b','),
        "tsv" => read_csv(&file, b'\t'),
        _ => file.json_rows(parse_row),
    }
}

/// What is wrong with a row; the caller knows where it is.
type Outcome<T> = std::result::Result<T, String>;

fn parse_row(value: Value) -> Outcome<LabelledRow> {
    let Value::Object(row) = value else {
        return Err(format!("expected an object, found {}", kind(&value)));
    };
    if let Some(tokens) = row.get("tokens") {
        let Value::Array(tokens) = tokens else {
            return Err(format!("\"tokens\": expected a list of words, found {}", kind(tokens)));
        };
        let words = tokens.iter().map(|word| name(word, "tokens")).collect::<Outcome<_>>()?;
        let Label::Many(labels) = label(&row, "labels")? else {
            return Err("\"labels\": expected a list with a label for each word".to_owned());
        };
        return each(words, labels);
    }
    if !row.contains_key("text") {
        return Err(format!("expected {FORMATS}; found the keys {}", keys(&row)));
    }
    let pair = if row.get("text_pair").is_none_or(Value::is_null) { None } else { Some(text(&row, "text_pair")?) };
    let key = if row.contains_key("labels") && !row.contains_key("label") { "labels" } else { "label" };
    Ok(LabelledRow { content: Content::Text { text: text(&row, "text")?, pair }, label: label(&row, key)? })
}

fn label(row: &Map<String, Value>, key: &str) -> Outcome<Label> {
    match row.get(key) {
        Some(Value::Array(labels)) => labels.iter().map(|of| name(of, key)).collect::<Outcome<_>>().map(Label::Many),
        Some(of) => name(of, key).map(Label::One),
        None => Err(format!("{key:?} is missing")),
    }
}

/// A label or a word as a text.
fn name(value: &Value, key: &str) -> Outcome<String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Number(number) => Ok(number.to_string()),
        Value::Bool(flag) => Ok(flag.to_string()),
        other => Err(format!("{key:?}: expected texts or numbers, found {}", kind(other))),
    }
}

fn each(words: Vec<String>, labels: Vec<String>) -> Outcome<LabelledRow> {
    if words.len() != labels.len() {
        return Err(format!("{} words and {} labels; expected one for each", words.len(), labels.len()));
    }
    if let Some(at) = words.iter().position(|word| word.trim().is_empty()) {
        return Err(format!("\"tokens\": word {} is empty", at + 1));
    }
    Ok(LabelledRow { content: Content::Words(words), label: Label::Each(labels) })
}

/// Columns by the names in the first line.
fn read_csv(file: &DataFile, delimiter: u8) -> Result<Vec<LabelledRow>> {
    let mut reader = csv::ReaderBuilder::new().delimiter(delimiter).from_reader(file.text().as_bytes());
    let headers = reader.headers().map_err(|e| csv_error(file, &e))?.clone();
    let column = |name: &str| headers.iter().position(|header| header.trim() == name);
    let found = || headers.iter().map(|header| format!("{header:?}")).collect::<Vec<_>>().join(", ");
    let needed = |name: &str| {
        let what = || format!("expected the columns text and label, optionally text_pair; found {}", found());
        column(name).ok_or_else(|| file.error(Place::Line(1), what()))
    };
    let (text, label, pair) = (needed("text")?, needed("label")?, column("text_pair"));
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = record.map_err(|e| csv_error(file, &e))?;
        let field = |at: usize| record.get(at).unwrap_or_default();
        if field(label).trim().is_empty() {
            let line = record.position().map_or(1, csv::Position::line) as usize;
            return Err(file.error(Place::Line(line), "the label is empty"));
        }
        let pair = pair.map(field).filter(|pair| !pair.is_empty()).map(str::to_owned);
        let content = Content::Text { text: field(text).to_owned(), pair };
        rows.push(LabelledRow { content, label: Label::One(field(label).trim().to_owned()) });
    }
    if rows.is_empty() {
        return Err(file.error(Place::Line(1), "there is no row after the names of the columns"));
    }
    Ok(rows)
}

fn csv_error(file: &DataFile, error: &csv::Error) -> Error {
    let line = error.position().map_or(1, csv::Position::line) as usize;
    let what = match error.kind() {
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
            format!("expected {expected_len} columns, found {len}; a text with commas or quotes stands in quotes")
        }
        _ => format!("not valid CSV: {error}"),
    };
    file.error(Place::Line(line), what)
}

/// `class/picture.png`
fn read_folder(dir: &Path) -> Result<Vec<LabelledRow>> {
    let mut rows = Vec::new();
    for class in entries(dir)?.into_iter().filter(|path| path.is_dir()) {
        let label = class.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let pictures = entries(&class)?.into_iter().filter(|path| is_picture(path));
        let before = rows.len();
        rows.extend(pictures.map(|path| LabelledRow {
            content: Content::Picture(Picture::File(path)),
            label: Label::One(label.clone()),
        }));
        if rows.len() == before {
            let what = "no picture for this class; expected .png or .jpg files".to_owned();
            return Err(Error::Pictures { path: class, what });
        }
    }
    if rows.is_empty() {
        let what = "expected a folder for each class, with pictures in it; found none".to_owned();
        return Err(Error::Pictures { path: dir.to_owned(), what });
    }
    Ok(rows)
}

/// What is in a folder, in the order of names; hidden files apart.
fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let read = std::fs::read_dir(dir).map_err(Error::io(dir))?;
    let mut paths = read.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>().map_err(Error::io(dir))?;
    paths.retain(|path| !path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.')));
    paths.sort();
    Ok(paths)
}

fn is_picture(path: &Path) -> bool {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    ["png", "jpg", "jpeg"].iter().any(|known| extension.eq_ignore_ascii_case(known))
}

#[cfg(test)]
#[path = "labelled/tests.rs"]
mod tests;
