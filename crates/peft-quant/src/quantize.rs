//! Which weights of a model are packed, and how: for any Burn module in memory, and for loaders that pack while they read.

use std::collections::HashMap;
use std::fmt;

use burn::module::{Module, Param, ParamId};
use burn::tensor::Tensor;
use indexmap::IndexMap;
use peft_core::kernels::{BlockScales, PackedData, PackedLayout, PackedMatrix};
use peft_core::{ParamVisitor, PathStack, Problem, Site, pack, pattern_value, scan, visit_params};

use crate::{Code, Error, Packed, Statistics, dynamic_map};

/// How a weight is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// What the numbers stand for.
    pub code: Code,
    /// Values of a block.
    pub block: usize,
    /// Whether the scales of the blocks are packed as well.
    pub double_quant: bool,
}

impl Format {
    /// NF4 in blocks of 64 with double quantisation, as in the paper of QLoRA: 4.127 bits a value.
    pub const NF4: Self = Self { code: Code::Nf4, block: 64, double_quant: true };

    /// Bits a value, in large weights.
    ///
    /// ```
    /// # use peft_quant::Format;
    /// assert_eq!((Format::NF4.bits() * 1000.0).round(), 4127.0);
    /// ```
    pub fn bits(self) -> f64 {
        let block = self.block as f64;
        let scale = match (self.code, self.double_quant) {
            (Code::Int4Affine, _) => 64.0,
            (_, false) => 32.0,
            (_, true) => 8.0 + 32.0 / crate::NESTED_BLOCK as f64,
        };
        self.code.bits() as f64 + scale / block
    }

    /// Packs values in this format.
    ///
    /// # Errors
    /// As [`Packed::pack`].
    pub fn pack(self, values: &[f32]) -> Result<Packed, Error> {
        Packed::pack(values, self.code, self.block, self.double_quant)
    }
}

impl Default for Format {
    fn default() -> Self {
        Self::NF4
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let double = if self.double_quant { " with double quantisation" } else { "" };
        write!(f, "{} in blocks of {}{double}", self.code.name(), self.block)
    }
}

/// Which linear layers of a model are packed, those of experts too, and how. Embeddings and norms never are: they are not multiplied by.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantization {
    /// The format of all layers that nothing else is said of.
    pub format: Format,
    /// Modules that stay as they are, with all below them, by the ends of their names.
    pub skip: Vec<String>,
    /// Other formats for modules that a name or regular expression matches; the first entry that matches counts.
    pub pattern: IndexMap<String, Format>,
}

impl Default for Quantization {
    fn default() -> Self {
        Self::new(Format::NF4)
    }
}

impl Quantization {
    /// All linear layers and experts but the output head, `lm_head`, in that format.
    pub fn new(format: Format) -> Self {
        Self { format, skip: vec!["lm_head".to_owned()], pattern: IndexMap::new() }
    }

    /// The format of a layer; `None` when it stays as it is.
    ///
    /// # Errors
    /// When an entry of `pattern` is no regular expression.
    pub fn format_of(&self, site: &Site) -> peft_core::Result<Option<Format>> {
        let skipped = |name: &String| {
            let at_ends = |at: usize| {
                let (before, after) = (&site.path[..at], &site.path[at + name.len()..]);
                (before.is_empty() || before.ends_with('.')) && (after.is_empty() || after.starts_with('.'))
            };
            !name.is_empty() && site.path.match_indices(name.as_str()).any(|(at, _)| at_ends(at))
        };
        if !site.kind.packs() || site.is_router() || self.skip.iter().any(skipped) {
            return Ok(None);
        }
        Ok(Some(*pattern_value("pattern", &self.pattern, &site.path)?.unwrap_or(&self.format)))
    }
}

/// Packs the linear layers of a model in memory, and its experts.
///
/// ```
/// use burn::{nn::{Linear, LinearConfig}, tensor::{Device, Tensor}};
/// use peft_core::{Peft, linear};
/// use peft_quant::{Quantization, quantize};
///
/// #[derive(burn::module::Module, Debug)]
/// struct Model { proj: Linear }
///
/// let device = Device::flex();
/// let model = Model { proj: LinearConfig::new(256, 256).with_bias(false).init(&device) };
/// let packed = quantize(model.clone(), &Quantization::default())?;
/// assert_eq!((packed.trainable().total, packed.trainable().total_bytes), (65536, 32768 + 1024 + 4 * 4 + 4 + 16 * 4 + 256 * 4));
/// let x = Tensor::<2>::ones([1, 256], &device);
/// let error = (linear(&packed.proj, x.clone()) - linear(&model.proj, x)).abs().max().into_scalar::<f32>();
/// assert!(error < 0.5, "{error}");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// When a weight is not finite, carries an adapter, or the device does not hand it out. Weights that are packed already stay as they are. All layers at once; nothing is changed then.
pub fn quantize<T: Module>(module: T, quantization: &Quantization) -> peft_core::Result<T> {
    quantize_with(module, quantization, |_, format, rows| format.pack(rows))
}

