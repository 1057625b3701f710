//! A composition as a method.

use std::collections::BTreeMap;

use burn::module::Module as _;
use serde::{Deserialize, Serialize};

use super::{Composable, ComposedAdapter, Composition, Fusion};
use crate::{Activation, AdapterFile, Error, FileTensor, LayerKind, Method, Names, Result, Site, Targets};

/// Configuration of a composition of adapters of one method, of any configurations.
///
/// ```
/// # use peft_core::{ComposedConfig, Composable, Composition, Result};
/// /// A language and a task, the second on top of the first.
/// fn stack<M: Composable>(language: M, task: M) -> Result<ComposedConfig<M>> {
///     let stack = Composition::Stack(vec![Composition::Adapter(0), Composition::Adapter(1)]);
///     ComposedConfig::new(vec![language, task], stack)
/// }
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(bound = "M: Method")]
pub struct ComposedConfig<M> {
    /// The adapters.
    pub adapters: Vec<M>,
    /// How they work together.
    pub composition: Composition,
    /// Which places; each adapter may be at fewer.
    #[serde(flatten)]
    pub targets: Targets,
}

impl<M: Method> ComposedConfig<M> {
    /// The adapters at all places that any of them is at; behind the embeddings the first alone, as in AdapterHub.
    ///
    /// # Errors
    /// When the adapters name their places in ways that cannot be put into one.
    pub fn new(adapters: Vec<M>, composition: Composition) -> Result<Self> {
        let targets = all_of(adapters.iter().map(M::targets))?;
        Ok(Self { adapters, composition, targets })
    }

    /// The adapter that is behind the embeddings.
    fn embedding(&self) -> Option<usize> {
        let first = self.composition.first()?;
        self.adapters.get(first)?.embeds().then_some(first)
    }
}

/// The targets that name what any of these does.
fn all_of<'a>(mut each: impl Iterator<Item = &'a Targets>) -> Result<Targets> {
    let first = each.next().cloned().unwrap_or_default();
    each.try_fold(first, |all, next| {
        if all == *next {
            return Ok(all);
        }
        let (Some(Names::List(mut names)), Some(Names::List(more))) =
            (all.target_modules.clone(), &next.target_modules)
        else {
            return Err(Error::config("target_modules", format!("lists of names, or {all} in every adapter"), next));
        };
        names.extend(more.iter().filter(|name| !names.contains(name)).cloned().collect::<Vec<_>>());
        let joined = Targets { target_modules: Some(Names::List(names)), ..all };
        // What is left out, or trained besides, is the whole composition's.
        if joined == (Targets { target_modules: joined.target_modules.clone(), ..next.clone() }) {
            Ok(joined)
        } else {
            Err(Error::config("target_modules", "adapters that differ in the names of modules alone", next))
        }
    })
}

/// Adapters from files as the parts of one composition, ready to [`fill`](AdapterFile::fill) a model that it is attached to.
///
/// # Errors
/// When an adapter has a tensor that is at no place, such as a head: heads are not composed. As [`ComposedConfig::new`].
pub fn composed<M: Composable>(
    adapters: Vec<AdapterFile<M>>,
    composition: Composition,
) -> Result<AdapterFile<ComposedConfig<M>>> {
    let methods = adapters.iter().map(|adapter| adapter.method.clone()).collect();
    let method = ComposedConfig::new(methods, composition)?;
    let mut tensors = BTreeMap::new();
    for (number, adapter) in adapters.into_iter().enumerate() {
        let behind = if adapter.method.embeds() { M::tensors(LayerKind::Embedded) } else { &[] };
        let at_place = |key: &str, tensors: &[FileTensor]| {
            tensors.iter().find_map(|tensor| {
                let place = key.strip_suffix(tensor.key)?.strip_suffix('.')?;
                Some(format!("{place}.{PARTS}.{number}.{}", tensor.key))
            })
        };
        for (key, values) in adapter.tensors {
            let embedding = at_place(&key, behind);
            if embedding.is_some() && method.embedding() != Some(number) {
                continue;
            }
            let split = M::PLACES.iter().find_map(|kind| at_place(&key, M::tensors(*kind))).or(embedding);
            let whole = || Error::config("modules_to_save", "null: what is trained whole is not composed", &key);
            tensors.insert(split.ok_or_else(whole)?, values);
        }
    }
    Ok(AdapterFile { method, base_model: None, task_type: None, base_fingerprint: None, tensors })
}

