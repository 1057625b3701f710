//! Packed weights in the checkpoints of bitsandbytes (read and written, byte for byte), as `transformers` stores them.
//!
//! A weight `X.weight` is up to six tensors: `X.weight` (U8, numbers), `.absmax` (F32, or U8 when packed itself), `.quant_map` (F32, the code's
//! values), `.nested_absmax` and `.nested_quant_map` when the statistics are packed, and `.quant_state.bitsandbytes__nf4` or `__fp4`, a JSON
//! text as Python writes it.
//!
//! Codes that bitsandbytes has not (INT4 and INT8) are stored in the same way under `.quant_state.peft__…`, which its loader does not take for
//! its own; affine blocks have `.low` besides.

use std::collections::BTreeMap;

use safetensors::Dtype;
use serde::Deserialize;

use crate::{Code, Error, NESTED_BLOCK, Packed, Statistics, dynamic_map};

/// A tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    /// Type of the values.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<usize>,
    /// Values in row-major order, little-endian.
    pub data: Vec<u8>,
}

/// A packed weight of a checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct BnbWeight {
    /// Its values, row-major.
    pub packed: Packed,
    /// Its shape, `[d_out, d_in]` for a linear layer.
    pub shape: Vec<usize>,
    /// What it is unpacked to: `float32`, `float16` or `bfloat16`.
    pub dtype: String,
}

/// The JSON text of `quant_state`.
#[derive(Deserialize)]
struct State {
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_offset: Option<f64>,
}

/// What follows the name of a packed weight in that of its state.
const STATES: [(Code, &str); 5] = [
    (Code::Nf4, ".quant_state.bitsandbytes__nf4"),
    (Code::Fp4, ".quant_state.bitsandbytes__fp4"),
    (Code::Int4, ".quant_state.peft__int4"),
    (Code::Int4Affine, ".quant_state.peft__int4-affine"),
    (Code::Int8, ".quant_state.peft__int8"),
];

/// What follows the name of a packed weight in those of its other parts.
const PARTS: [&str; 5] = [".absmax", ".low", ".quant_map", ".nested_absmax", ".nested_quant_map"];

/// The packed weight whose state the tensor `name` holds.
pub fn packed_weight(name: &str) -> Option<(&str, Code)> {
    STATES.iter().find_map(|(code, state)| Some((name.strip_suffix(state)?, *code)))
}

/// The shape of the packed weight called `name`, by its state alone.
///
/// # Errors
/// When the state is malformed.
pub fn stored_shape(name: &str, state: &[u8]) -> Result<Vec<usize>, Error> {
    State::read(name, state).map(|state| state.shape)
}

impl State {
    fn read(name: &str, state: &[u8]) -> Result<Self, Error> {
        let malformed = |e| Error::Malformed { name: name.to_owned(), what: format!("quant_state: {e}") };
        serde_json::from_slice(state).map_err(malformed)
    }
}

/// Names that the parts of the packed weight called `name` may have, itself apart.
pub fn part_names(name: &str) -> impl Iterator<Item = String> {
    STATES.iter().map(|(_, state)| *state).chain(PARTS).map(move |suffix| format!("{name}{suffix}"))
}

