//! What an encoder's adapter is for. PEFT's files say the kind of task and hold the head, but name no labels; so `task.json` lies beside them, in the words
//! of `config.json`. Without it, as PEFT writes adapters, the head's shape and the base's labels decide.

use std::path::Path;

use peft_core::files::{CONFIG_FILE, tensors_of};
use peft_models::config::{EncoderConfig, InputConfig};
use peft_models::heads::Task;
use serde_json::{Value, json};

use crate::{Error, Result};

/// The file's name.
pub const TASK_FILE: &str = "task.json";

/// `task_type` of PEFT's files; it has none for pictures.
pub(crate) fn task_type(config: &EncoderConfig) -> Option<&'static str> {
    match (&config.task, &config.input) {
        (_, InputConfig::Image { .. }) => None,
        (Task::Embedding, _) => Some(FEATURE_EXTRACTION),
        (Task::Classification { .. }, _) => Some(SEQ_CLS),
        (Task::Tokens { .. }, _) => Some(TOKEN_CLS),
        (Task::Span, _) => Some(QUESTION_ANS),
    }
}

const FEATURE_EXTRACTION: &str = "FEATURE_EXTRACTION";
const SEQ_CLS: &str = "SEQ_CLS";
const TOKEN_CLS: &str = "TOKEN_CLS";
const QUESTION_ANS: &str = "QUESTION_ANS";

/// What [`TASK_FILE`] says of the task of a model.
pub(crate) fn describe(config: &EncoderConfig) -> Value {
    let mut json = json!({});
    config.describe_task(&mut json);
    json
}

/// The task of the adapter in `dir` on a model of that configuration.
///
/// # Errors
/// When a file cannot be read or says nothing that makes sense.
pub fn task_of_adapter(dir: &Path, config: &EncoderConfig) -> Result<Task> {
    let path = dir.join(TASK_FILE);
    if path.is_file() {
        return Ok(Task::from_json(&read_json(&path)?, &path)?);
    }
    let adapter = read_json(&dir.join(CONFIG_FILE))?;
    let tensors = tensors_of(dir)?;
    let is_head = |key: &&String| HEADS.iter().any(|head| key.ends_with(head));
    let outputs = tensors.keys().find(is_head).and_then(|key| tensors[key].shape.first().copied());
    let labels = |count: usize| (0..count).map(|at| format!("LABEL_{at}")).collect::<Vec<_>>();
    let task = match (adapter.get("task_type").and_then(Value::as_str), outputs) {
        (Some(FEATURE_EXTRACTION), _) => Task::Embedding,
        (Some(QUESTION_ANS), _) => Task::Span,
        (Some(TOKEN_CLS), Some(count)) => Task::Tokens { labels: labels(count) },
        (_, Some(count)) => Task::classification(labels(count)),
        (_, None) => config.task.clone(),
    };
    let same = std::mem::discriminant(&task) == std::mem::discriminant(&config.task);
    // The base may know what the labels are called.
    Ok(if same && task.outputs() == config.task.outputs() { config.task.clone() } else { task })
}

/// How the keys of a head's last layer end.
const HEADS: [&str; 3] = [".classifier.weight", ".classifier.out_proj.weight", ".score.weight"];

fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    serde_json::from_str(&text).map_err(|e| peft_core::Error::format(path, format!("not JSON: {e}")).into())
}
