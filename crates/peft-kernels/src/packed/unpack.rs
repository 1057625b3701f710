//! Unpacking on the CPU: a run of values at a time, so that a thread needs room for one tile only.
#![allow(unsafe_code, reason = "vector instructions that the processor is asked for before")]

use std::borrow::Cow;

use super::{NESTED_BLOCK, PackedLayout};

/// A packed matrix in memory.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    /// Numbers in the order of bytes; of 4 bits the first is the upper half.
    bytes: &'a [u8],
    table: &'a [f32],
    /// The first bytes of the sixteen values of a table, then the second ones, and so on.
    #[cfg(target_arch = "x86_64")]
    planes: [[u8; 16]; 4],
    scales: Scales<'a>,
    layout: PackedLayout,
}

/// The scales of a matrix in memory.
#[derive(Clone, Copy)]
pub(super) enum Scales<'a> {
    Plain(&'a [f32]),
    Affine { scales: &'a [f32], lows: &'a [f32] },
    Nested { bytes: &'a [u8], map: &'a [f32], scales: &'a [f32], offset: f32 },
}

impl<'a> View<'a> {
    pub(super) fn new(bytes: &'a [u8], table: &'a [f32], scales: Scales<'a>, layout: PackedLayout) -> Self {
        #[cfg(target_arch = "x86_64")]
        let planes = {
            let mut planes = [[0; 16]; 4];
            for (number, value) in table.iter().enumerate().take(16) {
                planes.iter_mut().zip(value.to_le_bytes()).for_each(|(plane, byte)| plane[number] = byte);
            }
            planes
        };
        Self {
            bytes,
            table,
            #[cfg(target_arch = "x86_64")]
            planes,
            scales,
            layout,
        }
    }

    pub(super) fn layout(&self) -> PackedLayout {
        self.layout
    }

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
        let value = |number: u8| self.table[usize::from(number)] * scale + low;
        if self.layout.bits == 8 {
            let bytes = &self.bytes[start..start + out.len()];
            out.iter_mut().zip(bytes).for_each(|(out, byte)| *out = value(*byte));
            return;
        }
        let (mut out, mut byte) = (out, start / 2);
        if start % 2 == 1 {
            let (first, rest) = out.split_at_mut(1);
            first[0] = value(self.bytes[byte] & 15);
            (out, byte) = (rest, byte + 1);
        }
        let bytes = &self.bytes[byte..byte + out.len().div_ceil(2)];
        #[cfg(target_arch = "x86_64")]
        let done = if has_avx2() {
            // SAFETY: the processor was asked.
            unsafe { avx2::unpack(&self.planes, scale, low, bytes, out) }
        } else {
            0
        };
        #[cfg(not(target_arch = "x86_64"))]
        let done = 0;
        let (pairs, last) = out[done..].as_chunks_mut::<2>();
        let bytes = &bytes[done / 2..];
        for ([first, second], byte) in pairs.iter_mut().zip(bytes) {
            (*first, *second) = (value(byte >> 4), value(byte & 15));
        }
        if let ([last], [.., byte]) = (last, bytes) {
            *last = value(byte >> 4);
        }
    }

    /// The rows of `x` in the order in which [`products`](Self::products) wants their values.
    pub(super) fn arranged<'x>(&self, x: &'x [f32]) -> Cow<'x, [f32]> {
        #[cfg(target_arch = "x86_64")]
        if self.takes_avx2() {
            return Cow::Owned(avx2::arranged(x));
        }
        Cow::Borrowed(x)
    }

    /// `Σ x·W[o, :]` of each of the rows `x`, which were [`arranged`](Self::arranged), given to `out`; `room` holds a row of the weight.
    pub(super) fn products(&self, o: usize, x: &[f32], room: &mut [f32], mut out: impl FnMut(usize, f32)) {
        let d_in = self.layout.d_in;
        let rows = x.chunks_exact(d_in.max(1)).enumerate();
        #[cfg(target_arch = "x86_64")]
        if self.takes_avx2() {
            for (row, x) in rows {
                // SAFETY: the processor was asked.
                out(row, unsafe { avx2::product(self, o, x) });
            }
            return;
        }
        self.unpack(o * d_in, room);
        rows.for_each(|(row, x)| out(row, dot(x, room)));
    }

    /// Whether rows are whole blocks that begin with one, blocks whole steps, and the processor fast at them.
    #[cfg(target_arch = "x86_64")]
    fn takes_avx2(&self) -> bool {
        let PackedLayout { d_in, bits, block, .. } = self.layout;
        let affine = matches!(self.scales, Scales::Affine { .. });
        bits == 4 && !affine && block.is_multiple_of(32) && d_in.is_multiple_of(block) && has_avx2()
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

/// Whether 32 numbers can be looked up at once.
#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma")
}

