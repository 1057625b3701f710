//! Several LoRA adapters into one, by weights: `ΔW = Σ wᵢ·sᵢ·Aᵢ·Bᵢ`.
//!
//! Hugging Face's `add_weighted_adapter` sums factors (`linear`, with cross terms) or applies the scale twice (`svd`); here every form
//! reaches the sum above: exactly as [`Combination::Cat`], and in the least-squares sense of a given rank as [`Combination::Svd`].
//! [`Combination::Linear`] is the same sum for adapters that share `A` or `B`, exact and without a growth in rank.

use std::collections::{BTreeMap, BTreeSet};

use nalgebra::DMatrix;
use peft_core::files::Values;
use peft_core::{AdapterFile, Error, Names, Result, Targets};

use crate::LoraConfig;

/// How adapters are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Combination {
    /// Sum of one factor when the other is the same in all adapters; an error where neither is.
    Linear,
    /// Factors side by side: the rank is the sum of the ranks. Exact.
    Cat,
    /// The best approximation of the sum by this rank (Eckart and Young 1936); exact when the rank is at least that of the sum.
    Svd {
        /// Rank of the result.
        rank: usize,
    },
}

/// Factors of one module in the file's orientation, in double precision.
struct Factors {
    /// `[rank, d_in]`
    a: DMatrix<f64>,
    /// `[d_out, rank]`
    b: DMatrix<f64>,
    /// Weight times scale.
    factor: f64,
}

/// The adapter whose update is the weighted sum of the updates of `adapters`; its scale is one.
///
/// # Errors
/// When there is none, a weight is not finite, the rank asked for is 0, tensors do not fit, an adapter trains more than `A` and `B`, or, for
/// [`Combination::Linear`], the adapters share neither factor.
pub fn combine(adapters: &[(AdapterFile<LoraConfig>, f64)], how: Combination) -> Result<AdapterFile<LoraConfig>> {
    let Some((first, _)) = adapters.first() else {
        return Err(Error::config("adapters", "at least one", 0));
    };
    if how == (Combination::Svd { rank: 0 }) {
        return Err(Error::config("rank", "at least 1", 0));
    }
    let mut modules: BTreeMap<(String, bool), Vec<Factors>> = BTreeMap::new();
    for (file, weight) in adapters {
        one_layer_each(&file.method)?;
        if !weight.is_finite() {
            return Err(Error::config("weights", "finite numbers", weight));
        }
        if file.base_fingerprint != first.base_fingerprint {
            let name =
                |print: &Option<String>| print.clone().unwrap_or_else(|| "the model as others have it".to_owned());
            let found = name(&file.base_fingerprint);
            return Err(Error::config("adapters", format!("one base, {}", name(&first.base_fingerprint)), found));
        }
        for ((module, embedding), (a, b)) in factors(file)? {
            let factor = weight * file.method.scale_of(&module)?;
            modules.entry((module, embedding)).or_default().push(Factors { a, b, factor });
        }
    }
    let mut rank_pattern = indexmap::IndexMap::new();
    let mut tensors = BTreeMap::new();
    for ((module, embedding), parts) in &modules {
        let (a, b) = sum(module, parts, how)?;
        rank_pattern.insert(format!("^{}", escape(module)), a.nrows());
        let [key_a, key_b] = keys(*embedding);
        tensors.insert(format!("{module}.{key_a}"), values(&a));
        tensors.insert(format!("{module}.{key_b}"), values(&b));
    }
    let rank = rank_pattern.values().copied().max().unwrap_or(1);
    rank_pattern.retain(|_, r| *r != rank);
    let alpha_pattern = rank_pattern.iter().map(|(k, r)| (k.clone(), *r as f64)).collect();
    let targets = Targets {
        target_modules: Some(Names::List(modules.into_keys().map(|(module, _)| module).collect())),
        ..Targets::default()
    };
    let fan_in_fan_out = first.method.fan_in_fan_out;
    let method = LoraConfig { rank_pattern, alpha_pattern, fan_in_fan_out, ..LoraConfig::new(rank, targets) };
    Ok(AdapterFile { method, tensors, ..first.clone() })
}

/// Refuses factors of several experts, whose rows and columns are not those of one rank.
pub(crate) fn one_layer_each(method: &LoraConfig) -> Result<()> {
    match method.targets.parameter_names() {
        [] => Ok(()),
        names => {
            Err(Error::config("target_parameters", "null here, where each adapter is on one layer", names.join(", ")))
        }
    }
}

type ModuleFactors = BTreeMap<(String, bool), (DMatrix<f64>, DMatrix<f64>)>;

