//! Laws of packed bases.

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::DType;
use peft_core::{Method, Quantized, attach, merge, scan};
use peft_quant::{Code, Format, Quantization, quantize};

use super::forward::output;
use super::training::{Run, train};
use super::{ROUNDING, Subject};
use crate::state::{deviation, worse};
use crate::{Failure, Finding, Outcome, Seam, Stack, fill_adapter, read};

/// Over a packed base the method computes what it computes over the dense values that the base stands for: outputs, gradients, merged.
/// Training moves the adapter and no bit of the base.
pub(super) fn packed<M: Method>(subject: &Subject<'_, M>, code: Code, double_quant: bool) -> Outcome {
    let format = Format { code, block: 32, double_quant };
    let base = quantize(subject.base(), &Quantization::new(format))?;
    let layers = scan(&base).sites.iter().filter(|site| site.packed.is_some()).count();
    if layers != 2 {
        return Err(format!("expected both linear layers packed, found {layers}").into());
    }
    let dense = base.clone().materialize();
    let adapted = |base: Stack| Ok::<_, Failure>(fill_adapter(attach(base, subject.method(), 0)?));
    let (over_packed, over_dense) = (adapted(base.clone())?, adapted(dense)?);
    let mut worst: f64 = 0.0;
    for seam in subject.seams()? {
        let run = |model| Run::new(model, *seam, &subject.device, DType::F32);
        worst = worse(worst, run(&over_packed)?.deviation(&run(&over_dense)?));
        let after = train(over_packed.clone(), *seam, 2, &subject.device);
        if unpacked(&after)? != unpacked(&over_packed)? {
            return Err(format!("a packed weight moved, {seam:?} seam").into());
        }
    }
    if subject.unmergeable()?.is_some() {
        return Ok(Finding::Measured { deviation: worst, bound: ROUNDING });
    }
    let merged = output(&merge(over_packed.clone(), subject.method())?, Seam::Weight)?;
    worst = worse(worst, deviation(&merged, &output(&over_packed.valid(), Seam::Activation)?));
    Ok(Finding::Measured { deviation: worst, bound: ROUNDING })
}

/// What the packed weights stand for.
fn unpacked(model: &Stack) -> Result<Vec<Vec<f64>>, Failure> {
    let packed = |layer: &Linear| layer.weight.reparameterization::<Quantized>().map(|q| read(q.packed().unpack()));
    [&model.up, &model.down].into_iter().filter_map(packed).collect()
}
