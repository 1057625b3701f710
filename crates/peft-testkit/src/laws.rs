//! The laws, and the runner that looks at each.

mod files;
mod forward;
mod packed;
mod setup;
mod training;

use std::collections::BTreeMap;

use burn::nn::Initializer;
use burn::nn::transformer::{TransformerEncoder, TransformerEncoderConfig};
use burn::tensor::{DType, Device};
use peft_core::Modality::{Image, Text};
use peft_core::{LayerKind, Method, Modalities, Modality, Scan, Site, attach, for_modalities, for_tasks, scan};
use peft_quant::Code;
use serde_json::Value;

use crate::stack::{BATCH, EPSILON, SEQ, WIDTH};
use crate::state::{Part, fill};
use crate::{Check, Failure, Matrix, Outcome, Seam, Stack, fill_adapter};

/// One adapted layer in double precision, for a reference formula.
#[derive(Clone, Debug)]
pub struct Layer<'a> {
    /// The layer.
    pub site: &'a Site,
    /// Input, `[rows, d_in]`; one-hot rows for an embedding.
    pub x: Matrix,
    /// Base weight, `[d_in, d_out]`; a norm's scale, `[1, width]`.
    pub weight: Matrix,
    /// Base bias, `[1, d_out]`.
    pub bias: Option<Matrix>,
    /// The adapter's tensors by field; a vector is a matrix of one row.
    pub fields: BTreeMap<String, Matrix>,
}

impl Layer<'_> {
    /// The layer without its adapter, `x·W + b`, or `γ ⊙ normed(x) + β`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn base(&self, x: &Matrix) -> peft_core::Result<Matrix> {
        let y = match self.site.kind {
            LayerKind::LayerNorm => x.normed(EPSILON).scale_by(&self.weight)?,
            _ => x.times(&self.weight)?,
        };
        self.bias.as_ref().map_or(Ok(y.clone()), |bias| y.plus(bias))
    }

    /// `y`, `[rows, d_out]`, times what the adapter's gate gives to each sequence.
    ///
    /// # Errors
    /// When there is no gate, or the shapes do not fit.
    pub fn gated(&self, y: &Matrix) -> peft_core::Result<Matrix> {
        let scores = self.x.times(self.field("gate.dense.weight")?)?.plus(self.field("gate.dense.bias")?)?;
        let open = scores.values().chunks(SEQ).flat_map(|sequence| {
            let mean = sequence.iter().map(|score| 1.0 / (1.0 + (-score).exp())).sum::<f64>() / sequence.len() as f64;
            vec![mean; sequence.len()]
        });
        let rows = y.values().chunks(y.columns().max(1)).zip(open);
        let values = rows.flat_map(|(row, open)| row.iter().map(move |value| value * open)).collect();
        Matrix::new(y.rows(), y.columns(), values)
    }

    /// The adapter's tensor of that field.
    ///
    /// # Errors
    /// When there is none.
    pub fn field(&self, name: &str) -> peft_core::Result<&Matrix> {
        self.fields.get(name).ok_or_else(|| peft_core::Error::config(name, "a tensor of the adapter", "none"))
    }
}

