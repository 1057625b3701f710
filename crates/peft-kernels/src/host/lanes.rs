//! Functions of f32 that compile to the widest vector instructions that the machine has: plain loops inside [`vectorized!`], without calls and branches.

/// Lanes of a sum: the widest vector, or several that are in flight at once; more would not stay in registers.
const LANES: usize = 16;

/// Runs a block compiled for the instructions that this machine turns out to have. A macro, because only what is inlined is.
macro_rules! vectorized {
    ($($block:tt)*) => {{
        let once = $crate::host::lanes::Once;
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || {
                let _once = once;
                $($block)*
            },
        )
    }};
}
pub(crate) use vectorized;

/// What a block consumes, so that it can be called but once: a closure that could be called again is called through a function of the compiler's, which is
/// inlined when it is small, and else has the instructions that every machine has.
pub(crate) struct Once;

/// `eˣ` within 2 units in the last place; zero below `e⁻⁸⁷`, which keeps products out of the slow range of tiny numbers, and `e⁸⁸` above that.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    /// Adding it rounds to an integer, which then lies in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    /// `ln 2` in two parts, the first of few bits: products with it are exact.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    const LOWEST: f32 = -87.0;
    let zero = x < LOWEST;
    let x = x.clamp(LOWEST, 88.0);
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = (x - n * LN_2[0]) - n * LN_2[1];
    // The polynomial of Cephes' expf for |r| <= ln 2 / 2.
    let p = 1.987_569_1e-4 * r + 1.398_2e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 0.166_666_65;
    let p = p * r + 0.5;
    let y = p * r * r + r + 1.0;
    let exponent = rounded.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    if zero { 0.0 } else { y * f32::from_bits(exponent) }
}

/// `1 / (1 + e⁻ˣ)`
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The error function within 1e-6: Abramowitz and Stegun 1964, formula 7.1.26.
#[inline(always)]
pub(crate) fn erf(x: f32) -> f32 {
    let t = 1.0 / (1.0 + 0.327_591_1 * x.abs());
    let p = 1.061_405_4 * t - 1.453_152;
    let p = p * t + 1.421_413_7;
    let p = p * t - 0.284_496_74;
    let p = (p * t + 0.254_829_6) * t;
    (1.0 - p * exp(-x * x)).copysign(x)
}

/// The sum of `term` of the values that slices of one length have in each place, in lanes.
#[inline(always)]
pub(crate) fn sum<const N: usize>(slices: [&[f32]; N], term: impl Fn([f32; N]) -> f32) -> f32 {
    let slices = slices.map(|slice| slice.as_chunks::<LANES>());
    let mut lanes = [0.0; LANES];
    for at in 0..slices[0].0.len() {
        let chunks = slices.map(|(chunks, _)| &chunks[at]);
        for (i, lane) in lanes.iter_mut().enumerate() {
            *lane += term(chunks.map(|chunk| chunk[i]));
        }
    }
    let rest: f32 = (0..slices[0].1.len()).map(|i| term(slices.map(|(_, rest)| rest[i]))).sum();
    lanes.iter().sum::<f32>() + rest
}

/// Adds so many slices to another, each times a factor, four at a time: `term` gives both.
#[inline(always)]
pub(crate) fn add_terms<'a>(out: &mut [f32], count: usize, term: impl Fn(usize) -> (f32, &'a [f32])) {
    let whole = count / 4 * 4;
    for at in (0..whole).step_by(4) {
        let [(e, a), (f, b), (g, c), (h, d)] = [0, 1, 2, 3].map(|n| term(at + n));
        for ((((sum, a), b), c), d) in out.iter_mut().zip(a).zip(b).zip(c).zip(d) {
            *sum += e * a + f * b + g * c + h * d;
        }
    }
    for at in whole..count {
        let (factor, values) = term(at);
        out.iter_mut().zip(values).for_each(|(sum, value)| *sum += factor * value);
    }
}

/// The largest value; negative infinity of none.
#[inline(always)]
pub(crate) fn max(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut chunks = values.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = if *value > *lane { *value } else { *lane };
        }
    }
    let larger = |a: f32, b: &f32| if *b > a { *b } else { a };
    chunks.remainder().iter().fold(lanes.iter().fold(f32::NEG_INFINITY, larger), larger)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worst(range: std::ops::Range<f32>, found: fn(f32) -> f32, expected: fn(f64) -> f64, relative: bool) -> f64 {
        let steps = 100_000;
        let at = |i| range.start + (range.end - range.start) * i as f32 / steps as f32;
        let deviation = |x: f32| {
            let (found, expected) = (f64::from(found(x)), expected(f64::from(x)));
            (found - expected).abs() / if relative { expected.abs() } else { 1.0 }
        };
        (0..=steps).map(|i| deviation(at(i))).fold(0.0, f64::max)
    }

    #[test]
    fn functions_are_those_of_double_precision() {
        assert!(worst(-86.0..87.0, exp, f64::exp, true) < 2.0 * f64::from(f32::EPSILON));
        assert!(worst(-20.0..20.0, sigmoid, |x| 1.0 / (1.0 + (-x).exp()), true) < 4e-7);
        // The series of Maclaurin, good where it is needed.
        let series = |x: f64| {
            let (mut term, mut sum) = (x, x);
            for n in 1..120 {
                term *= -x * x / f64::from(n);
                sum += term / f64::from(2 * n + 1);
            }
            sum * std::f64::consts::FRAC_2_SQRT_PI
        };
        assert!(worst(-3.5..3.5, erf, series, false) < 1e-6);
    }

    #[test]
    fn extremes_stay_finite() {
        assert!(exp(f32::INFINITY).is_finite() && exp(f32::NEG_INFINITY) == 0.0 && exp(f32::NAN).is_nan());
        assert_eq!((sigmoid(f32::MAX), erf(f32::MAX), erf(f32::MIN)), (1.0, 1.0, -1.0));
    }

    #[test]
    fn terms_are_added() {
        let values: Vec<f32> = (0..42).map(|i| (i * i) as f32).collect();
        let mut sums = [100.0; 7];
        add_terms(&mut sums, 6, |n| (n as f32, &values[7 * n..][..7]));
        let sum = |i: usize| 100.0 + (0..6).map(|n| n as f32 * values[7 * n + i]).sum::<f32>();
        assert_eq!(sums, [0, 1, 2, 3, 4, 5, 6].map(sum));
    }

    #[test]
    fn sums_and_maxima_have_no_order() {
        let values: Vec<f32> = (0..101).map(|i| (i * 37 % 101) as f32).collect();
        assert_eq!(sum([&values], |[x]| x), 5050.0);
        assert_eq!(
            sum([&values[..5], &values[1..6]], |[x, y]| x * y),
            (0..5).map(|i| values[i] * values[i + 1]).sum::<f32>()
        );
        assert_eq!((max(&values), max(&values[..7]), max(&[])), (100.0, 84.0, f32::NEG_INFINITY));
    }
}
