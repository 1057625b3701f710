//! Which modules are adapted and what else is trained, by exactly Hugging Face PEFT's rules.

mod parameters;

use std::fmt;

use fancy_regex::Regex;
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use crate::site::is_router;
use crate::{Error, LayerKind, Result};

pub(crate) use self::parameters::unmatched;
use self::parameters::{is_named, parameter};

/// A regular expression that must match a whole name, or a list of dotted suffixes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a regular expression or a list of names")]
pub enum Names {
    /// A regular expression over the whole module name; `all-linear` stands for every linear layer but the output head and routers of experts.
    Pattern(String),
    /// Each entry matches the module of that name and every module whose name ends in `.` and the entry.
    List(Vec<String>),
}

impl Names {
    /// Whether the name of a module ends in an entry of the list, with or without a dot before it, or the regular expression matches it whole: PEFT's
    /// rule for modules that a method treats in another way than the rest. `field` is for messages.
    ///
    /// # Errors
    /// When the regular expression does not compile.
    pub fn name(&self, field: &str, key: &str) -> Result<bool> {
        Ok(match self {
            Self::Pattern(p) => is_match(&whole(field, p)?, key),
            Self::List(list) => list.iter().any(|name| key.ends_with(name.as_str())),
        })
    }
}

/// One value or several, as Hugging Face's files hold both.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected one value or a list of them")]
pub enum OneOrMany<T> {
    /// `3`
    One(T),
    /// `[3, 4]`
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    /// The values as a slice.
    pub fn as_slice(&self) -> &[T] {
        match self {
            Self::One(value) => std::slice::from_ref(value),
            Self::Many(values) => values,
        }
    }
}

/// Which biases of the base are trained along with the adapter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bias {
    /// No bias.
    #[default]
    None,
    /// Every parameter called `bias`.
    All,
    /// The biases of the adapted layers; in a file the method's name stands before it, as in `lora_only`.
    Only,
}

impl Serialize for Bias {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(match self {
            Self::None => "none",
            Self::All => "all",
            Self::Only => "only",
        })
    }
}

impl<'de> Deserialize<'de> for Bias {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        match String::deserialize(deserializer)?.as_str() {
            "none" => Ok(Self::None),
            "all" => Ok(Self::All),
            only if only == "only" || only.ends_with("_only") => Ok(Self::Only),
            other => Err(serde::de::Error::custom(format!("bias: expected none, all or lora_only, found {other}"))),
        }
    }
}

/// Which modules a method adapts and which base parameters it trains besides. Field names are those of `adapter_config.json`.
///
/// Module names are the dotted paths of the model, which for the models of this workspace are those of `transformers`.
/// Nothing is targeted by default: the caller chooses.
///
/// ```
/// use peft_core::{LayerKind, Targets};
///
/// let targets = Targets::modules(["q_proj", "v_proj"]).matcher().unwrap();
/// assert!(targets.matches("model.layers.0.self_attn.q_proj", Some(LayerKind::Linear)));
/// assert!(!targets.matches("model.layers.0.self_attn.k_proj", Some(LayerKind::Linear)));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Targets {
    /// The modules to adapt.
    pub target_modules: Option<Names>,
    /// Parameters to adapt, by the whole name or by what follows a dot in it: the weights of several experts (`experts.down_proj`), and those of linear layers
    /// (`mlp.gate.weight`, a router). No other field of this struct acts on them but [`modules_to_save`](Self::modules_to_save), as in PEFT, where LoRA alone has them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_parameters: Option<Vec<String>>,
    /// Modules to leave out; looked at before everything else.
    pub exclude_modules: Option<Names>,
    /// Adapt only these layers of the stack.
    pub layers_to_transform: Option<OneOrMany<usize>>,
    /// Name of the stack, for instance `layers`; needs `layers_to_transform`.
    pub layers_pattern: Option<OneOrMany<String>>,
    /// Modules to train and save whole. As in PEFT, every module whose name ends so, with or without a dot before.
    pub modules_to_save: Option<Vec<String>>,
    /// Biases of the base to train.
    pub bias: Bias,
}

impl Targets {
    /// Every module of one of these names.
    pub fn modules<S: Into<String>>(names: impl IntoIterator<Item = S>) -> Self {
        Self { target_modules: Some(Names::List(names.into_iter().map(Into::into).collect())), ..Self::default() }
    }

