//! Several bottlenecks at one place: stacked, side by side, by parts of the batch or of the sequence, averaged, fused.
//!
//! A composition is a method like any other: it attaches, trains and saves as one adapter that holds several. Its parts are trained, unless it has a fusion: then
//! the fusion is.
//!
//! - source: Pfeiffer et al. 2020, arXiv:2007.07779 (stack, split); 2021, arXiv:2005.00247 (fusion); Rücklé et al. 2021, arXiv:2010.11918 (parallel inference)

use std::collections::BTreeMap;

use burn::module::{Module, Reparameterization};
use burn::tensor::Tensor;
use peft_core::{Activation, AdapterFile, End, Error, FileTensor, LayerKind, Method, Result, Site, Targets};
use serde::{Deserialize, Serialize};

use crate::bottleneck::Bottleneck;
use crate::config::{AFTER_ATTENTION, AFTER_FEED_FORWARD, BottleneckConfig};
use crate::fusion::Fusion;

/// How adapters work together; numbers are those of [`ComposedConfig::adapters`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Composition {
    /// One adapter.
    Adapter(usize),
    /// One after the other.
    Stack(Vec<Composition>),
    /// Each on its number of rows of the batch.
    BatchSplit(Vec<(usize, Composition)>),
    /// Each on an equal part of the rows: the caller repeats the batch once for each.
    Parallel(Vec<Composition>),
    /// Each on its number of tokens of the sequence.
    Split(Vec<(usize, Composition)>),
    /// The weighted mean of what they give.
    Average(Vec<(f64, Composition)>),
    /// Attention over what they add.
    Fuse(Vec<usize>),
}

/// Configuration of a composition of bottleneck adapters.
///
/// ```
/// use peft_adapter::{BottleneckConfig, ComposedConfig, Composition};
///
/// let (language, task) = (BottleneckConfig::pfeiffer(2.0), BottleneckConfig::pfeiffer(16.0));
/// let stack = Composition::Stack(vec![Composition::Adapter(0), Composition::Adapter(1)]);
/// let method = ComposedConfig::new(vec![language, task], stack);
/// # let _ = method;
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ComposedConfig {
    /// The adapters.
    pub adapters: Vec<BottleneckConfig>,
    /// How they work together.
    pub composition: Composition,
    /// Which places; each adapter may be at fewer.
    #[serde(flatten)]
    pub targets: Targets,
}

/// State of a [`ComposedConfig`] at one place.
#[derive(Module, Debug)]
pub struct ComposedAdapter {
    /// The adapters; `None` for one that is not at this place.
    parts: Vec<Option<Bottleneck>>,
    fusion: Option<Fusion>,
    #[module(skip)]
    composition: Composition,
}

impl Composition {
    /// The numbers of the adapters in it.
    fn numbers(&self) -> Vec<usize> {
        let of = |parts: &[Self]| parts.iter().flat_map(Self::numbers).collect();
        match self {
            Self::Adapter(number) => vec![*number],
            Self::Fuse(numbers) => numbers.clone(),
            Self::Stack(parts) | Self::Parallel(parts) => of(parts),
            Self::BatchSplit(parts) | Self::Split(parts) => parts.iter().flat_map(|(_, part)| part.numbers()).collect(),
            Self::Average(parts) => parts.iter().flat_map(|(_, part)| part.numbers()).collect(),
        }
    }

    /// Whether parts of the input are taken on the outside only: what is behind them ends each part for itself.
    fn is_whole(&self) -> bool {
        match self {
            Self::BatchSplit(parts) | Self::Split(parts) => parts.iter().all(|(_, part)| part.is_whole()),
            Self::Parallel(parts) => parts.iter().all(Self::is_whole),
            _ => !self.splits(),
        }
    }

    fn splits(&self) -> bool {
        match self {
            Self::Adapter(_) | Self::Fuse(_) => false,
            Self::BatchSplit(_) | Self::Split(_) | Self::Parallel(_) => true,
            Self::Stack(parts) => parts.iter().any(Self::splits),
            Self::Average(parts) => parts.iter().any(|(_, part)| part.splits()),
        }
    }