/// Sixteen bytes a step. A value is looked up byte by byte, for that is the one look-up in sixteen entries which is fast everywhere; then the four bytes
/// of each value are put together. A vector of the result has four values of the first sixteen and the four at the same place of the second.
#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::View;

    /// Values of a step.
    const STEP: usize = 32;

    #[derive(Clone, Copy)]
    struct Planes([__m256i; 4]);

    impl Planes {
        #[target_feature(enable = "avx2,fma")]
        #[inline]
        fn of(planes: &[[u8; 16]; 4]) -> Self {
            // SAFETY: a plane has sixteen bytes.
            let twice =
                |plane: &[u8; 16]| unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(plane.as_ptr().cast())) };
            let [a, b, c, d] = planes;
            Self([twice(a), twice(b), twice(c), twice(d)])
        }

        #[target_feature(enable = "avx2,fma")]
        #[inline]
        fn look_up(&self, step: &[u8; STEP / 2]) -> [__m256; 4] {
            // SAFETY: a step has sixteen bytes.
            let bytes = unsafe { _mm_loadu_si128(step.as_ptr().cast()) };
            let half = _mm_set1_epi8(15);
            let (upper, lower) = (_mm_and_si128(_mm_srli_epi16::<4>(bytes), half), _mm_and_si128(bytes, half));
            let numbers = _mm256_set_m128i(_mm_unpackhi_epi8(upper, lower), _mm_unpacklo_epi8(upper, lower));
            let [a, b, c, d] = self.0;
            let (a, b) = (_mm256_shuffle_epi8(a, numbers), _mm256_shuffle_epi8(b, numbers));
            let (c, d) = (_mm256_shuffle_epi8(c, numbers), _mm256_shuffle_epi8(d, numbers));
            let (low, low_end) = (_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b));
            let (high, high_end) = (_mm256_unpacklo_epi8(c, d), _mm256_unpackhi_epi8(c, d));
            [
                _mm256_castsi256_ps(_mm256_unpacklo_epi16(low, high)),
                _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, high)),
                _mm256_castsi256_ps(_mm256_unpacklo_epi16(low_end, high_end)),
                _mm256_castsi256_ps(_mm256_unpackhi_epi16(low_end, high_end)),
            ]
        }
    }

    /// Values of whole steps into `out`; gives how many.
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn unpack(planes: &[[u8; 16]; 4], scale: f32, low: f32, bytes: &[u8], out: &mut [f32]) -> usize {
        let planes = Planes::of(planes);
        let (scale, low) = (_mm256_set1_ps(scale), _mm256_set1_ps(low));
        let steps = out.as_chunks_mut::<STEP>().0;
        let count = STEP * steps.len();
        for (out, step) in steps.iter_mut().zip(bytes.as_chunks().0) {
            for (at, values) in planes.look_up(step).into_iter().enumerate() {
                // Two roundings, as everywhere.
                let values = _mm256_add_ps(_mm256_mul_ps(values, scale), low);
                let out = out.as_mut_ptr().wrapping_add(4 * at);
                // SAFETY: a step has room for 32 values: sixteen, and sixteen.
                unsafe {
                    _mm_storeu_ps(out, _mm256_castps256_ps128(values));
                    _mm_storeu_ps(out.add(STEP / 2), _mm256_extractf128_ps::<1>(values));
                }
            }
        }
        count
    }

    /// Each step of `x` in the order of the values that [`Planes::look_up`] gives.
    pub(super) fn arranged(x: &[f32]) -> Vec<f32> {
        let steps = x.as_chunks::<STEP>().0.iter();
        steps.flat_map(|step| (0..STEP).map(|at| step[at / 8 * 4 + at % 4 + at / 4 % 2 * (STEP / 2)])).collect()
    }

    /// `x·W[o, :]`, nothing of which is ever stored; `x` is [`arranged`].
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn product(view: &View<'_>, o: usize, x: &[f32]) -> f32 {
        let (block, d_in) = (view.layout.block, view.layout.d_in);
        let bytes = &view.bytes[o * d_in / 2..][..d_in / 2];
        let planes = Planes::of(&view.planes);
        let mut total = _mm256_setzero_ps();
        for (at, (x, bytes)) in x.chunks_exact(block).zip(bytes.chunks_exact(block / 2)).enumerate() {
            // Several sums, so that no product waits for the one before.
            let mut sums = [_mm256_setzero_ps(); 4];
            for (x, step) in x.as_chunks::<STEP>().0.iter().zip(bytes.as_chunks().0) {
                for (at, (sum, values)) in sums.iter_mut().zip(planes.look_up(step)).enumerate() {
                    // SAFETY: a step has four times eight values.
                    let x = unsafe { _mm256_loadu_ps(x.as_ptr().add(8 * at)) };
                    *sum = _mm256_fmadd_ps(x, values, *sum);
                }
            }
            let [a, b, c, d] = sums;
            let sum = _mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d));
            let (scale, _) = view.scales.at(o * d_in / block + at);
            total = _mm256_fmadd_ps(sum, _mm256_set1_ps(scale), total);
        }
        let mut sum = [0.0; 8];
        // SAFETY: there is room for eight values.
        unsafe { _mm256_storeu_ps(sum.as_mut_ptr(), total) };
        sum.iter().sum()
    }
}
