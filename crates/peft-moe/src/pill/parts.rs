//! What PILL trains: experts, gates, the projector of features.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use peft_core::kernels::{Nonlinearity, activate, gated};
use peft_core::{Dense, Error, Modality, Result, Site, Start, by_modality, product};
use rand::Rng;

use super::FeatureConfig;

/// `(silu(x·G) ⊙ (x·D))·U`
#[derive(Module, Debug)]
pub struct Expert {
    /// `G`, `[width, adapter_dim]`
    gate: Param<Tensor<2>>,
    /// `D`, `[width, adapter_dim]`
    down: Param<Tensor<2>>,
    /// `U`, `[adapter_dim, width]`
    up: Param<Tensor<2>>,
}

/// How far each head's values of an image token are open.
#[derive(Module, Debug)]
pub struct ValueGate {
    /// `W`, `[width, kv_heads]`
    opening: Param<Tensor<2>>,
    /// Of the values of all heads.
    width: usize,
}

/// What makes embeddings of features.
#[derive(Module, Debug)]
pub struct Projector {
    hidden: Option<Dense>,
    /// `P`, `[d_features or hidden, width]`
    projection: Param<Tensor<2>>,
}

/// The deviation of what starts at random, that of the authors' code.
const STD: f32 = 0.02;

impl Expert {
    pub(super) fn new(site: &Site, adapter_dim: usize, rng: &mut impl Rng) -> Result<Self> {
        let shape = [site.d_out, adapter_dim];
        Ok(Self {
            gate: Start::Kaiming.values(site, shape, site.d_out, rng)?,
            down: site.normal(shape, STD, rng)?,
            up: site.zeros([adapter_dim, site.d_out])?,
        })
    }

    /// `x + A(x)`, `[rows, width]` to the same.
    pub(super) fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let (dtype, up) = (x.dtype(), self.up.val());
        let x = x.cast(up.dtype());
        let inner = gated(product(x.clone(), self.gate.val()), product(x.clone(), self.down.val()), Nonlinearity::Silu);
        (x + product(inner, up)).cast(dtype)
    }
}

impl ValueGate {
    /// # Errors
    /// When the model does not say how many heads it has, or the layer makes no values of them.
    pub(super) fn new(site: &Site) -> Result<Self> {
        let refuse = |expected: &str, found: String| Err(Error::config("target_modules", expected, found));
        let Some(shape) = site.prompt else {
            let expected = "values of a model that says how many heads it has, by a field of type `peft_core::Prompts`";
            return refuse(expected, format!("{} in one that does not; or set `gate` to false", site.path));
        };
        let width = shape.kv_width();
        if site.d_out != width && site.d_out != 3 * width {
            let expected = format!("linear layers that make {width} values, alone or behind queries and keys");
            return refuse(&expected, format!("{} with {} outputs", site.path, site.d_out));
        }
        Ok(Self { opening: site.zeros([site.d_in, shape.kv_heads])?, width })
    }

    /// `y` `[rows, d_out]` with the values of image tokens as far open as `x` `[rows, d_in]` says; they are the last of its outputs.
    pub(super) fn forward(&self, x: Tensor<2>, y: Tensor<2>, leading: [usize; 2]) -> Tensor<2> {
        let (opening, width, dtype) = (self.opening.val(), self.width, y.dtype());
        let [_, heads] = opening.dims();
        let open = by_modality(leading, x.cast(opening.dtype()), |modality, x| match modality {
            Modality::Text => Tensor::ones([x.dims()[0], heads], (&x.device(), x.dtype())),
            Modality::Image => product(x, opening.clone()).tanh(),
        });
        let [rows, d_out] = y.dims();
        let values: Tensor<3> = y.clone().narrow(1, d_out - width, width).reshape([rows, heads, width / heads]);
        let values = (values * open.cast(dtype).unsqueeze_dim::<3>(2)).reshape([rows, width]);
        if d_out == width { values } else { Tensor::cat(vec![y.narrow(1, 0, d_out - width), values], 1) }
    }
}

impl Projector {
    pub(super) fn new(features: FeatureConfig, site: &Site, rng: &mut impl Rng) -> Result<Self> {
        let start = Start::Normal { std: STD, cut: false };
        let hidden =
            features.hidden.map(|hidden| Dense::new(site, [features.width, hidden], start, rng)).transpose()?;
        let projection = site.normal([features.hidden.unwrap_or(features.width), site.d_out], STD, rng)?;
        Ok(Self { hidden, projection })
    }

    /// `[batch, n, d_features]` to `[batch, n, width]`.
    pub(super) fn forward(&self, features: Tensor<3>) -> Tensor<3> {
        let (projection, [batch, n, d_in]) = (self.projection.val(), features.dims());
        let rows: Tensor<2> = features.reshape([batch * n, d_in]).cast(projection.dtype());
        let rows = match &self.hidden {
            Some(hidden) => activate(hidden.forward(rows), Nonlinearity::Gelu),
            None => rows,
        };
        let [_, width] = projection.dims();
        product(rows, projection).reshape([batch, n, width])
    }
}
