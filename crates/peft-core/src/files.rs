//! Adapter files in Hugging Face PEFT's layout, `adapter_config.json` and `adapter_model.safetensors`, both ways; and in AdapterHub's. Which one a folder has is
//! recognised.
//!
//! Saving what was loaded gives the same bytes. Files are written next to their place and then renamed, so a full disk leaves the
//! earlier adapter whole.

mod hub;
mod keys;
mod legacy;
mod torch;

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::{Path, PathBuf};

use burn::module::{Module, Param};
use burn::tensor::{Tensor, TensorData};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value};

use crate::attach::attach_within;
use crate::rebuild::Adapters;
use crate::{
    Error, LayerKind, Method, ParamMapper, ParamVisitor, PathStack, Problem, Result, Room, Site, base_fingerprint,
    map_params, scan, visit_params,
};

pub use self::hub::{HUB_TENSOR_FILE, HubFolder, layers_config};
use self::keys::Keys;
pub use self::torch::read_torch;

/// The configuration's file name.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The tensors' file name.
pub const TENSOR_FILE: &str = "adapter_model.safetensors";
/// The tensors' file name in first releases.
const TORCH_FILE: &str = "adapter_model.bin";

/// The file of what computes an adapter's tensors during training, and is needed to go on with it; PEFT does not look at it.
pub const ENCODER_FILE: &str = "prompt_encoder.safetensors";
/// What the keys of its tensors begin with among those of an adapter.
pub const ENCODER_PREFIX: &str = "prompt_encoder.";

/// `task_type` of adapters on language models.
pub const CAUSAL_LM: &str = "CAUSAL_LM";

/// The key of a prompt.
pub const PROMPT_KEY: &str = "prompt_embeddings";

const PREFIX: &str = "base_model.model.";

/// The same beside an adapter that belongs to the model as a whole, which PEFT wraps once instead of twice.
const PREFIX_OF_MODEL: &str = "base_model.";

/// Where a safetensors file's header begins, behind its length; also what its end is aligned to.
const HEADER_AT: usize = size_of::<u64>();

/// The entry of the tensor file's metadata that names the base.
const FINGERPRINT: &str = "base_fingerprint";

/// A matrix or vector of an adapter file, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Values {
    /// In the file's orientation.
    pub shape: Vec<usize>,
    /// As f32, whatever the file holds.
    pub values: Vec<f32>,
}

/// An adapter as a value: what a folder in PEFT's layout holds.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterFile<M> {
    /// The method's configuration.
    pub method: M,
    /// `base_model_name_or_path`.
    pub base_model: Option<String>,
    /// `task_type`, for instance `CAUSAL_LM`.
    pub task_type: Option<String>,
    /// The [`base_fingerprint`] of the base without which the adapter means nothing, where that is not the base model
    /// as it is published, for instance after `LoftQ`. Whatever loads or fills the adapter then refuses another base.
    pub base_fingerprint: Option<String>,
    /// Tensors by key, without the prefix `base_model.model.`
    pub tensors: BTreeMap<String, Values>,
}

/// What a load forgives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Strictness {
    /// Leave a tensor that the file lacks at its initial value.
    pub allow_missing: bool,
    /// Ignore a tensor that nothing asks for.
    pub allow_unknown: bool,
}

/// The `peft_type` of the adapter in `dir`, so that an application can choose among the methods it knows.
///
/// # Errors
/// When there is no readable `adapter_config.json` with a `peft_type`, or of AdapterHub.
pub fn peft_type(dir: &Path) -> Result<String> {
    let path = dir.join(CONFIG_FILE);
    let json = read_config(&path)?;
    let found = json.get("peft_type").and_then(Value::as_str).or_else(|| hub::hub_type(&json));
    found.map(str::to_owned).ok_or_else(|| Error::format(path, "no `peft_type`; is this an adapter?"))
}

/// Whether the adapter in `dir` is in AdapterHub's layout.
///
/// # Errors
/// When there is no readable `adapter_config.json`.
pub fn is_hub(dir: &Path) -> Result<bool> {
    let json = read_config(&dir.join(CONFIG_FILE))?;
    Ok(!json.contains_key("peft_type") && hub::hub_type(&json).is_some())
}

