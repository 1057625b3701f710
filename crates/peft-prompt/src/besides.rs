//! What a prompt method trains besides its prompt.

use peft_core::Targets;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Modules that are trained and saved whole beside a prompt, such as the head of a classifier: `modules_to_save`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Besides(Targets);

impl Besides {
    /// Every module whose name ends so.
    pub fn modules<S: Into<String>>(names: impl IntoIterator<Item = S>) -> Self {
        let names = names.into_iter().map(Into::into).collect();
        Self(Targets { modules_to_save: Some(names), ..Targets::default() })
    }

    /// The same as the core knows it.
    pub(crate) fn targets(&self) -> &Targets {
        &self.0
    }
}

impl Serialize for Besides {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.modules_to_save.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Besides {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut names = Option::<Vec<String>>::deserialize(deserializer)?;
        if let Some(names) = &mut names {
            // PEFT writes each name twice.
            let mut seen = Vec::new();
            names.retain(|name| {
                !seen.contains(name) && {
                    seen.push(name.clone());
                    true
                }
            });
        }
        Ok(Self(Targets { modules_to_save: names, ..Targets::default() }))
    }
}
