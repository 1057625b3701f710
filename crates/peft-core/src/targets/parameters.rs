//! Weights that are adapted by their own names, where other targets are the names of modules.

use std::borrow::Cow;

use super::{Names, Targets, ends_with_segment};
use crate::attach::nearest;
use crate::{LayerKind, Problem, Scan};

impl Targets {
    /// Every parameter whose name is one of these, or ends in a dot and one of these.
    pub fn parameters<S: Into<String>>(names: impl IntoIterator<Item = S>) -> Self {
        Self::default().with_parameters(names)
    }

    /// These, and the parameters of those names.
    #[must_use]
    pub fn with_parameters<S: Into<String>>(self, names: impl IntoIterator<Item = S>) -> Self {
        // PEFT takes null for modules of its own choice.
        let target_modules = self.target_modules.or_else(|| Some(Names::List(Vec::new())));
        let target_parameters = Some(names.into_iter().map(Into::into).collect());
        Self { target_modules, target_parameters, ..self }
    }

    /// The names of parameters to adapt.
    pub fn parameter_names(&self) -> &[String] {
        self.target_parameters.as_deref().unwrap_or_default()
    }

    /// What a pattern of names calls the module `path`: the parameter that it is where these name that, else the module.
    pub fn name_of<'a>(&self, path: &'a str) -> Cow<'a, str> {
        let weight = parameter(path, LayerKind::Linear)
            .filter(|weight| self.parameter_names().iter().any(|name| is_named(weight, name)));
        weight.map_or(Cow::Borrowed(path), Cow::Owned)
    }
}

/// What a parameter is called that [`Targets::target_parameters`] may name: the weight of the module `key`.
pub(super) fn parameter(key: &str, kind: LayerKind) -> Option<String> {
    match kind {
        LayerKind::GroupedLinear => Some(key.to_owned()),
        LayerKind::Linear => Some(format!("{key}.weight")),
        _ => None,
    }
}

/// Whether an entry of [`Targets::target_parameters`] names the parameter.
pub(super) fn is_named(parameter: &str, name: &str) -> bool {
    parameter == name || ends_with_segment(parameter, name)
}

/// The names of parameters that name none of the model's.
pub(crate) fn unmatched(found: &Scan, names: &[String]) -> Vec<Problem> {
    let parameters: Vec<String> = found.sites.iter().filter_map(|site| parameter(&site.path, site.kind)).collect();
    let none = |name: &&String| !parameters.iter().any(|parameter| is_named(parameter, name));
    let experts = found.sites.iter().any(|site| site.experts.is_some());
    let problem = |name: &String| {
        let near = found.sites.iter().filter(|site| site.experts.is_some() || !experts);
        let near = nearest(near.map(|site| site.path.as_str()), name);
        Problem::NoMatch { targets: format!("target_parameters \"{name}\""), near }
    };
    names.iter().filter(none).map(problem).collect()
}
