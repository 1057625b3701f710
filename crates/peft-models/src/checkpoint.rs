//! A Hugging Face directory as a source of tensors: one `model.safetensors`, or shards with an index.
//!
//! The tensors of a weight that bitsandbytes has packed are one tensor here, by the weight's name and in its shape.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use peft_core::files::decode;
use peft_core::kernels::PackedData;
use peft_quant::{BnbWeight, Stored, packed_weight, part_names, stored_shape};
use safetensors::Dtype;
use safetensors::tensor::Metadata;

use crate::export::OutFile;
use crate::weights::{TensorInfo, Weights};
use crate::{Error, Result};

/// The safetensors files of a folder. Only headers are read at first; each tensor is read when it is asked for.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    tensors: Vec<TensorInfo>,
    places: Vec<Place>,
    files: Vec<Shard>,
    /// Parts of packed weights, by name.
    parts: BTreeMap<String, (TensorInfo, Place)>,
}

#[derive(Clone, Debug)]
enum Shard {
    File(PathBuf),
    Memory(&'static [u8]),
}

#[derive(Clone, Copy, Debug)]
struct Place {
    file: usize,
    start: u64,
    dtype: Dtype,
}

pub(crate) const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// The format's own bound on the header.
const LARGEST_HEADER: u64 = 100_000_000;

impl Checkpoint {
    /// Opens the weights in `dir`.
    ///
    /// # Errors
    /// When there are none, a header is malformed, or a file is shorter than its header says.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::index(dir, shards(dir)?.into_iter().map(Shard::File).collect())
    }

