//! LoRA on parameters of experts: PEFT's adapters both ways, the logits that it gives, and configurations and files that do not fit.

use std::path::{Path, PathBuf};

use burn::module::{Module as _, Param};
use burn::tensor::{Device, Int, Tensor, TensorData};
use peft_adapter::Ia3Config;
use peft_core::files::{CONFIG_FILE, TENSOR_FILE, Values, read_values, write_values};
use peft_core::{
    Method, ParamVisitor, PathStack, Peft as _, Targets, load_adapter, merge, save_adapter, scan, visit_params,
};
use peft_lora::{Combination, InitWeights, LoraConfig, combine};
use peft_models::load::{Packing, Precision};
use peft_models::{CausalLm, Layout, ModelSource, Pretrained};
use peft_quant::{Format, Quantization, loftq_model};

use crate::golden::{BOUND, deviation, floats, ints, logits, testdata};

const BOTH: [&str; 2] = ["experts.gate_up_proj", "experts.down_proj"];

fn load(base: &str, packing: &Packing, precision: Precision, device: &Device) -> CausalLm {
    let dir = testdata().join("models-moe").join(base);
    Pretrained::load_with(&ModelSource::Dir(dir), packing, precision, device).unwrap().model
}

fn model(base: &str) -> CausalLm {
    load(base, &Packing::AsStored, Precision::F32, &Device::flex())
}

/// Every adapter of PEFT on a model with experts: its base and its folder.
fn cases() -> Vec<(String, PathBuf)> {
    let json = std::fs::read_to_string(testdata().join("lora-moe/cases.json")).unwrap();
    let cases: Vec<serde_json::Value> = serde_json::from_str(&json).unwrap();
    let text = |case: &serde_json::Value, field: &str| case[field].as_str().unwrap().to_owned();
    let cases: Vec<_> = cases.iter().map(|case| (text(case, "base"), testdata().join(text(case, "path")))).collect();
    assert_eq!(cases.len(), 20);
    cases
}

fn is_per_expert(dir: &Path) -> bool {
    dir.ends_with("per_expert")
}

#[test]
fn adapters_of_peft_give_its_logits() {
    for (base, dir) in cases() {
        let golden = dir.join("logits.safetensors");
        let (adapted, method) = load_adapter::<_, LoraConfig>(model(&base), &dir).unwrap();
        let expected = floats(&golden, "logits");
        let found = deviation(&logits(&adapted, &golden), &expected);
        assert!(found < BOUND, "{}: {found}", dir.display());
        let (shape, tokens) = ints(&golden, "tokens");
        let tokens = Tensor::<2, Int>::from_data(TensorData::new(tokens, shape), &Device::flex());
        for each in adapted.routed(tokens, Layout::Rows, None).1 {
            let expected = floats(&golden, &format!("router_logits.{}", each.layer));
            let found: Vec<f32> = each.logits.into_data().iter::<f32>().collect();
            assert!(deviation(&found, &expected) < BOUND, "{}", dir.display());
        }
        let found = deviation(&logits(&merge(adapted, &method).unwrap(), &golden), &expected);
        assert!(found < BOUND, "{}, merged: {found}", dir.display());
    }
}

#[test]
fn what_is_written_is_what_peft_wrote() {
    for (base, dir) in cases() {
        let out = tempfile::tempdir().unwrap();
        let (adapted, method) = load_adapter::<_, LoraConfig>(model(&base), &dir).unwrap();
        save_adapter(&adapted, &method, None, out.path()).unwrap();
        let (ours, theirs) = (out.path().join(TENSOR_FILE), dir.join(TENSOR_FILE));
        if !is_per_expert(&dir) {
            assert_eq!(read_values(&ours).unwrap(), read_values(&theirs).unwrap(), "{}", dir.display());
        }
        let (again, same) = load_adapter::<_, LoraConfig>(model(&base), out.path()).unwrap();
        assert_eq!(same, method);
        let golden = dir.join("logits.safetensors");
        assert_eq!(logits(&again, &golden), logits(&adapted, &golden));
        let second = tempfile::tempdir().unwrap();
        save_adapter(&again, &same, None, second.path()).unwrap();
        for file in [TENSOR_FILE, CONFIG_FILE] {
            let read = |dir: &Path| std::fs::read(dir.join(file)).unwrap();
            assert_eq!(read(out.path()), read(second.path()), "{file}");
        }
    }
}

