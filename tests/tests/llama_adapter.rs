//! LLaMA-Adapter: equality with PEFT, files both ways, its formula, what is trained, what is refused.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Int, Tensor, TensorData};
use peft_core::files::{CONFIG_FILE, TENSOR_FILE};
use peft_core::{
    Attended, Error, Named, ParamMapper, ParamVisitor, PathStack, Peft as _, Problem, load_adapter, map_params, merge,
    save_adapter, visit_params,
};
use peft_models::load::{Packing, Precision};
use peft_models::{CausalLm, ModelSource, Pretrained, Sampling, generate};
use peft_prompt::LlamaAdapterConfig;
use peft_testkit::fill_adapter;
use serde_json::Value;

use crate::encoders::encoder;
use crate::golden::{BOUND, deviation, floats, ints, model, testdata};
use crate::prompts::written;

const CASES: [(&str, &str); 4] = [
    ("llama", "adaption_prompt"),
    ("llama", "adaption_prompt_all"),
    ("llama_bias", "adaption_prompt"),
    ("gpt2", "adaption_prompt"),
];

fn ids() -> Tensor<2, Int> {
    let (shape, tokens) = ints(&testdata().join("prompts/inputs.safetensors"), "tokens");
    Tensor::from_data(TensorData::new(tokens, shape), &Device::flex())
}

fn logits(model: &CausalLm) -> Vec<f32> {
    model.forward(ids()).into_data().iter().collect()
}

fn json(dir: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(dir.join(CONFIG_FILE)).unwrap()).unwrap()
}

#[test]
fn adapters_of_peft_give_its_logits_and_go_back() {
    for (base, case) in CASES {
        let dir = testdata().join("prompts").join(base).join(case);
        let (adapted, method) = load_adapter::<_, LlamaAdapterConfig>(model(base), &dir).unwrap();
        let found: Vec<f32> = adapted.forward(ids()).narrow(2, 0, 16).into_data().iter().collect();
        let off = deviation(&found, &floats(&dir.join("logits.safetensors"), "logits"));
        assert!(off < BOUND, "{base}/{case}: {off}");
        let scratch = tempfile::tempdir().unwrap();
        let out = written(&format!("{base}/{case}"), scratch.path());
        save_adapter(&adapted, &method, None, &out).unwrap();
        let bytes = |dir: &Path| std::fs::read(dir.join(TENSOR_FILE)).unwrap();
        assert_eq!(bytes(&out), bytes(&dir), "{base}/{case}");
        for field in ["peft_type", "task_type", "adapter_len", "adapter_layers", "target_modules"] {
            assert_eq!(json(&out)[field], json(&dir)[field], "{base}/{case}: {field}");
        }
    }
}

/// Bit for bit, where the output projection has no bias: heads times their width may differ from the width of the model, and keys may be normed.
#[test]
fn a_new_adapter_is_the_identity() {
    for base in ["llama", "llama3_rope", "mistral_sliding", "qwen2", "qwen3", "gpt2"] {
        let (plain, method) = (model(base), LlamaAdapterConfig::new(4, 2));
        let adapted = plain.clone().attach(&method).unwrap();
        assert_eq!(logits(&adapted), logits(&plain), "{base}");
        assert!(deviation(&logits(&fill_adapter(adapted)), &logits(&plain)) > 1e-3, "{base}: nothing is added");
    }
    // The bias of the output projection is added twice.
    let plain = model("llama_bias");
    let adapted = plain.clone().attach(&LlamaAdapterConfig::new(4, 2)).unwrap();
    assert!(deviation(&logits(&adapted), &logits(&plain)) > 1e-3);
}

#[derive(Module, Debug)]
struct Attention {
    attended: Named<Attended>,
}

#[derive(Module, Debug)]
struct Layer {
    self_attn: Attention,
}

