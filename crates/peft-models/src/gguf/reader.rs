//! The GGUF header: magic, version, metadata, tensor table.
//!
//! Layout (little-endian, versions 2 and 3): `GGUF`, u32 version, u64 tensor count, u64 metadata count, the metadata
//! (`string key, u32 type, value`), the tensor table (`string name, u32 rank, u64 dims[rank], u32 type, u64 offset`),
//! then tensor data from the next multiple of `general.alignment` on. Strings and arrays start with a u64 length.
//!
//! Every count and length is compared with the bytes that are left in the file before anything is allocated for it, so
//! memory stays within a small multiple of the file's own size whatever the file claims.

use std::collections::HashSet;
use std::fmt::Display;
use std::io::{self, Read};
use std::path::Path;

use super::dequant::BlockFormat;
use super::metadata::{Metadata, Value};
use crate::{Error, Result};

/// As deep as an array of arrays may go; real files have no nesting at all.
const MAX_ARRAY_DEPTH: u32 = 4;
/// The rank limit of ggml.
const MAX_RANK: u32 = 4;

/// One row of the tensor table, with its place in the file checked.
#[derive(Debug)]
pub(super) struct Stored {
    /// The name in the file, such as `blk.0.attn_q.weight`.
    pub(super) name: String,
    /// Outermost dimension first; the file has the innermost first.
    pub(super) shape: Vec<usize>,
    pub(super) format: &'static BlockFormat,
    /// Position of the first byte in the file.
    pub(super) start: u64,
    pub(super) bytes: u64,
}

/// Reads the header of a file of `length` bytes.
pub(super) fn read_header(input: impl Read, length: u64, path: &Path) -> Result<(Metadata, Vec<Stored>)> {
    let mut cursor = Cursor { input, left: length, path };
    let magic: [u8; 4] = cursor.array("the magic number")?;
    if magic != *b"GGUF" {
        return Err(cursor.malformed("not a GGUF file: it does not start with `GGUF`"));
    }
    let version = cursor.u32("the version")?;
    match version {
        2 | 3 => {}
        _ if matches!(version.swap_bytes(), 1..=3) => {
            return Err(unsupported("a big-endian GGUF file", "convert the model again on a little-endian machine"));
        }
        _ => {
            return Err(unsupported(
                format!("GGUF version {version}"),
                "convert the model again; versions 2 and 3 are read",
            ));
        }
    }
    let tensor_count = cursor.u64("the tensor count")?;
    let metadata_count = cursor.u64("the metadata count")?;
    // Least sizes: name length, rank, one dimension, type, offset; key length, type, one byte.
    cursor.expect_items(tensor_count, 8 + 4 + 8 + 4 + 8, "tensors")?;
    cursor.expect_items(metadata_count, 8 + 4 + 1, "metadata entries")?;

    let mut metadata = Metadata::new(path);
    for _ in 0..metadata_count {
        let key = cursor.string("a metadata key")?;
        let kind = cursor.u32(&key)?;
        let value = cursor.value(kind, &key)?;
        metadata.insert(key, value)?;
    }
    let alignment = metadata.uint("general.alignment")?.unwrap_or(32);
    if !alignment.is_power_of_two() || alignment > length {
        return Err(cursor.malformed(format!("general.alignment is {alignment}, expected a small power of two")));
    }

    let mut tensors = Vec::new();
    for _ in 0..tensor_count {
        tensors.push(cursor.tensor(alignment)?);
    }
    // No overflow: both are at most the length of a file, which is less than 2^63.
    let data = (length - cursor.left).next_multiple_of(alignment);
    place(&mut tensors, data, length, path)?;
    Ok((metadata, tensors))
}

