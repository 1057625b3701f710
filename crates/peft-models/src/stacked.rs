//! The two forms that experts have in files: a tensor for each layer of each expert, or one for all experts.
//!
//! `transformers` 4 wrote, and 5 writes, the first; models in memory have the second, here and there, with the gate's rows over those of the other:
//! `mlp.experts.gate_up_proj` `[experts, 2 · inner, hidden]` and `mlp.experts.down_proj` `[experts, hidden, inner]`. Mixtral has names of its own in the first.

use std::collections::BTreeMap;
use std::path::Path;

use peft_core::kernels::PackedData;
use serde_json::Value;

use crate::load::HfTensor;
use crate::weights::{TensorInfo, Weights};
use crate::{Error, Result};

/// Names of the experts' layers where each has tensors of its own.
struct Names {
    /// The module that router and experts are in.
    module: &'static str,
    gate: &'static str,
    up: &'static str,
    down: &'static str,
}

/// The module's name in memory.
const MODULE: &str = "mlp";
const GATE_UP: &str = "gate_up_proj";
const DOWN: &str = "down_proj";
const USUAL: Names = Names { module: MODULE, gate: "gate_proj", up: "up_proj", down: DOWN };
const MIXTRAL: Names = Names { module: "block_sparse_moe", gate: "w1", up: "w3", down: "w2" };

/// Tensors of a source with those of experts put together, and all by the names that they have in memory.
pub struct Stacked<'a> {
    inner: &'a dyn Weights,
    tensors: Vec<TensorInfo>,
    /// What each tensor with another name or form is made of, one after the other.
    parts: BTreeMap<String, Vec<&'a TensorInfo>>,
}

impl<'a> Stacked<'a> {
    /// `inner`, which may have either form, or no experts at all.
    ///
    /// # Errors
    /// [`Error::Weights`] when an expert among others lacks a tensor, or its shape is not that of the others.
    pub fn new(inner: &'a dyn Weights) -> Result<Self> {
        let (mut found, mut parts, mut tensors) = (BTreeMap::<_, BTreeMap<_, _>>::new(), BTreeMap::new(), Vec::new());
        for info in inner.tensors() {
            if let Some((name, place)) = place(&info.name) {
                found.entry(name).or_default().insert(place, info);
            } else if let Some(name) = renamed(&info.name) {
                tensors.push(TensorInfo { name: name.clone(), ..info.clone() });
                parts.insert(name, vec![info]);
            } else {
                tensors.push(info.clone());
            }
        }
        let mut problems = Vec::new();
        for (name, pieces) in found {
            problems.extend(problem(&name, &pieces));
            tensors.push(joined(&name, &pieces));
            parts.insert(name, pieces.into_values().collect());
        }
        if !problems.is_empty() {
            return Err(Error::Weights { path: inner.path().to_owned(), problems });
        }
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self { inner, tensors, parts })
    }
}

impl Weights for Stacked<'_> {
    fn path(&self) -> &Path {
        self.inner.path()
    }

    fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    fn read(&self, info: &TensorInfo) -> Result<Vec<f32>> {
        let Some(parts) = self.parts.get(&info.name) else { return self.inner.read(info) };
        let mut values = Vec::with_capacity(info.shape.iter().product());
        for part in parts {
            values.extend(self.inner.read(part)?);
        }
        Ok(values)
    }

    fn packed(&self, info: &TensorInfo) -> Result<Option<PackedData>> {
        match self.parts.get(&info.name).map(Vec::as_slice) {
            None => self.inner.packed(info),
            Some([part]) => self.inner.packed(part),
            Some(_) => Ok(None),
        }
    }
}

/// Which expert, and which of the layers whose rows are one under the other.
type Place = (usize, usize);

/// The tensor in memory that the tensor of one expert is a part of, and where in it.
fn place(name: &str) -> Option<(String, Place)> {
    let (rest, layer) = name.strip_suffix(".weight")?.rsplit_once('.')?;
    let (experts, expert) = rest.rsplit_once('.')?;
    let expert: usize = expert.parse().ok().filter(|number: &usize| number.to_string() == expert)?;
    [USUAL, MIXTRAL].into_iter().find_map(|names| {
        let prefix = experts.strip_suffix(".experts")?.strip_suffix(names.module)?;
        let at = |tensor: &str, place| Some((format!("{prefix}{MODULE}.experts.{tensor}"), (expert, place)));
        match layer {
            gate if gate == names.gate => at(GATE_UP, 0),
            up if up == names.up => at(GATE_UP, 1),
            down if down == names.down => at(DOWN, 0),
            _ => None,
        }
    })
}

/// The name in memory of Mixtral's router.
fn renamed(name: &str) -> Option<String> {
    let (prefix, rest) = name.split_once(MIXTRAL.module)?;
    (rest == ".gate.weight").then(|| format!("{prefix}{MODULE}{rest}"))
}

