//! Methods that scale and shift, in all their forms, under the laws of `peft-testkit`, and on layers that the laws' model lacks.

use burn::module::Module;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{Initializer, LayerNorm, LayerNormConfig, Linear, LinearConfig, RmsNorm, RmsNormConfig};
use burn::tensor::{DType, Device, Distribution, Tensor};
use peft_adapter::{BitFitConfig, Ia3Config, InitSsf, LnTuningAdapter, LnTuningConfig, SsfAdapter, SsfConfig};
use peft_core::{AdapterAware, Error, Method, Names, Peft, Targets, attach, conv2d, merge, rms_norm};
use peft_testkit::{Stack, difference, fill_adapter, read};

use crate::hold;
use crate::statement::{bitfit, bitfit_laws, gated_ia3, ia3, ia3_laws, ln_tuning_laws, ssf, ssf_laws};

/// A layer without a bias, so that the weight form is the whole method.
#[test]
fn ia3_on_outputs() {
    hold(&ia3_laws(Ia3Config::new(Targets::modules(["down"]))));
}

#[test]
fn ia3_on_inputs() {
    let feedforward_modules = Names::Pattern(".*".to_owned());
    hold(&ia3_laws(Ia3Config { feedforward_modules, ..ia3() }));
}

#[test]
fn ia3_on_both() {
    hold(&ia3_laws(ia3()));
}

#[test]
fn ia3_random() {
    hold(&ia3_laws(Ia3Config { init_ia3_weights: false, ..ia3() }).skip("identity", "it starts at random"));
}

#[test]
fn ia3_with_a_gate() {
    hold(&gated_ia3());
    let both = Ia3Config { use_gating: true, ..ia3() };
    assert!(both.check().unwrap_err().to_string().contains("feedforward_modules"));
}

#[test]
fn ssf_on_linear_and_norm() {
    hold(&ssf_laws(ssf()));
}

#[test]
fn ssf_as_the_paper_starts() {
    hold(&ssf_laws(ssf().with_init(InitSsf::Paper)).skip("identity", "it starts around the identity"));
}

#[test]
fn ln_tuning() {
    hold(&ln_tuning_laws());
}

#[test]
fn bitfit_on_linear_and_norm() {
    hold(&bitfit_laws(bitfit()));
}

#[test]
fn bitfit_random() {
    hold(&bitfit_laws(BitFitConfig { init_weights: false, ..bitfit() }).skip("identity", "it starts at random"));
}

fn stack() -> Stack {
    Stack::new(&Device::flex().autodiff(), DType::F32, true)
}

/// The message of an error that the method gives on the laws' model.
fn refusal(method: &impl Method) -> String {
    attach(stack(), method, 0).unwrap_err().to_string()
}

#[test]
fn feedforward_modules_are_ends_of_names_among_the_targets() {
    let ia3 = Ia3Config::new(Targets::modules(["k_proj", "c_proj"])).with_feedforward(["c_proj"]);
    let is = |path| ia3.is_feedforward(path).unwrap();
    assert!(is("h.0.mlp.c_proj") && is("h.0.mlp.dc_proj") && !is("h.0.attn.k_proj") && !is("h.0.c_proj.inner"));
    let message = refusal(&Ia3Config::new(Targets::modules(["up"])).with_feedforward(["up", "down"]));
    assert!(message.contains("`feedforward_modules`") && message.contains("found down"), "{message}");
}

#[test]
fn layers_that_a_method_cannot_adapt_are_refused_by_name() {
    let message = refusal(&Ia3Config::new(Targets::modules(["norm"])));
    assert!(message.contains("norm is a LayerNorm"), "{message}");
    let message = refusal(&LnTuningConfig::new(Targets::modules(["up"])));
    assert!(message.contains("up is a Linear"), "{message}");
    let message = refusal(&BitFitConfig::new(Targets::modules(["up", "down"])));
    assert!(message.contains("layers with a bias") && message.contains("found down"), "{message}");
}

#[test]
fn without_a_bias_ssf_is_not_merged() {
    let method = SsfConfig::new(Targets::modules(["down"]));
    let refused = merge(stack().attach(&method).unwrap(), &method);
    assert!(matches!(refused, Err(Error::Merge { problems }) if problems.len() == 1));
}

#[derive(Module, Debug)]
struct Images {
    patches: Conv2d,
    norm: RmsNorm,
    aware: AdapterAware,
}

fn images(device: &Device) -> Images {
    let patches = Conv2dConfig::new([3, 8], [2, 2]).with_stride([2, 2]).init(device);
    Images { patches, norm: RmsNormConfig::new(8).init(device), aware: AdapterAware }
}

/// Values of both, which must be no more than rounding apart.
fn assert_near<const D: usize>(found: Tensor<D>, expected: Tensor<D>) {
    let (found, expected) = (read(found).unwrap(), read(expected).unwrap());
    let deviation = difference(&found, &expected);
    assert!(deviation < 1e-5, "{deviation}");
}