/// `g · softmax(q·Kᵀ/√d)·V` of each query alone, in double precision.
#[test]
fn what_is_added_is_the_formula() {
    let ([rows, heads, kv_heads, d, n, width], device) = ([5, 4, 2, 3, 4, 7], Device::flex());
    let layer = Layer { self_attn: Attention { attended: Attended::new(width, &device) } };
    let layer = fill_adapter(layer.attach(&LlamaAdapterConfig::new(n, 1)).unwrap());
    let wave = |count: usize, step: f32| (0..count).map(|i| (step * i as f32).sin()).collect::<Vec<_>>();
    let (q, k, v) = (wave(rows * heads * d, 0.7), wave(width * kv_heads * d, 1.3), wave(width * kv_heads * d, 2.1));
    let tensor =
        |values: &[f32], shape: [usize; 2]| Tensor::<2>::from_data(TensorData::new(values.to_vec(), shape), &device);
    let project = |x: Tensor<3>| {
        let x = x.reshape([n, width]);
        let by = |w: &[f32]| x.clone().matmul(tensor(w, [width, kv_heads * d])).reshape([1, n, kv_heads, d]);
        (by(&k), by(&v))
    };
    let queries = tensor(&q, [rows, heads * d]).reshape([1, rows, heads, d]);
    let found = layer.self_attn.attended.beside(&queries, &project).unwrap();
    let found: Vec<f64> = found.into_data().iter().collect();

    let state = values(&layer);
    let (prompt, gate) = (&state["self_attn:prompt"], state["self_attn:gate"][0]);
    let projected = |w: &[f32], token: usize, at: usize| -> f64 {
        (0..width).map(|i| prompt[token * width + i] * f64::from(w[i * kv_heads * d + at])).sum()
    };
    for (row, head) in (0..rows).flat_map(|row| (0..heads).map(move |head| (row, head))) {
        let kv = head / (heads / kv_heads) * d;
        let score = |token| -> f64 {
            let product = |i| f64::from(q[(row * heads + head) * d + i]) * projected(&k, token, kv + i);
            ((0..d).map(product).sum::<f64>() / (d as f64).sqrt()).exp()
        };
        let sum: f64 = (0..n).map(score).sum();
        for i in 0..d {
            let read: f64 = (0..n).map(|token| score(token) / sum * projected(&v, token, kv + i)).sum();
            let off = (found[(row * heads + head) * d + i] - gate * read).abs();
            assert!(off < 1e-5, "row {row}, head {head}: {off}");
        }
    }
}

/// Values of adapters by `path:field`.
fn values<T: Module>(module: &T) -> BTreeMap<String, Vec<f64>> {
    let mut read = Read { gradients: None, values: BTreeMap::new() };
    visit_params(module, &mut read);
    read.values
}

struct Read<'a> {
    gradients: Option<&'a GradientsParams>,
    values: BTreeMap<String, Vec<f64>>,
}

impl ParamVisitor for Read<'_> {
    fn float<const D: usize>(&mut self, at: &PathStack, param: &Param<Tensor<D>>) {
        let location = at.locate();
        let read = match self.gradients {
            Some(gradients) => gradients.get::<D>(param.id),
            None => location.field.as_ref().map(|_| param.base()),
        };
        if let Some(read) = read {
            let name = format!("{}:{}", location.module, location.field.unwrap_or(location.param));
            self.values.insert(name, read.into_data().iter().collect());
        }
    }
}