impl BnbWeight {
    /// Reads the weight called `name` (with `.weight`) through `get`, which gives a tensor by its whole name. `None` when the checkpoint does not
    /// hold that weight packed.
    ///
    /// # Errors
    /// When a part is missing, malformed, or does not fit the others.
    pub fn read(name: &str, get: impl Fn(&str) -> Option<Stored>) -> Result<Option<Self>, Error> {
        let state = STATES.iter().find_map(|(code, suffix)| Some((*code, get(&format!("{name}{suffix}"))?)));
        let Some((code, state)) = state else { return Ok(None) };
        let part = |suffix: &str| {
            let name = format!("{name}{suffix}");
            get(&name).ok_or(Error::Missing { name })
        };
        let malformed = |what: String| Error::Malformed { name: name.to_owned(), what };
        let State { blocksize, dtype, shape, nested_blocksize, nested_offset } = State::read(name, &state.data)?;
        let len = shape.iter().try_fold(1_usize, |len, size| len.checked_mul(*size));
        let len = len.ok_or_else(|| malformed(format!("shape {shape:?} has too many values")))?;
        let floats = |suffix: &str| {
            let stored = part(suffix)?;
            let expected = || malformed(format!("{suffix}: expected F32, found {:?}", stored.dtype));
            floats(&stored).ok_or_else(expected)
        };
        if floats(".quant_map")? != code.values() {
            return Err(malformed("quant_map holds other values than those of its code".to_owned()));
        }
        let statistics = match nested_offset {
            None if code == Code::Int4Affine => {
                Statistics::Affine { ranges: floats(".absmax")?, lows: floats(".low")? }
            }
            None => Statistics::Plain(floats(".absmax")?),
            Some(_) if nested_blocksize != Some(NESTED_BLOCK) => {
                return Err(malformed(format!(
                    "nested_blocksize: expected {NESTED_BLOCK}, found {nested_blocksize:?}"
                )));
            }
            Some(offset) => {
                let (codes, scales, offset) = (part(".absmax")?.data, floats(".nested_absmax")?, offset as f32);
                let map = floats(".nested_quant_map")?;
                if map == dynamic_map() {
                    Statistics::Nested { codes, scales, offset }
                } else {
                    // Another release computed the map with other roundings: what counts is what its numbers stand for.
                    let value = |(at, code): (usize, &u8)| {
                        Some(map.get(usize::from(*code))? * scales.get(at / NESTED_BLOCK)? + offset)
                    };
                    let absmax: Option<Vec<f32>> = codes.iter().enumerate().map(value).collect();
                    Statistics::Plain(absmax.ok_or_else(|| malformed("absmax does not fit nested_absmax".to_owned()))?)
                }
            }
        };
        if !["float32", "float16", "bfloat16"].contains(&dtype.as_str()) {
            return Err(malformed(format!("dtype: expected float32, float16 or bfloat16, found {dtype}")));
        }
        let packed = Packed::from_parts(code, blocksize, len, part("")?.data, statistics)?;
        Ok(Some(Self { packed, shape, dtype }))
    }

    /// The tensors of the weight called `name` (with `.weight`).
    pub fn write(&self, name: &str) -> BTreeMap<String, Stored> {
        let code = self.packed.code();
        let mut state = format!(
            "{{\"quant_type\": \"{}\", \"blocksize\": {}, \"dtype\": \"{}\", \"shape\": {:?}",
            code.name(),
            self.packed.block(),
            self.dtype,
            self.shape
        );
        let bytes = |data: &[u8], shape: Vec<usize>| Stored { dtype: Dtype::U8, shape, data: data.to_vec() };
        let numbers = self.packed.codes();
        let mut tensors = BTreeMap::from([
            (name.to_owned(), bytes(numbers, vec![numbers.len(), 1])),
            (format!("{name}.quant_map"), stored(code.values())),
        ]);
        match self.packed.statistics() {
            Statistics::Plain(absmax) => drop(tensors.insert(format!("{name}.absmax"), stored(absmax))),
            Statistics::Nested { codes, scales, offset } => {
                tensors.insert(format!("{name}.absmax"), bytes(codes, vec![codes.len()]));
                tensors.insert(format!("{name}.nested_absmax"), stored(scales));
                tensors.insert(format!("{name}.nested_quant_map"), stored(dynamic_map()));
                let offset = python_float(f64::from(*offset));
                state += &format!(
                    ", \"nested_blocksize\": {NESTED_BLOCK}, \"nested_dtype\": \"float32\", \"nested_offset\": {offset}"
                );
            }
            Statistics::Affine { ranges, lows } => {
                tensors.insert(format!("{name}.absmax"), stored(ranges));
                tensors.insert(format!("{name}.low"), stored(lows));
            }
        }
        state.push('}');
        let suffix = STATES.iter().find_map(|(known, suffix)| (*known == code).then_some(*suffix)).unwrap_or_default();
        tensors.insert(format!("{name}{suffix}"), bytes(state.as_bytes(), vec![state.len()]));
        tensors
    }
}

fn stored(values: &[f32]) -> Stored {
    let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Stored { dtype: Dtype::F32, shape: vec![values.len()], data }
}

fn floats(stored: &Stored) -> Option<Vec<f32>> {
    let values = || stored.data.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    (stored.dtype == Dtype::F32).then(values)
}

/// A float as Python writes it: the shortest text that reads back, with an exponent of two digits below 1e-4 and from 1e16.
fn python_float(value: f64) -> String {
    let text = format!("{value:e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    match exponent.parse::<i32>() {
        Ok(exponent) if value != 0.0 && !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.abs())
        }
        _ => format!("{value:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::python_float;

    #[test]
    fn floats_are_written_as_python_writes_them() {
        for (value, expected) in [
            (0.0, "0.0"),
            (0.112_778_842_449_188_23, "0.11277884244918823"),
            (2.0, "2.0"),
            (1e-4, "0.0001"),
            (1.234e-5, "1.234e-05"),
            (-3e-12, "-3e-12"),
            (1e16, "1e+16"),
            (1_234_567_890_123_456.0, "1234567890123456.0"),
        ] {
            assert_eq!(python_float(value), expected);
        }
    }
}
