//! Laws of X-LoRA.

use burn::module::{Module, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use peft_core::{
    AdapterAware, AdapterFile, ParamVisitor, PathStack, PromptShape, Prompts, Targets, attach, linear, load_adapter,
    report, save_adapter, visit_params,
};
use peft_lora::LoraConfig;
use peft_moe::XLoraConfig;
use peft_testkit::fill_adapter;

use crate::mixtures::{WIDTH, base, file, near, values, wave, x};

/// Two layers in a block, a row of tokens alone with itself; and two that come when it is over.
#[derive(Module, Debug)]
struct Twice {
    prompts: Prompts,
    blocks: Vec<Block>,
    lm_head: Linear,
    classifier: Linear,
    aware: AdapterAware,
}

#[derive(Module, Debug)]
struct Block {
    up: Linear,
    down: Linear,
}

impl Twice {
    fn new(device: &Device) -> Self {
        let shape = PromptShape { width: WIDTH, blocks: 1, kv_heads: 1, head_dim: WIDTH, positions: 16, causal: true };
        let layer = |step: f32| {
            let weight = TensorData::new(wave(WIDTH * WIDTH, step), [WIDTH, WIDTH]);
            let layer = LinearConfig::new(WIDTH, WIDTH).with_bias(false).init(device);
            Linear { weight: Param::from_tensor(Tensor::from_data(weight, device)), ..layer }
        };
        let prompts = Prompts::new(shape, device);
        let blocks = vec![Block { up: layer(1.7), down: layer(0.6) }];
        Self { prompts, blocks, lm_head: layer(1.1), classifier: layer(0.3), aware: AdapterAware }
    }

    fn hidden(&self, x: Tensor<3>) -> Tensor<3> {
        let Block { up, down } = &self.blocks[0];
        self.prompts.passes(|_| linear(down, linear(up, x.clone()).tanh()))
    }
}

/// Adapters of other ranks, scales and places; `down` has the second alone.
fn experts() -> Vec<AdapterFile<LoraConfig>> {
    let expert = |rank: usize, alpha: f64, names: &[&str]| {
        let method = LoraConfig::new(rank, Targets::modules(names.iter().copied())).with_alpha(alpha);
        let model = attach(Twice::new(&Device::flex()), &method, 0).unwrap();
        AdapterFile::collect(&fill_adapter(model), &method).unwrap()
    };
    vec![expert(2, 3.0, &["up"]), expert(3, 2.0, &["up", "down"]), expert(1, 1.0, &["up"])]
}

fn config() -> XLoraConfig {
    XLoraConfig { xlora_size: 5, ..XLoraConfig::new(WIDTH) }
}

fn random(config: XLoraConfig, device: &Device) -> (Twice, XLoraConfig) {
    let (model, method) = config.attach_experts(Twice::new(device), experts(), 0).unwrap();
    (fill_adapter(model), method)
}

fn matrix(file: &AdapterFile<XLoraConfig>, key: &str) -> Vec<Vec<f64>> {
    let values = &file.tensors[key];
    let columns = *values.shape.last().unwrap();
    values.values.chunks(columns).map(|row| row.iter().map(|value| f64::from(*value)).collect()).collect()
}

/// Rows of a file's matrix are outputs.
fn times(matrix: &[Vec<f64>], x: &[f64]) -> Vec<f64> {
    matrix.iter().map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
}

fn softmax(z: &[f64]) -> Vec<f64> {
    let sum: f64 = z.iter().map(|z| z.exp()).sum();
    z.iter().map(|z| z.exp() / sum).collect()
}

/// The formula, by plain loops.
struct Reference<'a> {
    method: &'a XLoraConfig,
    file: AdapterFile<XLoraConfig>,
    base: Twice,
}