    /// Every module whose whole name this regular expression matches.
    pub fn pattern(pattern: impl Into<String>) -> Self {
        Self { target_modules: Some(Names::Pattern(pattern.into())), ..Self::default() }
    }

    /// Every linear layer but the output head (`lm_head`).
    pub fn all_linear() -> Self {
        Self::pattern("all-linear")
    }

    /// Compiles the rules.
    ///
    /// # Errors
    /// Names the field of a regular expression that does not compile, or of a combination that PEFT refuses too.
    pub fn matcher(&self) -> Result<Matcher> {
        if self.layers_pattern.is_some() && self.layers_to_transform.is_none() {
            return Err(Error::config("layers_to_transform", "layer indices when layers_pattern is given", "null"));
        }
        let pattern = matches!(self.target_modules, Some(Names::Pattern(_)));
        for (field, given) in [
            ("layers_to_transform", self.layers_to_transform.is_some()),
            ("layers_pattern", self.layers_pattern.is_some()),
        ] {
            if pattern && given {
                return Err(Error::config(field, "null when target_modules is a regular expression", "a value"));
            }
        }
        let layer_index = match &self.layers_pattern {
            Some(patterns) if patterns.as_slice().iter().any(|p| !p.is_empty()) => patterns
                .as_slice()
                .iter()
                .map(|p| regex("layers_pattern", &format!(r"^(?:|.*?\.){p}\.(\d+)\.")))
                .collect::<Result<_>>()?,
            _ => vec![regex("layers_pattern", r"^.*?\.[^.]*\.(\d+)\.")?],
        };
        let kept_whole = self.modules_to_save.iter().flatten();
        Ok(Matcher {
            target: self.target_modules.as_ref().map(|n| NameRule::new("target_modules", n)).transpose()?,
            parameters: self.parameter_names().to_vec(),
            exclude: self.exclude_modules.as_ref().map(|n| NameRule::new("exclude_modules", n)).transpose()?,
            inside_saved: kept_whole
                .map(|m| regex("modules_to_save", &format!(r"(^|^.*\.){m}($|\..*)")))
                .collect::<Result<_>>()?,
            // An empty list is no restriction, as in Python.
            layers: self.layers_to_transform.clone().filter(|layers| !layers.as_slice().is_empty()),
            layer_index,
            modules_to_save: self.modules_to_save.clone().unwrap_or_default(),
            bias: self.bias,
        })
    }
}

impl fmt::Display for Targets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.target_modules {
            None => f.write_str("target_modules null"),
            Some(Names::Pattern(pattern)) => write!(f, "target_modules \"{pattern}\""),
            Some(Names::List(list)) => write!(f, "target_modules {list:?}"),
        }?;
        if let Some(parameters) = &self.target_parameters {
            write!(f, " and target_parameters {parameters:?}")?;
        }
        if let Some(layers) = &self.layers_to_transform {
            write!(f, " in layers {:?}", layers.as_slice())?;
        }
        if self.exclude_modules.is_some() {
            f.write_str(" after exclude_modules")?;
        }
        Ok(())
    }
}

/// The compiled form of [`Targets`].
#[derive(Debug)]
pub struct Matcher {
    target: Option<NameRule>,
    parameters: Vec<String>,
    exclude: Option<NameRule>,
    inside_saved: Vec<Regex>,
    layers: Option<OneOrMany<usize>>,
    layer_index: Vec<Regex>,
    modules_to_save: Vec<String>,
    bias: Bias,
}

#[derive(Debug)]
enum NameRule {
    AllLinear,
    Pattern(Regex),
    List(Vec<String>),
}

impl NameRule {
    fn new(field: &'static str, names: &Names) -> Result<Self> {
        Ok(match names {
            Names::Pattern(p) if field == "target_modules" && p.eq_ignore_ascii_case("all-linear") => Self::AllLinear,
            Names::Pattern(p) => Self::Pattern(whole(field, p)?),
            Names::List(list) => Self::List(list.clone()),
        })
    }

