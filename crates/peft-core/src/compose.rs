//! Several adapters at one place: stacked, side by side, by parts of the batch or of the sequence, averaged, fused.
//!
//! A composition is a method like any other: it attaches, trains and saves as one adapter that holds several. Its parts are trained, unless it has a fusion: then
//! the fusion is.
//!
//! - source: Pfeiffer et al. 2020, arXiv:2007.07779 (stack, split); 2021, arXiv:2005.00247 (fusion); Rücklé et al. 2021, arXiv:2010.11918 (parallel inference)

mod adapter;
mod fusion;
mod method;

use serde::{Deserialize, Serialize};

use crate::{LayerKind, Method, Result};

pub use adapter::{ComposedAdapter, Experts, Part};
pub use fusion::Fusion;
pub use method::{ComposedConfig, composed};

/// How adapters work together; numbers are those of [`ComposedConfig::adapters`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Composition {
    /// One adapter.
    Adapter(usize),
    /// One after the other: each at the place as those before it left it. Updates of weights add up.
    Stack(Vec<Composition>),
    /// Each on its number of rows of the batch.
    BatchSplit(Vec<(usize, Composition)>),
    /// Each on an equal part of the rows: the caller repeats the batch once for each.
    Parallel(Vec<Composition>),
    /// Each on its number of tokens of the sequence.
    Split(Vec<(usize, Composition)>),
    /// The weighted mean of what they give.
    Average(Vec<(f64, Composition)>),
    /// Attention over what they add.
    Fuse(Vec<usize>),
}

/// A method whose adapters can be parts of a composition.
pub trait Composable: Method<Adapter: Part> {
    /// The name of a composition in `adapter_config.json`.
    const COMPOSITION: &'static str;

    /// The name of a mixture in `adapter_config.json`.
    const MIXTURE: &'static str;

    /// The kinds of layer at which adapters can be composed.
    const PLACES: &'static [LayerKind];

    /// Refuses a configuration whose adapters are no sums, so that they cannot be parts of one.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config).
    fn check_part(&self) -> Result<()> {
        Ok(())
    }

    /// Refuses a configuration whose adapters cannot be experts of a mixture.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config).
    fn check_expert(&self) -> Result<()> {
        Ok(())
    }
}

impl Composition {
    /// The numbers of the adapters in it.
    fn numbers(&self) -> Vec<usize> {
        match self {
            Self::Adapter(number) => vec![*number],
            Self::Fuse(numbers) => numbers.clone(),
            _ => self.parts().into_iter().flat_map(Self::numbers).collect(),
        }
    }

    /// The adapter that comes before all others.
    fn first(&self) -> Option<usize> {
        self.numbers().first().copied()
    }

    /// What it is composed of, down by one level.
    fn parts(&self) -> Vec<&Self> {
        match self {
            Self::Adapter(_) | Self::Fuse(_) => Vec::new(),
            Self::Stack(parts) | Self::Parallel(parts) => parts.iter().collect(),
            Self::BatchSplit(parts) | Self::Split(parts) => parts.iter().map(|(_, part)| part).collect(),
            Self::Average(parts) => parts.iter().map(|(_, part)| part).collect(),
        }
    }

    /// Whether it takes parts of the input itself.
    fn cuts(&self) -> bool {
        matches!(self, Self::BatchSplit(_) | Self::Split(_) | Self::Parallel(_))
    }

    fn is_empty(&self) -> bool {
        match self {
            Self::Adapter(_) => false,
            Self::Fuse(numbers) => numbers.is_empty(),
            _ => self.parts().is_empty(),
        }
    }

    /// Whether it is a mean that divides by nothing.
    fn weighs_nothing(&self) -> bool {
        matches!(self, Self::Average(parts) if !total(parts).is_normal())
    }

    fn any(&self, holds: &impl Fn(&Self) -> bool) -> bool {
        holds(self) || self.parts().into_iter().any(|part| part.any(holds))
    }

    /// Whether parts of the input are taken on the outside only: what is behind them ends each part for itself.
    fn is_whole(&self) -> bool {
        if self.cuts() { self.parts().into_iter().all(Self::is_whole) } else { !self.any(&Self::cuts) }
    }

    fn fuses(&self) -> bool {
        self.any(&|part| matches!(part, Self::Fuse(_)))
    }

    /// Why it is no sum of weights; `None` when it is.
    fn acts(&self) -> Option<String> {
        if self.any(&Self::cuts) {
            Some("each adapter acts on a part of the input".to_owned())
        } else {
            self.fuses().then(|| "a fusion weighs adapters token by token".to_owned())
        }
    }
}

/// The sum of the weights of a mean.
fn total(parts: &[(f64, Composition)]) -> f64 {
    parts.iter().map(|(weight, _)| weight).sum()
}
