//! Laws of adapter files.

use std::collections::BTreeSet;
use std::path::Path;

use burn::module::Module;
use peft_core::files::{CONFIG_FILE, TENSOR_FILE, read_values};
use peft_core::{Method, load_adapter, report, save_adapter};

use super::{Subject, forward};
use crate::state::deviation;
use crate::{Failure, Finding, Outcome, Seam};

/// Saving what was loaded gives the same bytes, and what was loaded computes the same bits.
pub(super) fn save_load<M: Method>(subject: &Subject<'_, M>) -> Outcome {
    let (first, second) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let model = subject.random()?;
    save_adapter(&model, subject.method(), Some("base"), first.path())?;
    let (loaded, method) = load_adapter::<_, M>(subject.base(), first.path())?;
    save_adapter(&loaded, &method, Some("base"), second.path())?;
    for name in [CONFIG_FILE, TENSOR_FILE] {
        let read = |dir: &Path| std::fs::read(dir.join(name));
        if read(first.path())? != read(second.path())? {
            return Err(format!("{name} differs after loading and saving again").into());
        }
    }
    let output = |model: &crate::Stack| forward::output(&model.valid(), Seam::Activation);
    Ok(Finding::Measured { deviation: deviation(&output(&loaded)?, &output(&model)?), bound: 0.0 })
}

/// The file has the tensors that the method lists and no other, in the documented number of values, and these are what is trained.
pub(super) fn file<M: Method>(subject: &Subject<'_, M>) -> Outcome {
    let dir = tempfile::tempdir()?;
    let model = subject.random()?;
    save_adapter(&model, subject.method(), None, dir.path())?;
    let tensors = read_values(&dir.path().join(TENSOR_FILE))?;
    let sites = subject.sites()?;
    let listed: BTreeSet<String> = sites
        .iter()
        .flat_map(|site| {
            let place = if M::OF_MODEL { String::new() } else { format!("base_model.model.{}.", site.path) };
            M::tensors(site.kind).iter().map(move |t| format!("{place}{}", t.key))
        })
        .collect();
    if let Some(key) = tensors.keys().find(|key| !listed.contains(*key)) {
        return Err(format!("{key} is in the file, but `Method::tensors` does not list it").into());
    }
    let expected: usize = sites.iter().map(|site| (subject.laws.params)(subject.method(), site)).sum();
    let saved: usize = tensors.values().map(|tensor| tensor.values.len()).sum();
    let trained = report(&model).trainable;
    let same = |what: &str, found: usize| -> Result<(), Failure> {
        if found == expected {
            Ok(())
        } else {
            Err(format!("the formula gives {expected} values, {what} {found}").into())
        }
    };
    same("the file holds", saved)?;
    same("an optimizer step changes", trained)?;
    Ok(Finding::Holds)
}
