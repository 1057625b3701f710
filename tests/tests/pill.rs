//! PILL in whole models: its formula, what each token meets, how images come in, what is trained, files, what is refused.

mod reference;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use burn::module::Module;
use burn::nn::{Linear, LinearConfig, RmsNorm, RmsNormConfig};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Int, Tensor, TensorData};
use peft_core::Modality::{self, Image, Text};
use peft_core::files::{CONFIG_FILE, TENSOR_FILE};
use peft_core::{
    AdapterAware, AdapterFile, Error, Modalities, ParamVisitor, Peft as _, Problem, Strictness, Targets,
    for_modalities, load_adapter, merge, save_adapter, visit_params,
};
use peft_models::config::{LlamaConfig, ModelConfig};
use peft_models::load::{Packing, Precision};
use peft_models::{CausalLm, Layout, ModelSource, Pretrained, Sampling, generate};
use peft_moe::{FeatureConfig, PillConfig};
use peft_testkit::{Matrix, difference, fill_adapter};
use reference::{State, rows};

use crate::golden::{BOUND, deviation, model, testdata};

/// Two rows: an image before text, and one behind its first token.
const TOKENS: [[Modality; 6]; 2] = [[Image, Image, Text, Text, Text, Text], [Text, Image, Image, Text, Text, Text]];
const IDS: [[i64; 6]; 2] = [[0, 0, 3, 14, 15, 9], [7, 0, 0, 20, 5, 1]];
/// Features of an image, each of that width.
const FEATURES: FeatureConfig = FeatureConfig { width: 5, hidden: Some(4) };

fn ids(device: &Device) -> Tensor<2, Int> {
    Tensor::from_data(TensorData::new(IDS.concat(), [2, 6]), device)
}

fn batch() -> Modalities {
    Modalities::new(TOKENS.map(|row| row.to_vec()).to_vec())
}

fn features(device: &Device) -> Tensor<3> {
    let values: Vec<f32> = (0..2 * 2 * 5).map(|i| (0.7 * i as f32).sin()).collect();
    Tensor::from_data(TensorData::new(values, [2, 2, 5]), device)
}

fn random(base: &str, method: &PillConfig) -> CausalLm {
    fill_adapter(model(base).attach(method).unwrap())
}

fn hidden(model: &CausalLm) -> Vec<f32> {
    model.hidden(ids(&Device::flex()), Layout::Rows, None).into_data().iter().collect()
}

/// Hidden states of the fixed batch, without features.
fn mixed(model: &CausalLm) -> Vec<f32> {
    for_modalities(batch(), || hidden(model))
}

const BASES: [&str; 5] = ["llama", "llama_bias", "mistral_sliding", "qwen3", "gpt2"];

/// Bit for bit: gates act on images alone, and without them nothing acts.
#[test]
fn a_new_adapter_is_the_identity() {
    for base in BASES {
        let plain = hidden(&model(base));
        let fresh = model(base).attach(&PillConfig::decoder(4)).unwrap();
        assert_eq!(hidden(&fresh), plain, "{base}: text");
        let text = Modalities::new(vec![vec![Text; 6]; 2]);
        assert_eq!(for_modalities(text, || hidden(&fresh)), plain, "{base}: text by name");
        assert_eq!(mixed(&model(base).attach(&PillConfig::decoder(4).without_gate()).unwrap()), plain, "{base}: open");
        assert!(deviation(&mixed(&fresh), &plain) > 1e-4, "{base}: a closed gate takes something away");
        assert!(deviation(&mixed(&random(base, &PillConfig::decoder(4))), &mixed(&fresh)) > 1e-3, "{base}");
    }
}

fn shape(model: &CausalLm) -> LlamaConfig {
    match model.config() {
        ModelConfig::Llama(config) => config,
        ModelConfig::Gpt2(_) => panic!("no Llama"),
    }
}

/// Hidden states of the fixed batch by the formula in double precision.
fn expected(state: &State, config: &LlamaConfig) -> Vec<f64> {
    let table = rows(&state.0["model.embed_tokens.weight"]);
    let features: Vec<f64> = features(&Device::flex()).into_data().iter().collect();
    let row = |at: usize| {
        let image = state.projected(&Matrix::new(2, 5, features[at * 10..][..10].to_vec()).unwrap());
        let mut image = rows(&image).into_iter();
        let embedded = IDS[at].iter().zip(TOKENS[at]).flat_map(|(id, token)| match token {
            Image => image.next().unwrap(),
            Text => table[*id as usize].clone(),
        });
        let x = Matrix::new(6, config.hidden_size, embedded.collect()).unwrap();
        state.hidden(config, x, &TOKENS[at]).values().to_vec()
    };
    [row(0), row(1)].concat()
}