/// [`quantize`] with another way of packing a layer: `pack_layer` is given the layer, its format and its rows `[d_out, d_in]`; of several experts those of each.
pub(crate) fn quantize_with<T: Module>(
    module: T,
    quantization: &Quantization,
    pack_layer: impl FnMut(&Site, Format, &[f32]) -> Result<Packed, Error>,
) -> peft_core::Result<T> {
    let mut wanted = HashMap::new();
    for site in scan(&module).sites.into_iter().filter(|site| site.packed.is_none()) {
        if let Some(format) = quantization.format_of(&site)? {
            wanted.insert(site.id, (format, site));
        }
    }
    let mut packer = Packer { wanted, pack_layer, packed: HashMap::new(), problems: Vec::new() };
    visit_params(&module, &mut packer);
    if packer.problems.is_empty() {
        pack(module, packer.packed)
    } else {
        Err(peft_core::Error::Pack { problems: packer.problems })
    }
}

struct Packer<F> {
    wanted: HashMap<ParamId, (Format, Site)>,
    pack_layer: F,
    packed: HashMap<ParamId, Vec<PackedMatrix>>,
    problems: Vec<Problem>,
}

impl<F: FnMut(&Site, Format, &[f32]) -> Result<Packed, Error>> ParamVisitor for Packer<F> {
    fn float<const D: usize>(&mut self, _at: &PathStack, param: &Param<Tensor<D>>) {
        let Some((format, site)) = self.wanted.get(&param.id) else { return };
        let shape = [site.d_out, site.d_in];
        let packed = rows(param.base()).and_then(|values| {
            let matrix = |rows: &[f32]| -> Result<PackedMatrix, Error> {
                let packed = (self.pack_layer)(site, *format, rows)?.into_matrix(shape)?;
                Ok(PackedMatrix::new(packed, &site.device))
            };
            values
                .chunks((site.d_out * site.d_in).max(1))
                .map(matrix)
                .collect::<Result<_, _>>()
                .map_err(|e| e.to_string())
        });
        match packed {
            Ok(matrices) => drop(self.packed.insert(param.id, matrices)),
            Err(what) => self.problems.push(Problem::Other { path: site.path.clone(), what }),
        }
    }
}

/// The values of a weight as they are packed: row-major `[d_out, d_in]`, while a layer holds them as `[d_in, d_out]`, and those of experts one after the other, as they are held. `Err` says
/// why the device does not hand them out.
pub(crate) fn rows<const D: usize>(weight: Tensor<D>) -> Result<Vec<f32>, String> {
    let weight = if D == 2 { weight.swap_dims(0, 1) } else { weight };
    let data = weight.try_into_data().map_err(|e| format!("{e:?}"))?;
    Ok(data.iter::<f32>().collect())
}

impl Packed {
    /// These values as a matrix `[d_out, d_in]`, ready for a device.
    ///
    /// # Errors
    /// When there are not `d_out · d_in` values.
    pub fn into_matrix(self, [d_out, d_in]: [usize; 2]) -> Result<PackedData, Error> {
        // A block beyond the end is one up to it: a file may say anything.
        let block = self.block().min(self.len().max(1));
        let layout = PackedLayout { d_out, d_in, bits: self.code().bits(), block };
        if d_out.checked_mul(d_in) != Some(self.len()) {
            let (expected, found) = (d_out.saturating_mul(d_in), self.len());
            return Err(Error::Length { what: "values of a matrix", expected, found });
        }
        let table = self.code().values().into();
        let (bytes, statistics) = self.into_parts();
        let scales = match statistics {
            Statistics::Plain(absmax) => BlockScales::Plain(absmax),
            Statistics::Affine { ranges, lows } => BlockScales::Affine { scales: ranges, lows },
            Statistics::Nested { codes, scales, offset } => {
                BlockScales::Nested { numbers: codes, map: dynamic_map()[..].into(), scales, offset }
            }
        };
        Ok(PackedData { layout, bytes, table, scales })
    }
}
