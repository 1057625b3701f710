//! A gate: how much of an adapter a row of the batch gets.
//!
//! - formula: `s = mean over positions of σ(x·G + g)`, `G: [d_in, outputs]`: `outputs` numbers a row, between zero and one
//! - source: Mao et al. 2022, arXiv:2110.07577, section 3.2; the mean, which takes in padding too, is that of AdapterHub's `adapters`
//!
//! The mean is over the whole row, so in a decoder a token's gate knows what comes after it: it is for models that read a text whole. A decoder takes it
//! all the same where `adapters` does, so that its files load.

use burn::module::Module;
use burn::tensor::{Tensor, activation};
use rand::Rng;

use crate::{Dense, Result, Site, Start};

/// Deviation of a gate's weights at init, AdapterHub's.
const START: Start = Start::Normal { std: 0.02, cut: false };

/// Numbers between zero and one for each row of a batch, learned from what the adapter sees of it.
#[derive(Module, Debug)]
pub struct Gate {
    dense: Dense,
}

impl Gate {
    /// A gate that starts near one half.
    ///
    /// # Errors
    /// As [`Site::param`].
    pub fn new(site: &Site, shape: [usize; 2], rng: &mut impl Rng) -> Result<Self> {
        Ok(Self { dense: Dense::new(site, shape, START, rng)? })
    }

    /// `[batch, seq, d_in]` to `[batch, 1, outputs]`, in the type of the gate.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, seq, d_in] = x.dims();
        let y = self.dense.forward(x.reshape([batch * seq, d_in]).cast(self.dense.dtype())); // [rows, outputs]
        let outputs = y.dims()[1];
        activation::sigmoid(y).reshape([batch, seq, outputs]).mean_dim(1)
    }
}
