//! From the labels of a file to a task, and from a label to what a model learns.

use std::collections::BTreeSet;

use peft_models::heads::{Problem, Task};
use serde::{Deserialize, Serialize};

use super::labelled::{Content, IGNORED, Label, LabelledRow};
use crate::{Error, Result};

/// What a model does with rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TaskKind {
    /// One of several labels, or any number of them.
    Classify,
    /// A number.
    Regress,
    /// A label for each word.
    Tokens,
}

/// What a model of numbers calls the one that it gives.
const SCORE: &str = "score";

/// What is learnt from a row.
#[derive(Clone, Debug, PartialEq)]
pub enum Target {
    /// The number of the label.
    Class(usize),
    /// The number itself; or 1 for each label that holds, and 0 for the others.
    Values(Vec<f32>),
    /// The number of each token's label; nothing where none is learnt.
    Each(Vec<Option<usize>>),
}

/// The task that `rows` describe, with the labels that occur in them: numbers in their order, others in the order of their letters.
///
/// Without a `kind`, a list of labels a word means tokens, numbers of which one is written with a decimal point mean a regression, and all else classes.
///
/// # Errors
/// [`Error::Row`] for a row of another kind than the first; [`Error::Labels`] where there is nothing to tell apart.
pub fn task_of(rows: &[LabelledRow], kind: Option<TaskKind>) -> Result<Task> {
    let first = rows.first().ok_or_else(|| Error::setting("rows", "there are none"))?;
    if let Some(row) = rows.iter().position(|row| !alike(row, first)) {
        let what = format!("{}, where the first row is {}", described(&rows[row]), described(first));
        return Err(Error::Row { row: row + 1, what });
    }
    let found = match &first.label {
        Label::Each(_) => TaskKind::Tokens,
        Label::One(_) if is_numeric(rows) => TaskKind::Regress,
        Label::One(_) | Label::Many(_) => TaskKind::Classify,
    };
    let problem = if matches!(first.label, Label::Many(_)) { Problem::MultiLabel } else { Problem::SingleLabel };
    match (kind.unwrap_or(found), found) {
        (TaskKind::Tokens, TaskKind::Tokens) => Ok(Task::Tokens { labels: distinct(rows)? }),
        (TaskKind::Regress, TaskKind::Regress | TaskKind::Classify) if problem == Problem::SingleLabel => {
            Ok(Task::Classification { labels: vec![SCORE.to_owned()], problem: Problem::Regression })
        }
        (TaskKind::Classify, TaskKind::Regress | TaskKind::Classify) => {
            Ok(Task::Classification { labels: distinct(rows)?, problem })
        }
        (wanted, _) => {
            let wanted = match wanted {
                TaskKind::Classify => "one label or a list of labels",
                TaskKind::Regress => "a number",
                TaskKind::Tokens => "a label for each word",
            };
            Err(Error::Labels {
                what: format!("expected {wanted} for each row; the first row is {}", described(first)),
            })
        }
    }
}

fn alike(a: &LabelledRow, b: &LabelledRow) -> bool {
    std::mem::discriminant(&a.content) == std::mem::discriminant(&b.content)
        && std::mem::discriminant(&a.label) == std::mem::discriminant(&b.label)
}

fn described(row: &LabelledRow) -> String {
    let content = match row.content {
        Content::Text { pair: None, .. } => "a text",
        Content::Text { pair: Some(_), .. } => "a pair of texts",
        Content::Words(_) => "a list of words",
        Content::Picture(_) => "a picture",
    };
    let label = match row.label {
        Label::One(_) => "one label",
        Label::Many(_) => "a list of labels",
        Label::Each(_) => "a label for each word",
    };
    format!("{content} with {label}")
}

fn names(row: &LabelledRow) -> &[String] {
    match &row.label {
        Label::One(name) => std::slice::from_ref(name),
        Label::Many(names) | Label::Each(names) => names,
    }
}

/// Whether all labels are numbers, and not all of them whole.
fn is_numeric(rows: &[LabelledRow]) -> bool {
    let mut names = rows.iter().flat_map(names);
    names.clone().all(|name| number(name).is_some()) && names.any(|name| name.parse::<i64>().is_err())
}

fn number(name: &str) -> Option<f32> {
    name.trim().parse().ok().filter(|number: &f32| number.is_finite())
}

fn distinct(rows: &[LabelledRow]) -> Result<Vec<String>> {
    let names: BTreeSet<&String> = rows.iter().flat_map(names).filter(|name| *name != IGNORED).collect();
    let mut labels: Vec<String> = names.into_iter().cloned().collect();
    if labels.iter().all(|label| label.parse::<i64>().is_ok()) {
        labels.sort_by_key(|label| label.parse::<i64>().unwrap_or_default());
    }
    let several = matches!(rows.first().map(|row| &row.label), Some(Label::Many(_)));
    match &labels[..] {
        [] => Err(Error::Labels { what: "no row has one".to_owned() }),
        [only] if !several => {
            Err(Error::Labels { what: format!("every row has {only:?}; expected two different ones at least") })
        }
        _ => Ok(labels),
    }
}

/// The number of the label of that name; or, where names are no numbers, of that number.
fn index(labels: &[String], name: &str) -> std::result::Result<usize, String> {
    if let Some(found) = labels.iter().position(|label| label == name) {
        return Ok(found);
    }
    let by_number = name.parse::<usize>().ok().filter(|at| *at < labels.len());
    by_number.filter(|_| labels.iter().all(|label| label.parse::<i64>().is_err())).ok_or_else(|| {
        const SHOWN: usize = 12;
        let more = if labels.len() > SHOWN { format!(" and {} more", labels.len() - SHOWN) } else { String::new() };
        let known = labels.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
        format!("the label {name:?} is none of {known}{more}")
    })
}

