//! A union in `adapter_config.json`: one list, however the union is nested.

use serde::ser::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

use super::{UNION, Union};
use crate::{Method, Result};

/// The field with the list.
pub(super) const PARTS: &str = "parts";

/// What says which method a part is.
const TYPE: &str = "peft_type";

type Fields = Map<String, Value>;

/// The fields of a union in a file.
#[derive(Serialize, Deserialize)]
struct List {
    parts: Vec<Fields>,
}

impl<A: Method, B: Method> Serialize for Union<A, B> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let both = [listed(self.first.as_ref()), listed(self.second.as_ref())];
        let parts = both.into_iter().collect::<serde_json::Result<Vec<_>>>().map_err(S::Error::custom)?.concat();
        List { parts }.serialize(serializer)
    }
}

/// A method as an entry of the list, a union as all of its own, and what is not there as none.
fn listed<M: Method>(part: Option<&M>) -> serde_json::Result<Vec<Fields>> {
    let Some(part) = part else { return Ok(Vec::new()) };
    let json = serde_json::to_value(part)?;
    if M::PEFT_TYPE == UNION {
        return serde_json::from_value::<List>(json).map(|list| list.parts);
    }
    let mut fields = Fields::from_iter([(TYPE.to_owned(), M::PEFT_TYPE.into())]);
    fields.extend(serde_json::from_value::<Fields>(json)?);
    Ok(vec![fields])
}

impl<'de, A: Method, B: Method> Deserialize<'de> for Union<A, B> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let List { parts } = List::deserialize(deserializer)?;
        of(parts).map_err(serde::de::Error::custom)
    }
}

fn of<A: Method, B: Method>(mut parts: Vec<Fields>) -> serde_json::Result<Union<A, B>> {
    let first = take::<A>(&mut parts)?;
    let second = match B::PEFT_TYPE {
        UNION if parts.is_empty() => None,
        UNION => Some(serde_json::from_value(serde_json::to_value(List { parts: std::mem::take(&mut parts) })?)?),
        _ => take::<B>(&mut parts)?,
    };
    match parts.first() {
        None => Ok(Union::new(first, second)),
        Some(left) => {
            let found = left.get(TYPE).unwrap_or(&Value::Null);
            let what = format!("{PARTS}: expected {} and {}, once each; found {found}", A::PEFT_TYPE, B::PEFT_TYPE);
            Err(serde_json::Error::custom(what))
        }
    }
}

/// The first part of that method, out of the list.
fn take<M: Method>(parts: &mut Vec<Fields>) -> serde_json::Result<Option<M>> {
    let Some(at) = parts.iter().position(is::<M>) else { return Ok(None) };
    let fields = parts.remove(at);
    // As for a method alone, null means the default.
    let given = fields.into_iter().filter(|(_, value)| !value.is_null()).collect();
    let method = serde_json::from_value(Value::Object(given));
    method.map(Some).map_err(|e| serde_json::Error::custom(format!("{PARTS}, {}: {e}", M::PEFT_TYPE)))
}

fn is<M: Method>(part: &Fields) -> bool {
    part.get(TYPE).and_then(Value::as_str) == Some(M::PEFT_TYPE)
}

/// [`Method::check_file`] of the parts of that method.
pub(super) fn check_parts<M: Method>(json: &Fields) -> Result<()> {
    let parts = json.get(PARTS).and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_object);
    parts.filter(|part| is::<M>(part)).try_for_each(M::check_file)
}
