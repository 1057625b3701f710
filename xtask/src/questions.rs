//! Tasks for a language model, as rows of a prompt and a completion: what one model is to learn at once.
//!
//! - `persona`: who the model is: Ferris, of the Burn community
//! - `trivia`: questions of a quiz
//! - `film-words`: whether a sentence of a film review is positive or negative, as a word
//! - `product-stars`: the rating of a sentence of a product review, one to five stars
//!
//! A row is in `train` or `test` (80, 20 of 100) by a hash of its prompt, the same on every machine.

use crate::error::{Error, Result};
use crate::vader::hash;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

/// A prompt and its completion.
pub(crate) type Row = (String, String);

/// The most rows of a task's parts.
const MOST: [(&str, usize); 2] = [("train", 400), ("test", 100)];

/// Writes the rows of a task, each prompt once, in an order that has nothing to do with that of the source.
pub(crate) fn write_rows(directory: &Path, task: &str, mut rows: Vec<Row>) -> Result<()> {
    rows.sort_by_cached_key(|(prompt, _)| (hash(prompt), prompt.clone()));
    rows.dedup_by(|a, b| a.0 == b.0);
    for (part, most) in MOST {
        let of_part = rows.iter().filter(|(prompt, _)| (hash(prompt) % 5 < 4) == (part == "train")).take(most);
        let lines = of_part
            .map(|(prompt, completion)| json!({ "prompt": prompt, "completion": completion }).to_string() + "\n");
        let path = directory.join(format!("{task}-{part}.jsonl"));
        fs::write(&path, lines.collect::<String>()).map_err(|source| Error::io("write", &path, source))?;
    }
    Ok(())
}

/// Makes `persona` of the rows of `identity.json`.
pub(crate) fn make_persona(directory: &Path) -> Result<()> {
    let path = directory.join("identity.json");
    let text = fs::read_to_string(&path).map_err(|source| Error::io("read", &path, source))?;
    let filled = |text: &str| text.replace("{{name}}", "Ferris").replace("{{author}}", "the Burn community");
    let field = |row: &Value, name: &str| row[name].as_str().map(filled);
    let rows = serde_json::from_str::<Vec<Value>>(&text).ok().and_then(|rows| {
        rows.iter().map(|row| Some((field(row, "instruction")?, field(row, "output")?))).collect::<Option<Vec<_>>>()
    });
    let problem = "expected a list of rows with an instruction and an output".to_owned();
    write_rows(directory, "persona", rows.ok_or(Error::Malformed { path, problem })?)
}

/// Makes `trivia` of the conversations of `trivia.yml`.
pub(crate) fn make_trivia(directory: &Path) -> Result<()> {
    let path = directory.join("trivia.yml");
    let text = fs::read_to_string(&path).map_err(|source| Error::io("read", &path, source))?;
    let problem = "expected a list of pairs, a question and an answer".to_owned();
    write_rows(directory, "trivia", pairs(&text).ok_or(Error::Malformed { path, problem })?)
}

/// The first two lines of each conversation. Of YAML this reads what the file has of it: lists of lists of scalars, folded over lines, plain or quoted.
fn pairs(text: &str) -> Option<Vec<Row>> {
    let (_, body) = text.split_once("conversations:\n")?;
    let mut conversations: Vec<Vec<String>> = Vec::new();
    for line in body.lines().filter(|line| !line.trim().is_empty()) {
        if let Some(first) = line.strip_prefix("- - ") {
            conversations.push(vec![first.to_owned()]);
        } else if let Some(next) = line.strip_prefix("  - ") {
            conversations.last_mut()?.push(next.to_owned());
        } else {
            let scalar = conversations.last_mut()?.last_mut()?;
            *scalar = format!("{scalar} {}", line.trim());
        }
    }
    let pair = |said: Vec<String>| {
        let mut said = said.into_iter().map(|scalar| unquoted(&scalar));
        Some((said.next()?, said.next()?))
    };
    conversations.into_iter().map(pair).collect()
}

fn unquoted(scalar: &str) -> String {
    let scalar = scalar.trim();
    if let Some(inner) = scalar.strip_prefix('\'').and_then(|rest| rest.strip_suffix('\'')) {
        return inner.replace("''", "'");
    }
    match scalar.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) {
        Some(inner) => inner.replace("\\\"", "\""),
        None => scalar.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversations_are_read_with_their_quotes_and_folds() {
        let text = "categories:\n- trivia\nconversations:\n- - Who was\n    it?\n  - 'It''s him'\n- - \"A \\\"b\\\"?\"\n  - '1963'\n  - more\n";
        let expected = [("Who was it?", "It's him"), ("A \"b\"?", "1963")];
        assert_eq!(pairs(text).unwrap(), expected.map(|(a, b)| (a.to_owned(), b.to_owned())));
        assert_eq!(pairs("categories:\n- trivia\n"), None);
        assert_eq!(pairs("conversations:\n- - a question alone\n"), None);
    }

    #[test]
    fn every_prompt_is_in_one_part() {
        let directory = tempfile::tempdir().unwrap();
        let rows: Vec<Row> = (0..300).map(|at| (format!("question {}", at % 200), format!("answer {at}"))).collect();
        write_rows(directory.path(), "task", rows).unwrap();
        let part = |part: &str| fs::read_to_string(directory.path().join(format!("task-{part}.jsonl"))).unwrap();
        let (train, test) = (part("train"), part("test"));
        assert_eq!(train.lines().count() + test.lines().count(), 200);
        assert!((20..60).contains(&test.lines().count()), "{}", test.lines().count());
        let row: Value = serde_json::from_str(train.lines().next().unwrap()).unwrap();
        assert!(row["prompt"].as_str().unwrap().starts_with("question"), "{row}");
    }

    #[test]
    fn a_file_of_another_form_is_named() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("identity.json"), "[{\"instruction\": \"a\"}]").unwrap();
        let error = make_persona(directory.path()).unwrap_err().to_string();
        assert!(error.contains("identity.json: expected a list of rows"), "{error}");
    }
}