/// What `label` means for `task`; `words` is the word of each token, where tokens are labelled.
///
/// The label of a word is that of its first token; the others are not learnt.
pub(super) fn target(label: &Label, task: &Task, words: &[Option<usize>]) -> std::result::Result<Target, String> {
    match (task, label) {
        (Task::Classification { problem: Problem::Regression, .. }, Label::One(name)) => {
            let value = number(name).ok_or_else(|| format!("the label {name:?} is no number"))?;
            Ok(Target::Values(vec![value]))
        }
        (Task::Classification { problem: Problem::SingleLabel, labels }, Label::One(name)) => {
            index(labels, name).map(Target::Class)
        }
        (Task::Classification { problem: Problem::MultiLabel, labels }, Label::Many(names)) => {
            let mut values = vec![0.0; labels.len()];
            for name in names {
                values[index(labels, name)?] = 1.0;
            }
            Ok(Target::Values(values))
        }
        (Task::Tokens { labels }, Label::Each(names)) => {
            let mut of = vec![None; words.len()];
            for (at, word) in words.iter().enumerate() {
                let first = at == 0 || words[at - 1] != *word;
                if let Some(name) = word.filter(|_| first).and_then(|word| names.get(word)).filter(|n| *n != IGNORED) {
                    of[at] = Some(index(labels, name)?);
                }
            }
            Ok(Target::Each(of))
        }
        _ => Err(format!("its label {label:?} is not what the model's task has: {}", task_name(task))),
    }
}

fn task_name(task: &Task) -> &'static str {
    match task {
        Task::Classification { problem: Problem::SingleLabel, .. } => "one label a row",
        Task::Classification { problem: Problem::MultiLabel, .. } => "a list of labels a row",
        Task::Classification { problem: Problem::Regression, .. } => "a number a row",
        Task::Tokens { .. } => "a label a word",
        Task::Embedding | Task::Span => "no labels",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(label: Label) -> LabelledRow {
        let content = match label {
            Label::Each(_) => Content::Words(vec!["a".to_owned()]),
            _ => Content::Text { text: "a".to_owned(), pair: None },
        };
        LabelledRow { content, label }
    }

    fn ones(names: &[&str]) -> Vec<LabelledRow> {
        names.iter().map(|name| row(Label::One((*name).to_owned()))).collect()
    }

    fn list(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn labels_say_what_the_task_is() {
        let labels = |names: &[&str]| task_of(&ones(names), None).unwrap();
        assert_eq!(labels(&["b", "a", "b"]), Task::classification(["a", "b"]));
        assert_eq!(labels(&["10", "9", "-1"]), Task::classification(["-1", "9", "10"]));
        let score = Task::Classification { labels: list(&["score"]), problem: Problem::Regression };
        assert_eq!(labels(&["1", "0.5"]), score);
        assert_eq!(task_of(&ones(&["1", "2"]), Some(TaskKind::Regress)).unwrap(), score);
        assert_eq!(
            task_of(&ones(&["1.5", "0.5"]), Some(TaskKind::Classify)).unwrap(),
            Task::classification(["0.5", "1.5"])
        );
        let many = [row(Label::Many(list(&["b", "a"]))), row(Label::Many(Vec::new()))];
        let expected = Task::Classification { labels: list(&["a", "b"]), problem: Problem::MultiLabel };
        assert_eq!(task_of(&many, None).unwrap(), expected);
        let tokens = [row(Label::Each(list(&["O"]))), row(Label::Each(list(&["-100", "B"])))];
        assert_eq!(task_of(&tokens, None).unwrap(), Task::Tokens { labels: list(&["B", "O"]) });
    }

    #[test]
    fn labels_that_make_no_task_are_refused() {
        let refused = |rows: &[LabelledRow], kind| task_of(rows, kind).unwrap_err().to_string();
        assert_eq!(
            refused(&ones(&["a", "a"]), None),
            "labels: every row has \"a\"; expected two different ones at least"
        );
        let mixed = [ones(&["a"]), vec![row(Label::Many(list(&["a"])))]].concat();
        let expected = "row 2: a text with a list of labels, where the first row is a text with one label";
        assert_eq!(refused(&mixed, None), expected);
        let wanted = refused(&ones(&["a", "b"]), Some(TaskKind::Tokens));
        assert_eq!(
            wanted,
            "labels: expected a label for each word for each row; the first row is a text with one label"
        );
    }

    #[test]
    fn a_label_is_a_name_or_a_number() {
        let labels = list(&["negative", "positive"]);
        assert_eq!((index(&labels, "positive"), index(&labels, "1")), (Ok(1), Ok(1)));
        assert_eq!(index(&labels, "2").unwrap_err(), "the label \"2\" is none of negative, positive");
        assert!(index(&list(&["1", "2"]), "0").is_err(), "these names are numbers themselves");
    }

    #[test]
    fn the_first_token_of_a_word_has_its_label() {
        let task = Task::Tokens { labels: list(&["B", "O"]) };
        let words = [None, Some(0), Some(0), Some(1), Some(2), None];
        let found = target(&Label::Each(list(&["B", "-100", "O"])), &task, &words);
        assert_eq!(found, Ok(Target::Each(vec![None, Some(0), None, None, Some(1), None])));
        let error = target(&Label::Each(list(&["X", "O", "O"])), &task, &words).unwrap_err();
        assert!(error.contains("\"X\" is none of B, O"), "{error}");
    }
}