    fn fuses(&self) -> bool {
        match self {
            Self::Adapter(_) => false,
            Self::Fuse(_) => true,
            Self::Stack(parts) | Self::Parallel(parts) => parts.iter().any(Self::fuses),
            Self::BatchSplit(parts) | Self::Split(parts) => parts.iter().any(|(_, part)| part.fuses()),
            Self::Average(parts) => parts.iter().any(|(_, part)| part.fuses()),
        }
    }
}

impl ComposedConfig {
    /// The adapters at all places that any of them is at.
    pub fn new(adapters: Vec<BottleneckConfig>, composition: Composition) -> Self {
        Self { adapters, composition, targets: Targets::modules([AFTER_ATTENTION, AFTER_FEED_FORWARD]) }
    }
}

/// Adapters from files as the parts of one composition, ready to [`fill`](AdapterFile::fill) a model that it is attached to.
///
/// # Errors
/// When an adapter has a tensor that is at no place, such as a head: heads are not composed.
pub fn composed(
    adapters: Vec<AdapterFile<BottleneckConfig>>,
    composition: Composition,
) -> Result<AdapterFile<ComposedConfig>> {
    adapters.iter().try_for_each(|adapter| no_embedding(std::slice::from_ref(&adapter.method)))?;
    let (mut tensors, mut methods) = (BTreeMap::new(), Vec::new());
    for (number, adapter) in adapters.into_iter().enumerate() {
        for (key, values) in adapter.tensors {
            let split = [AFTER_ATTENTION, AFTER_FEED_FORWARD].iter().find_map(|place| {
                let (block, rest) = key.split_once(&format!(".{place}."))?;
                Some(format!("{block}.{place}.{PARTS}.{number}.{rest}"))
            });
            let whole = || Error::config("modules_to_save", "null: what is trained whole is not composed", &key);
            tensors.insert(split.ok_or_else(whole)?, values);
        }
        methods.push(adapter.method);
    }
    let method = ComposedConfig::new(methods, composition);
    Ok(AdapterFile { method, base_model: None, task_type: None, base_fingerprint: None, tensors })
}

fn no_embedding(adapters: &[BottleneckConfig]) -> Result<()> {
    match adapters.iter().find_map(|adapter| adapter.inv_adapter) {
        Some(found) => Err(Error::config("inv_adapter", "null: no composition has one yet", format!("{found:?}"))),
        None => Ok(()),
    }
}

/// The field that the adapters of a composition are in, by number.
const PARTS: &str = "parts";

impl Method for ComposedConfig {
    const PEFT_TYPE: &'static str = "BOTTLENECK_COMPOSITION";
    type Adapter = ComposedAdapter;

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn check(&self) -> Result<()> {
        self.adapters.iter().try_for_each(BottleneckConfig::check_values)?;
        no_embedding(&self.adapters)?;
        let numbers = self.composition.numbers();
        let wrong = |expected: String, found: String| Err(Error::config("composition", expected, found));
        if numbers.is_empty() {
            return wrong("an adapter at least".to_owned(), "none".to_owned());
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
        Ok(())
    }

    fn kinds(&self) -> &'static [LayerKind] {
        &[LayerKind::SubLayer]
    }

    fn init(&self, site: &Site, seed: u64) -> Result<ComposedAdapter> {
        let fuses = self.composition.fuses();
        let part = |(number, config): (usize, &BottleneckConfig)| -> Result<Option<Bottleneck>> {
            if !config.targets.matcher()?.matches(&site.path, Some(site.kind)) || config.leaves_out(&site.path) {
                return Ok(None);
            }
            let adapter = Bottleneck::new(config, site, seed.wrapping_add(number as u64))?;
            Ok(Some(if fuses { adapter.no_grad() } else { adapter }))
        };
        let parts: Vec<_> = self.adapters.iter().enumerate().map(part).collect::<Result<_>>()?;
        let here = |numbers: &[usize]| numbers.iter().all(|number| parts[*number].is_some());
        let fusion = (fuses && here(&self.composition.numbers())).then(|| Fusion::new(site, seed));
        Ok(ComposedAdapter { parts, fusion, composition: self.composition.clone() })
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

    fn numbered() -> Option<(&'static str, &'static [FileTensor])> {
        Some((PARTS, BottleneckConfig::tensors(LayerKind::SubLayer)))
    }

    fn activation(adapter: &ComposedAdapter) -> Option<&dyn Activation> {
        Some(adapter)
    }

    fn needs_activation(&self, _site: &Site) -> Option<String> {
        Some("bottlenecks act between layers".to_owned())
    }

    fn unmergeable(&self, _site: &Site) -> Option<String> {
        Some("a bottleneck is no part of any weight".to_owned())
    }
}

/// The weight form: there is none, and what it would change is not read.
impl Reparameterization for ComposedAdapter {
    const NAME: &'static str = "bottlenecks";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        base
    }
}

