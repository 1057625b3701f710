//! Weights into a model and out of it, by Hugging Face's names.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use burn::module::{Module, Param, ParamId};
use burn::tensor::{DType, Device, Tensor, TensorData};
use peft_core::files::transpose;
use peft_core::kernels::{PackedData, PackedLayout, PackedMatrix};
use peft_core::{LayerKind, ParamMapper, ParamVisitor, PathStack, Site, hf_name, map_params, pack, scan, visit_params};
use peft_quant::Quantization;
use rayon::prelude::*;

use crate::weights::{TensorInfo, Weights};
use crate::{Error, Result};

/// In which form linear layers, those of experts too, come into memory.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Packing {
    /// Packed where the file holds them packed, with the file's own numbers; but for experts, which are unpacked while they are read.
    #[default]
    AsStored,
    /// Dense, all of them.
    Dense,
    /// As stored where the file holds them packed, but for experts; others are packed while they are read, so that the dense model never exists.
    Quantize(Quantization),
    /// All packed while they are read; those that the file holds packed are unpacked first, and lose once more.
    Requantize(Quantization),
}

/// The type of the frozen matrices: linear layers, embedding tables, and the products with them. All else is f32: activations, norms, adapters, optimizer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// 32 bits.
    #[default]
    F32,
    /// bfloat16, with sums in f32: half the memory, and the fast products of processors that have them. Packed layers stay packed; only their products change.
    Bf16,
}

impl Precision {
    /// Whether the device has the type.
    fn check(self, device: &Device) -> Result<()> {
        match self {
            Self::Bf16 if !device.supports_dtype(DType::BF16) => Err(Error::Unsupported {
                what: "bfloat16 on this device".to_owned(),
                hint: "load the model in f32, which every device computes".to_owned(),
            }),
            _ => Ok(()),
        }
    }
}

/// Puts `weights` into `module`: any Burn module whose paths are the names of `transformers`.
///
/// `ignored` says which tensors of the source may go unused, for instance buffers. Linear layers are read and packed on all cores; besides the packed
/// model, memory holds one dense tensor a core, or one with all experts of a block.
///
/// # Errors
/// [`Error::Weights`] with every missing, unknown and misshapen tensor; or the first that cannot be read.
pub fn load_weights<M: Module>(
    module: M,
    weights: &dyn Weights,
    packing: &Packing,
    precision: Precision,
    ignored: impl Fn(&str) -> bool,
) -> Result<M> {
    load_weights_with(module, weights, packing, precision, ignored, |_| false).map(|(module, _)| module)
}

/// What of a model and of its source did not meet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unmatched {
    /// Parameters that the source does not have: they keep their initial values, and are there to be trained.
    pub fresh: Vec<String>,
    /// Tensors that the model has no use for.
    pub unused: Vec<String>,
}

/// [`load_weights`] where the source need not have the parameters for which `optional` holds: a head for a new task.
///
/// # Errors
/// As [`load_weights`].
pub fn load_weights_with<M: Module>(
    module: M,
    weights: &dyn Weights,
    packing: &Packing,
    precision: Precision,
    ignored: impl Fn(&str) -> bool,
    optional: impl Fn(&str) -> bool,
) -> Result<(M, Unmatched)> {
    module.devices().iter().try_for_each(|device| precision.check(device))?;
    let mut plan =
        Plan { weights, optional: &optional, sources: HashMap::new(), problems: Vec::new(), fresh: Vec::new() };
    visit_params(&module, &mut plan);
    let Plan { sources, mut problems, fresh, .. } = plan;
    let used: BTreeSet<&str> = sources.values().map(|source| source.info.name.as_str()).collect();
    let unused = weights.tensors().iter().map(|info| info.name.clone()).filter(|name| !used.contains(name.as_str()));
    let (unused, unknown): (Vec<String>, Vec<String>) = unused.partition(|name| ignored(name));
    problems.extend(unknown.iter().map(|name| format!("  - {name}: not part of this model")));
    if !problems.is_empty() {
        return Err(Error::Weights { path: weights.path().to_owned(), problems });
    }
    let module = fill(module, weights, &sources, packing, precision)?;
    Ok((module, Unmatched { fresh, unused }))
}