/// The field that the adapters of a composition are in, by number.
const PARTS: &str = "parts";

impl<M: Composable> Method for ComposedConfig<M> {
    const PEFT_TYPE: &'static str = M::COMPOSITION;
    const FAST: &'static [&'static str] = M::FAST;
    type Adapter = ComposedAdapter<M::Adapter>;

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn check(&self) -> Result<()> {
        self.adapters.iter().try_for_each(M::check)?;
        self.adapters.iter().try_for_each(M::check_part)?;
        let numbers = self.composition.numbers();
        let wrong = |expected: String, found: String| Err(Error::config("composition", expected, found));
        if self.composition.any(&Composition::is_empty) {
            return wrong("an adapter at least in each part".to_owned(), format!("{:?}", self.composition));
        }
        if self.composition.any(&Composition::weighs_nothing) {
            return wrong("weights with a sum other than zero".to_owned(), format!("{:?}", self.composition));
        }
        if !self.composition.is_whole() {
            return wrong(
                "parts of the batch or the sequence on the outside alone".to_owned(),
                format!("{:?}", self.composition),
            );
        }
        if let Some(number) = numbers.iter().find(|number| **number >= self.adapters.len()) {
            return wrong(format!("numbers below {}", self.adapters.len()), number.to_string());
        }
        let embeds = |number: &usize| self.adapters[*number].embeds();
        if self.composition.any(&Composition::cuts) && numbers.iter().any(embeds) {
            return wrong(
                "adapters with none behind the embeddings, where each has a part of the input".to_owned(),
                format!("{:?}", self.composition),
            );
        }
        Ok(())
    }

    fn kinds(&self) -> &'static [LayerKind] {
        M::PLACES
    }

    fn init(&self, site: &Site, seed: u64) -> Result<Self::Adapter> {
        let fuses = self.composition.fuses();
        let part = |(number, config): (usize, &M)| -> Result<Option<M::Adapter>> {
            let here = match site.kind {
                LayerKind::Embedded => self.embedding() == Some(number),
                kind => config.targets().matcher()?.matches(&site.path, Some(kind)) && !config.leaves_out(&site.path),
            };
            if !here {
                return Ok(None);
            }
            let adapter = config.init(site, seed.wrapping_add(number as u64))?;
            Ok(Some(if fuses { adapter.no_grad() } else { adapter }))
        };
        let parts: Vec<_> = self.adapters.iter().enumerate().map(part).collect::<Result<_>>()?;
        let here = |numbers: &[usize]| numbers.iter().all(|number| parts[*number].is_some());
        let fuses = fuses && site.kind != LayerKind::Embedded && here(&self.composition.numbers());
        let fusion = fuses.then(|| Fusion::new(site, seed)).transpose()?;
        Ok(ComposedAdapter::new(parts, fusion, self.composition.clone()))
    }

    fn is_fast(field: &str) -> bool {
        field.split_once('.').and_then(|(_, rest)| rest.split_once('.')).is_some_and(|(_, field)| M::is_fast(field))
    }

    fn tensors(_kind: LayerKind) -> &'static [FileTensor] {
        const fn tensor(field: &'static str, key: &'static str, transposed: bool) -> FileTensor {
            FileTensor { field, key, transposed }
        }
        &const {
            [
                tensor("fusion.query.weight", "adapter_fusion.query.weight", true),
                tensor("fusion.query.bias", "adapter_fusion.query.bias", false),
                tensor("fusion.key.weight", "adapter_fusion.key.weight", true),
                tensor("fusion.key.bias", "adapter_fusion.key.bias", false),
                tensor("fusion.value", "adapter_fusion.value.weight", true),
            ]
        }
    }

    fn numbered(kind: LayerKind) -> Option<(&'static str, &'static [FileTensor])> {
        Some((PARTS, M::tensors(kind)))
    }

    fn embeds(&self) -> bool {
        self.embedding().is_some()
    }

    fn activation(adapter: &Self::Adapter) -> Option<&dyn Activation> {
        Some(adapter)
    }

    fn needs_activation(&self, site: &Site) -> Option<String> {
        self.composition.acts().or_else(|| self.adapters.iter().find_map(|method| method.needs_activation(site)))
    }

    fn unmergeable(&self, site: &Site) -> Option<String> {
        self.composition.acts().or_else(|| self.adapters.iter().find_map(|method| method.unmergeable(site)))
    }
}