/// Makes the offsets absolute, and checks that tensors lie inside the file, apart from each other and under unique
/// names.
fn place(tensors: &mut [Stored], data: u64, length: u64, path: &Path) -> Result<()> {
    let mut names = HashSet::new();
    let mut spans = Vec::new();
    for tensor in tensors.iter_mut() {
        if !names.insert(tensor.name.as_str()) {
            return Err(Error::format(path, format!("the tensor `{}` is there twice", tensor.name)));
        }
        let start = tensor.start.checked_add(data);
        let end = start.and_then(|start| start.checked_add(tensor.bytes)).filter(|&end| end <= length);
        let (Some(start), Some(end)) = (start, end) else {
            let (Stored { name, start, bytes, .. }, have) = (tensor, length.saturating_sub(data));
            let what = format!("`{name}` has {bytes} bytes at offset {start}, but only {have} bytes of data are there");
            return Err(Error::format(path, format!("{what}; is the download complete?")));
        };
        tensor.start = start;
        spans.push((start, end, tensor.name.as_str()));
    }
    spans.sort_unstable();
    for pair in spans.windows(2) {
        if pair[0].1 > pair[1].0 {
            return Err(Error::format(path, format!("the tensors `{}` and `{}` overlap", pair[0].2, pair[1].2)));
        }
    }
    Ok(())
}

fn unsupported(what: impl Into<String>, hint: &str) -> Error {
    Error::Unsupported { what: what.into(), hint: hint.to_owned() }
}

/// A reader that knows how many bytes are left.
struct Cursor<'a, R> {
    input: R,
    left: u64,
    path: &'a Path,
}

