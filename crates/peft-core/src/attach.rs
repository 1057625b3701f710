//! Attaching: visit first, decide, and only then change the model.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use burn::module::{Module, Param, ParamId, Reparameterizer};
use burn::tensor::{DType, Tensor};

use crate::targets::unmatched;
use crate::{
    Error, LayerKind, Matcher, Method, ParamVisitor, PathStack, Problem, Result, Room, Scan, Site, activation, hf_name,
    scan, visit_params,
};

/// [`attach`] and the report as methods of every Burn module.
pub trait Peft: Module {
    /// [`attach`] with seed 0.
    ///
    /// # Errors
    /// See [`attach`].
    fn attach<M: Method>(self, method: &M) -> Result<Self> {
        attach(self, method, 0)
    }

    /// How much of this module is trained.
    fn trainable(&self) -> crate::Report {
        crate::report(self)
    }
}

impl<T: Module> Peft for T {}

/// Freezes `module` and puts an adapter of `method` into every matched weight; `modules_to_save` and chosen biases stay trainable.
///
/// The clone of `module` made before is the un-adapted model: it shares the base weights and stays as it was.
///
/// # Errors
/// [`Error::Attach`] with every reason at once: nothing matched (with the nearest names), a layer of another kind, already adapted, no
/// activation seam where the method needs one. [`Error::Config`] for a configuration that makes no sense. Nothing is changed then.
pub fn attach<T: Module, M: Method>(module: T, method: &M, seed: u64) -> Result<T> {
    attach_within(module, method, seed, &Room::default())
}

/// [`attach`], with so much room for the adapter.
pub(crate) fn attach_within<T: Module, M: Method>(module: T, method: &M, seed: u64, room: &Room) -> Result<T> {
    let mut found = scan(&module);
    found.sites.iter_mut().for_each(|site| site.room = room.clone());
    let sites = method.select(&found)?;
    let adapters: HashMap<_, _> = sites.iter().map(|site| site.id).zip(method.init_all(&sites, seed)?).collect();
    let trained = trained_base(&module, method, &found, &sites)?;
    activation::register::<M>();
    Ok(module.apply_reparameterization(Attacher { adapters, trained }))
}

/// Whether `method` asks for the module at that path; `kind` is that of a layer.
pub(crate) fn wants<M: Method>(method: &M, matcher: &Matcher, path: &str, kind: Option<LayerKind>) -> bool {
    let named = match kind {
        Some(LayerKind::Embedded) => method.embeds(),
        // A model has one such place, so there is nothing to choose.
        Some(LayerKind::Prompts) => method.kinds().contains(&LayerKind::Prompts),
        kind => matcher.matches(path, kind),
    };
    named && !method.leaves_out(path)
}

/// What [`Method::select`] does where a method does not do it in a way of its own: the layers that the targets name, of the kinds that the method can adapt.
///
/// # Errors
/// As [`Method::select`].
pub fn select<'a, M: Method>(found: &'a Scan, method: &M) -> Result<Vec<&'a Site>> {
    method.check()?;
    let matcher = method.targets().matcher()?;
    let mut problems: Vec<Problem> =
        found.adapted.iter().map(|path| Problem::AlreadyAdapted { path: path.clone() }).collect();
    let by_path: BTreeMap<&str, &Site> = found.sites.iter().map(|s| (s.path.as_str(), s)).collect();
    let mut sites = Vec::new();
    for (path, container) in &found.modules {
        let site = by_path.get(path.as_str()).copied();
        let behind = site.is_some_and(|site| site.kind == LayerKind::Embedded);
        if !wants(method, &matcher, path, site.map(|site| site.kind)) {
            continue;
        }
        match site {
            Some(site) if behind || method.kinds().contains(&site.kind) => {
                if let (Some(reason), false) = (method.needs_activation(site), site.aware) {
                    problems.push(Problem::NotAware { path: path.clone(), reason });
                }
                if matcher.names_module(path, Some(site.kind)) && matcher.names_parameter(path, Some(site.kind)) {
                    let what = "target_modules and target_parameters both name it; PEFT refuses that".to_owned();
                    problems.push(Problem::Other { path: path.clone(), what });
                }
                sites.push(site);
            }
            _ => problems.push(Problem::Kind {
                path: path.clone(),
                expected: format!("{:?}", method.kinds()),
                found: container.clone(),
            }),
        }
    }
    problems.extend(unmatched(found, method.targets().parameter_names()));
    let has = |kinds: &[LayerKind]| found.sites.iter().any(|site| kinds.contains(&site.kind));
    if problems.is_empty() && !has(method.kinds()) {
        problems.push(Problem::NoPlace { expected: format!("{:?}", method.kinds()) });
    } else if problems.is_empty() && method.embeds() && !has(&[LayerKind::Embedded]) {
        problems.push(Problem::NoPlace { expected: format!("{:?}", [LayerKind::Embedded]) });
    } else if problems.is_empty() && sites.iter().all(|site| site.kind == LayerKind::Embedded) {
        let targets = method.targets().to_string();
        let near = nearest(found.sites.iter().map(|site| site.path.as_str()), &targets);
        problems.push(Problem::NoMatch { targets, near });
    }
    if !problems.is_empty() {
        return Err(Error::Attach { method: M::PEFT_TYPE, problems });
    }
    match method.last() {
        Some((field, count)) => last(found, sites, field, count),
        None => Ok(sites),
    }
}