    /// Opens one safetensors file that is in memory; `name` is for messages.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_bytes(name: &str, bytes: &'static [u8]) -> Result<Self> {
        Self::index(Path::new(name), vec![Shard::Memory(bytes)])
    }

    fn index(dir: &Path, files: Vec<Shard>) -> Result<Self> {
        let mut found: BTreeMap<String, (TensorInfo, Place)> = BTreeMap::new();
        for (at, shard) in files.iter().enumerate() {
            let path = shard.path(dir);
            let (metadata, data_start) = match shard {
                Shard::File(path) => {
                    let file = File::open(path).map_err(Error::io(path))?;
                    let length = file.metadata().map_err(Error::io(path))?.len();
                    header(path, file, length)?
                }
                Shard::Memory(bytes) => header(dir, *bytes, bytes.len() as u64)?,
            };
            for (name, info) in metadata.tensors() {
                let (start, end) = info.data_offsets;
                let tensor = TensorInfo {
                    name: name.clone(),
                    shape: info.shape.clone(),
                    dtype: format!("{:?}", info.dtype),
                    bytes: (end - start) as u64,
                    packed_rows: false,
                };
                let place = Place { file: at, start: data_start + start as u64, dtype: info.dtype };
                if found.insert(name.clone(), (tensor, place)).is_some() {
                    return Err(Error::format(path, format!("{name}: another shard holds this tensor too")));
                }
            }
        }
        let mut checkpoint =
            Self { dir: dir.to_owned(), tensors: Vec::new(), places: Vec::new(), files, parts: BTreeMap::new() };
        checkpoint.collect_packed(&mut found)?;
        (checkpoint.tensors, checkpoint.places) = found.into_values().unzip();
        Ok(checkpoint)
    }

    /// Makes one tensor of those of each packed weight.
    fn collect_packed(&mut self, found: &mut BTreeMap<String, (TensorInfo, Place)>) -> Result<()> {
        let packed =
            found.keys().filter_map(|name| packed_weight(name).map(|(weight, code)| (weight.to_owned(), code)));
        for (name, code) in packed.collect::<Vec<_>>() {
            let parts = part_names(&name).chain([name.clone()]).filter_map(|part| found.remove_entry(&part));
            self.parts.extend(parts);
            let Some((numbers, place)) = self.parts.get(&name) else {
                return Err(Error::format(
                    &self.dir,
                    format!("{name}: packed by its state, but its numbers are missing"),
                ));
            };
            let (numbers, place) = (numbers.clone(), *place);
            let state = part_names(&name).find(|part| packed_weight(part).is_some() && self.parts.contains_key(part));
            let state = state.map(|state| self.bytes_at(&self.parts[&state].0, self.parts[&state].1)).transpose()?;
            let shape = stored_shape(&name, &state.unwrap_or_default());
            let shape = shape.map_err(|e| Error::format(&self.dir, e.to_string()))?;
            let dtype = code.name().to_uppercase();
            let info = TensorInfo { name: name.clone(), shape, dtype, bytes: numbers.bytes, packed_rows: true };
            found.insert(name, (info, place));
        }
        Ok(())
    }

    /// The packed weight of that name, if it is one.
    ///
    /// # Errors
    /// When it is malformed, or the file cannot be read.
    pub fn packed_weight(&self, name: &str) -> Result<Option<BnbWeight>> {
        if !self.parts.contains_key(name) {
            return Ok(None);
        }
        let failed = RefCell::new(None);
        let weight = BnbWeight::read(name, |part| {
            let (info, place) = self.parts.get(part)?;
            let data = self.bytes_at(info, *place).map_err(|error| failed.replace(Some(error))).ok()?;
            Some(Stored { dtype: place.dtype, shape: info.shape.clone(), data })
        });
        failed.into_inner().map_or(Ok(()), Err)?;
        weight.map_err(|e| Error::format(&self.dir, e.to_string()))
    }

    /// Whether a weight is stored packed.
    pub fn is_packed(&self) -> bool {
        !self.parts.is_empty()
    }

    /// The type that packed weights had before; `None` when no weight is stored packed.
    ///
    /// # Errors
    /// As [`packed_weight`](Self::packed_weight).
    pub fn unpacked_dtype(&self) -> Result<Option<Dtype>> {
        let first = self.tensors.iter().find(|info| info.packed_rows);
        let weight = first.map(|info| self.packed_weight(&info.name)).transpose()?.flatten();
        Ok(weight.map(|weight| match weight.dtype.as_str() {
            "float16" => Dtype::F16,
            "bfloat16" => Dtype::BF16,
            _ => Dtype::F32,
        }))
    }

    /// The shards' file names, in the order of the index.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.files.iter().map(|shard| match shard {
            Shard::File(path) => path.file_name().and_then(|n| n.to_str()).unwrap_or(SINGLE),
            Shard::Memory(_) => SINGLE,
        })
    }

    /// The tensors of one shard, with their types.
    pub fn in_file(&self, file: usize) -> impl Iterator<Item = (&TensorInfo, Dtype)> {
        self.tensors.iter().zip(&self.places).filter(move |(_, p)| p.file == file).map(|(t, p)| (t, p.dtype))
    }

    pub(crate) fn out_files(&self) -> Vec<OutFile<'_>> {
        let shard =
            |(at, file): (usize, &str)| OutFile { at, file: file.to_owned(), tensors: self.in_file(at).collect() };
        self.files().enumerate().map(shard).collect()
    }

    /// The bytes of one tensor, as they are in the file.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn bytes(&self, info: &TensorInfo) -> Result<Vec<u8>> {
        self.bytes_at(info, self.place(info)?)
    }

    fn bytes_at(&self, info: &TensorInfo, place: Place) -> Result<Vec<u8>> {
        let path = match &self.files[place.file] {
            Shard::File(path) => path,
            Shard::Memory(bytes) => {
                let start = place.start as usize;
                return Ok(bytes[start..start + info.bytes as usize].to_vec());
            }
        };
        let mut file = File::open(path).map_err(Error::io(path))?;
        file.seek(SeekFrom::Start(place.start)).map_err(Error::io(path))?;
        // The header was checked against the file's length, so this is no larger than the file.
        let mut bytes = vec![0; usize::try_from(info.bytes).unwrap_or(usize::MAX)];
        file.read_exact(&mut bytes).map_err(Error::io(path))?;
        Ok(bytes)
    }

    fn place(&self, info: &TensorInfo) -> Result<Place> {
        let at = self.tensors.binary_search_by(|t| t.name.cmp(&info.name));
        at.map(|at| self.places[at]).map_err(|_| Error::format(&self.dir, format!("{}: no such tensor", info.name)))
    }
}

