//! The custom operations of `peft-kernels` on a device, against double precision.

mod activate;
mod adamw;
mod attention;
mod cross_entropy;
mod experts;
mod grouped;
mod linear;
mod low_rank;
mod mixed;
mod norm;
mod packed;
mod rope;
mod softmax;

use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::state::{deviation, normal, worse};
use crate::{Failure, Finding, Outcome, read};

/// Relative deviation of sums in f32, and in half precision.
const ROUNDING: f64 = 1e-5;
const HALF: f64 = 2e-2;

/// On a CPU, f64 is what goes through the bodies that other backends run in f32.
const SINGLE: &[DType] = &[DType::F32, DType::F64];
const HALVES: &[DType] = &[DType::F16, DType::BF16];
const ALL: &[DType] = &[DType::F32, DType::F64, DType::F16, DType::BF16];

/// A check by name.
pub type Operation = (String, Box<dyn Fn(&Device) -> Outcome>);

/// Checks of every custom operation: whole and odd sizes, values and gradients.
pub fn operations() -> Vec<Operation> {
    let checks = [
        packed::checks(),
        activate::checks(),
        adamw::checks(),
        norm::checks(),
        rope::checks(),
        softmax::checks(),
        attention::checks(),
        cross_entropy::checks(),
        linear::checks(),
        low_rank::checks(),
        experts::checks(),
        grouped::checks(),
        mixed::checks(),
    ];
    checks.into_iter().flatten().collect()
}

/// A check of a deviation in each type that the device has. Its name ends in the type, unless that is f32.
fn in_types(
    name: &str,
    dtypes: &[DType],
    deviation: impl Fn(DType, &Device) -> Result<f64, Failure> + Clone + 'static,
) -> Vec<Operation> {
    let check = |dtype: &DType| -> Operation {
        let (dtype, deviation) = (*dtype, deviation.clone());
        let (name, bound) = match dtype {
            DType::F32 => (name.to_lowercase(), ROUNDING),
            DType::F64 => (format!("{name} f64").to_lowercase(), ROUNDING),
            _ => (format!("{name} {dtype:?}").to_lowercase(), HALF),
        };
        let measure = move |device: &Device| {
            if !device.supports_dtype(dtype) {
                return Ok(Finding::Skipped(format!("the device has no {dtype:?}")));
            }
            Ok(Finding::Measured { deviation: deviation(dtype, device)?, bound })
        };
        (name, Box::new(measure))
    };
    dtypes.iter().map(check).collect()
}

/// Values that go into an operation.
struct Input {
    values: Vec<f32>,
    /// How far apart the values are whose gradient is looked at; nothing when the input is frozen.
    step: Option<usize>,
}

impl Input {
    fn trained(values: Vec<f32>) -> Self {
        Self { values, step: Some(1) }
    }

    fn frozen(values: Vec<f32>) -> Self {
        Self { values, step: None }
    }
}

/// The largest deviation of an operation from `reference`, and of its gradients from differences of `reference`.
///
/// The operation takes its inputs flat; the reference takes them as the type rounds them, so that only the arithmetic differs.
fn by_differences<const N: usize, const D: usize>(
    inputs: &[Input; N],
    dtype: DType,
    device: &Device,
    operation: impl Fn([Tensor<1>; N]) -> Tensor<D>,
    reference: impl Fn([&[f64]; N]) -> Vec<f64>,
) -> Result<f64, Failure> {
    let gradients = |values: [&[f64]; N], dy: &[f64]| {
        let of = |at: usize| {
            let loss = |moved: &[f64]| {
                let mut values = values;
                values[at] = moved;
                dot(&reference(values), dy)
            };
            inputs[at].step.map(|step| gradient(loss, values[at], step))
        };
        std::array::from_fn(of)
    };
    compare(inputs, dtype, device, operation, &reference, gradients)
}

/// The same with the gradients of the trained inputs as a function of the inputs and of the gradient of the output.
fn compare<const N: usize, const D: usize>(
    inputs: &[Input; N],
    dtype: DType,
    device: &Device,
    operation: impl Fn([Tensor<1>; N]) -> Tensor<D>,
    reference: impl Fn([&[f64]; N]) -> Vec<f64>,
    gradients: impl Fn([&[f64]; N], &[f64]) -> [Option<Vec<f64>>; N],
) -> Result<f64, Failure> {
    let data = inputs.each_ref().map(|input| rounded(&input.values, dtype));
    let exact = data.each_ref().map(exact);
    let values = exact.each_ref().map(Vec::as_slice);
    let y = reference(values);
    let dy = rounded(&normal(y.len(), 1.0, 9), dtype);
    let plain = operation(data.clone().map(|data| Tensor::from_data(data, (device, dtype))));

    let autodiff = device.clone().autodiff();
    let tensors: [Tensor<1>; N] = std::array::from_fn(|at| {
        let tensor = Tensor::from_data(data[at].clone(), (&autodiff, dtype));
        tensor.set_require_grad(inputs[at].step.is_some())
    });
    let output = operation(tensors.clone());
    let weights = Tensor::<1>::from_data(dy.clone(), (&autodiff, dtype)).reshape(output.dims());
    let tape = (output.clone() * weights).sum().backward();

    let mut worst = worse(deviation(&read(plain)?, &y), deviation(&read(output)?, &y));
    let expected = gradients(values, &self::exact(&dy));
    for ((input, tensor), expected) in inputs.iter().zip(&tensors).zip(expected) {
        if let (Some(step), Some(expected)) = (input.step, expected) {
            let found = read(tensor.grad(&tape).ok_or("an input has no gradient")?)?;
            let found: Vec<f64> = found.into_iter().step_by(step).collect();
            worst = worse(worst, deviation(&found, &expected));
        }
    }
    Ok(worst)
}

fn rounded(values: &[f32], dtype: DType) -> TensorData {
    TensorData::new(values.to_vec(), [values.len()]).convert_dtype(dtype)
}

fn exact(data: &TensorData) -> Vec<f64> {
    data.iter::<f64>().collect()
}

/// The gradient of `f` by central differences, at values `step` apart.
fn gradient(f: impl Fn(&[f64]) -> f64, at: &[f64], step: usize) -> Vec<f64> {
    /// Where rounding and the third derivative both cost less than 1e-8.
    const DISTANCE: f64 = 1e-5;
    let (mut at, count) = (at.to_vec(), at.len());
    let slope = |i: usize| {
        let value = at[i];
        let mut moved = |by: f64| {
            at[i] = value + by;
            f(&at)
        };
        let slope = (moved(DISTANCE) - moved(-DISTANCE)) / (2.0 * DISTANCE);
        at[i] = value;
        slope
    };
    (0..count).step_by(step).map(slope).collect()
}

fn dot(left: &[f64], right: &[f64]) -> f64 {
    left.iter().zip(right).map(|(left, right)| left * right).sum()
}
