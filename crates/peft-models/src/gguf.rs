//! GGUF files, presented as Hugging Face checkpoints: the same tensor names, shapes, configuration and tokenizer.
//!
//! Read are the architectures `llama` (Llama, Mistral, `SmolLM2`), `qwen2`, `qwen3` and `gpt2`, and tensors of type
//! F32, F16, BF16, `Q8_0`, `Q4_0`, `Q4_1`, `Q4_K`, `Q5_K` and `Q6_K`. What llama.cpp stores differently is turned back:
//! the rows of query and key projections of `llama`, and the transposed `Conv1D` weights of `gpt2`. The rotation
//! factors of Llama 3.1 and later (`rope_freqs.weight`) are not a tensor of the model but become `rope_scaling` in
//! [`Gguf::config`].

mod config;
mod dequant;
mod metadata;
mod names;
mod reader;
mod tokenizer;

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use peft_core::kernels::PackedData;
use rayon::prelude::*;

use self::metadata::Metadata;
use self::names::{Architecture, Heads, Layout};
use self::reader::Stored;
pub use self::tokenizer::SpecialTokens;
use crate::weights::{TensorInfo, Weights};
use crate::{Error, Result};

/// An open GGUF file: its header is in memory, tensors are read when asked for.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    metadata: Metadata,
    architecture: Architecture,
    heads: Heads,
    /// Sorted by name.
    tensors: Vec<TensorInfo>,
    /// Where the values of `tensors` are, in the same order.
    sources: Vec<(Stored, Layout)>,
    rope_factors: Option<Stored>,
}

impl Gguf {
    /// Reads and checks the header of a GGUF file, version 2 or 3.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read, [`Error::Format`] when it is malformed or cut short,
    /// [`Error::Unsupported`] when its version or architecture is not read or a tensor has no place in the
    /// architecture.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = File::open(path).map_err(Error::io(path))?;
        let length = file.metadata().map_err(Error::io(path))?.len();
        Self::parse(path, BufReader::new(file), length)
    }

    fn parse(path: &Path, input: impl Read, length: u64) -> Result<Self> {
        let (metadata, stored) = reader::read_header(input, length, path)?;
        let architecture = Architecture::of(&metadata)?;
        if metadata.uint(&architecture.key("expert_count"))?.is_some_and(|experts| experts > 0) {
            return Err(Error::Unsupported {
                what: format!("{}: a mixture of experts in a GGUF file", path.display()),
                hint: "use the model's Hugging Face directory instead".into(),
            });
        }
        let heads = architecture.heads(&metadata)?;
        let (mut tensors, mut rope_factors, mut unknown) = (Vec::new(), None, Vec::new());
        for stored in stored {
            if stored.name == "rope_freqs.weight" {
                rope_factors = Some(stored);
            } else if let Some((name, layout)) = architecture.translate(&stored.name, heads) {
                tensors.push((describe(name, &stored, layout, path)?, (stored, layout)));
            } else {
                unknown.push(stored.name);
            }
        }
        if let Some(first) = unknown.first() {
            return Err(Error::Unsupported {
                what: format!("{}: the tensor `{first}` and {} others", path.display(), unknown.len() - 1),
                hint: format!("a model of architecture `{}` has no such tensors", architecture.name()),
            });
        }
        tensors.sort_unstable_by(|a, b| a.0.name.cmp(&b.0.name));
        let (tensors, sources) = tensors.into_iter().unzip();
        Ok(Self { path: path.to_owned(), metadata, architecture, heads, tensors, sources, rope_factors })
    }

    /// What `config.json` holds in a Hugging Face directory of this model.
    ///
    /// # Errors
    /// When a parameter of the architecture is missing, has the wrong type, or cannot be expressed.
    pub fn config(&self) -> Result<serde_json::Value> {
        config::config(self)
    }

    /// The tokenizer, which adds a beginning-of-sequence token where the file asks for it.
    ///
    /// # Errors
    /// [`Error::Format`] when tokens, merges or scores contradict each other, [`Error::Unsupported`] when the kind of
    /// tokenizer or its way of splitting text is not known.
    pub fn tokenizer(&self) -> Result<tokenizers::Tokenizer> {
        tokenizer::tokenizer(&self.metadata)
    }

    /// The ids of the tokens that have a role.
    ///
    /// # Errors
    /// When an id is not that of a token.
    pub fn special_tokens(&self) -> Result<SpecialTokens> {
        SpecialTokens::of(&self.metadata)
    }

    /// The Jinja template that turns messages into text, if there is one.
    #[must_use]
    pub fn chat_template(&self) -> Option<&str> {
        self.metadata.string("tokenizer.chat_template").ok().flatten()
    }

    /// Divisors of the rotation frequencies, `[head_dim / 2]`.
    fn rope_factors(&self) -> Result<Option<Vec<f32>>> {
        self.rope_factors.as_ref().map(|stored| self.values(stored)).transpose()
    }

    /// The values of a tensor in the order of the file.
    fn values(&self, stored: &Stored) -> Result<Vec<f32>> {
        let Stored { name, format, .. } = stored;
        format.decode(&self.bytes(stored)?).ok_or_else(|| Error::Unsupported {
            what: format!("{}: `{name}` of type {}", self.path.display(), format.name),
            hint: "quantise the model as Q4_0, Q4_1, Q4_K, Q5_K, Q6_K or Q8_0, or convert it to F16".into(),
        })
    }

    /// The bytes of a tensor.
    fn bytes(&self, stored: &Stored) -> Result<Vec<u8>> {
        let Stored { name, start, bytes, .. } = stored;
        let too_big =
            |_| Error::format(&self.path, format!("`{name}` has {bytes} bytes, more than this machine addresses"));
        let mut packed = vec![0; usize::try_from(*bytes).map_err(too_big)?];
        let mut file = File::open(&self.path).map_err(Error::io(&self.path))?;
        file.seek(SeekFrom::Start(*start)).map_err(Error::io(&self.path))?;
        file.read_exact(&mut packed).map_err(Error::io(&self.path))?;
        Ok(packed)
    }

    fn source(&self, info: &TensorInfo) -> Result<&(Stored, Layout)> {
        let missing = |_| Error::format(&self.path, format!("it has no tensor `{}`", info.name));
        let index = self.tensors.binary_search_by(|tensor| tensor.name.cmp(&info.name)).map_err(missing)?;
        Ok(&self.sources[index])
    }
}