/// Puts the values of `sources` into `module`: those that are to be packed first, on all cores.
fn fill<M: Module>(
    module: M,
    weights: &dyn Weights,
    sources: &HashMap<ParamId, Source<'_>>,
    packing: &Packing,
    precision: Precision,
) -> Result<M> {
    let sites = scan(&module).sites;
    let packed = |site: &Site| {
        let packed = sources.get(&site.id)?.packed(weights, site, packing).transpose()?;
        Some(packed.map(|data| (site.id, data)))
    };
    let devices: HashMap<ParamId, &Device> = sites.iter().map(|site| (site.id, &site.device)).collect();
    // The weights of all experts of a block are large: one at a time, which is packed on all cores by itself.
    let (experts, layers): (Vec<&Site>, Vec<&Site>) = sites.iter().partition(|site| site.experts.is_some());
    let mut all = layers.into_par_iter().filter_map(packed).collect::<Result<Vec<_>>>()?;
    all.extend(experts.into_iter().filter_map(packed).collect::<Result<Vec<_>>>()?);
    let packed = all.into_iter().map(|(id, data)| {
        let matrix = |data| {
            let matrix = PackedMatrix::new(data, devices[&id]);
            if precision == Precision::Bf16 { matrix.in_bf16() } else { matrix }
        };
        (id, data.into_iter().map(matrix).collect())
    });
    let packed = packed.collect();
    let module = pack(module, packed)?;
    let is_matrix = |kind: LayerKind| kind.packs() || kind == LayerKind::Embedding;
    // The choice of experts would hang on what is rounded.
    let matrices = sites.iter().filter(|site| is_matrix(site.kind) && !site.is_router());
    let matrices = matrices.map(|site| site.id).filter(|_| precision == Precision::Bf16).collect();
    let mut loader = Loader { weights, sources, matrices, failed: None };
    let module = map_params(module, &mut loader);
    loader.failed.map_or(Ok(module), Err)
}

/// Where a parameter's values come from.
struct Source<'a> {
    info: &'a TensorInfo,
    /// Whether the file holds the transpose.
    transposed: bool,
}

impl Source<'_> {
    /// The weight of `site` in its packed form, if it is to have one; of experts that of each.
    fn packed(&self, weights: &dyn Weights, site: &Site, packing: &Packing) -> Result<Option<Vec<PackedData>>> {
        if !site.kind.packs() || *packing == Packing::Dense {
            return Ok(None);
        }
        let as_stored = site.experts.is_none() && matches!(packing, Packing::AsStored | Packing::Quantize(_));
        if let Some(stored) = if as_stored { weights.packed(self.info)? } else { None } {
            return Ok(Some(vec![stored]));
        }
        let (Packing::Quantize(quantization) | Packing::Requantize(quantization)) = packing else { return Ok(None) };
        let Some(format) = quantization.format_of(site)? else { return Ok(None) };
        let values = weights.read(self.info)?;
        // The rows of a linear layer and of experts are what their files hold; GPT-2's layers are stored the other way.
        let are_rows = self.transposed || site.experts.is_some();
        let rows = if are_rows { values } else { transpose(&values, site.d_in, site.d_out) };
        let shape = [site.d_out, site.d_in];
        let matrices = rows.chunks((site.d_out * site.d_in).max(1)).map(|rows| format.pack(rows)?.into_matrix(shape));
        let packed: std::result::Result<Vec<_>, peft_quant::Error> = matrices.collect();
        packed.map(Some).map_err(|e| Error::format(weights.path(), format!("{}: {e}", self.info.name)))
    }
}

/// Finds the source of each parameter.
struct Plan<'a> {
    weights: &'a dyn Weights,
    /// Which parameters may be missing.
    optional: &'a dyn Fn(&str) -> bool,
    sources: HashMap<ParamId, Source<'a>>,
    problems: Vec<String>,
    fresh: Vec<String>,
}

