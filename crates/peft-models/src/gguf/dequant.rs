//! ggml's block formats, and how those that models are shipped in become f32, or the packed matrix of an operation.
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
//! All are `(q - zero)·scale`, less an offset in some, with a scale for each run of values: so one function a format takes a block apart, and what
//! becomes of its numbers is another matter. The order of operations is that of ggml's reference, so the result is the same to the last bit.

use half::{bf16, f16};
use peft_core::kernels::{BlockScales, PackedData, PackedLayout};
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
    values: Values,
}

/// What a block holds.
#[derive(Debug)]
enum Values {
    /// Known, but not read.
    Unread,
    /// One value.
    Float(fn(&[u8]) -> f32),
    /// Numbers with scales.
    Packed(Numbers),
}

/// Numbers with a scale for each run of them: `(q - zero)·scale + low`.
#[derive(Debug)]
struct Numbers {
    zero: f32,
    /// Values that share a scale.
    run: usize,
    /// Bits of the matrix that they are repacked to.
    bits: usize,
    /// Whether there are lows.
    affine: bool,
    take_apart: fn(&[u8], &mut Apart),
}

/// A block, taken apart.
struct Apart {
    numbers: [u8; LARGEST],
    scales: [f32; LARGEST / 16],
    lows: [f32; LARGEST / 16],
}

/// Values of the largest block.
const LARGEST: usize = 256;

const fn known(name: &'static str, elements: usize, bytes: usize) -> BlockFormat {
    BlockFormat { name, elements, bytes, values: Values::Unread }
}

const fn float(name: &'static str, bytes: usize, value: fn(&[u8]) -> f32) -> BlockFormat {
    BlockFormat { name, elements: 1, bytes, values: Values::Float(value) }
}

const fn packed(name: &'static str, elements: usize, bytes: usize, numbers: Numbers) -> BlockFormat {
    BlockFormat { name, elements, bytes, values: Values::Packed(numbers) }
}

const fn numbers(zero: f32, run: usize, bits: usize, take_apart: fn(&[u8], &mut Apart)) -> Numbers {
    Numbers { zero, run, bits, affine: false, take_apart }
}

const fn affine(run: usize, bits: usize, take_apart: fn(&[u8], &mut Apart)) -> Numbers {
    Numbers { zero: 0.0, run, bits, affine: true, take_apart }
}

