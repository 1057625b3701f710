//! Reading a data file into rows. The format is decided row by row, by its keys.

use std::path::Path;

use peft_models::chat::Message;
use serde_json::{Map, Value};

use super::file::{DataFile, keys, kind, text};
use crate::Result;

/// One example of a data file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Row {
    /// Text to continue: every token is learnt.
    Text {
        /// The text.
        text: String,
    },
    /// A prompt and what follows it verbatim: only the completion is learnt.
    Completion {
        /// What the model is given.
        prompt: String,
        /// What the model should continue with.
        completion: String,
    },
    /// The Alpaca format: only the output is learnt.
    Instruction {
        /// The task.
        instruction: String,
        /// What the task is about; may be empty.
        input: String,
        /// The answer.
        output: String,
    },
    /// A conversation: only the assistant's turns are learnt.
    Chat {
        /// Its turns.
        messages: Vec<Message>,
    },
}

/// The keys of each format, for messages.
const FORMATS: &str = "\"messages\" (role, content), \"conversations\" (from, value), \"instruction\" and \"output\" \
                       (optionally \"input\"), \"prompt\" and \"completion\", or \"text\"";

/// Reads `.json` (one array of rows, or a row per line), `.jsonl` (a row per line) or `.txt` (one text). Keys that a
/// format does not know are ignored.
///
/// # Errors
/// When the file cannot be read, is empty, is not UTF-8 or JSON, or has a row of no known format.
pub fn read_rows(path: &Path) -> Result<Vec<Row>> {
    let file = DataFile::open(path, &["json", "jsonl", "txt"])?;
    if file.extension == "txt" {
        return Ok(vec![Row::Text { text: file.text().to_owned() }]);
    }
    file.json_rows(parse_row)
}

/// Replaces `{{key}}` by its value in every text of every row, as data sets with a placeholder for the model's name
/// want. Returns how many were replaced.
pub fn substitute(rows: &mut [Row], values: &[(&str, &str)]) -> usize {
    let mut count = 0;
    let mut replace = |text: &mut String| {
        for (key, value) in values {
            let placeholder = format!("{{{{{key}}}}}");
            let found = text.matches(&placeholder).count();
            if found > 0 {
                *text = text.replace(&placeholder, value);
                count += found;
            }
        }
    };
    for row in rows {
        match row {
            Row::Text { text } => replace(text),
            Row::Completion { prompt, completion } => [prompt, completion].into_iter().for_each(&mut replace),
            Row::Instruction { instruction, input, output } => {
                [instruction, input, output].into_iter().for_each(&mut replace);
            }
            Row::Chat { messages } => messages.iter_mut().for_each(|message| replace(&mut message.content)),
        }
    }
    count
}

fn parse_row(value: Value) -> std::result::Result<Row, String> {
    let Value::Object(row) = value else {
        return Err(format!("expected an object, found {}", kind(&value)));
    };
    if row.contains_key("messages") {
        chat(&row, "messages", "role", "content")
    } else if row.contains_key("conversations") {
        chat(&row, "conversations", "from", "value")
    } else if row.contains_key("instruction") && row.contains_key("output") {
        let input = if row.get("input").is_none_or(Value::is_null) { String::new() } else { text(&row, "input")? };
        Ok(Row::Instruction { instruction: text(&row, "instruction")?, input, output: text(&row, "output")? })
    } else if row.contains_key("prompt") && row.contains_key("completion") {
        Ok(Row::Completion { prompt: text(&row, "prompt")?, completion: text(&row, "completion")? })
    } else if row.contains_key("text") {
        Ok(Row::Text { text: text(&row, "text")? })
    } else {
        Err(format!("expected {FORMATS}; found the keys {}", keys(&row)))
    }
}

/// A conversation under `list`, with the speaker under `role` and the text under `content`.
fn chat(row: &Map<String, Value>, list: &str, role: &str, content: &str) -> std::result::Result<Row, String> {
    let turns = row[list].as_array().filter(|turns| !turns.is_empty());
    let turns = turns.ok_or_else(|| format!("{list:?}: expected a list of turns, found {}", kind(&row[list])))?;
    let mut messages = Vec::with_capacity(turns.len() + 1);
    if list == "conversations"
        && let Some(system) = row.get("system").and_then(Value::as_str).filter(|system| !system.is_empty())
    {
        messages.push(Message::system(system));
    }
    for (index, turn) in turns.iter().enumerate() {
        let place = |what: String| format!("{list:?}, turn {}: {what}", index + 1);
        let turn = turn.as_object().ok_or_else(|| place(format!("expected an object, found {}", kind(turn))))?;
        let speaker = text(turn, role).map_err(place)?;
        let speaker = match speaker.as_str() {
            "human" => "user".to_owned(),
            "gpt" | "function_call" => "assistant".to_owned(),
            "observation" => "tool".to_owned(),
            _ => speaker,
        };
        let parts = turn.get(content).and_then(Value::as_array);
        let said =
            parts.map_or_else(|| text(turn, content), |parts| parts.iter().map(part).collect()).map_err(place)?;
        messages.push(Message::new(speaker, said));
    }
    Ok(Row::Chat { messages })
}

