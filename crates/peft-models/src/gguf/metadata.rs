//! The key-value part of a GGUF header, read by name and type.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// One metadata value. Integers of every width share a variant; arrays that no model or tokenizer needs are not kept.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Uint(u64),
    Int(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    String(String),
    Ints(Vec<i32>),
    Floats(Vec<f32>),
    Strings(Vec<String>),
    Skipped,
}

impl Value {
    fn kind(&self) -> &'static str {
        match self {
            Self::Uint(_) | Self::Int(_) => "an integer",
            Self::F32(_) | Self::F64(_) => "a float",
            Self::Bool(_) => "a boolean",
            Self::String(_) => "a string",
            Self::Ints(_) => "an array of integers",
            Self::Floats(_) => "an array of floats",
            Self::Strings(_) => "an array of strings",
            Self::Skipped => "an array of another type",
        }
    }
}

/// All metadata of one file.
#[derive(Debug)]
pub(super) struct Metadata {
    path: PathBuf,
    values: HashMap<String, Value>,
}

impl Metadata {
    pub(super) fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), values: HashMap::new() }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn insert(&mut self, key: String, value: Value) -> Result<()> {
        if self.values.contains_key(&key) {
            return Err(Error::format(&self.path, format!("the metadata key `{key}` is there twice")));
        }
        self.values.insert(key, value);
        Ok(())
    }

    pub(super) fn uint(&self, key: &str) -> Result<Option<u64>> {
        self.get(key, "an integer that is not negative", |value| match value {
            Value::Uint(x) => Some(*x),
            Value::Int(x) => u64::try_from(*x).ok(),
            _ => None,
        })
    }

    /// A float as the shortest decimal that means it: the f32 `9.99999975e-6` is `1e-5`, as its author wrote it.
    pub(super) fn float(&self, key: &str) -> Result<Option<f64>> {
        self.get(key, "a finite float", |value| match value {
            Value::F32(x) => x.to_string().parse().ok(),
            Value::F64(x) => Some(*x),
            _ => None,
        })
        .and_then(|x| match x {
            Some(x) if !x.is_finite() => Err(Error::format(&self.path, format!("`{key}` is {x}"))),
            x => Ok(x),
        })
    }

    pub(super) fn boolean(&self, key: &str) -> Result<Option<bool>> {
        self.get(key, "a boolean", |value| if let Value::Bool(x) = value { Some(*x) } else { None })
    }

    pub(super) fn string(&self, key: &str) -> Result<Option<&str>> {
        self.get(key, "a string", |value| if let Value::String(x) = value { Some(x.as_str()) } else { None })
    }

    pub(super) fn ints(&self, key: &str) -> Result<Option<&[i32]>> {
        self.get(key, "an array of 32-bit integers", |v| if let Value::Ints(x) = v { Some(x.as_slice()) } else { None })
    }

    pub(super) fn floats(&self, key: &str) -> Result<Option<&[f32]>> {
        self.get(key, "an array of 32-bit floats", |v| if let Value::Floats(x) = v { Some(x.as_slice()) } else { None })
    }

    pub(super) fn strings(&self, key: &str) -> Result<Option<&[String]>> {
        self.get(key, "an array of strings", |v| if let Value::Strings(x) = v { Some(x.as_slice()) } else { None })
    }

    /// Turns the absence of `key` into an error.
    pub(super) fn required<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| Error::format(&self.path, format!("the metadata key `{key}` is missing")))
    }

    fn get<'a, T>(&'a self, key: &str, want: &str, pick: impl FnOnce(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.values.get(key) else { return Ok(None) };
        let wrong = || Error::format(&self.path, format!("`{key}` should be {want}, it is {}", value.kind()));
        pick(value).map(Some).ok_or_else(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_by_type() {
        let mut metadata = Metadata::new(Path::new("m.gguf"));
        metadata.insert("eps".into(), Value::F32(1e-5)).unwrap();
        metadata.insert("n".into(), Value::Int(-1)).unwrap();
        assert_eq!(metadata.float("eps").unwrap(), Some(1e-5));
        assert_eq!(metadata.uint("absent").unwrap(), None);
        assert!(metadata.required("absent", None::<u64>).unwrap_err().to_string().contains("`absent` is missing"));
        let message = metadata.uint("n").unwrap_err().to_string();
        assert!(message.contains("m.gguf") && message.contains("`n` should be an integer that is not negative"));
        assert!(metadata.insert("n".into(), Value::Bool(true)).unwrap_err().to_string().contains("twice"));
    }
}