impl Reference<'_> {
    /// What becomes of scalings in a layer.
    fn gates(&self, scalings: &[f64]) -> Vec<f64> {
        let rank = |e: usize| {
            let before = |(at, other): (usize, &f64)| *other > scalings[e] || (*other == scalings[e] && at < e);
            scalings.iter().enumerate().filter(|(at, other)| before((*at, other))).count()
        };
        let open = |e: usize| self.method.top_k_lora.is_none_or(|k| rank(e) < k) && scalings[e] != 0.0;
        let kept: Vec<usize> = (0..scalings.len()).filter(|e| open(*e)).collect();
        let mut gates = vec![0.0; scalings.len()];
        let chosen: Vec<f64> = kept.iter().map(|e| scalings[*e]).collect();
        let chosen = if self.method.enable_softmax_topk { softmax(&chosen) } else { chosen };
        kept.iter().zip(chosen).for_each(|(e, gate)| gates[*e] = gate * self.method.global_scaling_weight);
        gates
    }

    fn layer(&self, name: &str, layer: &Linear, x: &[f64], scalings: &[f64]) -> Vec<f64> {
        let weight: Vec<f64> = layer.weight.base().into_data().iter().collect();
        let mut y: Vec<f64> = (0..WIDTH).map(|out| (0..WIDTH).map(|i| x[i] * weight[i * WIDTH + out]).sum()).collect();
        for (e, gate) in self.gates(scalings).into_iter().enumerate() {
            let key = |factor: &str| format!("blocks.0.{name}.experts.{e}.{factor}.weight");
            if self.file.tensors.contains_key(&key("lora_A")) {
                let expert = &self.method.experts[e];
                let update = times(&matrix(&self.file, &key("lora_B")), &times(&matrix(&self.file, &key("lora_A")), x));
                let scale = gate * expert.alpha / expert.rank as f64;
                y.iter_mut().zip(update).for_each(|(y, update)| *y += scale * update);
            }
        }
        y
    }

    /// A pass with scalings by layer.
    fn pass(&self, x: &[f64], scalings: &[Vec<f64>]) -> Vec<f64> {
        let Block { up, down } = &self.base.blocks[0];
        let inner: Vec<f64> = self.layer("up", up, x, &scalings[0]).into_iter().map(f64::tanh).collect();
        self.layer("down", down, &inner, &scalings[1])
    }

    fn output(&self, x: &[f64]) -> Vec<f64> {
        let hidden = self.pass(x, &vec![vec![self.method.scaling_pass_value; 3]; 2]);
        let between = if self.method.xlora_dropout_p > 0.0 { 3 } else { 2 };
        let mut z = hidden;
        for layer in 0..self.method.xlora_depth {
            if layer > 0 {
                z.iter_mut().for_each(|value| *value = value.max(0.0));
            }
            let key = |name: &str| format!("base_model.internal_xlora_classifier.layers.{}.{name}", layer * between);
            let bias = matrix(&self.file, &key("bias")).concat();
            z = times(&matrix(&self.file, &key("weight")), &z).iter().zip(bias).map(|(z, bias)| z + bias).collect();
        }
        let of_layer = |z: &[f64]| {
            let scaled: Vec<f64> = z.iter().map(|z| z / self.method.softmax_temperature).collect();
            if self.method.enable_softmax { softmax(&scaled) } else { z.to_vec() }
        };
        let scalings: Vec<Vec<f64>> = z.chunks(3).map(of_layer).collect();
        let scalings = if scalings.len() == 1 { vec![scalings[0].clone(); 2] } else { scalings };
        self.pass(x, &scalings)
    }
}

#[test]
fn a_model_is_computed_twice_by_the_formula() {
    let cases = [
        config(),
        XLoraConfig { layerwise_scalings: true, softmax_temperature: 0.6, ..config() },
        XLoraConfig { xlora_depth: 2, scaling_pass_value: 0.4, global_scaling_weight: 0.7, ..config() },
        XLoraConfig { xlora_depth: 3, xlora_dropout_p: 0.0, layerwise_scalings: true, ..config() },
        XLoraConfig { top_k_lora: Some(2), enable_softmax: false, layerwise_scalings: true, ..config() },
        XLoraConfig { top_k_lora: Some(2), enable_softmax_topk: true, scaling_pass_value: -0.5, ..config() },
    ];
    for case in cases {
        let device = Device::flex();
        let (model, method) = random(case, &device);
        let found = values(model.hidden(x(&device)));
        let file = AdapterFile::collect(&model, &method).unwrap();
        let reference = Reference { method: &method, file, base: Twice::new(&device) };
        let tokens = values(x(&device));
        let row = |token: &[f32]| reference.output(&token.iter().map(|value| f64::from(*value)).collect::<Vec<_>>());
        let expected: Vec<f32> = tokens.chunks(WIDTH).flat_map(row).map(|value| value as f32).collect();
        near(&found, &expected);
        let plain = values(Twice::new(&device).hidden(x(&device)));
        assert!(found.iter().zip(&plain).any(|(a, b)| (a - b).abs() > 1e-2), "the experts do nothing");
    }
}

/// Names of parameters with a gradient that is not zero.
struct Moved<'a>(&'a GradientsParams, Vec<String>);

impl ParamVisitor for Moved<'_> {
    fn float<const D: usize>(&mut self, at: &PathStack, param: &Param<Tensor<D>>) {
        if self.0.get::<D>(param.id).is_some_and(|grad| values(grad).iter().any(|value| *value != 0.0)) {
            self.1.push(at.path());
        }
    }
}