/// The factors of every module; whether the module is an embedding is part of the key.
fn factors(file: &AdapterFile<LoraConfig>) -> Result<ModuleFactors> {
    let mut modules: BTreeSet<(String, bool)> = BTreeSet::new();
    for key in file.tensors.keys() {
        let known = [false, true].into_iter().find_map(|embedding| {
            let module = keys(embedding).into_iter().find_map(|k| key.strip_suffix(k)?.strip_suffix('.'))?;
            Some((module.to_owned(), embedding))
        });
        let what = || Error::config("adapters", "LoRA factors only (no bias, no modules_to_save)", key);
        modules.insert(known.ok_or_else(what)?);
    }
    let matrix = |key: String| {
        let found = file.tensors.get(&key);
        match found.map(|v| (&v.shape[..], v)) {
            Some(([rows, columns], v)) => {
                Ok(DMatrix::from_row_iterator(*rows, *columns, v.values.iter().map(|x| f64::from(*x))))
            }
            _ => Err(Error::config(key, "a matrix", if found.is_some() { "another rank" } else { "nothing" })),
        }
    };
    modules
        .into_iter()
        .map(|(module, embedding)| {
            let [key_a, key_b] = keys(embedding);
            let (a, b) = (matrix(format!("{module}.{key_a}"))?, matrix(format!("{module}.{key_b}"))?);
            if a.nrows() != b.ncols() {
                return Err(Error::config(module, format!("rank {} in both factors", a.nrows()), b.ncols()));
            }
            Ok(((module, embedding), (a, b)))
        })
        .collect()
}

fn keys(embedding: bool) -> [&'static str; 2] {
    if embedding { ["lora_embedding_A", "lora_embedding_B"] } else { ["lora_A.weight", "lora_B.weight"] }
}

/// `(A, B)` of one module with `B·A = Σ factor·Bᵢ·Aᵢ`.
fn sum(module: &str, parts: &[Factors], how: Combination) -> Result<(DMatrix<f64>, DMatrix<f64>)> {
    let (d_in, d_out) = (parts[0].a.ncols(), parts[0].b.nrows());
    if let Some(other) = parts.iter().find(|p| (p.a.ncols(), p.b.nrows()) != (d_in, d_out)) {
        return Err(Error::config(
            module,
            format!("{d_out} x {d_in}"),
            format!("{} x {}", other.b.nrows(), other.a.ncols()),
        ));
    }
    match how {
        Combination::Cat => Ok(cat(parts)),
        Combination::Linear if parts.iter().all(|p| p.a == parts[0].a) => {
            Ok((parts[0].a.clone(), parts.iter().map(|p| &p.b * p.factor).sum()))
        }
        Combination::Linear if parts.iter().all(|p| p.b == parts[0].b) => {
            Ok((parts.iter().map(|p| &p.a * p.factor).sum(), parts[0].b.clone()))
        }
        Combination::Linear => {
            Err(Error::config("combination", "cat or svd: linear is exact only when all adapters share A or B", module))
        }
        Combination::Svd { rank } => truncate(cat(parts), rank.clamp(1, d_in.min(d_out))),
    }
}

fn cat(parts: &[Factors]) -> (DMatrix<f64>, DMatrix<f64>) {
    let rank = parts.iter().map(|p| p.a.nrows()).sum();
    let mut a = DMatrix::zeros(rank, parts[0].a.ncols());
    let mut b = DMatrix::zeros(parts[0].b.nrows(), rank);
    let mut at = 0;
    for part in parts {
        let r = part.a.nrows();
        a.rows_mut(at, r).copy_from(&(&part.a * part.factor));
        b.columns_mut(at, r).copy_from(&part.b);
        at += r;
    }
    (a, b)
}

/// Truncated SVD of `B·A` without forming it: with `B = Q₁R₁` and `Aᵀ = Q₂R₂`, only the small core `R₁R₂ᵀ` is decomposed.
fn truncate((a, b): (DMatrix<f64>, DMatrix<f64>), rank: usize) -> Result<(DMatrix<f64>, DMatrix<f64>)> {
    let (left, right) = (b.qr(), a.transpose().qr());
    let core = left.r() * right.r().transpose();
    let svd = core.svd(true, true);
    let (Some(u), Some(v_t)) = (svd.u, svd.v_t) else {
        return Err(Error::config("combination", "a converging SVD", "none"));
    };
    let kept = rank.min(svd.singular_values.len());
    let mut order: Vec<usize> = (0..svd.singular_values.len()).collect();
    order.sort_by(|x, y| svd.singular_values[*y].total_cmp(&svd.singular_values[*x]));
    let mut b = DMatrix::zeros(u.nrows(), kept);
    let mut a = DMatrix::zeros(kept, v_t.ncols());
    for (to, from) in order.into_iter().take(kept).enumerate() {
        // The root of each singular value in both factors keeps them of one size, which f32 files and further training like.
        let root = svd.singular_values[from].sqrt();
        b.set_column(to, &(u.column(from) * root));
        a.set_row(to, &(v_t.row(from) * root));
    }
    Ok((a * right.q().transpose(), left.q() * b))
}

fn values(matrix: &DMatrix<f64>) -> Values {
    let shape = vec![matrix.nrows(), matrix.ncols()];
    Values { shape, values: matrix.transpose().iter().map(|v| *v as f32).collect() }
}

/// A module path as a regular expression.
fn escape(module: &str) -> String {
    module.replace('.', r"\.")
}