#[test]
fn layers_of_each_expert_become_parameters_of_all() {
    let path = |base: &str| testdata().join("lora-moe").join(base).join("per_expert");
    let method = |base: &str| load_adapter::<_, LoraConfig>(model(base), &path(base)).unwrap().1;
    let mixtral = method("mixtral");
    assert_eq!(mixtral.targets.parameter_names(), BOTH);
    assert_eq!(mixtral.targets, Targets::modules(["gate", "q_proj"]).with_parameters(BOTH));
    assert_eq!(mixtral.rank_pattern.get("experts.gate_up_proj"), Some(&4));
    assert_eq!(mixtral.alpha_pattern.get("experts.gate_up_proj"), Some(&12.0));
    // The shared expert keeps the names that the experts had as well.
    let modules = ["down_proj", "gate_proj", "q_proj", "up_proj"];
    assert_eq!(method("qwen2_moe").targets, Targets::modules(modules).with_parameters(BOTH));
}

/// A copy of an adapter with other tensors.
fn changed(dir: &Path, change: impl FnOnce(&mut std::collections::BTreeMap<String, Values>)) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    std::fs::copy(dir.join(CONFIG_FILE), copy.path().join(CONFIG_FILE)).unwrap();
    let mut tensors = read_values(&dir.join(TENSOR_FILE)).unwrap();
    change(&mut tensors);
    let path = copy.path().join(TENSOR_FILE);
    let bytes = write_values(tensors.iter().map(|(key, values)| (key.clone(), values)), &path).unwrap();
    std::fs::write(path, bytes).unwrap();
    copy
}

#[test]
fn layers_of_experts_that_do_not_fit_are_named() {
    let dir = testdata().join("lora-moe/mixtral/per_expert");
    let experts = "base_model.model.model.layers.0.block_sparse_moe.experts";
    let refused = |change: &dyn Fn(&mut std::collections::BTreeMap<String, Values>)| {
        let copy = changed(&dir, change);
        load_adapter::<_, LoraConfig>(model("mixtral"), copy.path()).map(|_| ()).unwrap_err().to_string()
    };
    let without = |names: &'static [&'static str]| {
        refused(&move |tensors| {
            for name in names {
                assert!(tensors.remove(&format!("{experts}.{name}.weight")).is_some());
            }
        })
    };
    let missing = |name: &str| format!("model.layers.0.{name}.weight: missing");
    assert!(without(&["2.w3.lora_A", "2.w3.lora_B"]).contains(&missing("mlp.experts.2.up_proj.lora_A")));
    assert!(without(&["3.w3.lora_A", "3.w3.lora_B"]).contains(&missing("mlp.experts.3.up_proj.lora_A")));
    assert!(without(&["1.w2.lora_B"]).contains(&missing("block_sparse_moe.experts.1.w2.lora_B")));
    assert!(without(&["1.w2.lora_A"]).contains(&missing("block_sparse_moe.experts.1.w2.lora_A")));
    // The last expert is one that only the model knows of.
    let message = without(&["3.w2.lora_A", "3.w2.lora_B"]);
    assert!(message.contains("mlp.experts.lora_A.weight: expected shape [8, 24], found [6, 24]"), "{message}");
    let message = refused(&|tensors| {
        let values = tensors.get_mut(&format!("{experts}.1.w1.lora_A.weight")).unwrap();
        *values = Values { shape: vec![1, 32], values: vec![0.0; 32] };
    });
    assert!(message.contains("experts.1.w1.lora_A.weight: expected shape [2, 32], found [1, 32]"), "{message}");
    let message = refused(&|tensors| {
        for name in ["w1.lora_A", "w1.lora_B", "w3.lora_A", "w3.lora_B", "w2.lora_A", "w2.lora_B"] {
            let values = tensors.get_mut(&format!("{experts}.0.{name}.weight")).unwrap();
            values.shape = vec![values.values.len()];
        }
    });
    assert!(message.contains("experts.0.w1: expected factors that are matrices"), "{message}");
}

/// Random factors on parameters of experts, and on a router.
fn random(names: &[&str]) -> LoraConfig {
    let targets = Targets::modules(["q_proj"]).with_parameters(names.iter().copied());
    LoraConfig::new(2, targets).with_alpha(3.0).with_init(InitWeights::Random)
}

/// The parameters of a model by path.
#[derive(Default)]
struct Parameters(std::collections::BTreeMap<String, Vec<f32>>);

impl ParamVisitor for Parameters {
    fn float<const D: usize>(&mut self, at: &PathStack, param: &Param<Tensor<D>>) {
        self.0.insert(at.path(), param.base().into_data().iter::<f32>().collect());
    }
}

fn parameters(model: &CausalLm) -> std::collections::BTreeMap<String, Vec<f32>> {
    let mut found = Parameters::default();
    visit_params(model, &mut found);
    found.0
}