/// The last `count` of `sites` in the order of the model; `field` is for messages.
fn last<'a>(found: &Scan, mut sites: Vec<&'a Site>, field: &str, count: usize) -> Result<Vec<&'a Site>> {
    let Some(others) = sites.len().checked_sub(count) else {
        return Err(Error::config(
            field,
            format!("at most the {} layers of this model that match", sites.len()),
            count,
        ));
    };
    sites.sort_by_key(|site| found.sites.iter().position(|other| other.id == site.id));
    Ok(sites.split_off(others))
}

/// The distinct last components of `paths`, those most like a word of `wanted` first.
pub(crate) fn nearest<'a>(paths: impl Iterator<Item = &'a str>, wanted: &str) -> Vec<String> {
    const SHOWN: usize = 8;
    let words: Vec<&str> = wanted.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|w| !w.is_empty()).collect();
    let names: BTreeSet<&str> = paths.filter_map(|path| path.rsplit('.').next()).collect();
    let mut names: Vec<String> = names.into_iter().map(str::to_owned).collect();
    names.sort_by_key(|name| words.iter().map(|word| distance(word, name)).min());
    names.truncate(SHOWN);
    names
}

/// Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let substitution = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substitution.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// What PEFT calls the head of a classifier: it writes both names into every such adapter, and a model has one of them.
const CLASSIFIERS: [&str; 2] = ["classifier", "score"];

/// The base parameters that stay trainable. An entry of `modules_to_save` that names nothing is an error, as for targets.
fn trained_base<T: Module, M: Method>(module: &T, method: &M, found: &Scan, sites: &[&Site]) -> Result<Vec<ParamId>> {
    let matcher = method.targets().matcher()?;
    let mut visitor = BaseParams::default();
    visit_params(module, &mut visitor);
    let adapted = |path: &str| sites.iter().any(|s| s.path == path);
    let packed = found.sites.iter().filter(|site| site.packed.is_some());
    let trained_packed = packed.filter(|site| matcher.trains(&site.path, "weight", adapted(&site.path)));
    let mut problems: Vec<Problem> = trained_packed
        .map(|site| {
            let what = "the weight is packed, so it cannot be trained whole; leave it out of packing".to_owned();
            Problem::Other { path: site.path.clone(), what }
        })
        .collect();
    let modules: Vec<&String> =
        visitor.params.iter().map(|(_, module, _)| module).chain(found.sites.iter().map(|site| &site.path)).collect();
    let names_something = |name: &str| {
        let named = |path: &str| path.ends_with(name);
        modules.iter().any(|module| named(module) || module.match_indices('.').any(|(at, _)| named(&module[..at])))
    };
    let saved = matcher.modules_to_save();
    let has_classifier =
        saved.iter().any(|name| CLASSIFIERS.contains(&name.as_str()) && names_something(name.as_str()));
    let unknown = saved
        .iter()
        .filter(|name| !names_something(name))
        .filter(|name| !(has_classifier && CLASSIFIERS.contains(&name.as_str())))
        .map(|name| Problem::NoMatch {
            targets: format!("modules_to_save \"{name}\""),
            near: nearest(visitor.params.iter().map(|(_, module, _)| module.as_str()), name),
        });
    problems.extend(unknown);
    if !problems.is_empty() {
        return Err(Error::Attach { method: M::PEFT_TYPE, problems });
    }
    let trained = |(_, module, param): &&(ParamId, String, String)| matcher.trains(module, param, adapted(module));
    Ok(visitor.params.iter().filter(trained).map(|(id, ..)| *id).collect())
}

#[derive(Default)]
struct BaseParams {
    /// Id, module path and Hugging Face's name of each base parameter.
    params: Vec<(ParamId, String, String)>,
}

impl ParamVisitor for BaseParams {
    fn float<const D: usize>(&mut self, at: &PathStack, param: &Param<Tensor<D>>) {
        let location = at.locate();
        if location.field.is_none() {
            let name = hf_name(&location, D).name;
            let short = name.rsplit('.').next().unwrap_or_default().to_owned();
            self.params.push((param.id, location.module, short));
        }
    }
}

struct Attacher<A> {
    adapters: HashMap<ParamId, A>,
    trained: Vec<ParamId>,
}

impl<A: burn::module::Reparameterization> Reparameterizer for Attacher<A> {
    type Reparam = A;

    fn reparameterize<const D: usize>(
        &mut self,
        _path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<A>) {
        let adapter = self.adapters.remove(&param.id);
        let trained = self.trained.contains(&param.id);
        let param = param.set_require_grad(false);
        // A matrix in 16 bits would round the small steps of training away; a product does not mind the type of its weight.
        let half = trained && D == 2 && matches!(param.base().dtype(), DType::F16 | DType::BF16);
        let param = if half { param.map(|weight| weight.cast(DType::F32)) } else { param };
        (param.set_require_grad(trained), adapter)
    }
}
