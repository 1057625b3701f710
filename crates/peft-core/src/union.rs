//! Several methods as one adapter: a prefix, bottlenecks and `LoRA`, each in its own places.
//!
//! - formula: in each place that of the one part that is there
//! - source: He et al. 2022, arXiv:2110.04366 (MAM); Mao et al. 2022, arXiv:2110.07577 (`UniPELT`)
//! - trained: what its parts train
//! - at init: the identity where each part is

mod hub;
mod json;

use std::collections::BTreeMap;

use burn::module::{Module, ModuleDisplay, Reparameterization};
use burn::tensor::Tensor;

use crate::files::{HubFolder, Values};
use crate::{
    Activation, AdapterFile, Bias, Error, FileTensor, LayerKind, Method, Problem, Result, Scan, Site, Targets,
};

/// Configuration of a union: a method and another one, either of which a file may lack. The second may be a union again, so that there may be any number.
///
/// In `adapter_config.json` it is one list `parts`, each with the `peft_type` and the fields that it has alone.
///
/// ```
/// # use peft_core::{Method, Union};
/// /// What is in some places as the first says, and in others as the second or the third.
/// fn all<A: Method, B: Method, C: Method>(a: A, b: B, c: C) -> Union<A, Union<B, C>> {
///     Union::new(a, Union::new(b, c))
/// }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Union<A, B> {
    first: Option<A>,
    second: Option<B>,
    /// What all parts train besides.
    targets: Targets,
}

impl<A: Method, B: Method> Union<A, B> {
    /// Both, or one of them.
    pub fn new(first: impl Into<Option<A>>, second: impl Into<Option<B>>) -> Self {
        let (first, second) = (first.into(), second.into());
        let targets = besides(first.as_ref().map(A::targets).into_iter().chain(second.as_ref().map(B::targets)));
        Self { first, second, targets }
    }

    /// The one method.
    pub fn first(&self) -> Option<&A> {
        self.first.as_ref()
    }

    /// The other one, or what it is a union of.
    pub fn second(&self) -> Option<&B> {
        self.second.as_ref()
    }
}

/// The modules that any of these saves, and the biases that any of them trains.
fn besides<'a>(each: impl Iterator<Item = &'a Targets>) -> Targets {
    let mut all = Targets::default();
    for targets in each {
        for name in targets.modules_to_save.iter().flatten() {
            let saved = all.modules_to_save.get_or_insert_default();
            if !saved.contains(name) {
                saved.push(name.clone());
            }
        }
        if targets.bias == Bias::All || all.bias == Bias::None {
            all.bias = targets.bias;
        }
    }
    all
}

/// State of a [`Union`] at one place: that of the part that is there.
#[derive(Module, Debug)]
pub struct UnionAdapter<A: Module, B: Module> {
    first: Option<A>,
    second: Option<B>,
}

const UNION: &str = "UNION";

/// What the parts of a union are called in an adapter.
const FIRST: &str = "first";
const SECOND: &str = "second";

/// The part, if it is at that site.
fn here<'a, M: Method>(part: Option<&'a M>, site: &Site) -> Option<&'a M> {
    part.filter(|part| part.takes(site))
}

