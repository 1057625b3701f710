//! ggml's block formats, and how those that models are shipped in become f32.
//!
//! A tensor is a sequence of blocks of equal size; a row is a whole number of blocks. With `d` and `m` the f16 scale
//! and offset of a block and `q` its integers (least significant nibble first: the first half of a block, then the
//! second):
//!
//! | format | values | value                                                         |
//! |--------|--------|---------------------------------------------------------------|
//! | `Q4_0` | 32     | `d·(q - 8)`                                                   |
//! | `Q4_1` | 32     | `d·q + m`                                                     |
//! | `Q8_0` | 32     | `d·q`, q signed                                               |
//! | `Q4_K` | 256    | `(d·s)·q - m·o`, a 6-bit scale `s` and offset `o` per 32 values |
//! | `Q5_K` | 256    | the same with 5-bit `q`                                       |
//! | `Q6_K` | 256    | `(d·s)·(q - 32)`, an 8-bit signed scale `s` per 16 values     |
//!
//! The order of operations is that of ggml's reference, so the result is the same to the last bit.

use half::{bf16, f16};
use rayon::prelude::*;

/// How a tensor type lays out its values.
#[derive(Debug)]
pub(super) struct BlockFormat {
    /// The name that ggml gives it.
    pub(super) name: &'static str,
    /// Values in a block.
    pub(super) elements: usize,
    /// Bytes in a block.
    pub(super) bytes: usize,
    /// Unpacks one block; `None` when the format is known but not read.
    decode: Option<Decode>,
}

type Decode = fn(&[u8], &mut [f32]);

const fn known(name: &'static str, elements: usize, bytes: usize) -> BlockFormat {
    BlockFormat { name, elements, bytes, decode: None }
}

const fn read(name: &'static str, elements: usize, bytes: usize, decode: Decode) -> BlockFormat {
    BlockFormat { name, elements, bytes, decode: Some(decode) }
}

