//! What each token of a batch is, for adapters that treat text and images apart, and what stands in the places of images.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use burn::tensor::{Int, Tensor};

use crate::within;

/// What a token stands for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Modality {
    /// A piece of text.
    #[default]
    Text,
    /// A part of an image, or of whatever else is no text.
    Image,
}

/// A batch of which some tokens are no text.
///
/// An adapter that projects features puts those of a row into the places of its image tokens, in their order; which token is written there does not matter then.
#[derive(Clone, Debug)]
pub struct Modalities {
    /// `[batch][seq]`
    tokens: Vec<Vec<Modality>>,
    features: Option<Tensor<3>>,
    /// Whether an adapter asked for the features.
    taken: Cell<bool>,
}

impl Modalities {
    /// What each token is, `[batch][seq]`.
    pub fn new(tokens: Vec<Vec<Modality>>) -> Self {
        Self { tokens, features: None, taken: Cell::new(false) }
    }

    /// With the features of the images, `[batch, n, d_features]`: each row of the batch has `n` image tokens or none.
    #[must_use]
    pub fn with_features(self, features: Tensor<3>) -> Self {
        Self { features: Some(features), ..self }
    }

    /// What each token is, rows one behind the other.
    pub fn tokens(&self) -> impl Iterator<Item = Modality> {
        self.tokens.iter().flatten().copied()
    }

    /// Whether a token is no text.
    pub fn has_images(&self) -> bool {
        self.tokens().any(|token| token == Modality::Image)
    }

    /// The features, for an adapter that projects them.
    ///
    /// # Panics
    /// When a row has another number of image tokens than it has features, and not none.
    pub fn features(&self) -> Option<Tensor<3>> {
        let features = self.features.clone()?;
        self.taken.set(true);
        let [batch, n, _] = features.dims();
        assert_eq!(batch, self.tokens.len(), "features for each row of the batch");
        for row in &self.tokens {
            let images = row.iter().filter(|token| **token == Modality::Image).count();
            assert!(images == n || images == 0, "a row has {n} features, for {images} image tokens");
        }
        Some(features)
    }
}

thread_local! {
    /// What [`for_modalities`] was called with, further down this thread's stack.
    static MODALITIES: RefCell<Option<Rc<Modalities>>> = const { RefCell::new(None) };
}

/// Computes `forward` for one pass over that batch. Without it all tokens are text.
///
/// Adapters deep in a model read it where they need it, as with [`for_tasks`](crate::for_tasks). It ends with the call and holds on this thread alone. Tokens behind those in a cache are
/// a batch of their own: of text, where a model goes on writing.
///
/// ```
/// use peft_core::{Modalities, Modality::{Image, Text}, for_modalities, modalities};
///
/// assert!(modalities([1, 3]).is_none());
/// let batch = Modalities::new(vec![vec![Image, Image, Text]]);
/// assert!(for_modalities(batch, || modalities([1, 3])).is_some_and(|batch| batch.has_images()));
/// ```
///
/// # Panics
/// When there are features and no adapter asked for them: a model without a projector would go on as if it had seen an image.
pub fn for_modalities<R>(modalities: Modalities, forward: impl FnOnce() -> R) -> R {
    let modalities = Rc::new(modalities);
    let result = within(&MODALITIES, Rc::clone(&modalities), forward);
    assert!(
        modalities.features.is_none() || modalities.taken.get(),
        "a model that reads features has an adapter that projects them"
    );
    result
}

/// Computes `forward` for text alone, whatever holds around it.
pub fn for_text<R>(forward: impl FnOnce() -> R) -> R {
    let around = MODALITIES.with_borrow(Option::is_some);
    if around { for_modalities(Modalities::new(Vec::new()), forward) } else { forward() }
}