impl<A: Method, B: Method> Method for Union<A, B> {
    const PEFT_TYPE: &'static str = UNION;
    const FAST: &'static [&'static str] = if A::FAST.is_empty() { B::FAST } else { A::FAST };
    type Adapter = UnionAdapter<A::Adapter, B::Adapter>;

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn check(&self) -> Result<()> {
        if A::PEFT_TYPE == UNION {
            return Err(Error::config(json::PARTS, "a union in the last place alone", "one in the first"));
        }
        if self.first.is_none() && self.second.is_none() {
            return Err(Error::config(json::PARTS, "a method at least", "none"));
        }
        self.first.as_ref().map_or(Ok(()), A::check)?;
        self.second.as_ref().map_or(Ok(()), B::check)
    }

    /// Which of them is for the parts to say: [`select`](Method::select), [`takes`](Method::takes).
    fn kinds(&self) -> &'static [LayerKind] {
        &LayerKind::ALL
    }

    fn select<'a>(&self, found: &'a Scan) -> Result<Vec<&'a Site>> {
        self.check()?;
        let parts = [self.first().map(|part| part.select(found)), self.second().map(|part| part.select(found))];
        let (mut sites, mut problems): (Vec<&Site>, Vec<Problem>) = (Vec::new(), Vec::new());
        for part in parts.into_iter().flatten() {
            match part {
                Ok(part) => {
                    let taken = part.iter().filter(|site| sites.iter().any(|other| other.id == site.id));
                    let what = "two parts of the union adapt it; a place has room for one".to_owned();
                    problems.extend(taken.map(|site| Problem::Other { path: site.path.clone(), what: what.clone() }));
                    sites.extend(part);
                }
                Err(Error::Attach { problems: more, .. }) => {
                    let new: Vec<_> = more.into_iter().filter(|problem| !problems.contains(problem)).collect();
                    problems.extend(new);
                }
                Err(error) => return Err(error),
            }
        }
        if problems.is_empty() { Ok(sites) } else { Err(Error::Attach { method: UNION, problems }) }
    }

    fn takes(&self, site: &Site) -> bool {
        here(self.first(), site).is_some() || here(self.second(), site).is_some()
    }

    fn init(&self, site: &Site, seed: u64) -> Result<Self::Adapter> {
        let first = here(self.first(), site).map(|part| part.init(site, seed)).transpose()?;
        let second = here(self.second(), site).map(|part| part.init(site, seed)).transpose()?;
        Ok(UnionAdapter { first, second })
    }

    fn is_fast(field: &str) -> bool {
        match field.split_once('.') {
            Some((FIRST, field)) => A::is_fast(field),
            Some((SECOND, field)) => B::is_fast(field),
            _ => false,
        }
    }

    /// None of its own.
    fn tensors(_kind: LayerKind) -> &'static [FileTensor] {
        &[]
    }

    fn key(kind: LayerKind, field: &str) -> Option<(String, bool)> {
        match field.split_once('.')? {
            (FIRST, field) => A::key(kind, field),
            (SECOND, field) => B::key(kind, field),
            _ => None,
        }
    }

    fn is_of_model(key: &str) -> bool {
        A::is_of_model(key) || B::is_of_model(key)
    }

    fn holds(key: &str) -> bool {
        A::holds(key) || B::holds(key)
    }

    fn num_tasks(&self) -> Option<usize> {
        self.first().and_then(A::num_tasks).or_else(|| self.second().and_then(B::num_tasks))
    }

    fn takes_whole_rows(&self) -> bool {
        self.first().is_some_and(A::takes_whole_rows) || self.second().is_some_and(B::takes_whole_rows)
    }

    fn has_prompts(&self) -> bool {
        self.first().is_some_and(A::has_prompts) || self.second().is_some_and(B::has_prompts)
    }

    fn computed(adapter: &Self::Adapter) -> Option<(&'static str, Tensor<2>)> {
        let second = || adapter.second.as_ref().and_then(B::computed);
        adapter.first.as_ref().and_then(A::computed).or_else(second)
    }

    fn without_encoder(self) -> Self {
        Self {
            first: self.first.map(A::without_encoder),
            second: self.second.map(B::without_encoder),
            targets: self.targets,
        }
    }

    fn activation(adapter: &Self::Adapter) -> Option<&dyn Activation> {
        match (&adapter.first, &adapter.second) {
            (Some(first), _) => A::activation(first),
            (None, second) => second.as_ref().and_then(B::activation),
        }
    }

    fn needs_activation(&self, site: &Site) -> Option<String> {
        let second = || here(self.second(), site).and_then(|part| part.needs_activation(site));
        here(self.first(), site).and_then(|part| part.needs_activation(site)).or_else(second)
    }

    fn unmergeable(&self, site: &Site) -> Option<String> {
        let second = || here(self.second(), site).and_then(|part| part.unmergeable(site));
        here(self.first(), site).and_then(|part| part.unmergeable(site)).or_else(second)
    }

    fn from_hub(folder: &HubFolder) -> Result<Option<(Self, BTreeMap<String, Values>)>> {
        hub::read(folder)
    }

    fn to_hub(file: &AdapterFile<Self>, name: &str) -> Result<Option<HubFolder>> {
        hub::write(file, name).map(Some)
    }

    fn embeds(&self) -> bool {
        self.first().is_some_and(A::embeds) || self.second().is_some_and(B::embeds)
    }

    fn check_file(json: &serde_json::Map<String, serde_json::Value>) -> Result<()> {
        json::check_parts::<A>(json)?;
        if B::PEFT_TYPE == UNION { B::check_file(json) } else { json::check_parts::<B>(json) }
    }
}

/// The weight form: that of the part that is there.
impl<A: Reparameterization + ModuleDisplay, B: Reparameterization + ModuleDisplay> Reparameterization
    for UnionAdapter<A, B>
{
    const NAME: &'static str = "union";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        match (&self.first, &self.second) {
            (Some(first), _) => first.apply(base),
            (None, Some(second)) => second.apply(base),
            (None, None) => base,
        }
    }
}
