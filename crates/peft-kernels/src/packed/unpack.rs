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

    /// `Σ x·W[o, :]` of each of the rows `x`, into `out`; `room` holds a row of the weight.
    pub(super) fn products(&self, o: usize, x: &[f32], room: &mut [f32], mut out: impl FnMut(usize, f32)) {
        let PackedLayout { d_in, bits, block, .. } = self.layout;
        let rows = x.chunks_exact(d_in.max(1));
        #[cfg(target_arch = "x86_64")]
        if bits == 4 && block % 16 == 0 && d_in % block == 0 && has_avx2() {
            for (row, x) in rows.enumerate() {
                // SAFETY: the processor was asked.
                out(row, unsafe { product_avx2(self, o, x) });
            }
            return;
        }
        self.unpack(o * d_in, room);
        rows.enumerate().for_each(|(row, x)| out(row, dot(x, room)));
    }

    /// Values that share a scale.
    fn unpack_in_block(&self, start: usize, out: &mut [f32]) {
        if self.layout.bits == 8 {
            let (scale, low) = self.scales.at(start / self.layout.block);
            let value = |number: f32| number * scale + low;
            let bytes = &self.bytes[start..start + out.len()];
            out.iter_mut().zip(bytes).for_each(|(out, byte)| *out = value(self.table[usize::from(*byte)]));
            return;
        }
        let table = self.table_of(start / self.layout.block);
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

impl View<'_> {
    /// A table for a block: what is left for each value is to look it up.
    #[inline(always)]
    fn table_of(&self, block: usize) -> [f32; 16] {
        let (scale, low) = self.scales.at(block);
        let mut table = [0.0; 16];
        table.iter_mut().zip(self.table).for_each(|(out, number)| *out = number * scale + low);
        table
    }
}

impl Scales<'_> {
    /// Scale and smallest value of a block.
    #[inline(always)]
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

fn dot(a: &[f32], b: &[f32]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if has_avx2() {
        /// The same, compiled for wider vectors.
        #[target_feature(enable = "avx2,fma")]
        fn dot_avx2(a: &[f32], b: &[f32]) -> f32 {
            dot_with(a, b, f32::mul_add)
        }
        // SAFETY: the processor was asked.
        return unsafe { dot_avx2(a, b) };
    }
    // Without the instruction, a fused product would be a function call.
    dot_with(a, b, |x, y, sum| x * y + sum)
}

#[inline(always)]
fn dot_with(a: &[f32], b: &[f32], multiply_add: impl Fn(f32, f32, f32) -> f32) -> f32 {
    let mut sums = [0.0; 32];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<32>(), b.as_chunks::<32>());
    for (a, b) in a.iter().zip(b) {
        for (sum, (x, y)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum = multiply_add(*x, *y, *sum);
        }
    }
    sums.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(x, y)| x * y).sum::<f32>()
}

/// Whether eight values can be looked up at once.
#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma")
}

/// `out[2·i]` from the upper half of byte `i`, `out[2·i + 1]` from the lower.
fn look_up(table: &[f32; 16], bytes: &[u8], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if has_avx2() {
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

#[cfg(target_arch = "x86_64")]
use avx2::{look_up_avx2, product_avx2};

/// Four bytes a step: each goes into 64 bits, from which two numbers of 32 bits are made; these pick from the halves of a table.
#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::{View, look_up_each};

    /// Both halves of a table.
    #[derive(Clone, Copy)]
    struct Table(__m256, __m256);

    impl Table {
        #[target_feature(enable = "avx2,fma")]
        #[inline]
        fn of(table: &[f32; 16]) -> Self {
            let (low, high) = table.split_at(8);
            // SAFETY: both halves have eight values.
            unsafe { Self(_mm256_loadu_ps(low.as_ptr()), _mm256_loadu_ps(high.as_ptr())) }
        }

        /// The values of eight numbers.
        #[target_feature(enable = "avx2,fma")]
        #[inline]
        fn look_up(self, step: [u8; 4]) -> __m256 {
            let each = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(i32::from_le_bytes(step)));
            // The lower 32 bits: the upper half of the byte. The upper 32 bits: the byte, of which a look-up sees three bits.
            let number = _mm256_or_si256(_mm256_srli_epi64::<4>(each), _mm256_slli_epi64::<32>(each));
            let (a, b) = (_mm256_permutevar8x32_ps(self.0, number), _mm256_permutevar8x32_ps(self.1, number));
            // The fourth bit, as a sign, chooses the half of the table.
            _mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(number)))
        }
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn look_up_avx2(table: &[f32; 16], bytes: &[u8], out: &mut [f32]) {
        let values = Table::of(table);
        let (steps, _) = bytes.as_chunks::<4>();
        let (eights, _) = out.as_chunks_mut::<8>();
        let whole = steps.len().min(eights.len());
        for (out, step) in eights.iter_mut().zip(steps) {
            // SAFETY: there is room for eight values.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), values.look_up(*step)) };
        }
        look_up_each(table, &bytes[4 * whole..], &mut out[8 * whole..]);
    }

    /// `x·W[o, :]`, nothing of which is ever stored. Rows must be whole blocks, blocks whole pairs of steps.
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn product_avx2(view: &View<'_>, o: usize, x: &[f32]) -> f32 {
        let (block, d_in) = (view.layout.block, view.layout.d_in);
        let bytes = &view.bytes[o * d_in / 2..][..d_in / 2];
        // Two sums, so that one product need not wait for the other.
        let mut sums = [_mm256_setzero_ps(); 2];
        for (at, (x, bytes)) in x.chunks_exact(block).zip(bytes.chunks_exact(block / 2)).enumerate() {
            let table = Table::of(&view.table_of(o * d_in / block + at));
            for (x, bytes) in x.as_chunks::<16>().0.iter().zip(bytes.as_chunks::<8>().0) {
                let [a, b, c, d, e, f, g, h] = *bytes;
                // SAFETY: there are sixteen values.
                let (first, second) = unsafe { (_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))) };
                sums[0] = _mm256_fmadd_ps(first, table.look_up([a, b, c, d]), sums[0]);
                sums[1] = _mm256_fmadd_ps(second, table.look_up([e, f, g, h]), sums[1]);
            }
        }
        let mut sum = [0.0; 8];
        // SAFETY: there is room for eight values.
        unsafe { _mm256_storeu_ps(sum.as_mut_ptr(), _mm256_add_ps(sums[0], sums[1])) };
        sum.iter().sum()
    }
}