impl<R: Read> Cursor<'_, R> {
    fn malformed(&self, what: impl Into<String>) -> Error {
        Error::format(self.path, what)
    }

    /// Refuses `count` items of at least `size` bytes each when the rest of the file cannot hold them.
    fn expect_items(&self, count: u64, size: u64, what: impl Display) -> Result<()> {
        match count.checked_mul(size) {
            Some(bytes) if bytes <= self.left => Ok(()),
            _ => Err(self.malformed(format!("it claims {count} {what}, but ends after {} more bytes", self.left))),
        }
    }

    fn fill(&mut self, buffer: &mut [u8], what: impl Display) -> Result<()> {
        self.expect_items(buffer.len() as u64, 1, format_args!("bytes for {what}"))?;
        self.input.read_exact(buffer).map_err(Error::io(self.path))?;
        self.left -= buffer.len() as u64;
        Ok(())
    }

    fn skip(&mut self, bytes: u64) -> Result<()> {
        let copied = io::copy(&mut self.input.by_ref().take(bytes), &mut io::sink()).map_err(Error::io(self.path))?;
        if copied != bytes {
            return Err(self.malformed("it became shorter while it was read"));
        }
        self.left -= bytes;
        Ok(())
    }

    fn array<const N: usize>(&mut self, what: impl Display) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes, what)?;
        Ok(bytes)
    }

    fn u32(&mut self, what: impl Display) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: impl Display) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// The length of a string or an array whose items take `size` bytes or more, known to fit into the file.
    fn length(&mut self, size: u64, what: impl Display) -> Result<usize> {
        let length = self.u64(&what)?;
        self.expect_items(length, size, format_args!("items for {what}"))?;
        usize::try_from(length).map_err(|_| self.malformed(format!("{what} is longer than this machine can address")))
    }

    fn string(&mut self, what: impl Display) -> Result<String> {
        let mut bytes = vec![0; self.length(1, &what)?];
        self.fill(&mut bytes, &what)?;
        String::from_utf8(bytes).map_err(|_| self.malformed(format!("{what} is not valid UTF-8")))
    }

    fn value(&mut self, kind: u32, key: &str) -> Result<Value> {
        Ok(match kind {
            0 => Value::Uint(u8::from_le_bytes(self.array(key)?).into()),
            1 => Value::Int(i8::from_le_bytes(self.array(key)?).into()),
            2 => Value::Uint(u16::from_le_bytes(self.array(key)?).into()),
            3 => Value::Int(i16::from_le_bytes(self.array(key)?).into()),
            4 => Value::Uint(u32::from_le_bytes(self.array(key)?).into()),
            5 => Value::Int(i32::from_le_bytes(self.array(key)?).into()),
            6 => Value::F32(f32::from_le_bytes(self.array(key)?)),
            7 => match self.array(key)? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [byte] => return Err(self.malformed(format!("`{key}` is a boolean of value {byte}"))),
            },
            8 => Value::String(self.string(key)?),
            9 => self.items(key)?,
            10 => Value::Uint(u64::from_le_bytes(self.array(key)?)),
            11 => Value::Int(i64::from_le_bytes(self.array(key)?)),
            12 => Value::F64(f64::from_le_bytes(self.array(key)?)),
            _ => return Err(self.malformed(format!("`{key}` has the unknown type {kind}"))),
        })
    }

    /// An array: the three kinds that tokenizers are made of are kept, the others are stepped over.
    fn items(&mut self, key: &str) -> Result<Value> {
        match self.u32(key)? {
            5 => self.numbers(key, i32::from_le_bytes).map(Value::Ints),
            6 => self.numbers(key, f32::from_le_bytes).map(Value::Floats),
            8 => (0..self.length(8, key)?).map(|_| self.string(key)).collect::<Result<_>>().map(Value::Strings),
            kind => self.skip_items(kind, key, 1).map(|()| Value::Skipped),
        }
    }

    fn numbers<T>(&mut self, key: &str, decode: fn([u8; 4]) -> T) -> Result<Vec<T>> {
        (0..self.length(4, key)?).map(|_| self.array(key).map(decode)).collect()
    }

    fn skip_items(&mut self, kind: u32, key: &str, depth: u32) -> Result<()> {
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            8 => {
                for _ in 0..self.length(8, key)? {
                    let bytes = self.length(1, key)?;
                    self.skip(bytes as u64)?;
                }
                return Ok(());
            }
            9 if depth < MAX_ARRAY_DEPTH => {
                for _ in 0..self.length(4 + 8, key)? {
                    let kind = self.u32(key)?;
                    self.skip_items(kind, key, depth + 1)?;
                }
                return Ok(());
            }
            9 => return Err(self.malformed(format!("`{key}` nests arrays more than {MAX_ARRAY_DEPTH} deep"))),
            _ => return Err(self.malformed(format!("`{key}` is an array of the unknown type {kind}"))),
        };
        let count = self.length(size, key)?;
        self.skip(count as u64 * size)
    }

    /// One row of the tensor table, its offset still relative to the start of the data.
    fn tensor(&mut self, alignment: u64) -> Result<Stored> {
        let name = self.string("a tensor name")?;
        let rank = self.u32(&name)?;
        if !(1..=MAX_RANK).contains(&rank) {
            return Err(self.malformed(format!("the tensor `{name}` has rank {rank}, expected 1 to {MAX_RANK}")));
        }
        let mut shape = Vec::new();
        let mut elements = 1_u64;
        for _ in 0..rank {
            let dim = self.u64(&name)?;
            let (size, product) = (usize::try_from(dim).ok(), elements.checked_mul(dim));
            let (Some(size @ 1..), Some(product)) = (size, product) else {
                return Err(self.malformed(format!("the tensor `{name}` has a dimension of {dim} after {shape:?}")));
            };
            elements = product;
            shape.insert(0, size);
        }
        let kind = self.u32(&name)?;
        let Some(format) = BlockFormat::of(kind) else {
            return Err(unsupported(format!("`{name}`: tensor type {kind}"), "convert the model to F16, Q8_0 or Q4_K"));
        };
        let row = shape[shape.len() - 1];
        if !row.is_multiple_of(format.elements) {
            let what = format!("`{name}`: rows of {row} values are not made of {} blocks", format.name);
            return Err(self.malformed(what));
        }
        // Too large for 64 bits is too large for the file, which is checked later.
        let bytes = (elements / format.elements as u64).saturating_mul(format.bytes as u64);
        let start = self.u64(&name)?;
        if !start.is_multiple_of(alignment) {
            return Err(self.malformed(format!("`{name}` starts at {start}, which is not a multiple of {alignment}")));
        }
        Ok(Stored { name, shape, format, start, bytes })
    }
}
