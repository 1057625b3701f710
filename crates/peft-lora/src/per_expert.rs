//! Files that PEFT wrote beside `transformers` 4, where each expert had linear layers of its own: `mlp.experts.3.up_proj.lora_A.weight`.
//!
//! With `A` of gate and up one under the other and `B` on a diagonal, the factors of an expert's layers are those of the fused parameters today. PEFT does this for some
//! families, and in others leaves the factors out without a word. A layer that has another scale than the rest has the difference in its `B`.

use std::collections::BTreeMap;

use peft_core::files::{TENSOR_FILE, Values};
use peft_core::{Error, Names, Problem, Result, Scan};

use crate::LoraConfig;

/// An expert's layers: their names, those of Mixtral, the fused parameter that each is a part of, and which part.
const LAYERS: [(&str, &str, &str, usize); 3] =
    [("gate_proj", "w1", GATE_UP, 0), ("up_proj", "w3", GATE_UP, 1), ("down_proj", "w2", DOWN, 0)];
const GATE_UP: &str = "gate_up_proj";
const DOWN: &str = "down_proj";

/// What Mixtral's mixtures were called, and are.
const MIXTRAL: &str = ".block_sparse_moe.";
const MODULE: &str = ".mlp.";

const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";

/// The factors of one expert's layer.
struct Factors<'a> {
    /// The layer as the file calls it.
    path: &'a str,
    /// `[rank, d_in]`
    a: &'a Values,
    /// `[d_out, rank]`
    b: &'a Values,
}

/// The layers of all experts that make up a parameter, by expert and part.
type Parts<'a> = BTreeMap<(usize, usize), Factors<'a>>;

/// The parts of each parameter, by its name and the path of its module.
type Found<'a> = BTreeMap<(&'static str, String), Parts<'a>>;

/// `method` and `tensors` with the parameters of several experts that the model has, in place of their layers.
pub(crate) fn fused(
    mut method: LoraConfig,
    tensors: BTreeMap<String, Values>,
    model: &Scan,
) -> Result<(LoraConfig, BTreeMap<String, Values>)> {
    if model.sites.iter().all(|site| site.experts.is_none()) {
        return Ok((method, tensors));
    }
    let (found, mut kept) = parted(&tensors)?;
    for name in [GATE_UP, DOWN] {
        let all = found.iter().filter(|((other, _), _)| *other == name);
        configure(&mut method, name, &all.collect::<Vec<_>>())?;
    }
    if let (false, Some(Names::List(list))) = (found.is_empty(), &mut method.targets.target_modules) {
        let names = LAYERS.iter().flat_map(|(name, mixtral, ..)| [*name, *mixtral]);
        for name in names.filter(|name| !kept.keys().any(|key| key.contains(&format!(".{name}.")))) {
            list.retain(|entry| entry.rsplit('.').next() != Some(name));
        }
    }
    for ((name, module), parts) in &found {
        // PEFT wraps a module once for each parameter, the first one innermost.
        let inside = *name == GATE_UP && found.contains_key(&(DOWN, module.clone()));
        let prefix = if inside { format!("{module}.base_layer") } else { module.clone() };
        let (a, b) = joined(method.scale_of(&format!("{module}.{name}"))?, &method, parts)?;
        kept.extend([(format!("{prefix}{A}"), a), (format!("{prefix}{B}"), b)]);
    }
    Ok((method, kept))
}

/// The factors of experts' layers, and all other tensors by their names today.
fn parted(tensors: &BTreeMap<String, Values>) -> Result<(Found<'_>, BTreeMap<String, Values>)> {
    let (mut found, mut kept, mut problems) = (Found::new(), BTreeMap::new(), Vec::new());
    for (key, values) in tensors {
        let layer = |suffix| key.strip_suffix(suffix).and_then(|path| Some((path, place(path)?)));
        match (layer(A), layer(B)) {
            (Some((path, (name, module, part))), _) => match tensors.get(&format!("{path}{B}")) {
                Some(b) => drop(found.entry((name, module)).or_default().insert(part, Factors { path, a: values, b })),
                None => problems.push(missing(format!("{path}{B}"))),
            },
            (None, Some((path, _))) if tensors.contains_key(&format!("{path}{A}")) => {}
            (None, Some((path, _))) => problems.push(missing(format!("{path}{A}"))),
            (None, None) => drop(kept.insert(key.replace(MIXTRAL, MODULE), values.clone())),
        }
    }
    problems.extend(found.iter().filter_map(|((name, module), parts)| problem(name, module, parts)));
    if problems.is_empty() { Ok((found, kept)) } else { Err(Error::Tensors { path: TENSOR_FILE.into(), problems }) }
}

/// The parameter that a layer is a part of, the path of its module, and the expert and the part.
fn place(path: &str) -> Option<(&'static str, String, (usize, usize))> {
    let (rest, layer) = path.rsplit_once('.')?;
    let (module, expert) = rest.rsplit_once('.')?;
    let expert = expert.parse().ok().filter(|number: &usize| number.to_string() == expert)?;
    let (.., name, part) = LAYERS.iter().find(|(usual, mixtral, ..)| [*usual, *mixtral].contains(&layer))?;
    module.ends_with(".experts").then(|| (*name, module.replace(MIXTRAL, MODULE), (expert, *part)))
}