/// By ggml's type number. The gaps are types that ggml has withdrawn.
static FORMATS: [Option<BlockFormat>; 36] = [
    Some(float("F32", 4, |b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
    Some(float("F16", 2, |b| half_at(b, 0))),
    Some(packed("Q4_0", 32, 18, numbers(8.0, 32, 4, q4_0))),
    Some(packed("Q4_1", 32, 20, affine(32, 4, q4_1))),
    None,
    None,
    Some(known("Q5_0", 32, 22)),
    Some(known("Q5_1", 32, 24)),
    Some(packed("Q8_0", 32, 34, numbers(128.0, 32, 8, q8_0))),
    Some(known("Q8_1", 32, 40)),
    Some(known("Q2_K", 256, 84)),
    Some(known("Q3_K", 256, 110)),
    Some(packed("Q4_K", 256, 144, affine(32, 4, q4_k))),
    Some(packed("Q5_K", 256, 176, affine(32, 8, q5_k))),
    Some(packed("Q6_K", 256, 210, numbers(32.0, 16, 8, q6_k))),
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
    Some(float("BF16", 2, |b| bf16::from_le_bytes([b[0], b[1]]).to_f32())),
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

    /// Whether blocks hold numbers with scales.
    pub(super) fn is_packed(&self) -> bool {
        matches!(self.values, Values::Packed(_))
    }

    /// Unpacks whole blocks on all cores; `None` when the format is not read.
    pub(super) fn decode(&self, packed: &[u8]) -> Option<Vec<f32>> {
        let mut values = vec![0.0; packed.len() / self.bytes * self.elements];
        let batches = values.par_chunks_mut(BATCH * self.elements).zip(packed.par_chunks(BATCH * self.bytes));
        let blocks = |values: &'_ mut [f32], packed: &[u8], decode: &dyn Fn(&[u8], &mut [f32])| {
            for (out, block) in values.chunks_exact_mut(self.elements).zip(packed.chunks_exact(self.bytes)) {
                decode(block, out);
            }
        };
        match &self.values {
            Values::Unread => return None,
            Values::Float(value) => batches.for_each(|(values, packed)| {
                blocks(values, packed, &|block, out| out[0] = value(block));
            }),
            Values::Packed(format) => batches.for_each(|(values, packed)| {
                blocks(values, packed, &|block, out| format.unpack(&format.take_apart(block), out));
            }),
        }
        Some(values)
    }

    /// Whole blocks in row-major order as the matrix `[d_out, d_in]` that they are, number for number; `None` when they hold no numbers.
    pub(super) fn repack(&self, packed: &[u8], [d_out, d_in]: [usize; 2]) -> Option<PackedData> {
        let Values::Packed(format) = &self.values else { return None };
        let layout = PackedLayout { d_out, d_in, bits: format.bits, block: format.run };
        let runs = self.elements / format.run;
        let mut bytes = vec![0; layout.len() * format.bits / 8];
        let (mut scales, mut lows) = (vec![0.0; layout.blocks()], vec![0.0; layout.blocks()]);
        bytes
            .par_chunks_mut(self.elements * format.bits / 8)
            .zip(scales.par_chunks_mut(runs).zip(lows.par_chunks_mut(runs)))
            .zip(packed.par_chunks(self.bytes))
            .with_min_len(BATCH)
            .for_each(|((bytes, (scales, lows)), block)| {
                let apart = format.take_apart(block);
                scales.copy_from_slice(&apart.scales[..runs]);
                lows.copy_from_slice(&apart.lows[..runs]);
                if format.bits == 8 {
                    bytes.copy_from_slice(&apart.numbers[..self.elements]);
                } else {
                    let pairs = apart.numbers.as_chunks::<2>().0;
                    bytes.iter_mut().zip(pairs).for_each(|(byte, [first, second])| *byte = first << 4 | second);
                }
            });
        let table = (0..1_u16 << format.bits).map(|q| f32::from(q) - format.zero).collect();
        let scales = if format.affine { BlockScales::Affine { scales, lows } } else { BlockScales::Plain(scales) };
        Some(PackedData { layout, bytes, table, scales })
    }
}

/// Blocks that one thread takes at a time: enough to hide the cost of handing them out.
const BATCH: usize = 1024;

impl Numbers {
    fn take_apart(&self, block: &[u8]) -> Apart {
        let mut apart = Apart { numbers: [0; LARGEST], scales: [0.0; LARGEST / 16], lows: [0.0; LARGEST / 16] };
        (self.take_apart)(block, &mut apart);
        apart
    }

    fn unpack(&self, apart: &Apart, out: &mut [f32]) {
        for (at, (out, number)) in out.iter_mut().zip(apart.numbers).enumerate() {
            let value = (f32::from(number) - self.zero) * apart.scales[at / self.run];
            *out = if self.affine { value + apart.lows[at / self.run] } else { value };
        }
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn q4_0(block: &[u8], apart: &mut Apart) {
    apart.scales[0] = half_at(block, 0);
    halves(&block[2..], apart);
}

fn q4_1(block: &[u8], apart: &mut Apart) {
    (apart.scales[0], apart.lows[0]) = (half_at(block, 0), half_at(block, 2));
    halves(&block[4..], apart);
}

/// The lower halves of 16 bytes, then the upper ones.
fn halves(bytes: &[u8], apart: &mut Apart) {
    let (low, high) = apart.numbers.split_at_mut(16);
    for ((low, high), byte) in low.iter_mut().zip(high).zip(bytes) {
        (*low, *high) = (byte & 15, byte >> 4);
    }
}

fn q8_0(block: &[u8], apart: &mut Apart) {
    apart.scales[0] = half_at(block, 0);
    // From -128..128 to 0..256.
    apart.numbers.iter_mut().zip(&block[2..]).for_each(|(number, byte)| *number = byte ^ 0x80);
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

fn q4_k(block: &[u8], apart: &mut Apart) {
    k_block(block, &[], &block[16..], apart);
}

fn q5_k(block: &[u8], apart: &mut Apart) {
    k_block(block, &block[16..48], &block[48..], apart);
}

/// `Q4_K`, and with the fifth bits in `high` `Q5_K`: 32 bytes of nibbles hold two groups of 32 values.
fn k_block(block: &[u8], high: &[u8], nibbles: &[u8], apart: &mut Apart) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (group, numbers) in apart.numbers.chunks_exact_mut(32).enumerate() {
        let (scale, offset) = scale_and_offset(&block[4..16], group);
        (apart.scales[group], apart.lows[group]) = (d * scale, -(m * offset));
        let shift = 4 * (group % 2);
        for (i, (number, byte)) in numbers.iter_mut().zip(&nibbles[group / 2 * 32..]).enumerate() {
            let fifth = high.get(i).map_or(0, |bits| (bits >> group & 1) << 4);
            *number = (byte >> shift & 15) | fifth;
        }
    }
}

fn q6_k(block: &[u8], apart: &mut Apart) {
    let (low, high, scales, d) = (&block[..128], &block[128..192], &block[192..208], half_at(block, 208));
    apart.scales.iter_mut().zip(scales).for_each(|(out, scale)| *out = d * f32::from(scale.cast_signed()));
    for (group, numbers) in apart.numbers.chunks_exact_mut(32).enumerate() {
        // Half a block, 128 values, has 64 bytes of low nibbles (values 0..64 below, 64..128 above) and 32 of high
        // bits.
        let (half, part) = (group / 4, group % 4);
        let (low, low_shift) = (&low[half * 64 + part % 2 * 32..], part / 2 * 4);
        let high = &high[half * 32..];
        for (i, number) in numbers.iter_mut().enumerate() {
            *number = (low[i] >> low_shift & 15) | (high[i] >> (2 * part) & 3) << 4;
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