#[test]
fn ssf_scales_and_shifts_the_channels_of_a_convolution() {
    let device = Device::flex();
    let (base, method) = (images(&device), SsfConfig::new(Targets::modules(["patches"])));
    let model = fill_adapter(base.clone().attach(&method).unwrap());
    let adapter = model.patches.weight.reparameterization::<SsfAdapter>().unwrap();
    let by_channel = |values: Tensor<1>| values.reshape([1, 8, 1, 1]);
    let x = Tensor::random([2, 3, 6, 6], Distribution::Default, &device);
    let y = base.patches.forward(x.clone());
    let expected = y * by_channel(adapter.scale.val()) + by_channel(adapter.shift.val());
    assert_near(conv2d(&model.patches, x.clone()), expected.clone());
    assert_near(merge(model, &method).unwrap().patches.forward(x), expected);
}

#[test]
fn bitfit_moves_the_bias_of_a_convolution() {
    let device = Device::flex();
    let method = BitFitConfig::new(Targets::modules(["patches"]));
    let model = fill_adapter(images(&device).attach(&method).unwrap());
    let x = Tensor::random([2, 3, 6, 6], Distribution::Default, &device);
    let y = conv2d(&model.patches, x.clone());
    assert!(difference(&read(y.clone()).unwrap(), &read(model.patches.forward(x.clone())).unwrap()) > 0.1);
    assert_near(merge(model, &method).unwrap().patches.forward(x), y);
}

#[test]
fn ssf_on_an_rms_norm() {
    let device = Device::flex();
    let (base, method) = (images(&device), SsfConfig::new(Targets::modules(["norm"])));
    let model = fill_adapter(base.clone().attach(&method).unwrap());
    let adapter = model.norm.gamma.reparameterization::<SsfAdapter>().unwrap();
    let x = Tensor::<2>::random([4, 8], Distribution::Default, &device);
    let y = base.norm.forward(x.clone());
    assert_near(rms_norm(&model.norm, x), y * adapter.scale.val().unsqueeze() + adapter.shift.val().unsqueeze());
}

/// It starts at what the base holds, which is not one here, and needs no seam, since an RMS norm has no shift.
#[test]
fn ln_tuning_of_an_rms_norm() {
    #[derive(Module, Debug)]
    struct Plain {
        norm: RmsNorm,
    }
    let device = Device::flex().autodiff();
    let mut norm = RmsNormConfig::new(8).init(&device);
    norm.gamma = norm.gamma.map(|ones| (ones * 0.3).detach().require_grad());
    let (base, method) = (Plain { norm }, LnTuningConfig::new(Targets::modules(["norm"])));
    let model = base.clone().attach(&method).unwrap();
    let adapter = model.norm.gamma.reparameterization::<LnTuningAdapter>().unwrap();
    assert!(adapter.bias.is_none() && adapter.weight.is_require_grad());
    assert_eq!(read(adapter.weight.val()).unwrap(), read(base.norm.gamma.val()).unwrap());
    let (model, x) = (fill_adapter(model), Tensor::<2>::random([4, 8], Distribution::Default, &device));
    let y = model.norm.forward(x.clone());
    assert!(difference(&read(y.clone()).unwrap(), &read(base.norm.forward(x.clone())).unwrap()) > 0.1);
    assert_near(rms_norm(&model.norm, x.clone()), y.clone());
    assert_near(merge(model, &method).unwrap().norm.forward(x.inner()), y.inner());
}

/// The layers of a vision transformer of that width, without the head.
#[derive(Module, Debug)]
struct Vit {
    patches: Conv2d,
    blocks: Vec<VitBlock>,
    norm: LayerNorm,
    aware: AdapterAware,
}

#[derive(Module, Debug)]
struct VitBlock {
    norm1: LayerNorm,
    qkv: Linear,
    proj: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

/// The paper's count for ViT-B/16, whose weights do not matter here.
#[test]
fn ssf_trains_as_many_values_of_vit_b_16_as_in_the_paper() {
    const WIDTH: usize = 768;
    let device = Device::flex().autodiff();
    let zeros = Initializer::Zeros;
    let linear =
        |d_in, d_out| LinearConfig::new(d_in * WIDTH, d_out * WIDTH).with_initializer(zeros.clone()).init(&device);
    let norm = || LayerNormConfig::new(WIDTH).init(&device);
    let block = |_| VitBlock {
        norm1: norm(),
        qkv: linear(1, 3),
        proj: linear(1, 1),
        norm2: norm(),
        fc1: linear(1, 4),
        fc2: linear(4, 1),
    };
    let patches = Conv2dConfig::new([3, WIDTH], [16, 16]).with_stride([16, 16]).init(&device);
    let vit = Vit { patches, blocks: (0..12).map(block).collect(), norm: norm(), aware: AdapterAware };
    let everything = r"patches|norm|blocks\.\d+\.(norm1|qkv|proj|norm2|fc1|fc2)";
    let vit = vit.attach(&SsfConfig::new(Targets::pattern(everything))).unwrap();
    assert_eq!(vit.trainable().trainable, 205_824);
}