/// What is wrong with the parts of a tensor: the first that is missing, or has another shape than the first of all.
fn problem(name: &str, parts: &BTreeMap<Place, &TensorInfo>) -> Option<String> {
    let per_expert = if name.ends_with(GATE_UP) { 2 } else { 1 };
    let expected = &parts.first_key_value()?.1.shape;
    for (at, (place, info)) in parts.iter().enumerate() {
        if *place != (at / per_expert, at % per_expert) {
            let which = if per_expert == 1 { "down" } else { ["gate", "up"][at % per_expert] };
            return Some(format!("  - {name}: the {which} projection of expert {} is missing", at / per_expert));
        }
        if info.shape != *expected || expected.len() != 2 {
            return Some(format!("  - {}: expected shape {expected:?}, found {:?}", info.name, info.shape));
        }
    }
    (!parts.len().is_multiple_of(per_expert))
        .then(|| format!("  - {name}: the up projection of expert {} is missing", parts.len() / per_expert))
}

/// What the parts, of which nothing is [wrong](problem), are together.
fn joined(name: &str, parts: &BTreeMap<Place, &TensorInfo>) -> TensorInfo {
    let experts = parts.keys().map(|(expert, _)| expert).max().map_or(0, |last| last.saturating_add(1));
    let first = parts.values().next();
    let shape = match first.map(|info| info.shape.as_slice()) {
        Some([rows, columns]) => vec![experts, rows * (parts.len() / experts.max(1)), *columns],
        _ => Vec::new(),
    };
    TensorInfo {
        name: name.to_owned(),
        shape,
        dtype: first.map(|info| info.dtype.clone()).unwrap_or_default(),
        bytes: parts.values().map(|info| info.bytes).sum(),
        packed_rows: false,
    }
}

/// Tensors as a model has them, in the form in which `base` has them.
pub fn as_in(base: &dyn Weights, tensors: BTreeMap<String, HfTensor>) -> BTreeMap<String, HfTensor> {
    let has = |name: &str| base.find(name).is_some();
    unstacked(tensors, |prefix, rest| {
        let in_memory = has(&format!("{prefix}{MODULE}.{rest}"));
        let of = |names: &Names| match rest {
            ROUTER => has(&format!("{prefix}{}.{rest}", names.module)),
            _ => has(&format!("{prefix}{}.experts.0.{}.weight", names.module, names.down)),
        };
        if in_memory { None } else { [USUAL, MIXTRAL].into_iter().find(of) }
    })
}

/// Tensors as a model has them, in the form that `transformers` writes for a model with this configuration.
pub(crate) fn as_usual(config: &Value, tensors: BTreeMap<String, HfTensor>) -> BTreeMap<String, HfTensor> {
    let mixtral = config.get("model_type").and_then(Value::as_str) == Some("mixtral");
    unstacked(tensors, |_, _| Some(if mixtral { MIXTRAL } else { USUAL }))
}

const ROUTER: &str = "gate.weight";

/// Takes the tensors of experts apart; `names` says what they are to be called, given what stands before and behind the module's name, or that they stay.
fn unstacked(
    tensors: BTreeMap<String, HfTensor>,
    names: impl Fn(&str, &str) -> Option<Names>,
) -> BTreeMap<String, HfTensor> {
    let apart = |(name, tensor): (String, HfTensor)| {
        let module = name.rsplit_once(".mlp.").map(|(prefix, rest)| (format!("{prefix}."), rest));
        let Some((prefix, rest)) = module else { return vec![(name, tensor)] };
        let layers = |names: &Names| match rest.strip_prefix("experts.") {
            Some(GATE_UP) => Some(vec![names.gate, names.up]),
            Some(DOWN) => Some(vec![names.down]),
            _ => None,
        };
        match names(&prefix, rest) {
            Some(names) if rest == ROUTER => vec![(format!("{prefix}{}.{rest}", names.module), tensor)],
            Some(names) => match layers(&names) {
                Some(layers) => split(&format!("{prefix}{}.experts", names.module), &layers, &tensor),
                None => vec![(name, tensor)],
            },
            None => vec![(name, tensor)],
        }
    };
    tensors.into_iter().flat_map(apart).collect()
}

/// The tensors of each expert, the rows of each of its layers apart.
fn split(experts: &str, layers: &[&str], tensor: &HfTensor) -> Vec<(String, HfTensor)> {
    let [_, rows, columns] = tensor.shape[..] else { return vec![(experts.to_owned(), tensor.clone())] };
    let rows = rows / layers.len();
    let names = (0..).flat_map(|expert| layers.iter().map(move |layer| format!("{experts}.{expert}.{layer}.weight")));
    let parts = tensor.values.chunks((rows * columns).max(1));
    names
        .zip(parts)
        .map(|(name, values)| (name, HfTensor { shape: vec![rows, columns], values: values.to_vec() }))
        .collect()
}