/// Only the prompts and gates of the last layers have gradients, and while the gate is closed it alone moves.
#[test]
fn the_last_layers_alone_are_trained() {
    for (base, path) in [("llama", "model.layers.1.self_attn"), ("gpt2", "transformer.h.1.attn")] {
        let method = LlamaAdapterConfig::new(3, 1);
        let fresh = model(base).train().attach(&method).unwrap();
        let ids = ids().to_device(&Device::flex().autodiff());
        let width = fresh.embed(ids.clone()).dims()[2];
        assert_eq!(fresh.trainable().trainable, 3 * width + 1);
        for (adapted, prompt_moves) in [(fresh.clone(), false), (fill_adapter(fresh), true)] {
            let loss = adapted.forward(ids.clone()).powi_scalar(2).mean();
            let gradients = GradientsParams::from_grads(loss.backward(), &adapted);
            let mut read = Read { gradients: Some(&gradients), values: BTreeMap::new() };
            visit_params(&adapted, &mut read);
            let moves = |field: &str| read.values[&format!("{path}:{field}")].iter().any(|value| *value != 0.0);
            assert_eq!(read.values.len(), 2, "{base}: {:?}", read.values.keys());
            assert!(moves("gate") && moves("prompt") == prompt_moves, "{base}");
        }
    }
}

/// Behind a cache, token by token, a model says what it says of the whole text.
#[test]
fn generation_is_that_of_the_whole_text() {
    for base in ["llama", "mistral_sliding", "gpt2"] {
        let adapted = fill_adapter(model(base).attach(&LlamaAdapterConfig::new(4, 2)).unwrap());
        let mut text = vec![3, 14, 15, 9];
        let found = generate(&adapted, &text, 12, Sampling::default(), &[], &Device::flex(), |_| true).unwrap();
        for token in &found {
            let ids = text.iter().map(|id| i64::from(*id)).collect();
            let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, text.len()]), &Device::flex());
            let last = adapted.forward(ids).narrow(1, text.len() - 1, 1);
            assert_eq!(last.argmax(2).into_scalar::<i64>(), i64::from(*token), "{base} behind {text:?}");
            text.push(*token);
        }
    }
}

/// Prompts go through packed projections as through the same ones unpacked.
#[test]
fn packed_bases_carry_it() {
    for base in ["llama_nf4", "gpt2_nf4"] {
        let source = ModelSource::Dir(testdata().join("bnb").join(base));
        let [packed, dense] = [Packing::AsStored, Packing::Dense].map(|packing| {
            let loaded = Pretrained::load_with(&source, &packing, Precision::F32, &Device::flex()).unwrap();
            logits(&fill_adapter(loaded.model.attach(&LlamaAdapterConfig::new(4, 1)).unwrap()))
        });
        let off = deviation(&packed, &dense);
        assert!(off < BOUND, "{base}: {off}");
    }
}

/// In order of the model, where the tenth layer is not behind the first.
#[test]
fn the_last_of_many_layers_are_the_last() {
    let device = Device::flex();
    let layer = |_| Layer { self_attn: Attention { attended: Attended::new(4, &device) } };
    let layers: Vec<Layer> = (0..12).map(layer).collect();
    let layers = layers.attach(&LlamaAdapterConfig::new(1, 3)).unwrap();
    let paths: Vec<String> = values(&layers).into_keys().filter(|key| key.ends_with(":gate")).collect();
    assert_eq!(paths, ["10.self_attn:gate", "11.self_attn:gate", "9.self_attn:gate"]);
}

/// A saved adapter is the same to the bit when it is loaded and saved again.
#[test]
fn saving_keeps_every_bit() {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let method = LlamaAdapterConfig::new(4, 1);
    let adapted = fill_adapter(model("qwen3").attach(&method).unwrap());
    save_adapter(&adapted, &method, Some("somewhere"), first.path()).unwrap();
    let (loaded, read) = load_adapter::<_, LlamaAdapterConfig>(model("qwen3"), first.path()).unwrap();
    assert_eq!((logits(&loaded), &read), (logits(&adapted), &method));
    save_adapter(&loaded, &read, Some("somewhere"), second.path()).unwrap();
    for name in [CONFIG_FILE, TENSOR_FILE] {
        let bytes = |dir: &Path| std::fs::read(dir.join(name)).unwrap();
        assert_eq!(bytes(first.path()), bytes(second.path()), "{name}");
    }
    // What the model itself holds is as it was, under the same names.
    let names = |model: &CausalLm| {
        let mut names = Names(Vec::new());
        map_params(model.clone(), &mut names);
        names.0
    };
    let fields = |name: &String| name.contains("llama_adapter");
    let (own, added): (Vec<_>, Vec<_>) = names(&adapted).into_iter().partition(|name| !fields(name));
    assert_eq!((own, added.len()), (names(&model("qwen3")), 2));
}