/// The formula of an adapted layer's output, `[rows, d_out]`.
type Reference<M> = fn(&M, &Layer<'_>) -> peft_core::Result<Matrix>;

/// The tasks of the two rows of every batch, for methods that tell tasks apart.
const TASKS: [usize; 2] = [1, 0];

/// What the tokens of every batch are, for methods that tell modalities apart.
pub const MODALITIES: [[Modality; SEQ]; BATCH] = [[Image, Image, Text, Text], [Text, Image, Text, Text]];

/// One rounding of an f32 value, with a margin for what follows it.
const ONE_ROUNDING: f64 = 1e-6;

/// Relative deviation of f32 sums in another order.
const ROUNDING: f64 = 1e-5;

/// The laws of values and of their gradients.
const VALUES: [&str; 5] = ["identity", "seams", "reference", "backend", "backend_gradients"];

type Law<M> = fn(&Subject<'_, M>) -> Outcome;

/// A method and what its author states of it.
///
/// The method targets layers of [`Stack`]: any of `embed`, `up`, `down` and `norm`.
#[derive(Clone, Debug)]
pub struct Laws<M> {
    method: M,
    params: fn(&M, &Site) -> usize,
    bad_value: (&'static str, Value),
    reference: Option<Reference<M>>,
    /// How far a fresh adapter may move the output.
    identity: f64,
    skips: Vec<(&'static str, String)>,
    /// Whether only the laws of [`VALUES`] are looked at.
    brief: bool,
}

impl<M: Method> Laws<M> {
    /// `params` is the documented number of values that the method trains in a layer; `bad_value` a field of the configuration with a
    /// value that the method must refuse.
    pub fn new(method: M, params: fn(&M, &Site) -> usize, bad_value: (&'static str, Value)) -> Self {
        Self { method, params, bad_value, reference: None, identity: 0.0, skips: Vec::new(), brief: false }
    }

    /// For a device that fuses operations into kernels: its driver may round a product and a sum once instead of twice, so a fresh adapter is
    /// the identity up to that, and not bit for bit.
    #[must_use]
    pub fn fused(mut self) -> Self {
        self.identity = ONE_ROUNDING;
        self
    }

    /// States the method's formula, to be held against both seams in double precision.
    #[must_use]
    pub fn with_reference(self, reference: Reference<M>) -> Self {
        Self { reference: Some(reference), ..self }
    }

    /// Leaves out a law, for a reason that the report shows.
    #[must_use]
    pub fn skip(mut self, law: &'static str, reason: impl Into<String>) -> Self {
        self.skips.push((law, reason.into()));
        self
    }

    /// Looks at values and their gradients alone: for what differs in them only from a method that is looked at as a whole.
    #[must_use]
    pub fn brief(self) -> Self {
        Self { brief: true, ..self }
    }

    /// Looks at every law on `device` and gives each outcome to `report` as soon as it is there.
    pub fn run_with(&self, device: &Device, mut report: impl FnMut(&Check)) -> Vec<Check> {
        let subject = Subject { laws: self, device: device.clone().autodiff() };
        let laws: [(&str, Law<M>); 25] = [
            ("identity", forward::identity),
            ("base_frozen", training::base_frozen),
            ("adapter_moves", training::adapter_moves),
            ("merge", forward::merge),
            ("seams", training::seams),
            ("save_load", files::save_load),
            ("file", files::file),
            ("packed_nf4", |subject| packed::packed(subject, Code::Nf4, false)),
            ("packed_nf4_double", |subject| packed::packed(subject, Code::Nf4, true)),
            ("packed_fp4", |subject| packed::packed(subject, Code::Fp4, false)),
            ("packed_int4", |subject| packed::packed(subject, Code::Int4, false)),
            ("packed_int4_affine", |subject| packed::packed(subject, Code::Int4Affine, false)),
            ("packed_int8", |subject| packed::packed(subject, Code::Int8, false)),
            ("f16", |subject| training::half(subject, DType::F16)),
            ("bf16", |subject| training::half(subject, DType::BF16)),
            ("valid_train", training::valid_train),
            ("config", setup::config),
            ("bad_value", setup::bad_value),
            ("attach_twice", setup::attach_twice),
            ("attach_nothing", setup::attach_nothing),
            ("unaware", setup::unaware),
            ("encoder", forward::encoder),
            ("reference", forward::reference),
            ("backend", training::backend),
            ("backend_gradients", training::backend_gradients),
        ];
        let known = |law: &str| laws.iter().any(|(name, _)| *name == law);
        let unknown = self.skips.iter().filter(|(law, _)| !known(law));
        let mut checks: Vec<Check> =
            unknown.map(|(law, _)| Check::run(*law, || Err("there is no such law to skip".into()))).collect();
        checks.iter().for_each(&mut report);
        for (name, law) in laws.into_iter().filter(|(name, _)| !self.brief || VALUES.contains(name)) {
            let check = match self.skips.iter().find(|(skipped, _)| *skipped == name) {
                Some((_, reason)) => Check::skip(name, reason),
                None => Check::run(name, || {
                    let tokens = MODALITIES.map(|row| row.to_vec()).to_vec();
                    for_tasks(&TASKS, || for_modalities(Modalities::new(tokens), || law(&subject)))
                }),
            };
            report(&check);
            checks.push(check);
        }
        checks
    }

    /// Looks at every law on `device`.
    pub fn run(&self, device: &Device) -> Vec<Check> {
        self.run_with(device, |_| ())
    }
}

/// A method on a device.
struct Subject<'a, M> {
    laws: &'a Laws<M>,
    /// With autodiff.
    device: Device,
}

impl<M: Method> Subject<'_, M> {
    fn on(&self, device: Device) -> Self {
        Self { laws: self.laws, device: device.autodiff() }
    }

    fn method(&self) -> &M {
        &self.laws.method
    }

    fn base(&self) -> Stack {
        Stack::new(&self.device, DType::F32, true)
    }

    /// The stack with a fresh adapter.
    fn attached(&self) -> Result<Stack, Failure> {
        Ok(attach(self.base(), self.method(), 0)?)
    }

    /// The stack with an adapter of random values.
    fn random(&self) -> Result<Stack, Failure> {
        Ok(fill_adapter(self.attached()?))
    }

    /// The layers of `scan` that `attached` reports as adapted.
    fn sites(&self) -> Result<Vec<Site>, Failure> {
        let adapted = scan(&self.attached()?).adapted;
        let Scan { sites, .. } = scan(&self.base());
        Ok(sites.into_iter().filter(|site| adapted.contains(&site.path)).collect())
    }

    /// Why the method's weight form is not the whole method; then only the activation seam is looked at.
    fn weight_form_lacks(&self) -> Result<Option<String>, Failure> {
        Ok(self.sites()?.iter().find_map(|site| self.method().needs_activation(site)))
    }

    /// Why the method is no part of a weight; then merging is refused.
    fn unmergeable(&self) -> Result<Option<String>, Failure> {
        Ok(self.sites()?.iter().find_map(|site| self.method().unmergeable(site)))
    }

    fn seams(&self) -> Result<&'static [Seam], Failure> {
        Ok(if self.weight_form_lacks()?.is_some() { &[Seam::Activation] } else { &[Seam::Weight, Seam::Activation] })
    }

    /// The same method on other layers.
    fn retargeted(&self, names: &[&str]) -> Result<M, Failure> {
        let mut json = serde_json::to_value(self.method())?;
        json["target_modules"] = names.into();
        Ok(serde_json::from_value(json)?)
    }

    /// An unmodified encoder of Burn, and the method on three of its layers.
    fn encoder(&self) -> Result<(TransformerEncoder, M), Failure> {
        let config = TransformerEncoderConfig::new(WIDTH, 2 * WIDTH, 2, 1).with_dropout(0.0);
        let encoder = config.with_initializer(Initializer::Zeros).init(&self.device);
        let method = self.retargeted(&["query", "value", "linear_inner"])?;
        Ok((fill(encoder, Part::Base(DType::F32), 1), method))
    }
}