#[test]
fn a_model_computes_the_formula() {
    for (base, device) in [("llama", Device::flex()), ("llama", ndarray()), ("mistral", Device::flex())] {
        let method = PillConfig::decoder(4).with_features(FEATURES);
        let adapted = calm(random(base, &method), &method).to_device(&device);
        let found = for_modalities(batch().with_features(features(&device)), || {
            adapted.hidden(ids(&device), Layout::Rows, None)
        });
        let expected = expected(&State::of(&adapted), &shape(&adapted));
        let found: Vec<f64> = found.into_data().iter().collect();
        let largest = expected.iter().map(|value| value.abs()).fold(0.0, f64::max);
        let off = difference(&found, &expected) / largest;
        assert!(off < 2e-5, "{base}: {off} of {largest}");
    }
}

#[allow(deprecated, reason = "a backend that is supported as long as Burn has it")]
fn ndarray() -> Device {
    Device::ndarray()
}

/// Of a weighted sum of hidden states: gradients are those of the formula, by differences, in every tensor of PILL and nowhere else.
#[test]
fn gradients_are_those_of_the_formula() {
    let device = Device::flex().autodiff();
    let method = PillConfig::decoder(4).with_features(FEATURES);
    let adapted = calm(fill_adapter(model("llama").train().attach(&method).unwrap()), &method);
    let found =
        for_modalities(batch().with_features(features(&device)), || adapted.hidden(ids(&device), Layout::Rows, None));
    let weights: Vec<f32> = (0..2 * 6 * 32).map(|i| (1.3 * i as f32).cos()).collect();
    let weighed = Tensor::<3>::from_data(TensorData::new(weights.clone(), [2, 6, 32]), &device);
    let gradients = GradientsParams::from_grads((found * weighed).sum().backward(), &adapted);
    let (state, config) = (State::of(&adapted), shape(&adapted));
    let loss = |state: &State| -> f64 {
        expected(state, &config).iter().zip(&weights).map(|(value, weight)| value * f64::from(*weight)).sum()
    };
    let gradients = read(&adapted, &gradients);
    let own: Vec<&String> = state.0.keys().filter(|name| name.contains(':')).collect();
    assert_eq!(gradients.keys().collect::<Vec<_>>(), own, "what is trained");
    assert_eq!(own.len(), 2 * (3 + 6 + 1) + 3);
    for (name, found) in &gradients {
        let largest = found.iter().map(|value| value.abs()).fold(0.0, f64::max);
        assert!(largest > 1e-4, "{name}: {largest}");
        for at in [0, found.len() / 2, found.len() - 1] {
            let moved = |by: f64| {
                let (mut state, matrix) = (state.clone(), &state.0[name]);
                let mut values = matrix.values().to_vec();
                values[at] += by;
                state.0.insert(name.clone(), Matrix::new(matrix.rows(), matrix.columns(), values).unwrap());
                loss(&state)
            };
            let slope = (moved(1e-4) - moved(-1e-4)) / 2e-4;
            assert!((slope - found[at]).abs() < 1e-3 * largest.max(0.1), "{name} {at}: {slope}, found {}", found[at]);
        }
    }
}

/// Gradients by `path:field`.
fn read(model: &CausalLm, gradients: &GradientsParams) -> BTreeMap<String, Vec<f64>> {
    struct Read<'a>(&'a GradientsParams, BTreeMap<String, Vec<f64>>);
    impl ParamVisitor for Read<'_> {
        fn float<const D: usize>(&mut self, at: &peft_core::PathStack, param: &burn::module::Param<Tensor<D>>) {
            let location = at.locate();
            if let Some(gradient) = self.0.get::<D>(param.id) {
                let name = format!("{}:{}", location.module, location.field.unwrap_or(location.param));
                self.1.insert(name, gradient.into_data().iter().collect());
            }
        }
    }
    let mut read = Read(gradients, BTreeMap::new());
    visit_params(model, &mut read);
    read.1
}

