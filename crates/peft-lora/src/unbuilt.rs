//! Parts of PEFT's LoRA that are not built: a file that asks for one is refused by its name.

use peft_core::{Error, Result};
use serde_json::{Map, Value};

/// Refuses a file that asks for one of them.
pub(crate) fn check(json: &Map<String, Value>) -> Result<()> {
    // Each of these changes what the adapter computes, so ignoring it would be silently wrong.
    const NOT_BUILT: [&str; 10] = [
        "use_dora",
        "use_qalora",
        "use_bdlora",
        "alora_invocation_tokens",
        "kasa_config",
        "velora_config",
        "monteclora_config",
        "layer_replication",
        "trainable_token_indices",
        "megatron_config",
    ];
    if let Some(arrow) = json.get("arrow_config").filter(|arrow| !arrow.is_null()) {
        let expected = "null: a router of Arrow has no adapters in it; mix these with `peft combine --how arrow`";
        return Err(Error::config("arrow_config", expected, arrow));
    }
    for field in NOT_BUILT {
        let asked = json.get(field).is_some_and(|v| match v {
            Value::Null | Value::Bool(false) => false,
            Value::Array(values) => !values.is_empty(),
            Value::Object(values) => !values.is_empty(),
            _ => true,
        });
        if asked {
            return Err(Error::config(field, "null: this part of LoRA is not built yet", &json[field]));
        }
    }
    Ok(())
}