impl Shard {
    fn path<'a>(&'a self, dir: &'a Path) -> &'a Path {
        match self {
            Self::File(path) => path,
            Self::Memory(_) => dir,
        }
    }
}

impl Weights for Checkpoint {
    fn path(&self) -> &Path {
        &self.dir
    }

    fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    fn read(&self, info: &TensorInfo) -> Result<Vec<f32>> {
        if let Some(weight) = self.packed_weight(&info.name)? {
            return Ok(weight.packed.unpack());
        }
        let dtype = self.place(info)?.dtype;
        decode(dtype, &self.bytes(info)?).ok_or_else(|| Error::Unsupported {
            what: format!("{}: type {dtype:?} in {}", info.name, self.dir.display()),
            hint: "F32, F16, BF16 and F64 are read".to_owned(),
        })
    }

    fn packed(&self, info: &TensorInfo) -> Result<Option<PackedData>> {
        let Some(BnbWeight { packed, shape, .. }) = self.packed_weight(&info.name)? else { return Ok(None) };
        let wrong = |what: String| Error::format(&self.dir, format!("{}: {what}", info.name));
        let shape = <[usize; 2]>::try_from(&shape[..]).map_err(|_| wrong(format!("shape {shape:?} is no matrix")))?;
        packed.into_matrix(shape).map(Some).map_err(|e| wrong(e.to_string()))
    }
}

fn shards(dir: &Path) -> Result<Vec<PathBuf>> {
    let (single, index) = (dir.join(SINGLE), dir.join(INDEX));
    if single.exists() {
        return Ok(vec![single]);
    }
    if !index.exists() {
        let what = format!("neither {SINGLE} nor {INDEX} is here; a Hugging Face model directory holds one of them");
        return Err(Error::format(dir, what));
    }
    let text = std::fs::read_to_string(&index).map_err(Error::io(&index))?;
    let json: serde_json::Value =
        serde_json::from_str(&text).map_err(|e| Error::format(&index, format!("not JSON: {e}")))?;
    let map = json.get("weight_map").and_then(serde_json::Value::as_object);
    let map = map.ok_or_else(|| Error::format(&index, "no `weight_map` object"))?;
    let mut names: Vec<&str> = map.values().filter_map(serde_json::Value::as_str).collect();
    names.sort_unstable();
    names.dedup();
    // A shard is a plain file name: an index must not lead out of its folder.
    if let Some(bad) = names.iter().find(|n| Path::new(n).file_name() != Some(n.as_ref())) {
        return Err(Error::format(&index, format!("`{bad}` is not a file of this folder")));
    }
    Ok(names.into_iter().map(|name| dir.join(name)).collect())
}

fn header(path: &Path, mut file: impl Read, length: u64) -> Result<(Metadata, u64)> {
    let mut prefix = [0; 8];
    file.read_exact(&mut prefix)
        .map_err(|_| Error::format(path, format!("{length} bytes are too few for a safetensors file")))?;
    let header = u64::from_le_bytes(prefix);
    if header > LARGEST_HEADER || header > length - 8 {
        return Err(Error::format(
            path,
            format!("its header claims {header} bytes, the file has {length}; is it cut short?"),
        ));
    }
    let mut bytes = vec![0; header as usize];
    file.read_exact(&mut bytes).map_err(Error::io(path))?;
    let metadata: Metadata =
        serde_json::from_slice(&bytes).map_err(|e| Error::format(path, format!("not a safetensors file: {e}")))?;
    // Parsing made sure that offsets follow each other without a gap and agree with shapes; what is left to check is the end.
    let data = metadata.data_len() as u64;
    if 8 + header + data != length {
        let needed = 8 + header + data;
        return Err(Error::format(path, format!("{needed} bytes expected, {length} found; is it cut short?")));
    }
    Ok((metadata, 8 + header))
}