/// The tensors of the adapter in `dir`, whatever its method, by keys that begin with the path in the model: as AdapterHub's layout has them, or those of PEFT's
/// without what they all begin with.
///
/// # Errors
/// When a file is missing or malformed.
pub fn tensors_of(dir: &Path) -> Result<BTreeMap<String, Values>> {
    if is_hub(dir)? {
        return Ok(HubFolder::read(dir)?.tensors);
    }
    let (_, tensors) = read_tensors(dir)?;
    let prefix = if tensors.keys().any(|key| key.starts_with(PREFIX)) { PREFIX } else { PREFIX_OF_MODEL };
    Ok(tensors.into_iter().map(without(prefix)).collect())
}

/// The tensors of the adapter in `dir` as they are, in PEFT's file or in the pickle that its first releases wrote; and which file that is.
///
/// # Errors
/// When there is neither, or it is malformed.
pub fn read_tensors(dir: &Path) -> Result<(PathBuf, BTreeMap<String, Values>)> {
    read_with_fingerprint(dir).map(|(path, tensors, _)| (path, tensors))
}

/// The same, and the fingerprint that the file holds in its metadata; a pickle has none.
fn read_with_fingerprint(dir: &Path) -> Result<(PathBuf, BTreeMap<String, Values>, Option<String>)> {
    let (path, torch) = (dir.join(TENSOR_FILE), dir.join(TORCH_FILE));
    if !path.exists() && torch.exists() {
        let tensors = read_torch(&torch)?;
        return Ok((torch, tensors, None));
    }
    let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
    let (tensors, fingerprint) = (values_of(&bytes, &path)?, fingerprint_of(&bytes, &path)?);
    Ok((path, tensors, fingerprint))
}

/// Takes off what keys of PEFT's layout begin with.
fn without(prefix: &str) -> impl Fn((String, Values)) -> (String, Values) {
    move |(key, values)| (key.strip_prefix(prefix).map_or(key.clone(), str::to_owned), values)
}

/// Writes the adapter of `module`, a causal language model: exactly the adapter's tensors, and the base parameters that were trained with it. Of another model
/// [`AdapterFile::collect`] it and say its [`task_type`](AdapterFile::task_type), by which PEFT wraps the model.
///
/// # Errors
/// When the device or the file system fails, or `module` carries no adapter.
pub fn save_adapter<T: Module, M: Method>(module: &T, method: &M, base_model: Option<&str>, dir: &Path) -> Result<()> {
    let mut file = AdapterFile::collect(module, method)?;
    file.base_model = base_model.map(str::to_owned);
    file.task_type = Some(CAUSAL_LM.to_owned());
    file.write(dir)
}

/// Reads the adapter in `dir` and attaches it to `module`, which must be un-adapted.
///
/// # Errors
/// As [`attach`](crate::attach); when the adapter names another base; and when a tensor is missing, unknown, not finite or of another shape, all of them at once.
pub fn load_adapter<T: Module, M: Method>(module: T, dir: &Path) -> Result<(T, M)> {
    load_adapter_with(module, dir, Strictness::default())
}

/// [`load_adapter`] that forgives what `strictness` says.
///
/// # Errors
/// As [`load_adapter`].
pub fn load_adapter_with<T: Module, M: Method>(module: T, dir: &Path, strictness: Strictness) -> Result<(T, M)> {
    AdapterFile::read(dir)?.load_into(module, &dir.join(TENSOR_FILE), strictness)
}

impl<M: Method> AdapterFile<M> {
    const PREFIX: &'static str = if M::OF_MODEL { PREFIX_OF_MODEL } else { PREFIX };

    /// Takes the adapter out of `module`.
    ///
    /// # Errors
    /// When the device fails to hand out a tensor, or there is no adapter of this method.
    pub fn collect<T: Module>(module: &T, method: &M) -> Result<Self> {
        let mut collector = Collector::<M>::new(module, method)?;
        if collector.keys.adapted.is_empty() {
            let path = "model".to_owned();
            collector.problems.push(Problem::Other { path, what: "carries no adapter".to_owned() });
        }
        visit_params(module, &mut collector);
        collector.compute(module, method)?;
        let Collector { tensors, problems, .. } = collector;
        if !problems.is_empty() {
            return Err(Error::Attach { method: M::PEFT_TYPE, problems });
        }
        Ok(Self { method: method.clone(), base_model: None, task_type: None, base_fingerprint: None, tensors })
    }