/// The same adapter with each tensor whose key holds `part` made anew.
fn changed(model: &CausalLm, method: &PillConfig, part: &str, f: impl Fn(f32) -> f32) -> CausalLm {
    let mut file = AdapterFile::collect(model, method).unwrap();
    let of_part = file.tensors.iter_mut().filter(|(key, _)| key.contains(part));
    let count = of_part.map(|(_, tensor)| tensor.values.iter_mut().for_each(|value| *value = f(*value))).count();
    assert!(count > 0, "{part}");
    file.fill(model.clone(), Path::new("changed"), Strictness::default()).unwrap()
}

/// Smaller values, with which a model in f32 is near one in double precision.
fn calm(model: CausalLm, method: &PillConfig) -> CausalLm {
    changed(&model, method, "pill_", |value| 0.3 * value)
}

/// Not even a value that is no number comes through from what is for the other modality.
#[test]
fn a_token_meets_nothing_that_is_for_the_other_modality() {
    for base in ["llama", "gpt2"] {
        let method = PillConfig::decoder(4);
        let adapted = random(base, &method);
        let lost = |part: &str| changed(&adapted, &method, part, |_| f32::NAN);
        for part in ["pill_image", "pill_gate"] {
            assert_eq!(hidden(&lost(part)), hidden(&adapted), "{base}: {part} on text");
        }
        let images = || Modalities::new(vec![vec![Image; 6]; 2]);
        let found = for_modalities(images(), || hidden(&lost("pill_text")));
        assert_eq!(found, for_modalities(images(), || hidden(&adapted)), "{base}: text on images");
        // In one batch: the image that stands before all text, and the text that stands before all images.
        let other = |part: &str| mixed(&changed(&adapted, &method, part, |value| value + 1.0));
        let (plain, without_text, without_images) = (mixed(&adapted), other("pill_text"), other("pill_image"));
        let width = plain.len() / 12;
        let token = |of: &[f32], at: usize| of[at * width..(at + 1) * width].to_vec();
        for image in [0, 1] {
            assert_eq!(token(&without_text, image), token(&plain, image), "{base}: an image beside text");
            assert_ne!(token(&without_images, image), token(&plain, image), "{base}: an image meets its expert");
        }
        assert_eq!(token(&without_images, 6), token(&plain, 6), "{base}: text beside an image");
        assert_ne!(token(&without_text, 6), token(&plain, 6), "{base}: text meets its expert");
    }
}

/// Experts of one modality alone are one adapter, whichever of the two it is.
#[test]
fn a_mask_of_one_modality_is_the_single_adapter() {
    let method = PillConfig::decoder(4).without_gate();
    let adapted = random("llama", &method);
    let mut file = AdapterFile::collect(&adapted, &method).unwrap();
    let other = |key: &str| {
        let [from, to] =
            if key.contains("pill_text") { ["pill_text", "pill_image"] } else { ["pill_image", "pill_text"] };
        key.replace(from, to)
    };
    file.tensors = file.tensors.iter().map(|(key, values)| (other(key), values.clone())).collect();
    let swapped = file.fill(adapted.clone(), Path::new("swapped"), Strictness::default()).unwrap();
    let of = |token| Modalities::new(vec![vec![token; 6]; 2]);
    assert_eq!(for_modalities(of(Image), || hidden(&adapted)), for_modalities(of(Text), || hidden(&swapped)));
    assert_eq!(for_modalities(of(Image), || hidden(&swapped)), hidden(&adapted));
    assert!(deviation(&hidden(&swapped), &hidden(&adapted)) > 1e-3);
}