/// What the tokens of a batch of that many rows and tokens are; `None` where all are text.
///
/// # Panics
/// Inside of [`for_modalities`] with another shape.
pub fn modalities([batch, seq]: [usize; 2]) -> Option<Rc<Modalities>> {
    let found = MODALITIES.with_borrow(Clone::clone).filter(|found| !found.tokens.is_empty())?;
    let fits = found.tokens.len() == batch && found.tokens.iter().all(|row| row.len() == seq);
    assert!(fits, "a modality for each token of a batch of {batch} × {seq}");
    Some(found)
}

/// `each` of the rows of one modality, in the places of these rows: a row meets nothing that is for the other one. Not called for a modality without rows.
///
/// # Shapes
/// `x`: `[batch · seq, d_in]`, of a batch `[batch, seq]`; result `[batch · seq, d_out]`
pub fn by_modality(leading: [usize; 2], x: Tensor<2>, each: impl Fn(Modality, Tensor<2>) -> Tensor<2>) -> Tensor<2> {
    let Some(found) = modalities(leading) else { return each(Modality::Text, x) };
    let rows = |modality| -> Vec<i64> {
        let here = found.tokens().enumerate().filter(|(_, token)| *token == modality);
        here.map(|(at, _)| at as i64).collect()
    };
    let (text, images) = (rows(Modality::Text), rows(Modality::Image));
    if text.is_empty() || images.is_empty() {
        return each(if text.is_empty() { Modality::Image } else { Modality::Text }, x);
    }
    // Where each row is among those that were sorted by modality.
    let mut back = vec![0; text.len() + images.len()];
    text.iter().chain(&images).enumerate().for_each(|(sorted, at)| back[*at as usize] = sorted as i64);
    let device = x.device();
    let places = |rows: Vec<i64>| Tensor::<1, Int>::from_data(&rows[..], &device);
    let of = |modality, rows| each(modality, x.clone().select(0, places(rows)));
    Tensor::cat(vec![of(Modality::Text, text), of(Modality::Image, images)], 0).select(0, places(back))
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::Modality::{Image, Text};
    use super::*;

    fn mixed() -> Modalities {
        Modalities::new(vec![vec![Image, Text, Image], vec![Text, Text, Text]])
    }

    #[test]
    fn what_held_before_holds_again() {
        for_modalities(mixed(), || {
            assert!(for_text(|| modalities([5, 7])).is_none());
            let failed = std::panic::catch_unwind(|| for_text(|| panic!("on purpose")));
            assert!(failed.is_err());
            assert_eq!(modalities([2, 3]).map(|found| found.tokens().filter(|token| *token == Image).count()), Some(2));
            assert!(std::panic::catch_unwind(|| modalities([3, 2])).is_err());
        });
        assert!(modalities([2, 3]).is_none());
    }

    #[test]
    fn each_row_meets_its_own_and_stays_in_its_place() {
        let x = Tensor::<2>::from_data(TensorData::new((1..=6).map(|v| v as f32).collect(), [6, 1]), &Device::flex());
        let each = |modality, x: Tensor<2>| if modality == Text { x } else { x * f32::NAN };
        let y = for_modalities(mixed(), || by_modality([2, 3], x, each)).into_data();
        let found: Vec<f32> = y.iter().collect();
        assert!(found[0].is_nan() && found[2].is_nan());
        assert_eq!([found[1], found[3], found[4], found[5]], [2.0, 4.0, 5.0, 6.0]);
    }

    #[test]
    fn features_must_be_taken_and_fit_their_rows() {
        let features = |n| Tensor::<3>::zeros([2, n, 4], &Device::flex());
        let take = |n, take: bool| {
            let read = || take.then(|| modalities([2, 3]).and_then(|found| found.features()).map(|x| x.dims()));
            std::panic::catch_unwind(|| for_modalities(mixed().with_features(features(n)), read)).ok().flatten()
        };
        assert_eq!(take(2, true), Some(Some([2, 2, 4])));
        assert!(take(2, false).is_none() && take(3, true).is_none());
    }
}