    /// Puts these tensors into the adapter that `module` carries.
    ///
    /// # Errors
    /// [`Error::Base`] when the adapter was made on another base, or else [`Error::Tensors`] with every difference at once; `path` is named in
    /// both.
    pub fn fill<T: Module>(self, module: T, path: &Path, strictness: Strictness) -> Result<T> {
        if let Some(expected) = self.base_fingerprint {
            let found = base_fingerprint(&module)?;
            if found != expected {
                return Err(Error::Base { path: path.to_owned(), expected, found });
            }
        }
        let keys = Keys::<M>::new(&module, &self.method)?;
        let mut filler = Filler { keys, tensors: self.tensors, strictness, encoded: false, problems: Vec::new() };
        let module = map_params(module, &mut filler);
        let Filler { mut tensors, mut problems, encoded, .. } = filler;
        // What an encoder computes is not stored twice.
        let stored = if encoded { tensors.remove(PROMPT_KEY) } else { None };
        if !strictness.allow_unknown {
            problems.extend(tensors.into_keys().map(|name| Problem::Unknown { name }));
        }
        if let Some(stored) = stored.filter(|_| problems.is_empty()) {
            let mut computed = Collector::<M>::new(&module, &self.method)?;
            computed.compute(&module, &self.method)?;
            if computed.tensors.get(PROMPT_KEY).is_none_or(|computed| differ(computed, &stored)) {
                let what = format!(
                    "{ENCODER_FILE} computes another prompt; remove it where something else has trained the prompt since"
                );
                problems.push(Problem::Other { path: PROMPT_KEY.to_owned(), what });
            }
        }
        if problems.is_empty() { Ok(module) } else { Err(Error::Tensors { path: path.to_owned(), problems }) }
    }

    /// Attaches the method to `module`, which must be un-adapted, and puts these tensors in. What the method asks for is not made where the file has far less.
    ///
    /// # Errors
    /// As [`attach`](crate::attach) and [`fill`](Self::fill).
    pub fn load_into<T: Module>(mut self, module: T, path: &Path, strictness: Strictness) -> Result<(T, M)> {
        (self.method, self.tensors) = self.method.renew(self.tensors, &scan(&module))?;
        let module = attach_within(module, &self.method, 0, &room(&self.tensors))?;
        let method = self.method.clone();
        Ok((self.fill(module, path, strictness)?, method))
    }