/// The text of one part of a turn whose content is a list.
fn part(part: &Value) -> std::result::Result<String, String> {
    let text = part.get("text").or_else(|| part.get("value")).and_then(Value::as_str);
    match (part.get("type").and_then(Value::as_str), text) {
        (Some("text"), Some(text)) => Ok(text.to_owned()),
        (found, _) => {
            Err(format!("a part of type {:?}; expected only parts of type \"text\"", found.unwrap_or("none")))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::Error;

    fn read(name: &str, content: impl AsRef<[u8]>) -> Result<Vec<Row>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        fs::write(&path, content).unwrap();
        read_rows(&path)
    }

    fn refused(name: &str, content: impl AsRef<[u8]>) -> String {
        read(name, content).unwrap_err().to_string()
    }

    #[test]
    fn each_format_is_known_by_its_keys() {
        let rows = read(
            "rows.json",
            r#"[
            {"text": "a", "extra": [1]},
            {"prompt": "p", "completion": "c"},
            {"instruction": "i", "output": "o", "input": null, "text": "i o"},
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": [{"type": "text", "value": "x"}, {"type": "text", "text": "y"}]}]},
            {"system": "s", "conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}
        ]"#,
        )
        .unwrap();
        let expected = [
            Row::Text { text: "a".into() },
            Row::Completion { prompt: "p".into(), completion: "c".into() },
            Row::Instruction { instruction: "i".into(), input: String::new(), output: "o".into() },
            Row::Chat { messages: vec![Message::user("u"), Message::assistant("xy")] },
            Row::Chat { messages: vec![Message::system("s"), Message::user("u"), Message::assistant("a")] },
        ];
        assert_eq!(rows, expected);
    }

    #[test]
    fn lines_may_be_blank_and_end_in_any_way() {
        let rows = read("rows.jsonl", "\u{feff}{\"text\": \"a\"}\r\n\r\n{\"text\": \"b\"}").unwrap();
        assert_eq!(rows, [Row::Text { text: "a".into() }, Row::Text { text: "b".into() }]);
        assert_eq!(read("lines.json", "{\"text\": \"a\"}\n{\"text\": \"b\"}\n").unwrap().len(), 2);
        assert_eq!(read("book.TXT", "one\n\ntwo\n").unwrap(), [Row::Text { text: "one\n\ntwo\n".into() }]);
    }

    #[test]
    fn errors_name_file_place_expected_and_found() {
        let error = refused("rows.jsonl", "{\"text\": \"a\"}\n{\"question\": 1, \"answer\": 2}\n");
        assert!(error.contains("rows.jsonl, line 2: expected \"messages\""), "{error}");
        assert!(error.ends_with("found the keys \"question\", \"answer\""), "{error}");
        let error = refused("rows.json", "[{\"text\": \"a\"}, {\"text\": 3}]");
        assert!(error.ends_with("rows.json, row 2: \"text\": expected a string, found a number"), "{error}");
        let error = refused("rows.json", "[{\"text\": \"a\"},\n {\"text\": ]");
        assert!(error.contains("rows.json, line 2, column 11: not valid JSON: expected value"), "{error}");
        let error = refused("rows.jsonl", "{\"text\": \"a\"}\n{\"text\" 3}\n");
        assert!(error.contains("line 2, column 9: not valid JSON: expected `:`; expected one JSON object"), "{error}");
        let error = refused("rows.txt", b"good\nba\xffd");
        assert!(error.ends_with("line 2, column 3: this byte is not UTF-8; convert the file to UTF-8"), "{error}");
        let error = refused("rows.json", r#"[{"messages": [{"role": "user", "content": null}]}]"#);
        assert!(error.ends_with("\"messages\", turn 1: \"content\": expected a string, found null"), "{error}");
        let error = refused("rows.json", r#"[{"messages": []}]"#);
        assert!(error.ends_with("\"messages\": expected a list of turns, found an empty list"), "{error}");
        let error = refused("rows.json", r#"[{"messages": [{"role": "user", "content": [{"type": "image"}]}]}]"#);
        assert!(error.contains("a part of type \"image\""), "{error}");
        for (name, content) in [("a.json", ""), ("a.jsonl", " \n"), ("a.txt", "\n"), ("a.json", "[]")] {
            assert!(refused(name, content).contains("is empty"), "{name}");
        }
        assert!(refused("a.csv", "a,b").contains("expected .json, .jsonl or .txt"));
        assert!(matches!(read_rows(Path::new("no-such-file.json")), Err(Error::Io { .. })));
    }

    #[test]
    fn placeholders_are_replaced_everywhere() {
        let mut rows = vec![
            Row::Instruction {
                instruction: "{{name}}?".into(),
                input: String::new(),
                output: "{{name}} by {{author}}".into(),
            },
            Row::Chat { messages: vec![Message::assistant("I am {{name}}, not {{other}}.")] },
        ];
        assert_eq!(substitute(&mut rows, &[("name", "Pip"), ("author", "us")]), 4);
        assert_eq!(
            rows,
            [
                Row::Instruction { instruction: "Pip?".into(), input: String::new(), output: "Pip by us".into() },
                Row::Chat { messages: vec![Message::assistant("I am Pip, not {{other}}.")] },
            ]
        );
    }
}
