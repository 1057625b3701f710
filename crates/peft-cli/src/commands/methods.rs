//! `peft methods`: the table of methods.

use serde_json::json;

use crate::methods::METHODS;
use crate::output::table;
use crate::{Context, Result};

/// Runs the command.
///
/// # Errors
/// When standard output is closed.
pub fn run(context: &Context) -> Result<()> {
    let header = ["method", "peft_type", "adapted layer", "parameters a layer", "--lr", ""].map(str::to_owned).to_vec();
    let row = |entry: &crate::methods::Entry| {
        let rate = format!("{:e}", entry.learning_rate);
        [entry.name, entry.peft_type().unwrap_or_default(), entry.formula, entry.parameters, &rate, entry.about]
            .map(str::to_owned)
            .to_vec()
    };
    let rows: Vec<Vec<String>> = std::iter::once(header).chain(METHODS.iter().map(row)).collect();
    context.output.line(table(&rows))?;
    let list = METHODS.iter().map(|entry| {
        json!({
            "name": entry.name,
            "peft_type": entry.peft_type(),
            "formula": entry.formula,
            "parameters": entry.parameters,
            "learning_rate": entry.learning_rate,
            "about": entry.about,
        })
    });
    context.output.json(&json!({ "methods": list.collect::<Vec<_>>() }))
}