    /// Reads a folder, in PEFT's layout or AdapterHub's.
    ///
    /// # Errors
    /// When a file is missing, malformed, of another method, or asks for something that is not built.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(CONFIG_FILE);
        let json = read_config(&path)?;
        let hub = hub::hub_type(&json).filter(|_| !json.contains_key("peft_type"));
        let found = json.get("peft_type").and_then(Value::as_str).or(hub).unwrap_or("no peft_type");
        if found != M::PEFT_TYPE {
            return Err(Error::Method { path, expected: M::PEFT_TYPE.to_owned(), found: found.to_owned() });
        }
        if hub.is_some() {
            return Self::read_hub(dir);
        }
        M::check_file(&json)?;
        let text = |key: &str| json.get(key).and_then(Value::as_str).map(str::to_owned);
        let (base_model, task_type) = (text("base_model_name_or_path"), text("task_type"));
        // PEFT writes null for "the default", which serde would refuse in a field that is no option.
        let json: Map<_, _> = json.into_iter().filter(|(_, value)| !value.is_null()).collect();
        let method: M = parse(&json).map_err(|e| Error::format(&path, culprit::<M>(&json) + &e.to_string()))?;
        method.check()?;
        let (_, tensors, base_fingerprint) = read_with_fingerprint(dir)?;
        let mut tensors: BTreeMap<_, _> = tensors.into_iter().map(without(Self::PREFIX)).collect();
        let method = method.read_parts(dir, &mut tensors)?;
        let path = dir.join(ENCODER_FILE);
        let method = if method.has_prompts() && path.is_file() {
            let encoder = read_values(&path)?.into_iter();
            tensors.extend(encoder.map(|(key, values)| (format!("{ENCODER_PREFIX}{key}"), values)));
            method
        } else {
            method.without_encoder()
        };
        Ok(Self { method, base_model, task_type, base_fingerprint, tensors })
    }

    /// Writes a folder in PEFT's layout; see [`write_atomically`].
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn write(&self, dir: &Path) -> Result<()> {
        match M::write_parts(self, dir)? {
            Some(own) => own.write_own(dir),
            None => self.write_own(dir),
        }
    }

    /// Writes what belongs into the folder itself.
    fn write_own(&self, dir: &Path) -> Result<()> {
        let config = self.config_json()?;
        let path = dir.join(TENSOR_FILE);
        let (encoder, tensors): (Vec<_>, Vec<_>) =
            self.tensors.iter().partition(|(key, _)| key.starts_with(ENCODER_PREFIX));
        let prefixed = tensors.into_iter().map(|(key, values)| {
            let name = if M::is_of_model(key) { key.clone() } else { format!("{}{key}", Self::PREFIX) };
            (name, values)
        });
        let mut tensors = write_values(prefixed, &path)?;
        if let Some(fingerprint) = &self.base_fingerprint {
            tensors = with_fingerprint(&tensors, fingerprint, &path)?;
        }
        let encoder = encoder.into_iter().map(|(key, values)| (key[ENCODER_PREFIX.len()..].to_owned(), values));
        let encoder = write_values(encoder, &dir.join(ENCODER_FILE))?;
        let mut files: Vec<(&str, &[u8])> = vec![(TENSOR_FILE, &tensors), (CONFIG_FILE, config.as_bytes())];
        let path = dir.join(ENCODER_FILE);
        if self.tensors.keys().any(|key| key.starts_with(ENCODER_PREFIX)) {
            files.push((ENCODER_FILE, &encoder));
        } else if path.is_file() {
            // That of an earlier adapter, which is whole without it.
            std::fs::remove_file(&path).map_err(Error::io(&path))?;
        }
        write_atomically(dir, &files)
    }

    fn config_json(&self) -> Result<String> {
        let invalid = |e: serde_json::Error| Error::config(M::PEFT_TYPE, "values that JSON can hold", e);
        let Value::Object(method) = serde_json::to_value(&self.method).map_err(invalid)? else {
            return Err(Error::config(M::PEFT_TYPE, "a struct of named fields", "another type"));
        };
        let mut json: BTreeMap<String, Value> = method.into_iter().collect();
        if json.get("bias").is_some_and(|bias| bias == "only") {
            json.insert("bias".to_owned(), format!("{}_only", M::PEFT_TYPE.to_lowercase()).into());
        }
        // PEFT wants to know who reads the text that a prompt started as, though it reads it no more.
        if json.get("prompt_tuning_init").is_some_and(|init| init == "TEXT") {
            json.insert("tokenizer_name_or_path".to_owned(), self.base_model.clone().into());
        }
        json.insert("peft_type".to_owned(), M::PEFT_TYPE.into());
        json.insert("base_model_name_or_path".to_owned(), self.base_model.clone().into());
        json.insert("task_type".to_owned(), self.task_type.clone().into());
        json.insert("inference_mode".to_owned(), true.into());
        json.insert("auto_mapping".to_owned(), Value::Null);
        json.insert("revision".to_owned(), Value::Null);
        serde_json::to_string_pretty(&json).map_err(invalid)
    }
}

/// How much is made before it is compared with a file: a configuration that asks for far more than is there gets nothing.
fn room(tensors: &BTreeMap<String, Values>) -> Room {
    /// Little enough for any machine, so that what is missing from a small file is named.
    const ALWAYS: usize = 1 << 20;
    let all: usize = tensors.values().map(|values| values.values.len()).sum();
    Room::of(all.saturating_mul(2).max(ALWAYS))
}

/// Whether they are different things, rather than the same one computed on different devices.
fn differ(found: &Values, expected: &Values) -> bool {
    /// Of the largest value: products of 10 bits, as GPUs have them, are off by less.
    const SAME: f32 = 5e-3;
    let largest = expected.values.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
    let mut pairs = found.values.iter().zip(&expected.values);
    found.shape != expected.shape || pairs.any(|(found, expected)| (found - expected).abs() > SAME * largest)
}

/// Writes files of one folder so that each is seen either as it was or whole: first all beside their places, then the renames.
///
/// # Errors
/// When the file system refuses. A write that fails, as on a full disk, leaves every file as it was; only a rename that fails after
/// another one succeeded leaves a mixture.
pub fn write_atomically(dir: &Path, files: &[(&str, &[u8])]) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
    let mut written = Vec::with_capacity(files.len());
    for (name, bytes) in files {
        let path = dir.join(name);
        let mut builder = tempfile::Builder::new();
        builder.prefix(".").suffix(".peft-tmp");
        // `tempfile` makes files that only the owner can read; an adapter is as public as its folder.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let mut file = builder.tempfile_in(dir).map_err(Error::io(&path))?;
        file.write_all(bytes).and_then(|()| file.as_file().sync_all()).map_err(Error::io(&path))?;
        written.push((file, path));
    }
    for (file, path) in written {
        file.persist(&path).map_err(|e| Error::Io { path: path.clone(), source: e.error })?;
    }
    Ok(())
}