#[test]
fn the_file_says_what_merging_adds() {
    let base = model("mixtral");
    for names in [&BOTH[..], &BOTH[..1], &BOTH[1..]] {
        let method = random(names);
        let adapted = base.clone().attach(&method).unwrap();
        let out = tempfile::tempdir().unwrap();
        save_adapter(&adapted, &method, None, out.path()).unwrap();
        let file = read_values(&out.path().join(TENSOR_FILE)).unwrap();
        let (before, after) = (parameters(&base), parameters(&merge(adapted, &method).unwrap()));
        for name in BOTH {
            let path = format!("model.layers.1.mlp.{name}");
            let (before, after) = (&before[&format!("{path}.weight")], &after[&format!("{path}.weight")]);
            if !names.contains(&name) {
                assert_eq!(before, after);
                continue;
            }
            let inside = if name == BOTH[0] && names.len() == 2 { ".base_layer" } else { "" };
            let factor = |which: &str| {
                &file[&format!("base_model.model.model.layers.1.mlp.experts{inside}.lora_{which}.weight")]
            };
            let (a, b, rank, experts) = (factor("A"), factor("B"), 2, 4);
            let (d_in, d_out) = (a.shape[1], b.shape[0]);
            assert_eq!((&a.shape, &b.shape), (&vec![experts * rank, d_in], &vec![d_out, rank * experts]));
            let expected: Vec<f32> = (0..experts * d_out * d_in)
                .map(|at| {
                    let (expert, row, column) = (at / (d_out * d_in), at / d_in % d_out, at % d_in);
                    let a = |k: usize| a.values[(expert * rank + k) * d_in + column];
                    let b = |k: usize| b.values[row * rank * experts + k * experts + expert];
                    before[at] + 1.5 * (0..rank).map(|k| a(k) * b(k)).sum::<f32>()
                })
                .collect();
            assert!(deviation(after, &expected) < 1e-5, "{path}");
        }
    }
}

/// Over packed experts an adapter gives what it gives over the values that are left, and is merged into them.
#[test]
fn adapters_on_packed_experts_are_those_on_what_is_left() {
    for (base, path) in [("mixtral", "mixtral/experts"), ("qwen2_moe", "qwen2_moe/projections")] {
        let (dir, packing) =
            (testdata().join("lora-moe").join(path), Packing::Quantize(Quantization::new(Format::NF4)));
        let golden = dir.join("logits.safetensors");
        let packed = || load(base, &packing, Precision::F32, &Device::flex());
        let (adapted, method) = load_adapter::<_, LoraConfig>(packed(), &dir).unwrap();
        let left = merge(packed(), &method).unwrap();
        let (expected, _) = load_adapter::<_, LoraConfig>(left, &dir).unwrap();
        let expected = logits(&expected, &golden);
        let found = deviation(&logits(&adapted, &golden), &expected);
        assert!(found < 1e-5, "{path}: {found}");
        let merged = deviation(&logits(&merge(adapted, &method).unwrap(), &golden), &expected);
        assert!(merged < 1e-5, "{path}, merged: {merged}");
    }
}

/// What packing loses is made up for in linear layers; experts are packed beside them, and their adapters start as always.
#[test]
fn loftq_leaves_experts_as_they_are() {
    let targets = Targets::modules(["q_proj", "o_proj"]).with_parameters(BOTH);
    let matcher = targets.matcher().unwrap();
    let rank_of = |site: &peft_core::Site| Ok(matcher.matches(&site.path, Some(site.kind)).then_some(2));
    let (packed, factors) = loftq_model(model("mixtral"), &Quantization::new(Format::NF4), 1, rank_of).unwrap();
    assert!(scan(&packed).sites.iter().filter(|site| site.experts.is_some()).all(|site| site.packed.is_some()));
    assert_eq!(factors.len(), 4);
    assert!(factors.keys().all(|path| path.ends_with("_proj") && path.contains("self_attn")), "{:?}", factors.keys());
}

#[test]
fn a_step_moves_the_factors_and_nothing_else() {
    let device = Device::flex().autodiff();
    for (base, precision) in [
        ("mixtral", Precision::F32),
        ("qwen2_moe", Precision::Bf16),
        ("qwen3_moe_dense", Precision::F32),
        ("deepseek_v2_groups", Precision::F32),
        ("deepseek_v3", Precision::F32),
    ] {
        let packing = Packing::Quantize(Quantization::new(Format::NF4));
        for packing in [Packing::AsStored, packing] {
            let method = random(&[BOTH[0], BOTH[1], "mlp.gate.weight"]);
            let method = LoraConfig { targets: Targets::parameters(method.targets.parameter_names()), ..method };
            let model = load(base, &packing, precision, &device).attach(&method).unwrap();
            let golden = testdata().join("models-moe").join(base).join("logits.safetensors");
            let (shape, tokens) = ints(&golden, "tokens");
            let tokens = Tensor::<2, Int>::from_data(TensorData::new(tokens, shape), &device);
            let grads = model.forward(tokens).powf_scalar(2.0).mean().backward();
            let mut moved = Moved(&grads, Vec::new());
            visit_params(&model, &mut moved);
            let mut expected: Vec<String> = scan(&model)
                .adapted
                .iter()
                .flat_map(|path| ["a", "b"].map(|f| format!("{path}.weight.lora.{f}")))
                .collect();
            moved.1.sort();
            expected.sort();
            assert_eq!(moved.1, expected, "{base}");
        }
    }
}