/// Features that are projected onto the embeddings of tokens are these tokens, wherever they stand.
#[test]
fn features_take_the_places_of_image_tokens() {
    for base in ["llama", "qwen2", "gpt2"] {
        let plain = model(base);
        let device = Device::flex();
        let chosen = Tensor::<2, Int>::from_data(TensorData::new(vec![11_i64, 12, 13, 2], [1, 4]), &device);
        let rows: Vec<f32> = plain.embed(chosen).into_data().iter().collect();
        let width = rows.len() / 4;
        let method = PillConfig::decoder(4).without_gate().with_features(FeatureConfig { width: 4, hidden: None });
        let adapted = plain.clone().attach(&method).unwrap();
        let mut file = AdapterFile::collect(&adapted, &method).unwrap();
        let key = file.tensors.keys().find(|key| key.ends_with("pill_projector.weight")).unwrap().clone();
        let columns = (0..width).flat_map(|column| (0..4).map(move |row| row * width + column));
        file.tensors.get_mut(&key).unwrap().values = columns.map(|at| rows[at]).collect();
        let adapted = file.fill(adapted, Path::new("embeddings"), Strictness::default()).unwrap();
        // 11, 12 and 13, 2.
        let hot: Vec<f32> = (0..16).map(|at| f32::from(u8::from(at / 4 == at % 4))).collect();
        let features = Tensor::<3>::from_data(TensorData::new(hot, [2, 2, 4]), &device);
        let found = for_modalities(batch().with_features(features), || hidden(&adapted));
        let ids = vec![11_i64, 12, 3, 14, 15, 9, 7, 13, 2, 20, 5, 1];
        let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [2, 6]), &device);
        let expected: Vec<f32> = plain.hidden(ids, Layout::Rows, None).into_data().iter().collect();
        let off = deviation(&found, &expected);
        assert!(off < 1e-5, "{base}: {off}");
    }
}

/// Behind a cache, token by token, a model says what it says of image and text at once.
#[test]
fn generation_is_that_of_the_whole_sequence() {
    for base in ["llama", "gpt2"] {
        let device = Device::flex();
        let adapted = random(base, &PillConfig::decoder(4).with_features(FEATURES));
        let of_image = |seq: usize| {
            let tokens = (0..seq).map(|at| if at < 2 { Image } else { Text }).collect();
            Modalities::new(vec![tokens]).with_features(features(&device).narrow(0, 0, 1))
        };
        let mut text: Vec<u32> = vec![0, 0, 3, 14];
        let found = for_modalities(of_image(4), || {
            generate(&adapted, &text, 10, Sampling::default(), &[], &device, |_| true).unwrap()
        });
        for token in found {
            let ids = text.iter().map(|id| i64::from(*id)).collect();
            let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, text.len()]), &device);
            let last = for_modalities(of_image(text.len()), || adapted.forward(ids)).narrow(1, text.len() - 1, 1);
            assert_eq!(last.argmax(2).into_scalar::<i64>(), i64::from(token), "{base} behind {text:?}");
            text.push(token);
        }
    }
}

/// Gates and experts act over packed projections as over the same ones unpacked.
#[test]
fn packed_bases_carry_it() {
    for base in ["llama_nf4", "gpt2_nf4"] {
        let source = ModelSource::Dir(testdata().join("bnb").join(base));
        let [packed, dense] = [Packing::AsStored, Packing::Dense].map(|packing| {
            let loaded = Pretrained::load_with(&source, &packing, Precision::F32, &Device::flex()).unwrap();
            mixed(&fill_adapter(loaded.model.attach(&PillConfig::decoder(4)).unwrap()))
        });
        let off = deviation(&packed, &dense);
        assert!(off < BOUND, "{base}: {off}");
    }
}

#[test]
fn files_hold_the_adapter_under_the_documented_keys() {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let method = PillConfig::decoder(4).with_features(FEATURES);
    let adapted = random("llama", &method);
    save_adapter(&adapted, &method, Some("somewhere"), first.path()).unwrap();
    let (loaded, read) = load_adapter::<_, PillConfig>(model("llama"), first.path()).unwrap();
    assert_eq!(read, method);
    assert_eq!(mixed(&loaded), mixed(&adapted));
    save_adapter(&loaded, &read, Some("somewhere"), second.path()).unwrap();
    for name in [CONFIG_FILE, TENSOR_FILE] {
        let bytes = |dir: &Path| std::fs::read(dir.join(name)).unwrap();
        assert_eq!(bytes(first.path()), bytes(second.path()), "{name}");
    }
    let tensors = peft_core::files::read_values(&first.path().join(TENSOR_FILE)).unwrap();
    let shape = |key: &str| tensors[&format!("base_model.model.model.{key}")].shape.clone();
    assert_eq!(shape("layers.1.input_layernorm.pill_shared.down_proj.weight"), [4, 32]);
    assert_eq!(shape("layers.1.post_attention_layernorm.pill_text.gate_proj.weight"), [4, 32]);
    assert_eq!(shape("layers.1.post_attention_layernorm.pill_image.up_proj.weight"), [32, 4]);
    assert_eq!(shape("layers.0.self_attn.v_proj.pill_gate.weight"), [2, 32]);
    assert_eq!(shape("prompts.pill_projector.weight"), [32, 4]);
    assert_eq!(shape("prompts.pill_projector.hidden.weight"), [4, 5]);
    assert_eq!(shape("prompts.pill_projector.hidden.bias"), [4]);
    assert_eq!(tensors.len(), 2 * (3 + 6 + 1) + 3);
}

