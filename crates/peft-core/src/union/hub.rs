//! A union in AdapterHub's layout: `architecture: "union"`, and each part of `configs` as it is alone, all in one file.

use std::collections::BTreeMap;

use super::{UNION, Union};
use crate::files::{HubFolder, Values};
use crate::{AdapterFile, Error, Method, Result};

type Read<M> = (M, BTreeMap<String, Values>);

pub(super) fn read<A: Method, B: Method>(folder: &HubFolder) -> Result<Option<Read<Union<A, B>>>> {
    let mut parts = folder.parts_of_union()?;
    let first = take::<A>(&mut parts)?;
    let second = match B::PEFT_TYPE {
        UNION if parts.is_empty() => None,
        UNION => B::from_hub(&HubFolder::union(std::mem::take(&mut parts))?)?,
        _ => take::<B>(&mut parts)?,
    };
    if let Some(left) = parts.first() {
        let expected = format!("{} and {}, once each", A::PEFT_TYPE, B::PEFT_TYPE);
        let found = left.method_type().unwrap_or("a method that is not read from AdapterHub's layout");
        return Err(Error::config("configs", expected, found));
    }
    let (first, mut tensors) = first.map_or((None, BTreeMap::new()), |(method, tensors)| (Some(method), tensors));
    let second = second.map(|(method, more)| {
        tensors.extend(more);
        method
    });
    Ok(Some((Union::new(first, second), tensors)))
}

fn take<M: Method>(parts: &mut Vec<HubFolder>) -> Result<Option<Read<M>>> {
    match parts.iter().position(|part| part.method_type() == Some(M::PEFT_TYPE)) {
        Some(at) => M::from_hub(&parts.remove(at)),
        None => Ok(None),
    }
}

pub(super) fn write<A: Method, B: Method>(file: &AdapterFile<Union<A, B>>, name: &str) -> Result<HubFolder> {
    if let Some(key) = file.tensors.keys().find(|key| !A::holds(key) && !B::holds(key)) {
        let what = format!("{key} is in no part; keep what is trained whole in PEFT's layout");
        return Err(Error::config("modules_to_save", "null", what));
    }
    let parts = [part(file, file.method.first(), name)?, part(file, file.method.second(), name)?];
    HubFolder::union(parts.into_iter().flatten().collect())
}

/// A part of the file, as the file of that method alone.
fn part<M: Method, U>(file: &AdapterFile<U>, method: Option<&M>, name: &str) -> Result<Option<HubFolder>> {
    let Some(method) = method else { return Ok(None) };
    let own = file.tensors.iter().filter(|(key, _)| M::holds(key));
    let file = AdapterFile {
        method: method.clone(),
        base_model: file.base_model.clone(),
        task_type: file.task_type.clone(),
        base_fingerprint: file.base_fingerprint.clone(),
        tensors: own.map(|(key, values)| (key.clone(), values.clone())).collect(),
    };
    let folder = M::to_hub(&file, name)?;
    folder.map(Some).ok_or_else(|| Error::config("parts", "methods that AdapterHub's layout has", M::PEFT_TYPE))
}