impl Weights for Gguf {
    fn path(&self) -> &Path {
        &self.path
    }

    fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    fn read(&self, info: &TensorInfo) -> Result<Vec<f32>> {
        let (stored, layout) = self.source(info)?;
        let values = self.values(stored)?;
        Ok(match *layout {
            Layout::Same => values,
            Layout::Transposed => transposed(&values, stored.shape[1]),
            Layout::Interleaved { heads } => halves(&values, stored.shape[0], heads),
        })
    }

    fn packed(&self, info: &TensorInfo) -> Result<Option<PackedData>> {
        let (stored, layout) = self.source(info)?;
        let Stored { format, shape, .. } = stored;
        let [d_out, d_in] = shape[..] else { return Ok(None) };
        if !format.is_packed() {
            return Ok(None);
        }
        let bytes = match *layout {
            // The file has the rows of a linear layer whatever `transformers` has.
            Layout::Same | Layout::Transposed => self.bytes(stored)?,
            // Rows are whole blocks, so they can change places packed.
            Layout::Interleaved { heads } => halves(&self.bytes(stored)?, d_out, heads),
        };
        Ok(format.repack(&bytes, [d_out, d_in]))
    }
}

/// What Hugging Face would say of a tensor.
fn describe(name: String, stored: &Stored, layout: Layout, path: &Path) -> Result<TensorInfo> {
    let mut shape = stored.shape.clone();
    match layout {
        Layout::Same => {}
        Layout::Transposed if shape.len() == 2 => shape.reverse(),
        Layout::Interleaved { heads } if shape[0].is_multiple_of(2 * heads) => {}
        Layout::Transposed | Layout::Interleaved { .. } => {
            let what = format!("`{}` has shape {shape:?}, which does not go with {layout:?}", stored.name);
            return Err(Error::format(path, what));
        }
    }
    Ok(TensorInfo { name, shape, dtype: stored.format.name.to_owned(), bytes: stored.bytes, packed_rows: false })
}

/// `[rows, columns]` to `[columns, rows]`.
fn transposed(values: &[f32], columns: usize) -> Vec<f32> {
    let rows = values.len() / columns;
    let mut out = vec![0.0; values.len()];
    out.par_chunks_mut(rows).enumerate().for_each(|(column, out)| {
        for (out, row) in out.iter_mut().zip(values.chunks_exact(columns)) {
            *out = row[column];
        }
    });
    out
}

/// Undoes [`Layout::Interleaved`] on `rows` rows.
fn halves<T: Copy + Default + Send + Sync>(values: &[T], rows: usize, heads: usize) -> Vec<T> {
    let (width, head_dim) = (values.len() / rows, rows / heads);
    let mut out = vec![T::default(); values.len()];
    out.par_chunks_mut(width).enumerate().for_each(|(row, out)| {
        let (head, half, pair) = (row / head_dim, row % head_dim / (head_dim / 2), row % (head_dim / 2));
        let source = head * head_dim + 2 * pair + half;
        out.copy_from_slice(&values[source * width..][..width]);
    });
    out
}

#[cfg(test)]
mod tests;