fn parse<M: Method>(json: &Map<String, Value>) -> serde_json::Result<M> {
    serde_json::from_value(Value::Object(json.clone()))
}

/// The field without which the configuration could be read, for a message: serde does not say which it stumbled over.
fn culprit<M: Method>(json: &Map<String, Value>) -> String {
    let without =
        |field: &String| json.iter().filter(|(key, _)| *key != field).map(|(k, v)| (k.clone(), v.clone())).collect();
    let field = json.keys().find(|field| parse::<M>(&without(field)).is_ok());
    field.map_or_else(String::new, |field| format!("{field} is {}: ", json[field]))
}

fn read_config(path: &Path) -> Result<Map<String, Value>> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    serde_json::from_str(&text).map_err(|e| Error::format(path, format!("not a JSON object: {e}")))
}

/// The bytes of a safetensors file with these tensors in f32; `path` is for messages.
///
/// # Errors
/// When a shape does not fit its values.
pub fn write_values<'a>(tensors: impl IntoIterator<Item = (String, &'a Values)>, path: &Path) -> Result<Vec<u8>> {
    let format = |e: safetensors::SafeTensorError| Error::format(path, e.to_string());
    let raw: Vec<(String, Vec<u8>, &[usize])> = tensors
        .into_iter()
        .map(|(key, v)| (key, v.values.iter().flat_map(|x| x.to_le_bytes()).collect(), &v.shape[..]))
        .collect();
    let views = raw
        .iter()
        .map(|(key, bytes, shape)| Ok((key, TensorView::new(Dtype::F32, shape.to_vec(), bytes).map_err(format)?)))
        .collect::<Result<Vec<_>>>()?;
    safetensors::serialize(views, Some(HashMap::from([("format".to_owned(), "pt".to_owned())]))).map_err(format)
}

/// The tensors of a safetensors file, which must be finite floats.
///
/// # Errors
/// When the file cannot be read, is malformed, or holds anything else.
pub fn read_values(path: &Path) -> Result<BTreeMap<String, Values>> {
    values_of(&std::fs::read(path).map_err(Error::io(path))?, path)
}

/// [`read_values`] of what was read; `path` is for messages.
fn values_of(bytes: &[u8], path: &Path) -> Result<BTreeMap<String, Values>> {
    // The parser checks the header's length, every offset and every shape against the bytes that are there.
    let file = SafeTensors::deserialize(bytes).map_err(malformed(path))?;
    let mut tensors = BTreeMap::new();
    for (key, view) in file.tensors() {
        let values = decode(view.dtype(), view.data())
            .ok_or_else(|| Error::format(path, format!("{key}: expected a float type, found {:?}", view.dtype())))?;
        if values.iter().any(|v| !v.is_finite()) {
            return Err(Error::format(
                path,
                format!("{key}: holds a value that is not finite; the training that wrote it diverged"),
            ));
        }
        tensors.insert(key, Values { shape: view.shape().to_vec(), values });
    }
    Ok(tensors)
}

/// The fingerprint that a safetensors file holds in its metadata.
fn fingerprint_of(bytes: &[u8], path: &Path) -> Result<Option<String>> {
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(malformed(path))?;
    Ok(header.metadata().as_ref().and_then(|metadata| metadata.get(FINGERPRINT)).cloned())
}

/// A safetensors file with the fingerprint as the last entry of its metadata. `safetensors` writes two entries in an order that changes from
/// call to call, and the same adapter is to give the same bytes.
fn with_fingerprint(bytes: &[u8], fingerprint: &str, path: &Path) -> Result<Vec<u8>> {
    let (length, _) = SafeTensors::read_metadata(bytes).map_err(malformed(path))?;
    let (header, data) = bytes[HEADER_AT..].split_at(length);
    let mut header: Map<String, Value> = serde_json::from_slice(header).map_err(malformed(path))?;
    if let Some(Value::Object(metadata)) = header.get_mut("__metadata__") {
        metadata.insert(FINGERPRINT.to_owned(), fingerprint.into());
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(HEADER_AT), b' ');
    Ok([&(header.len() as u64).to_le_bytes(), &header[..], data].concat())
}