impl ParamVisitor for Plan<'_> {
    fn float<const D: usize>(&mut self, at: &PathStack, param: &Param<Tensor<D>>) {
        let location = at.locate();
        let hf = hf_name(&location, D);
        let info = self.weights.find_parameter(&hf.name);
        let linear = matches!(location.kind, Some(LayerKind::Linear | LayerKind::Conv1D));
        let transposed = hf.transposed || (linear && info.is_some_and(|info| info.packed_rows));
        let mut expected = param.lazy_shape().to_vec();
        if transposed {
            expected.reverse();
        }
        match info {
            None if (self.optional)(&hf.name) => self.fresh.push(hf.name),
            None => self.problems.push(format!("  - {}: missing; expected shape {expected:?}", hf.name)),
            Some(info) if info.shape != expected => {
                self.problems.push(format!("  - {}: expected shape {expected:?}, found {:?}", info.name, info.shape));
            }
            Some(info) => drop(self.sources.insert(param.id, Source { info, transposed })),
        }
    }
}

/// Fills the parameters that are not packed.
struct Loader<'a> {
    weights: &'a dyn Weights,
    sources: &'a HashMap<ParamId, Source<'a>>,
    /// Layers in 16 bits.
    matrices: HashSet<ParamId>,
    failed: Option<Error>,
}

impl ParamMapper for Loader<'_> {
    fn float<const D: usize>(&mut self, _at: &PathStack, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(source) = self.sources.get(&param.id).filter(|_| self.failed.is_none()) else { return param };
        let shape = param.lazy_shape().to_vec();
        match self.weights.read(source.info) {
            Ok(values) => {
                let values = match shape[..] {
                    [rows, columns] if source.transposed => transpose(&values, columns, rows),
                    _ => values,
                };
                // What was frozen stays so. The random initial value is never made: a lazy parameter is replaced, not read.
                let trained = !param.is_initialized() || param.is_require_grad();
                let dtype = if self.matrices.contains(&param.id) { DType::BF16 } else { DType::F32 };
                let value = Tensor::from_data(TensorData::new(values, shape), (&param.lazy_device(), dtype));
                Param::initialized(param.id, value).set_require_grad(trained)
            }
            Err(error) => {
                self.failed = Some(error);
                param
            }
        }
    }
}

/// One tensor of a model, by Hugging Face's name and in its orientation.
#[derive(Clone, Debug, PartialEq)]
pub struct HfTensor {
    /// In the file's orientation.
    pub shape: Vec<usize>,
    /// Row-major.
    pub values: Vec<f32>,
}

/// The parameters of `module` by Hugging Face's names, those for which `wanted` holds.
///
/// # Errors
/// When the device fails to hand out a tensor, or a wanted weight is packed: merge first, or quantise the files instead.
pub fn export_weights<M: Module>(module: &M, wanted: impl Fn(&str) -> bool) -> Result<BTreeMap<String, HfTensor>> {
    let mut exporter = Exporter { wanted, tensors: BTreeMap::new(), failed: None };
    visit_params(module, &mut exporter);
    exporter.failed.map_or(Ok(exporter.tensors), Err)
}

struct Exporter<F> {
    wanted: F,
    tensors: BTreeMap<String, HfTensor>,
    failed: Option<Error>,
}

impl<F: Fn(&str) -> bool> ParamVisitor for Exporter<F> {
    fn packed(&mut self, at: &PathStack, _layout: PackedLayout) {
        let hf = hf_name(&at.locate(), 2);
        if (self.wanted)(&hf.name) {
            let what = "the weight is packed; only dense weights can be written".to_owned();
            self.failed = Some(Error::format(hf.name, what));
        }
    }

    fn float<const D: usize>(&mut self, at: &PathStack, param: &Param<Tensor<D>>) {
        let location = at.locate();
        let hf = hf_name(&location, D);
        if location.field.is_some() || !(self.wanted)(&hf.name) || self.failed.is_some() {
            return;
        }
        let shape = param.lazy_shape().to_vec();
        match param.base().try_into_data() {
            Ok(data) => {
                let values: Vec<f32> = data.iter::<f32>().collect();
                let tensor = match (hf.transposed, &shape[..]) {
                    (true, [rows, columns]) => {
                        HfTensor { values: transpose(&values, *rows, *columns), shape: vec![*columns, *rows] }
                    }
                    _ => HfTensor { shape, values },
                };
                self.tensors.insert(hf.name, tensor);
            }
            Err(e) => {
                self.failed = Some(Error::format(hf.name, format!("the device could not hand out the tensor: {e:?}")));
            }
        }
    }
}