impl Activation for ComposedAdapter {
    fn sub_layer(&self, end: End<'_>) -> Tensor<3> {
        self.end(&self.composition, end)
    }
}

impl ComposedAdapter {
    /// The whole end of a sub-layer. Parts of a batch or a sequence end each for itself, so that each is what its adapter alone would make of it.
    fn end(&self, composition: &Composition, end: End<'_>) -> Tensor<3> {
        let [batch, seq, _] = end.output.dims();
        match composition {
            Composition::BatchSplit(parts) => self.parts_of(parts, 0, batch, end),
            Composition::Split(parts) => self.parts_of(parts, 1, seq, end),
            Composition::Parallel(parts) => {
                let equal = |part: &Composition| (batch / parts.len(), part.clone());
                self.parts_of(&parts.iter().map(equal).collect::<Vec<_>>(), 0, batch, end)
            }
            _ => match self.last(composition) {
                Some(last) => last.after(self.hidden(composition, end.clone()), end),
                None => end.close(),
            },
        }
    }

    /// What goes on behind adapters that see all of the input.
    fn hidden(&self, composition: &Composition, end: End<'_>) -> Tensor<3> {
        match composition {
            Composition::Adapter(number) => match &self.parts[*number] {
                Some(part) => {
                    let (x, residual) = part.before(end.output, &end.input, end.norm);
                    part.through(x, residual).output
                }
                None => end.output,
            },
            Composition::Stack(parts) => {
                parts.iter().fold(end.output.clone(), |output, part| self.hidden(part, End { output, ..end.clone() }))
            }
            Composition::Average(parts) => {
                let whole: f64 = parts.iter().map(|(weight, _)| weight).sum();
                let weighted = |(weight, part): &(f64, Composition)| self.hidden(part, end.clone()) * (weight / whole);
                parts.iter().map(weighted).reduce(|sum, each| sum + each).expect("an adapter at least")
            }
            Composition::Fuse(numbers) => self.fused(numbers, end),
            Composition::BatchSplit(_) | Composition::Parallel(_) | Composition::Split(_) => {
                unreachable!("`check` lets parts of the input be at the outside only")
            }
        }
    }

    fn fused(&self, numbers: &[usize], end: End<'_>) -> Tensor<3> {
        let parts: Vec<&Bottleneck> = numbers.iter().filter_map(|number| self.parts[*number].as_ref()).collect();
        let (Some(fusion), Some(last)) = (&self.fusion, parts.last()) else { return end.output };
        let (x, residual) = last.before(end.output, &end.input, end.norm);
        let ups = parts.iter().map(|part| part.through(x.clone(), residual.clone()).up).collect();
        fusion.forward(x, ups, residual)
    }

    /// The adapter whose form the end of the sub-layer has.
    fn last(&self, composition: &Composition) -> Option<&Bottleneck> {
        composition.numbers().into_iter().rev().find_map(|number| self.parts[number].as_ref())
    }

    fn parts_of(&self, parts: &[(usize, Composition)], dim: usize, length: usize, end: End<'_>) -> Tensor<3> {
        let whole: usize = parts.iter().map(|(count, _)| count).sum();
        assert_eq!(whole, length, "composition: the parts of dimension {dim} of {:?}", end.output.dims());
        let mut start = 0;
        let part = |(count, part): &(usize, Composition)| {
            let narrow = |x: &Tensor<3>| x.clone().narrow(dim, start, *count);
            let own = End { output: narrow(&end.output), input: narrow(&end.input), norm: end.norm };
            start += count;
            self.end(part, own)
        };
        Tensor::cat(parts.iter().map(part).collect(), dim)
    }
}