struct Names(Vec<String>);

impl ParamMapper for Names {
    fn float<const D: usize>(&mut self, at: &PathStack, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        self.0.push(at.path());
        param
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let config = |error: Error, field: &str, expected: &str| match &error {
        Error::Config { field: found, .. } if found == field => {
            assert!(error.to_string().contains(expected), "{error}");
        }
        _ => panic!("expected a wrong {field}, found {error}"),
    };
    let refused = |method| model("llama").attach(&method).unwrap_err();
    config(refused(LlamaAdapterConfig::new(0, 1)), "adapter_len", "at least 1");
    config(refused(LlamaAdapterConfig::new(4, 0)), "adapter_layers", "at least 1");
    config(refused(LlamaAdapterConfig::new(4, 3)), "adapter_layers", "at most the 2 layers");
    let problems = |error| match error {
        Error::Attach { problems, .. } => problems,
        other => panic!("expected problems, found {other}"),
    };
    let of = |name: &str| problems(refused(LlamaAdapterConfig::new(4, 2).with_attention(name)));
    assert!(matches!(&of("attention")[..], [Problem::NoMatch { .. }]));
    assert!(matches!(&of("q_proj")[..], [Problem::Kind { .. }, Problem::Kind { .. }]));
    assert!(matches!(&of("attn")[..], [Problem::NoMatch { .. }]), "a part of a name is no name");
    let found = problems(encoder("bert_seqcls").attach(&LlamaAdapterConfig::new(4, 2)).unwrap_err());
    assert!(matches!(&found[..], [Problem::NoPlace { .. }]), "{found:?}");
    assert!(found[0].to_string().contains("Attended"), "{}", found[0]);

    let method = LlamaAdapterConfig::new(4, 2);
    let error = merge(model("llama").attach(&method).unwrap(), &method).unwrap_err();
    assert!(matches!(&error, Error::Merge { problems } if problems.len() == 2), "{error}");
    assert!(error.to_string().contains("no part of any weight"), "{error}");
    let error = model("llama").attach(&method).unwrap().attach(&method).unwrap_err();
    assert!(matches!(&problems(error)[0], Problem::AlreadyAdapted { path } if path == "model.layers.0.self_attn"));

    let dir = tempfile::tempdir().unwrap();
    save_adapter(&model("llama").attach(&method).unwrap(), &method, None, dir.path()).unwrap();
    let mut file = json(dir.path());
    file.as_object_mut().unwrap().remove("adapter_len");
    std::fs::write(dir.path().join(CONFIG_FILE), file.to_string()).unwrap();
    let error = load_adapter::<_, LlamaAdapterConfig>(model("llama"), dir.path()).unwrap_err();
    assert!(error.to_string().contains("adapter_len"), "{error}");
    // An adapter of more layers than its file has.
    let dir = testdata().join("prompts/llama/adaption_prompt");
    let copy = tempfile::tempdir().unwrap();
    let mut file = json(&dir);
    file["adapter_layers"] = 2.into();
    std::fs::write(copy.path().join(CONFIG_FILE), file.to_string()).unwrap();
    std::fs::copy(dir.join(TENSOR_FILE), copy.path().join(TENSOR_FILE)).unwrap();
    match load_adapter::<_, LlamaAdapterConfig>(model("llama"), copy.path()) {
        Err(Error::Tensors { problems, .. }) => {
            assert!(matches!(&problems[..], [Problem::Missing { .. }, Problem::Missing { .. }]), "{problems:?}");
        }
        other => panic!("expected missing tensors, found {:?}", other.map(|_| ())),
    }
}