#[derive(Module, Debug)]
struct Layers {
    v_proj: Linear,
    input_layernorm: Option<RmsNorm>,
    aware: AdapterAware,
}

fn layers(normed: bool) -> Layers {
    let device = Device::flex();
    let input_layernorm = normed.then(|| RmsNormConfig::new(8).init(&device));
    Layers { v_proj: LinearConfig::new(8, 8).init(&device), input_layernorm, aware: AdapterAware }
}

#[test]
fn what_does_not_fit_is_refused() {
    let problem = |error: Error| match error {
        Error::Attach { problems, .. } => problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n"),
        other => panic!("expected problems, found {other}"),
    };
    let method = PillConfig::decoder(4);
    let found = problem(model("llama").attach(&PillConfig::new(4, Targets::modules(["nrom"]))).unwrap_err());
    assert!(found.contains("matches no layer"), "{found}");
    let found = problem(layers(false).attach(&method).unwrap_err());
    assert!(found.contains("matches no norm"), "{found}");
    let found = problem(model("llama").attach(&PillConfig::new(4, Targets::modules(["input_layernorm"]))).unwrap_err());
    assert!(found.contains("`gate` to false"), "{found}");
    let latent = ModelSource::Dir(testdata().join("models-moe/deepseek_v2"));
    let latent = Pretrained::load(&latent, &Device::flex()).unwrap().model;
    let found = problem(latent.attach(&method).unwrap_err());
    assert!(found.contains("`gate` to false"), "latent attention has no layer of values alone: {found}");
    let found = problem(layers(true).attach(&method.clone().with_features(FEATURES)).unwrap_err());
    assert!(found.contains("place for features"), "{found}");
    // It has no field that says how many heads it has.
    let config = |error: Error, field: &str, expected: &str| match &error {
        Error::Config { field: found, .. } if found == field => {
            assert!(error.to_string().contains(expected), "{error}");
        }
        _ => panic!("expected a wrong {field}, found {error}"),
    };
    config(layers(true).attach(&method).unwrap_err(), "target_modules", "how many heads");
    let all = PillConfig::new(4, Targets::modules(["input_layernorm", "q_proj"]));
    config(model("llama").attach(&all).unwrap_err(), "target_modules", "q_proj with 32 outputs");
    config(model("llama").attach(&PillConfig::decoder(0)).unwrap_err(), "adapter_dim", "at least 1");
    let nothing = FeatureConfig { width: 0, hidden: None };
    config(model("llama").attach(&method.clone().with_features(nothing)).unwrap_err(), "features", "at least 1");

    let error = merge(model("llama").attach(&method).unwrap(), &method).unwrap_err();
    assert!(matches!(&error, Error::Merge { problems } if problems.len() == 2 * 3), "{error}");
    let error = problem(model("llama").attach(&method).unwrap().attach(&method).unwrap_err());
    assert!(error.contains("is adapted already"), "{error}");
}

/// A model without a projector does not go on as if it had seen an image, nor one whose image tokens are not as many as the features.
#[test]
fn features_that_nothing_reads_are_no_silent_matter() {
    let read = |method: &PillConfig, count: usize| {
        let adapted = random("llama", method);
        let features = features(&Device::flex()).narrow(1, 0, count);
        let pass = || for_modalities(batch().with_features(features), || hidden(&adapted));
        catch_unwind(AssertUnwindSafe(pass)).is_ok()
    };
    assert!(read(&PillConfig::decoder(4).with_features(FEATURES), 2));
    assert!(!read(&PillConfig::decoder(4).with_features(FEATURES), 1));
    assert!(!read(&PillConfig::decoder(4), 2));
}
