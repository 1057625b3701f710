//! What a method is.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::Path;

use burn::module::{ModuleDisplay, Reparameterization};
use burn::tensor::Tensor;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::attach::{self, wants};
use crate::files::{HubFolder, Values};
use crate::{Activation, AdapterFile, LayerKind, Result, Scan, Site, Targets};

/// One tensor of an adapter, as Hugging Face's file holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileTensor {
    /// Path of the field in the adapter, for instance `a`.
    pub field: &'static str,
    /// What follows the module path in the file's key, for instance `lora_A.weight`.
    pub key: &'static str,
    /// Whether the file holds the transpose of a matrix. Of a layer of several experts, who have theirs one under the other: whether it has their rows side by side, by column and
    /// then by expert.
    pub transposed: bool,
}

/// A parameter-efficient method: a configuration whose JSON is `adapter_config.json`, and the adapter that it puts into each matched weight.
///
/// A method is one file: module doc with formula and source, configuration, adapter, the implementations of `Method`,
/// [`Reparameterization`] (weight form) and [`Activation`] (activation form), tests. Nothing else in the workspace has to know of it.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a fine-tuning method",
    note = "a method implements `peft_core::Method` on its configuration; see `examples/custom_method.rs`"
)]
pub trait Method: Clone + Debug + Serialize + DeserializeOwned + Send + Sync + 'static {
    /// The name in `adapter_config.json`, for instance `LORA`.
    const PEFT_TYPE: &'static str;

    /// Names of the adapter's fields that LoRA+ trains faster than the rest: those that start at zero and wait for their partner. Empty when the
    /// method has none.
    const FAST: &'static [&'static str] = &[];

    /// Whether the adapter belongs to the model as a whole, as those of PEFT's prompt methods: see [`is_of_model`](Self::is_of_model).
    const OF_MODEL: bool = false;

    /// The trained state in one weight.
    type Adapter: Reparameterization + ModuleDisplay;

    /// Which layers are adapted, and what is trained besides.
    fn targets(&self) -> &Targets;

    /// How many tasks the adapter tells apart, for one that computes inside [`for_tasks`](crate::for_tasks) only.
    fn num_tasks(&self) -> Option<usize> {
        None
    }

    /// Whether it takes a row of a batch for one text, so that a row must not hold several.
    fn takes_whole_rows(&self) -> bool {
        self.num_tasks().is_some()
    }

    /// Refuses values that make no sense, naming the field by its name in the file.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config).
    fn check(&self) -> Result<()>;

    /// The kinds of layer that the method can adapt.
    fn kinds(&self) -> &'static [LayerKind] {
        &[LayerKind::Linear, LayerKind::Conv1D]
    }

    /// The layers of a model that are adapted: those that [`targets`](Self::targets) names, of the kinds that it can adapt.
    ///
    /// # Errors
    /// [`Error::Attach`](crate::Error::Attach) with every reason at once why it cannot be attached.
    fn select<'a>(&self, found: &'a Scan) -> Result<Vec<&'a Site>> {
        attach::select(found, self)
    }

    /// Whether the layer is one that [`select`](Self::select) may take; never where the targets make no sense, which it refuses.
    fn takes(&self, site: &Site) -> bool {
        self.targets().matcher().is_ok_and(|matcher| wants(self, &matcher, &site.path, Some(site.kind)))
    }

    /// The adapter of one layer, with its initial values.
    ///
    /// # Errors
    /// When the configuration does not fit this layer.
    fn init(&self, site: &Site, seed: u64) -> Result<Self::Adapter>;

    /// Whether LoRA+ trains a field faster: one of [`FAST`](Self::FAST), and in an adapter that holds others, one of theirs.
    fn is_fast(field: &str) -> bool {
        Self::FAST.contains(&field)
    }

    /// The adapters of all layers that were [selected](Self::select), in that order: for a method whose adapters know of each other.
    ///
    /// # Errors
    /// As [`init`](Self::init).
    fn init_all(&self, sites: &[&Site], seed: u64) -> Result<Vec<Self::Adapter>> {
        sites.iter().map(|site| self.init(site, seed)).collect()
    }

    /// The adapter's tensors in the file, for a layer of that kind.
    fn tensors(kind: LayerKind) -> &'static [FileTensor];

    /// For an adapter that holds several of another method: the field that they are in, by number, and the tensors of each in a layer of that kind.
    fn numbered(kind: LayerKind) -> Option<(&'static str, &'static [FileTensor])> {
        let _ = kind;
        None
    }

    /// The file's key of an adapter's field, without the module path, and whether the file holds the transpose; `None` when the method does not list it.
    fn key(kind: LayerKind, field: &str) -> Option<(String, bool)> {
        let listed = |tensors: &[FileTensor], field: &str| {
            tensors.iter().find(|tensor| tensor.field == field).map(|tensor| (tensor.key.to_owned(), tensor.transposed))
        };
        listed(Self::tensors(kind), field).or_else(|| {
            let (several, tensors) = Self::numbered(kind)?;
            let (number, field) = field.strip_prefix(several)?.strip_prefix('.')?.split_once('.')?;
            let (key, transposed) = listed(tensors, field)?;
            Some((format!("{several}.{number}.{key}"), transposed))
        })
    }

    /// Whether a file's key is that of a tensor of the adapter's that belongs to the model as a whole, so that it has no path and nothing before it.
    fn is_of_model(key: &str) -> bool {
        let _ = key;
        false
    }

    /// Whether a file's key, without what all keys begin with, is that of one of the adapter's tensors.
    fn holds(key: &str) -> bool {
        let ends = |tensor: &FileTensor| key.strip_suffix(tensor.key).is_some_and(|module| module.ends_with('.'));
        Self::is_of_model(key) || LayerKind::ALL.into_iter().flat_map(Self::tensors).any(ends)
    }

    /// Whether some of the adapter belongs to the model as a whole, at its [`Prompts`](crate::Prompts).
    fn has_prompts(&self) -> bool {
        Self::OF_MODEL
    }

    /// A tensor that the file holds though it is none of the adapter's parameters, with its key: what these compute, for everybody who only uses the adapter. They go
    /// into a file of their own then, and come from it.
    fn computed(adapter: &Self::Adapter) -> Option<(&'static str, Tensor<2>)> {
        let _ = adapter;
        None
    }

    /// The method of a file without the parameters behind what is [`computed`](Self::computed).
    #[must_use]
    fn without_encoder(self) -> Self {
        self
    }

    /// The method of the file in `dir` with its parts in other folders, whose tensors are added.
    ///
    /// # Errors
    /// When one of them cannot be read.
    fn read_parts(self, dir: &Path, tensors: &mut BTreeMap<String, Values>) -> Result<Self> {
        let _ = (dir, tensors);
        Ok(self)
    }

    /// The reverse: writes the parts that have folders of their own, and gives what is left for `dir`; nothing for a method without any.
    ///
    /// # Errors
    /// When the file system refuses.
    fn write_parts(file: &AdapterFile<Self>, dir: &Path) -> Result<Option<AdapterFile<Self>>> {
        let _ = (file, dir);
        Ok(None)
    }

    /// The adapter's activation form, if the method has one.
    fn activation(adapter: &Self::Adapter) -> Option<&dyn Activation> {
        let _ = adapter;
        None
    }

    /// Why an adapter on this layer needs the activation seam during training; `None` when the weight form says the same.
    fn needs_activation(&self, site: &Site) -> Option<String> {
        let _ = site;
        None
    }

    /// Why an adapter on this layer cannot be merged; `None` when it is part of the weight and the bias.
    fn unmergeable(&self, site: &Site) -> Option<String> {
        let _ = site;
        None
    }

    /// The method and its tensors, by their keys in PEFT's layout, from a folder in AdapterHub's; `None` for a method that is not read from it.
    ///
    /// # Errors
    /// When the folder asks for a part of the method that is not built, or a tensor belongs nowhere.
    fn from_hub(folder: &HubFolder) -> Result<Option<(Self, BTreeMap<String, Values>)>> {
        let _ = folder;
        Ok(None)
    }

    /// The reverse of [`from_hub`](Self::from_hub), under that name.
    ///
    /// # Errors
    /// When the adapter has no form there.
    fn to_hub(file: &AdapterFile<Self>, name: &str) -> Result<Option<HubFolder>> {
        let _ = (file, name);
        Ok(None)
    }

    /// Whether the method has an adapter behind the model's embeddings, at its [`Embedded`](crate::Embedded): that is for the method to say, whatever its targets are, and a
    /// model without that place is refused.
    fn embeds(&self) -> bool {
        false
    }

    /// Whether the method leaves out the module at that path, though its targets name it.
    fn leaves_out(&self, path: &str) -> bool {
        let _ = path;
        false
    }

    /// Of the layers that match, how many are adapted, counted from the end of the model, with the name of the field that says so; all without it.
    fn last(&self) -> Option<(&'static str, usize)> {
        None
    }

    /// The method of a file and its tensors as they would be written today for that model, where it is of a time when the model's layers had another form.
    ///
    /// # Errors
    /// When the tensors do not have that form.
    fn renew(self, tensors: BTreeMap<String, Values>, found: &Scan) -> Result<(Self, BTreeMap<String, Values>)> {
        let _ = found;
        Ok((self, tensors))
    }

    /// Refuses a file that asks for a part of the method that is not built, by its raw JSON.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config), naming the field.
    fn check_file(json: &serde_json::Map<String, serde_json::Value>) -> Result<()> {
        let _ = json;
        Ok(())
    }
}