    /// Whether the rule names `key`, and whether it does so exactly rather than by a suffix.
    fn find(&self, key: &str, kind: Option<LayerKind>) -> (bool, bool) {
        match self {
            Self::AllLinear => {
                let linear = kind.is_some_and(LayerKind::multiplies);
                (linear && key.rsplit('.').next() != Some("lm_head") && !is_router(key), false)
            }
            Self::Pattern(pattern) => (is_match(pattern, key), true),
            Self::List(list) => {
                let exact = list.iter().any(|name| name == key);
                (exact || list.iter().any(|name| ends_with_segment(key, name)), exact)
            }
        }
    }
}

impl Matcher {
    /// Whether the module `key`, of kind `kind`, is adapted.
    pub fn matches(&self, key: &str, kind: Option<LayerKind>) -> bool {
        self.names_module(key, kind) || self.names_parameter(key, kind)
    }

    /// Whether the weight of the module is one of the parameters to adapt.
    pub(crate) fn names_parameter(&self, key: &str, kind: Option<LayerKind>) -> bool {
        let Some(parameter) = kind.and_then(|kind| parameter(key, kind)) else { return false };
        self.parameters.iter().any(|name| is_named(&parameter, name)) && !self.is_inside_saved(key)
    }

    /// Whether the module is one of those to adapt. The weight of several experts is none: to PEFT it is a parameter.
    pub(crate) fn names_module(&self, key: &str, kind: Option<LayerKind>) -> bool {
        let Some(target) = self.target.as_ref().filter(|_| kind != Some(LayerKind::GroupedLinear)) else {
            return false;
        };
        if self.exclude.as_ref().is_some_and(|rule| rule.find(key, kind).0) || self.is_inside_saved(key) {
            return false;
        }
        let (found, exact) = target.find(key, kind);
        match &self.layers {
            // PEFT looks at the layer index only when a suffix matched, not when the whole name did.
            Some(layers) if found && !exact => {
                self.layer_of(key).is_some_and(|layer| layers.as_slice().contains(&layer))
            }
            _ => found,
        }
    }

    fn is_inside_saved(&self, key: &str) -> bool {
        self.inside_saved.iter().any(|pattern| is_match(pattern, key))
    }

    /// Whether the base parameter `param` of module `key` is trained and saved along with the adapter.
    pub fn trains(&self, key: &str, param: &str, adapted: bool) -> bool {
        self.saves_module(key)
            || match self.bias {
                Bias::None => false,
                Bias::All => param == "bias",
                Bias::Only => param == "bias" && adapted,
            }
    }

    /// Whether the module, or one that contains it, is in `modules_to_save`.
    pub fn saves_module(&self, key: &str) -> bool {
        // PEFT compares the plain end of the name, without asking for a dot before it.
        self.modules_to_save.iter().any(|name| {
            let prefixes = key.match_indices('.').map(|(at, _)| &key[..at]).chain([key]);
            prefixes.into_iter().any(|prefix| prefix.ends_with(name.as_str()))
        })
    }

    /// The entries of `modules_to_save`.
    pub fn modules_to_save(&self) -> &[String] {
        &self.modules_to_save
    }

    fn layer_of(&self, key: &str) -> Option<usize> {
        let captures = self.layer_index.iter().find_map(|pattern| pattern.captures(key).ok().flatten())?;
        captures.get(1)?.as_str().parse().ok()
    }
}

/// The value of the first entry of `patterns` that names `key`: `(.*\.)?(entry)$`, in the order of the map.
///
/// # Errors
/// Names `field` when an entry is not a regular expression.
pub fn pattern_value<'a, T>(field: &str, patterns: &'a IndexMap<String, T>, key: &str) -> Result<Option<&'a T>> {
    for (pattern, value) in patterns {
        if is_match(&regex(field, &format!(r"\A(.*\.)?({pattern})$"))?, key) {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

fn ends_with_segment(key: &str, name: &str) -> bool {
    key.strip_suffix(name).is_some_and(|head| head.ends_with('.'))
}

/// The pattern that matches a whole name.
fn whole(field: &str, pattern: &str) -> Result<Regex> {
    regex(field, &format!(r"\A(?:{pattern})\z"))
}

fn regex(field: &str, pattern: &str) -> Result<Regex> {
    Regex::new(pattern).map_err(|e| Error::config(field, "a regular expression", format!("{pattern}: {e}")))
}

/// A pattern that runs into the engine's backtracking limit counts as no match, so a hostile file cannot hang the loader.
fn is_match(pattern: &Regex, key: &str) -> bool {
    pattern.is_match(key).unwrap_or(false)
}
