//! Pillow's resizing of 8-bit pictures: weights in whole numbers, one direction after the other, rounded to bytes after each.

use ::image::RgbImage;

/// Rows of red, green and blue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Picture {
    pub(super) height: usize,
    pub(super) width: usize,
    pub(super) values: Vec<u8>,
}

/// How neighbours are weighted by their distance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filter {
    /// A triangle.
    Bilinear,
    /// Keys 1981 with `a = −1/2`.
    Bicubic,
}

impl Filter {
    /// By Pillow's numbers.
    pub(super) fn of(number: u8) -> Option<Self> {
        match number {
            2 => Some(Self::Bilinear),
            3 => Some(Self::Bicubic),
            _ => None,
        }
    }

    /// The distance from which on the weight is zero.
    fn reach(self) -> f64 {
        match self {
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
        }
    }

    fn weight(self, distance: f64) -> f64 {
        const A: f64 = -0.5;
        match (self, distance.abs()) {
            (Self::Bilinear, d) => (1.0 - d).max(0.0),
            (Self::Bicubic, d) if d < 1.0 => ((A + 2.0) * d - (A + 3.0)) * d * d + 1.0,
            (Self::Bicubic, d) if d < 2.0 => (((d - 5.0) * d + 8.0) * d - 4.0) * A,
            (Self::Bicubic, _) => 0.0,
        }
    }
}

/// Bits after the point of a weight, which leave room for a sum of bytes in 32 bits.
const FRACTION: u32 = 22;

/// What one place of the result takes: the first neighbour, and the weights from there on.
struct Taps {
    from: usize,
    weights: Vec<i64>,
}

/// The taps of each of `count` places over `size` old ones.
fn taps(size: usize, count: usize, filter: Filter) -> Vec<Taps> {
    let scale = size as f64 / count as f64;
    let stretch = scale.max(1.0);
    let reach = filter.reach() * stretch;
    let tap = |place: usize| {
        let centre = (place as f64 + 0.5) * scale;
        let from = (centre - reach + 0.5).max(0.0) as usize;
        let to = ((centre + reach + 0.5) as usize).min(size);
        let raw: Vec<f64> = (from..to).map(|at| filter.weight((at as f64 - centre + 0.5) / stretch)).collect();
        let total: f64 = raw.iter().sum();
        let whole = |weight: &f64| (weight / total * f64::from(1 << FRACTION)).round() as i64;
        Taps { from, weights: raw.iter().map(whole).collect() }
    };
    (0..count).map(tap).collect()
}

/// `picture` in another size.
pub(super) fn resize(picture: &Picture, height: usize, width: usize, filter: Filter) -> Picture {
    let mixed = |taps: &Taps, value: &dyn Fn(usize) -> u8| {
        let sum: i64 = taps.weights.iter().zip(taps.from..).map(|(weight, at)| weight * i64::from(value(at))).sum();
        ((sum + (1 << (FRACTION - 1))) >> FRACTION).clamp(0, 255) as u8
    };
    let across = taps(picture.width, width, filter);
    let mut rows = Vec::with_capacity(picture.height * width * 3);
    for row in picture.values.chunks_exact(3 * picture.width) {
        rows.extend(across.iter().flat_map(|taps| (0..3).map(move |c| mixed(taps, &|at| row[3 * at + c]))));
    }
    let down = taps(picture.height, height, filter);
    let mut values = Vec::with_capacity(height * width * 3);
    for taps in &down {
        values.extend((0..3 * width).map(|column| mixed(taps, &|at| rows[3 * width * at + column])));
    }
    Picture { height, width, values }
}

impl Picture {
    pub(super) fn of(image: &RgbImage) -> Self {
        let (width, height) = image.dimensions();
        Self { height: height as usize, width: width as usize, values: image.as_raw().clone() }
    }

    /// The middle; `None` when the picture is smaller.
    pub(super) fn middle(&self, height: usize, width: usize) -> Option<Self> {
        let (top, left) = (self.height.checked_sub(height)? / 2, self.width.checked_sub(width)? / 2);
        let rows = self.values.chunks_exact(3 * self.width).skip(top).take(height);
        let values = rows.flat_map(|row| &row[3 * left..3 * (left + width)]).copied().collect();
        Some(Self { height, width, values })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_picture_stays_plain_and_its_own_size_changes_nothing() {
        let plain = Picture { height: 5, width: 7, values: vec![200; 5 * 7 * 3] };
        let noisy = Picture { height: 5, width: 7, values: (0..5 * 7 * 3).map(|v| (v * 37 % 251) as u8).collect() };
        for filter in [Filter::Bilinear, Filter::Bicubic] {
            assert!(resize(&plain, 3, 11, filter).values.iter().all(|value| *value == 200));
            assert_eq!(resize(&noisy, 5, 7, filter), noisy);
        }
    }

    #[test]
    fn the_middle_is_cut_out() {
        let picture = Picture { height: 3, width: 4, values: (0..36).collect() };
        let middle = picture.middle(1, 2).unwrap();
        assert_eq!(middle.values, (15..21).collect::<Vec<u8>>());
        assert_eq!(picture.middle(4, 2), None);
    }
}
