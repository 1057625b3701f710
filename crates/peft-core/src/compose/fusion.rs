//! AdapterFusion: attention over what several frozen adapters would add.
//!
//! - formula: with `uᵢ` what adapter `i` makes of a token, before its residual: `p = softmaxᵢ(q(x)·k(uᵢ))`, `y = Σᵢ pᵢ·v(uᵢ) + residual`
//! - source: Pfeiffer et al. 2021, arXiv:2005.00247, section 3
//! - trained: `3·width² + 2·width` values where a sub-layer ends, `d_in·d_out + 2·d_out² + 2·d_out` in a linear layer; the adapters are not
//! - at init: `v` is the identity, up to 1e-6 beside the diagonal, as in AdapterHub

use burn::module::{Module, Param};
use burn::tensor::{Tensor, activation};

use crate::{Dense, Result, Site, Start};

/// Off the diagonal of the value matrix at init, so that every entry has a gradient of its own.
const BESIDE: f32 = 1e-6;

/// State of a fusion at one place.
#[derive(Module, Debug)]
pub struct Fusion {
    query: Dense,
    key: Dense,
    /// `[d_out, d_out]`
    value: Param<Tensor<2>>,
}

impl Fusion {
    pub(super) fn new(site: &Site, seed: u64) -> Result<Self> {
        let (width, mut rng, start) = (site.d_out, site.rng(seed), Start::Normal { std: 0.02, cut: false });
        let mut at = 0;
        let value = site.param([width, width], || {
            let (row, column) = (at / width, at % width);
            at += 1;
            if row == column { 1.0 } else { BESIDE }
        })?;
        let mut dense = |d_in| Dense::new(site, [d_in, width], start, &mut rng);
        Ok(Self { query: dense(site.d_in)?, key: dense(width)?, value })
    }

    /// `query`: `[batch, seq, d_in]`; `residual`: `[batch, seq, d_out]`; `updates`: one such for each adapter.
    pub(super) fn forward(&self, query: Tensor<3>, updates: Vec<Tensor<3>>, residual: Tensor<3>) -> Tensor<3> {
        let ([batch, seq, width], [.., d_in]) = (residual.dims(), query.dims());
        let (count, dtype) = (updates.len(), residual.dtype());
        let rows = batch * seq;
        let own = self.value.val().dtype();
        let updates: Tensor<4> = Tensor::stack(updates, 2); // [batch, seq, count, width]
        let updates: Tensor<2> = updates.reshape([rows * count, width]).cast(own);
        let query = self.query.forward(query.reshape([rows, d_in]).cast(own)).reshape([rows, 1, width]);
        let key = self.key.forward(updates.clone()).reshape([rows, count, width]);
        let value = updates.matmul(self.value.val()).reshape([rows, count, width]);
        let p = activation::softmax((query * key).sum_dim(2), 1); // [rows, count, 1]
        let mixed: Tensor<3> = (p * value).sum_dim(1);
        mixed.reshape([batch, seq, width]).cast(dtype) + residual
    }
}