/// Which parameters have gradients that are not zero.
struct Moved<'a>(&'a burn::tensor::Gradients, Vec<String>);

impl ParamVisitor for Moved<'_> {
    fn float<const D: usize>(&mut self, at: &PathStack, param: &Param<Tensor<D>>) {
        if let Some(grad) = param.val().grad(self.0) {
            let grad: Vec<f32> = grad.into_data().iter::<f32>().collect();
            assert!(
                grad.iter().any(|value| *value != 0.0) && grad.iter().all(|value| value.is_finite()),
                "{}",
                at.path()
            );
            self.1.push(at.path());
        }
    }
}

#[test]
fn what_cannot_be_adapted_is_refused() {
    let refused = |method: &LoraConfig| model("mixtral").attach(method).map(|_| ()).unwrap_err().to_string();
    let message = refused(&LoraConfig::new(2, Targets::modules(["q_proj"]).with_parameters(["experts.gate_up"])));
    let expected =
        "target_parameters \"experts.gate_up\" matches no layer of this model; the nearest names are: gate_up_proj";
    assert!(message.contains(expected), "{message}");
    let twice = Targets::modules(["gate"]).with_parameters(["gate.weight"]);
    let message = refused(&LoraConfig::new(2, twice));
    assert!(
        message.contains("model.layers.0.mlp.gate: target_modules and target_parameters both name it"),
        "{message}"
    );
    let lora = LoraConfig::new(2, Targets::parameters(BOTH));
    let biased = LoraConfig { lora_bias: true, ..lora.clone() };
    for (field, method) in [("lora_dropout", lora.clone().with_dropout(0.1)), ("lora_bias", biased)] {
        let expected = format!("`{field}`: expected none beside target_parameters");
        assert!(refused(&method).contains(&expected), "{}", refused(&method));
    }
    // What names modules names no parameter.
    let message = refused(&LoraConfig::new(2, Targets::modules(["down_proj"])));
    assert!(message.contains("target_modules [\"down_proj\"] matches no layer"), "{message}");
    let ia3 = Ia3Config::new(Targets::parameters(BOTH));
    let message = model("mixtral").attach(&ia3).map(|_| ()).unwrap_err().to_string();
    let expected = "model.layers.0.mlp.experts.down_proj";
    assert!(message.contains(expected) && message.contains("GroupedLinear"), "{message}");
    let file = peft_core::AdapterFile::read(&testdata().join("lora-moe/mixtral/experts")).unwrap();
    let message = combine(&[(file, 1.0)], Combination::Cat).unwrap_err().to_string();
    assert!(message.contains("`target_parameters`: expected null here"), "{message}");
}

#[test]
fn patterns_call_parameters_by_their_names() {
    let method = |key: &str| {
        let lora = random(&[BOTH[0], "gate.weight"]);
        LoraConfig { rank_pattern: [(key.to_owned(), 5)].into_iter().collect(), ..lora }
    };
    let (router, experts) = ("model.layers.0.mlp.gate", "model.layers.0.mlp.experts.gate_up_proj");
    for (key, ranks) in [("gate.weight", [5, 2]), ("gate", [2, 2]), ("experts.gate_up_proj", [2, 5])] {
        let method = method(key);
        assert_eq!([router, experts].map(|path| method.rank_of(path).unwrap()), ranks, "{key}");
        let rank = ranks[1];
        let shapes = parameters(&model("mixtral").attach(&method).unwrap());
        assert_eq!(shapes[&format!("{experts}.weight.lora.a")].len(), 4 * rank * 32, "{key}");
    }
    assert_eq!(
        <LoraConfig as Method>::targets(&method("gate")).name_of("model.layers.0.self_attn.q_proj"),
        "model.layers.0.self_attn.q_proj"
    );
}

#[test]
fn an_adapted_model_generates_as_the_merged_one() {
    let method = random(&BOTH);
    let adapted = model("qwen3_moe").attach(&method).unwrap().valid();
    let merged = merge(adapted.clone(), &method).unwrap();
    let golden = testdata().join("models-moe/qwen3_moe/logits.safetensors");
    let found = deviation(&logits(&adapted, &golden), &logits(&merged, &golden));
    assert!(found < 1e-5, "{found}");
    assert!(deviation(&logits(&adapted, &golden), &floats(&golden, "logits")) > 1e-2);
}