/// By ggml's type number. The gaps are types that ggml has withdrawn.
static FORMATS: [Option<BlockFormat>; 36] = [
    Some(read("F32", 1, 4, |b, out| out[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
    Some(read("F16", 1, 2, |b, out| out[0] = half_at(b, 0))),
    Some(read("Q4_0", 32, 18, q4_0)),
    Some(read("Q4_1", 32, 20, q4_1)),
    None,
    None,
    Some(known("Q5_0", 32, 22)),
    Some(known("Q5_1", 32, 24)),
    Some(read("Q8_0", 32, 34, q8_0)),
    Some(known("Q8_1", 32, 40)),
    Some(known("Q2_K", 256, 84)),
    Some(known("Q3_K", 256, 110)),
    Some(read("Q4_K", 256, 144, q4_k)),
    Some(read("Q5_K", 256, 176, q5_k)),
    Some(read("Q6_K", 256, 210, q6_k)),
    Some(known("Q8_K", 256, 292)),
    Some(known("IQ2_XXS", 256, 66)),
    Some(known("IQ2_XS", 256, 74)),
    Some(known("IQ3_XXS", 256, 98)),
    Some(known("IQ1_S", 256, 50)),
    Some(known("IQ4_NL", 32, 18)),
    Some(known("IQ3_S", 256, 110)),
    Some(known("IQ2_S", 256, 82)),
    Some(known("IQ4_XS", 256, 136)),
    Some(known("I8", 1, 1)),
    Some(known("I16", 1, 2)),
    Some(known("I32", 1, 4)),
    Some(known("I64", 1, 8)),
    Some(known("F64", 1, 8)),
    Some(known("IQ1_M", 256, 56)),
    Some(read("BF16", 1, 2, |b, out| out[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32())),
    None,
    None,
    None,
    Some(known("TQ1_0", 256, 54)),
    Some(known("TQ2_0", 256, 66)),
];

impl BlockFormat {
    /// The format of that ggml type number.
    pub(super) fn of(kind: u32) -> Option<&'static Self> {
        FORMATS.get(usize::try_from(kind).ok()?)?.as_ref()
    }

    /// Unpacks whole blocks on all cores; `None` when the format is not read.
    pub(super) fn decode(&self, packed: &[u8]) -> Option<Vec<f32>> {
        /// Blocks that one thread takes at a time: enough to hide the cost of handing them out.
        const BATCH: usize = 1024;
        let decode = self.decode?;
        let mut values = vec![0.0; packed.len() / self.bytes * self.elements];
        let batches = values.par_chunks_mut(BATCH * self.elements).zip(packed.par_chunks(BATCH * self.bytes));
        batches.for_each(|(values, packed)| {
            for (out, block) in values.chunks_exact_mut(self.elements).zip(packed.chunks_exact(self.bytes)) {
                decode(block, out);
            }
        });
        Some(values)
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn q4_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    let (low, high) = out.split_at_mut(16);
    for ((low, high), &byte) in low.iter_mut().zip(high).zip(&block[2..]) {
        *low = d * (f32::from(byte & 15) - 8.0);
        *high = d * (f32::from(byte >> 4) - 8.0);
    }
}

fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let (low, high) = out.split_at_mut(16);
    for ((low, high), &byte) in low.iter_mut().zip(high).zip(&block[4..]) {
        *low = d * f32::from(byte & 15) + m;
        *high = d * f32::from(byte >> 4) + m;
    }
}

fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (out, &byte) in out.iter_mut().zip(&block[2..]) {
        *out = d * f32::from(byte.cast_signed());
    }
}

/// The `group`-th of eight 6-bit scales and offsets in 12 bytes: the first four of each lie in the low six bits of
/// bytes 0..4 and 4..8, the last four have their low nibbles in bytes 8..12 and their high bits on top of the former.
fn scale_and_offset(packed: &[u8], group: usize) -> (f32, f32) {
    let (scale, offset) = if group < 4 {
        (packed[group] & 63, packed[group + 4] & 63)
    } else {
        let nibbles = packed[group + 4];
        ((nibbles & 15) | (packed[group - 4] >> 6 << 4), (nibbles >> 4) | (packed[group] >> 6 << 4))
    };
    (f32::from(scale), f32::from(offset))
}

fn q4_k(block: &[u8], out: &mut [f32]) {
    k_block(block, &[], &block[16..], out);
}

fn q5_k(block: &[u8], out: &mut [f32]) {
    k_block(block, &block[16..48], &block[48..], out);
}

/// `Q4_K`, and with the fifth bits in `high` `Q5_K`: 32 bytes of nibbles hold two groups of 32 values.
fn k_block(block: &[u8], high: &[u8], nibbles: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, offset) = scale_and_offset(&block[4..16], group);
        let (scale, offset) = (d * scale, m * offset);
        let shift = 4 * (group % 2);
        for (i, (out, &byte)) in out.iter_mut().zip(&nibbles[group / 2 * 32..]).enumerate() {
            let fifth = high.get(i).map_or(0, |bits| (bits >> group & 1) << 4);
            *out = scale * f32::from((byte >> shift & 15) | fifth) - offset;
        }
    }
}

fn q6_k(block: &[u8], out: &mut [f32]) {
    let (low, high, scales, d) = (&block[..128], &block[128..192], &block[192..208], half_at(block, 208));
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        // Half a block, 128 values, has 64 bytes of low nibbles (values 0..64 below, 64..128 above) and 32 of high
        // bits.
        let (half, part) = (group / 4, group % 4);
        let (low, low_shift) = (&low[half * 64 + part % 2 * 32..], part / 2 * 4);
        let high = &high[half * 32..];
        for (i, out) in out.iter_mut().enumerate() {
            let q = (low[i] >> low_shift & 15) | (high[i] >> (2 * part) & 3) << 4;
            let scale = d * f32::from(scales[group * 2 + i / 16].cast_signed());
            *out = scale * (f32::from(q) - 32.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_listed_under_their_number() {
        assert_eq!(BlockFormat::of(3).unwrap().name, "Q4_1");
        assert_eq!(BlockFormat::of(14).unwrap().name, "Q6_K");
        assert_eq!(BlockFormat::of(30).unwrap().name, "BF16");
        assert_eq!(BlockFormat::of(35).unwrap().name, "TQ2_0");
        assert!(BlockFormat::of(4).is_none() && BlockFormat::of(u32::MAX).is_none());
    }

    #[test]
    fn many_batches_equal_one() {
        let format = BlockFormat::of(8).unwrap();
        let block: Vec<u8> = [0, 60].into_iter().chain(0..32).collect();
        let values = format.decode(&block.repeat(3000)).unwrap();
        let one: Vec<f32> = (0..32_u8).map(f32::from).collect();
        assert!(values.chunks(32).all(|chunk| chunk == one));
        assert!(BlockFormat::of(6).unwrap().decode(&[0; 22]).is_none());
    }
}