#[test]
fn the_classifier_is_trained_and_experts_where_they_are_asked_for() {
    let device = Device::flex().autodiff();
    for use_trainable_adapters in [false, true] {
        // What was not learned yet about experts may be in the first pass too.
        let case =
            XLoraConfig { use_trainable_adapters, layerwise_scalings: true, scaling_pass_value: 0.2, ..config() };
        let (model, _) = random(case, &device);
        let grads = GradientsParams::from_grads(model.hidden(x(&device)).square().sum().backward(), &model);
        let mut moved = Moved(&grads, Vec::new());
        visit_params(&model, &mut moved);
        let (of_classifier, others): (Vec<_>, Vec<_>) = moved.1.iter().partition(|name| name.contains("classifier"));
        assert_eq!(of_classifier.len(), 2, "{:?}", moved.1);
        let factors = if use_trainable_adapters { 2 * 4 } else { 0 };
        assert!(others.len() == factors && others.iter().all(|name| name.contains("experts")), "{others:?}");
        let of_experts = if use_trainable_adapters { 2 * WIDTH * (2 + 2 * 3 + 1) } else { 0 };
        assert_eq!(report(&model).trainable, of_experts + 2 * 3 * (WIDTH + 1));
    }
}

/// Experts lie in folders of their own, and are found there wherever the folder goes.
#[test]
fn a_folder_holds_all_of_it() {
    let (device, dir) = (Device::flex(), tempfile::tempdir().unwrap());
    let (model, method) = random(XLoraConfig { xlora_depth: 2, ..config() }, &device);
    let out = dir.path().join("first");
    save_adapter(&model, &method, Some("base"), &out).unwrap();
    let expected = values(model.hidden(x(&device)));
    for (number, expert) in experts().into_iter().enumerate() {
        let found = AdapterFile::<LoraConfig>::read(&out.join(number.to_string())).unwrap();
        assert_eq!((found.method, found.tensors.len()), (expert.method, expert.tensors.len()));
    }
    let moved = dir.path().join("second");
    std::fs::rename(&out, &moved).unwrap();
    let load = || -> peft_core::Result<_> {
        let (model, read) = load_adapter::<_, XLoraConfig>(Twice::new(&device), &moved)?;
        Ok((values(model.hidden(x(&device))), read.experts))
    };
    assert_eq!(load().unwrap(), (expected.clone(), method.experts.clone()));
    // Others where the file says, as those of the original of a copy.
    for (number, mut expert) in experts().into_iter().enumerate() {
        expert.tensors.values_mut().for_each(|tensor| tensor.values.fill(0.5));
        expert.write(&out.join(number.to_string())).unwrap();
    }
    assert_eq!(load().unwrap(), (expected, method.experts));
    std::fs::remove_dir_all(&out).unwrap();
    std::fs::remove_dir_all(moved.join("1")).unwrap();
    let error = load().map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("adapters.1"), "{error}");
}

#[test]
fn what_does_not_fit_is_refused() {
    let refused = |config: XLoraConfig, experts: Vec<AdapterFile<LoraConfig>>, with: &str| {
        let error = config.attach_experts(Twice::new(&Device::flex()), experts, 0).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains(with), "{error}");
    };
    refused(config(), Vec::new(), "adapters");
    refused(XLoraConfig { top_k_lora: Some(4), ..config() }, experts(), "at least 4");
    refused(XLoraConfig { hidden_size: 7, ..config() }, experts(), "hidden_size");
    refused(XLoraConfig { softmax_temperature: 0.0, ..config() }, experts(), "softmax_temperature");
    for xlora_depth in [0, 65, usize::MAX] {
        refused(XLoraConfig { xlora_depth, ..config() }, experts(), "xlora_depth");
    }
    for name in ["lm_head", "classifier"] {
        let head = LoraConfig::new(2, Targets::modules([name]));
        let model = attach(Twice::new(&Device::flex()), &head, 0).unwrap();
        refused(config(), vec![AdapterFile::collect(&model, &head).unwrap()], "outside of the model's passes");
    }
    let mut whole = experts();
    let extra = whole[0].tensors.values().next().unwrap().clone();
    whole[0].tensors.insert("down.weight".to_owned(), extra);
    refused(config(), whole, "down.weight");
    let mut gated = experts();
    gated[1].method.use_gating = true;
    refused(config(), gated, "use_gating");
    // A model without the place.
    let method = LoraConfig::new(2, Targets::modules(["proj"]));
    let expert = file(&crate::mixtures::random(&method), &method);
    let error = config().attach_experts(base(&Device::flex()), vec![expert], 0).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("Prompts"), "{error}");
}
