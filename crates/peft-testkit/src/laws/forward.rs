//! Laws of what a model computes.

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::nn::transformer::TransformerEncoderInput;
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Tensor};
use peft_core::{Error, LayerKind, Method, Site, attach, scan};

use super::{Layer, ROUNDING, Subject};
use crate::stack::{BATCH, EPSILON, IDS, SEQ, VOCAB, WIDTH, ids, input};
use crate::state::{adapter, adapter_shapes, deviation, gradients, normal, worse};
use crate::{Failure, Finding, Matrix, Outcome, Seam, Stack, fill_adapter, read};

/// The model's output on the fixed input, in the type of its weights.
pub(super) fn output(model: &Stack, seam: Seam) -> Result<Vec<f64>, Failure> {
    let (device, dtype) = (model.up.weight.lazy_device(), model.up.weight.base().dtype());
    read(model.forward(seam, ids(&device), input(WIDTH, 3, &device, dtype)))
}

/// A fresh adapter changes nothing: no bit where operations are not fused.
pub(super) fn identity<M: Method>(subject: &Subject<'_, M>) -> Outcome {
    let (base, model) = (subject.base().valid(), subject.attached()?.valid());
    let mut worst: f64 = 0.0;
    for seam in subject.seams()? {
        worst = worse(worst, deviation(&output(&model, *seam)?, &output(&base, *seam)?));
    }
    Ok(Finding::Measured { deviation: worst, bound: subject.laws.identity })
}

/// The merged model is the adapted one; or merging is refused, with the reason.
pub(super) fn merge<M: Method>(subject: &Subject<'_, M>) -> Outcome {
    let model = subject.random()?;
    if let Some(reason) = subject.unmergeable()? {
        return match peft_core::merge(model, subject.method()) {
            Err(error @ Error::Merge { .. }) if error.to_string().contains(&reason) => Ok(Finding::Holds),
            Err(error) => Err(format!("does not say that {reason}: {error}").into()),
            Ok(_) => Err(format!("merged, though {reason}").into()),
        };
    }
    let merged = output(&peft_core::merge(model.clone(), subject.method())?, Seam::Weight)?;
    let mut worst: f64 = 0.0;
    for seam in subject.seams()? {
        worst = worse(worst, deviation(&merged, &output(&model.valid(), *seam)?));
    }
    Ok(Finding::Measured { deviation: worst, bound: ROUNDING })
}

/// The method works in a model that knows nothing of it: Burn's own encoder. Merging changes nothing, and every adapter tensor has a
/// gradient.
pub(super) fn encoder<M: Method>(subject: &Subject<'_, M>) -> Outcome {
    let (encoder, method) = subject.encoder()?;
    let (matcher, found) = (method.targets().matcher()?, scan(&encoder));
    let mut adapted = found.sites.iter().filter(|site| matcher.matches(&site.path, Some(site.kind)));
    if let Some(reason) = adapted.find_map(|site| method.needs_activation(site)) {
        return Ok(Finding::Skipped(reason));
    }
    let model = fill_adapter(attach(encoder, &method, 0)?);
    let x = |device: &Device| TransformerEncoderInput::new(input(WIDTH, 3, device, DType::F32));
    let plain = subject.device.clone().without_autodiff();
    let merged = read(peft_core::merge(model.clone(), &method)?.forward(x(&plain)))?;
    let adapted = read(model.valid().forward(x(&plain)))?;
    // Norms make the mean a constant, so the loss is that of the squares against another input.
    let loss = (model.forward(x(&subject.device)) - input(WIDTH, 4, &subject.device, DType::F32)).square().sum();
    let grads = GradientsParams::from_grads(loss.backward(), &model);
    let silent =
        gradients(&model, &grads)?.into_iter().find(|(_, grad)| grad.iter().all(|g| *g == 0.0) || grad.is_empty());
    match silent {
        Some((name, _)) => Err(format!("the gradient of {name} is zero").into()),
        None => Ok(Finding::Measured { deviation: deviation(&merged, &adapted), bound: ROUNDING }),
    }
}

/// Both seams compute the method's formula, taken in double precision, on every adapted layer.
pub(super) fn reference<M: Method>(subject: &Subject<'_, M>) -> Outcome {
    let Some(formula) = subject.laws.reference else {
        return Ok(Finding::Skipped("no formula was given".to_owned()));
    };
    let model = subject.random()?.valid();
    let mut worst: f64 = 0.0;
    for site in subject.sites()? {
        let expected = formula(subject.method(), &layer(&model, &site)?)?;
        for seam in subject.seams()? {
            worst = worse(worst, deviation(&layer_output(&model, &site, *seam)?, expected.values()));
        }
    }
    Ok(Finding::Measured { deviation: worst, bound: ROUNDING })
}

/// `[d_in, d_out]`, a norm's scale `[1, width]`; `[1, d_out]`.
fn weight_and_bias(model: &Stack, site: &Site) -> Result<(Matrix, Option<Matrix>), Failure> {
    let row = |vector: &Param<Tensor<1>>| Ok::<_, Failure>(Matrix::new(1, site.d_out, read(vector.base())?)?);
    let (weight, bias) = match site.path.as_str() {
        "norm" => return Ok((row(&model.norm.gamma)?, model.norm.beta.as_ref().map(row).transpose()?)),
        "embed" => (&model.embed.weight, None),
        "up" => (&model.up.weight, model.up.bias.as_ref()),
        _ => (&model.down.weight, model.down.bias.as_ref()),
    };
    let weight = Matrix::new(site.d_in, site.d_out, read(weight.base())?)?;
    Ok((weight, bias.map(row).transpose()?))
}

fn layer<'a>(model: &Stack, site: &'a Site) -> Result<Layer<'a>, Failure> {
    let rows = BATCH * SEQ;
    let x = match site.kind {
        LayerKind::Embedding => {
            let hot = |at: usize| f64::from(u8::from(usize::try_from(IDS[at / VOCAB]) == Ok(at % VOCAB)));
            (0..rows * VOCAB).map(hot).collect()
        }
        _ => normal(rows * site.d_in, 1.0, 3).into_iter().map(f64::from).collect(),
    };
    let (weight, bias) = weight_and_bias(model, site)?;
    let shapes = adapter_shapes(model);
    let mut fields = BTreeMap::new();
    for (name, values) in adapter(model)? {
        if let Some(field) = name.strip_prefix(&format!("{}:", site.path)) {
            let columns = shapes[&name].last().copied().unwrap_or(1);
            fields.insert(field.to_owned(), Matrix::new(values.len() / columns.max(1), columns, values)?);
        }
    }
    Ok(Layer { site, x: Matrix::new(rows, site.d_in, x)?, weight, bias, fields })
}

fn layer_output(model: &Stack, site: &Site, seam: Seam) -> Result<Vec<f64>, Failure> {
    let device = site.device.clone().without_autodiff();
    let x = || input(site.d_in, 3, &device, DType::F32);
    let linear = if site.path == "up" { &model.up } else { &model.down };
    read(match (site.kind, seam) {
        (LayerKind::Embedding, Seam::Weight) => model.embed.forward(ids(&device)),
        (LayerKind::Embedding, Seam::Activation) => peft_core::embedding(&model.embed, ids(&device)),
        (LayerKind::LayerNorm, Seam::Weight) => model.norm.forward(x()),
        (LayerKind::LayerNorm, Seam::Activation) => peft_core::layer_norm(&model.norm, x(), EPSILON),
        (_, Seam::Weight) => linear.forward(x()),
        (_, Seam::Activation) => peft_core::linear(linear, x()),
    })
}
