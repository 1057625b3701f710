use burn::module::Module;
use burn::tensor::{DType, Device, DeviceType, Tensor, TensorData, Int};
use burn::tensor::activation::silu;
use peft::core::{Peft, Targets};
use peft::lora::LoraConfig;
use peft_testkit::{fill_adapter, Stack, Seam};
fn t<const D: usize>(shape: [usize; D], seed: u64, d: &Device) -> Tensor<D> {
    let n: usize = shape.iter().product();
    let v: Vec<f32> = (0..n).map(|i| (((i as u64 + 1).wrapping_mul(2654435761).wrapping_add(seed * 97) >> 7) % 1000) as f32 / 500.0 - 1.0).collect();
    Tensor::from_data(TensorData::new(v, shape), d)
}
fn main() {
    let v = Device::enumerate(DeviceType::Vulkan).to_vec().remove(0);
    let f = Device::flex();
    let run = |name: &str, go: &dyn Fn(&Device) -> Tensor<3>| {
        let (a, b) = (go(&v).into_data(), go(&f).into_data());
        let d = a.iter::<f32>().zip(b.iter::<f32>()).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
        println!("{name}: {d:.1e}");
    };
    let base = |d: &Device| Stack::new(d, DType::F32, true);
    let lora = |names: &[&str], d: &Device| {
        let d = d.clone().autodiff();
        fill_adapter(base(&d).attach(&LoraConfig::new(4, Targets::modules(names.to_vec())).with_alpha(8.0)).unwrap()).valid()
    };
    let ids = |d: &Device| Tensor::<2, Int>::from_data(TensorData::new(vec![1i64, 5, 3, 7, 2, 0, 5, 31], [2, 4]), d);
    run("weights up", &|d| base(d).up.weight.val().unsqueeze());
    run("weights down", &|d| base(d).down.weight.val().unsqueeze());
    run("weights embed", &|d| base(d).embed.weight.val().unsqueeze());
    run("adapter a", &|d| lora(&["down"], d).down.weight.val().unsqueeze());
    run("embed", &|d| base(d).embed.forward(ids(d)));
    run("up", &|d| base(d).up.forward(t([2, 4, 16], 1, d)));
    run("down", &|d| base(d).down.forward(t([2, 4, 32], 1, d)));
    run("silu(up)", &|d| silu(base(d).up.forward(t([2, 4, 16], 1, d))));
    run("down(silu)", &|d| base(d).down.forward(silu(t([2, 4, 32], 1, d))));
    run("stack", &|d| base(d).forward(Seam::Weight, ids(d), t([2, 4, 16], 1, d)));
    run("lora down act", &|d| peft::core::linear(&lora(&["down"], d).down, t([2, 4, 32], 1, d)));
    run("lora down weight", &|d| lora(&["down"], d).down.forward(t([2, 4, 32], 1, d)));
    run("lora up act", &|d| peft::core::linear(&lora(&["up"], d).up, t([2, 4, 16], 1, d)));
    run("lora up weight", &|d| lora(&["up"], d).up.forward(t([2, 4, 16], 1, d)));
    run("lora embed act", &|d| peft::core::embedding(&lora(&["embed"], d).embed, ids(d)));
}