fn malformed<E: std::fmt::Display>(path: &Path) -> impl Fn(E) -> Error {
    move |e| Error::format(path, format!("not a safetensors file: {e}"))
}

/// Little-endian floats as f32; `None` for a type that is no float.
pub fn decode(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    Some(match dtype {
        Dtype::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::F16 => bytes.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::BF16 => bytes.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::F64 => bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b) as f32).collect(),
        _ => return None,
    })
}

/// Floats in the little-endian form of `dtype`; `None` for a type that is no float.
pub fn encode(dtype: Dtype, values: &[f32]) -> Option<Vec<u8>> {
    Some(match dtype {
        Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
        Dtype::F64 => values.iter().flat_map(|v| f64::from(*v).to_le_bytes()).collect(),
        _ => return None,
    })
}

/// Row-major transpose of a `[rows, columns]` matrix.
pub fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len());
    out.extend((0..columns).flat_map(|c| (0..rows).map(move |r| values[r * columns + c])));
    out
}

struct Collector<M> {
    keys: Keys<M>,
    tensors: BTreeMap<String, Values>,
    problems: Vec<Problem>,
}

impl<M: Method> Collector<M> {
    fn new<T: Module>(module: &T, method: &M) -> Result<Self> {
        Ok(Self { keys: Keys::new(module, method)?, tensors: BTreeMap::new(), problems: Vec::new() })
    }

    /// Adds what the adapters compute.
    fn compute<T: Module>(&mut self, module: &T, method: &M) -> Result<()> {
        if !method.has_prompts() {
            return Ok(());
        }
        let mut adapters = Adapters::of(module);
        let prompts = |site: &&Site| site.kind == LayerKind::Prompts && self.keys.adapted.contains(&site.path);
        for site in scan(module).sites.iter().filter(prompts) {
            let adapter = adapters.take(method, site)?;
            let Some((key, values)) = adapter.as_ref().and_then(M::computed) else { continue };
            match values.try_into_data() {
                Ok(data) => {
                    let values = Values { shape: data.shape().to_vec(), values: data.iter::<f32>().collect() };
                    self.tensors.insert(key.to_owned(), values);
                }
                Err(e) => self.problems.push(Problem::Other { path: key.to_owned(), what: format!("{e:?}") }),
            }
        }
        Ok(())
    }
}

impl<M: Method> ParamVisitor for Collector<M> {
    fn float<const D: usize>(&mut self, at: &PathStack, param: &Param<Tensor<D>>) {
        let key = match self.keys.key(at, D) {
            Ok(key) if key.required => key,
            Ok(_) => return,
            Err(problem) => return self.problems.push(problem),
        };
        match param.base().try_into_data() {
            Ok(data) => {
                let values = key.to_file(data.shape().as_slice(), data.iter::<f32>().collect());
                self.tensors.insert(key.name, values);
            }
            Err(e) => self.problems.push(Problem::Other { path: key.name, what: format!("{e:?}") }),
        }
    }
}

struct Filler<M> {
    keys: Keys<M>,
    tensors: BTreeMap<String, Values>,
    strictness: Strictness,
    /// Whether something was asked for that computes a tensor of the file.
    encoded: bool,
    problems: Vec<Problem>,
}

impl<M: Method> ParamMapper for Filler<M> {
    fn float<const D: usize>(&mut self, at: &PathStack, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let key = match self.keys.key(at, D) {
            Ok(key) => key,
            Err(problem) => {
                self.problems.push(problem);
                return param;
            }
        };
        self.encoded |= key.name.starts_with(ENCODER_PREFIX);
        let shape: Vec<usize> = param.lazy_shape().to_vec();
        let expected = key.shape(&shape);
        let Some(found) = self.tensors.remove(&key.name) else {
            if key.required && !self.strictness.allow_missing {
                self.problems.push(Problem::Missing { name: key.name, expected });
            }
            return param;
        };
        if found.shape != expected {
            self.problems.push(Problem::Shape { name: key.name, expected, found: found.shape });
            return param;
        }
        let values = key.out_of_file(&shape, found.values);
        param.map(|old| {
            let (device, trained) = (old.device(), old.is_require_grad());
            Tensor::from_data(TensorData::new(values, shape), (&device, old.dtype())).set_require_grad(trained)
        })
    }
}