fn missing(name: String) -> Problem {
    Problem::Other { path: name, what: "missing, where those of other layers are there".to_owned() }
}

/// What is wrong with the parts of a parameter: the first that is missing, or has another shape than that of the first expert.
fn problem(name: &str, module: &str, parts: &Parts<'_>) -> Option<Problem> {
    let layers: Vec<&str> = LAYERS.iter().filter(|(_, _, of, _)| *of == name).map(|(layer, ..)| *layer).collect();
    let lacks = |at: usize| missing(format!("{module}.{}.{}{A}", at / layers.len(), layers[at % layers.len()]));
    let sizes = |expert_part| parts.get(&expert_part).map(|Factors { a, b, .. }| (&a.shape[..], &b.shape[..]));
    for (at, (place, Factors { path, a, b })) in parts.iter().enumerate() {
        let (Some(of_part), Some(of_all), true) =
            (sizes((0, place.1)), sizes((0, 0)), *place == (at / layers.len(), at % layers.len()))
        else {
            return Some(lacks(at));
        };
        let (([rank, _], [d_out, _]), ([_, d_in], _)) = (of_part, of_all) else {
            let what = format!("expected factors that are matrices, found shapes {:?} and {:?}", a.shape, b.shape);
            return Some(Problem::Other { path: (*path).to_owned(), what });
        };
        for (suffix, expected, found) in [(A, [*rank, *d_in], a), (B, [*d_out, *rank], b)] {
            if found.shape != expected {
                let (name, expected, found) = (format!("{path}{suffix}"), expected.to_vec(), found.shape.clone());
                return Some(Problem::Shape { name, expected, found });
            }
        }
    }
    (!parts.len().is_multiple_of(layers.len())).then(|| lacks(parts.len()))
}

/// The parts of the first expert.
fn first<'a>(parts: &'a Parts<'a>) -> impl Iterator<Item = &'a Factors<'a>> {
    parts.range(..(1, 0)).map(|(_, factors)| factors)
}

/// The rank of the parameter that these make up.
fn rank(parts: &Parts<'_>) -> usize {
    first(parts).map(|factors| factors.a.shape[0]).sum()
}

/// Names the parameter in `method`, with its rank and its scale: the largest of its layers.
fn configure(method: &mut LoraConfig, name: &str, all: &[(&(&'static str, String), &Parts<'_>)]) -> Result<()> {
    let Some(((_, module), parts)) = all.first() else { return Ok(()) };
    let (path, entry, rank) = (format!("{module}.{name}"), format!("experts.{name}"), self::rank(parts));
    if let Some((_, other)) = all.iter().find(|(_, parts)| self::rank(parts) != rank) {
        let found = format!("{} and {rank}", self::rank(other));
        return Err(Error::config("rank_pattern", format!("one rank in all layers of {entry}"), found));
    }
    let mut scale = 0.0_f64;
    for factors in all.iter().flat_map(|(_, parts)| parts.values()) {
        let other = method.scale_of(factors.path)?;
        scale = if other.abs() > scale.abs() { other } else { scale };
    }
    method.targets.target_parameters.get_or_insert_default().push(entry.clone());
    if method.rank_of(&path)? != rank {
        method.rank_pattern.shift_insert(0, entry.clone(), rank);
    }
    if method.scale_of(&path)? != scale {
        let ranks = rank as f64;
        let alpha = scale * if method.use_rslora { ranks.sqrt() } else { ranks };
        method.alpha_pattern.shift_insert(0, entry, alpha);
    }
    Ok(())
}

/// The factors of a parameter as files have them, `[experts · rank, d_in]` and `[d_out, rank · experts]`, for that scale.
fn joined(scale: f64, method: &LoraConfig, parts: &Parts<'_>) -> Result<(Values, Values)> {
    let experts = parts.len() / first(parts).count().max(1);
    let (rank, d_in) = (rank(parts), first(parts).map(|factors| factors.a.shape[1]).next().unwrap_or_default());
    let d_out: usize = first(parts).map(|factors| factors.b.shape[0]).sum();
    let mut b = vec![0.0; d_out * rank * experts];
    for ((expert, part), factors) in parts {
        let before = || first(parts).take(*part);
        let above: usize = before().map(|factors| factors.b.shape[0]).sum();
        let left: usize = before().map(|factors| factors.a.shape[0]).sum();
        let own = method.scale_of(factors.path)?;
        let by = if own == scale { 1.0 } else { (own / scale) as f32 };
        let width = factors.a.shape[0];
        for (at, value) in factors.b.values.iter().enumerate() {
            let (row, column) = (above + at / width, left + at % width);
            b[(row * rank + column) * experts + expert] = value * by;
        }
    }
    let a = parts.values().flat_map(|factors| factors.a.values.iter().copied()).collect();
    Ok((
        Values { shape: vec![experts * rank, d_in], values: a },
        Values { shape: vec![d_out, rank * experts], values: b },
    ))
}
