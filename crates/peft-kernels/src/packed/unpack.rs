//! Unpacking on the CPU: a run of values at a time, so that a thread needs room for one tile only.
#![allow(unsafe_code, reason = "vector instructions that the processor is asked for before")]

use super::{NESTED_BLOCK, PackedLayout};

/// A packed matrix in memory.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    /// Numbers in the order of bytes; of 4 bits the first is the upper half.
    pub(super) bytes: &'a [u8],
    pub(super) table: &'a [f32],
    pub(super) scales: Scales<'a>,
    pub(super) layout: PackedLayout,
}

/// The scales of a matrix in memory.
#[derive(Clone, Copy)]
pub(super) enum Scales<'a> {
    Plain(&'a [f32]),
    Affine { scales: &'a [f32], lows: &'a [f32] },
    Nested { bytes: &'a [u8], map: &'a [f32], scales: &'a [f32], offset: f32 },
}

impl View<'_> {
    /// The values from `start` on, as many as `out` holds.
    pub(super) fn unpack(&self, start: usize, out: &mut [f32]) {
        let block = self.layout.block;
        let (mut at, mut rest) = (start, out);
        while !rest.is_empty() {
            let count = (block - at % block).min(rest.len());
            let (now, later) = rest.split_at_mut(count);
            self.unpack_in_block(at, now);
            (at, rest) = (at + count, later);
        }
    }

    /// Values that share a scale.
    fn unpack_in_block(&self, start: usize, out: &mut [f32]) {
        let (scale, low) = self.scales.at(start / self.layout.block);
        let value = |number: f32| number * scale + low;
        if self.layout.bits == 8 {
            let bytes = &self.bytes[start..start + out.len()];
            out.iter_mut().zip(bytes).for_each(|(out, byte)| *out = value(self.table[usize::from(*byte)]));
            return;
        }
        // A table for the block: what is left for each value is to look it up.
        let mut table = [0.0; 16];
        table.iter_mut().zip(self.table).for_each(|(out, number)| *out = value(*number));
        let mut out = out;
        let mut byte = start / 2;
        if start % 2 == 1 {
            let (first, rest) = out.split_at_mut(1);
            first[0] = table[usize::from(self.bytes[byte] & 15)];
            (out, byte) = (rest, byte + 1);
        }
        look_up(&table, &self.bytes[byte..byte + out.len().div_ceil(2)], out);
    }
}

impl Scales<'_> {
    /// Scale and smallest value of a block.
    fn at(&self, block: usize) -> (f32, f32) {
        match *self {
            Self::Plain(scales) => (scales[block], 0.0),
            Self::Affine { scales, lows } => (scales[block], lows[block]),
            Self::Nested { bytes, map, scales, offset } => {
                (map[usize::from(bytes[block])] * scales[block / NESTED_BLOCK] + offset, 0.0)
            }
        }
    }
}

/// `out[2·i]` from the upper half of byte `i`, `out[2·i + 1]` from the lower.
fn look_up(table: &[f32; 16], bytes: &[u8], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor was asked.
        return unsafe { look_up_avx2(table, bytes, out) };
    }
    look_up_each(table, bytes, out);
}

fn look_up_each(table: &[f32; 16], bytes: &[u8], out: &mut [f32]) {
    let (pairs, last) = out.as_chunks_mut::<2>();
    for ([first, second], byte) in pairs.iter_mut().zip(bytes) {
        (*first, *second) = (table[usize::from(byte >> 4)], table[usize::from(byte & 15)]);
    }
    if let ([last], [.., byte]) = (last, bytes) {
        *last = table[usize::from(byte >> 4)];
    }
}

/// Four bytes a step: each goes into 64 bits, from which two numbers of 32 bits are made; these pick from the halves of the table.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn look_up_avx2(table: &[f32; 16], bytes: &[u8], out: &mut [f32]) {
    use std::arch::x86_64::*;
    let (low, high) = table.split_at(8);
    // SAFETY: both halves have eight values.
    let (low, high) = unsafe { (_mm256_loadu_ps(low.as_ptr()), _mm256_loadu_ps(high.as_ptr())) };
    let (steps, _) = bytes.as_chunks::<4>();
    let (eights, _) = out.as_chunks_mut::<8>();
    let whole = steps.len().min(eights.len());
    for (out, step) in eights.iter_mut().zip(steps) {
        let each = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(i32::from_le_bytes(*step)));
        // The lower 32 bits: the upper half of the byte. The upper 32 bits: the byte, of which a look-up sees three bits.
        let number = _mm256_or_si256(_mm256_srli_epi64::<4>(each), _mm256_slli_epi64::<32>(each));
        let (a, b) = (_mm256_permutevar8x32_ps(low, number), _mm256_permutevar8x32_ps(high, number));
        // The fourth bit, as a sign, chooses the half of the table.
        let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(number));
        // SAFETY: there is room for eight values.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), _mm256_blendv_ps(a, b, upper)) };
    }
    look_up_each(table, &bytes[4 * whole..], &mut out[8 * whole..]);
}
