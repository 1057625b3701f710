//! Several methods as one adapter.

use std::path::Path;

use burn::module::Module as _;
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use peft_adapter::{BottleneckConfig, Ia3Config};
use peft_core::files::{ENCODER_FILE, TENSOR_FILE, peft_type};
use peft_core::{
    AdapterFile, ComposedConfig, Error, Method, ParamVisitor, PathStack, Peft, Problem, Targets, Union, load_adapter,
    merge, save_adapter, visit_params,
};
use peft_lora::LoraConfig;
use peft_models::encoder::{Input, Text};
use peft_models::{Encoder, ModelSource, PretrainedEncoder};
use peft_moe::{MixLoraConfig, MixtureConfig};
use peft_prompt::PrefixTuningConfig;
use peft_testkit::{Laws, Stack, fill_adapter, table};
use peft_union::{AnyUnion, Parts, mam, unipelt};
use serde_json::json;

use crate::golden::testdata;

fn lora() -> LoraConfig {
    LoraConfig::new(2, Targets::modules(["up"])).with_alpha(6.0)
}

fn hold<M: Method>(laws: &Laws<M>) {
    let laws = laws
        .clone()
        .skip("file", "keys are those of the parts")
        .skip("encoder", "each part names its own layers")
        .skip("attach_nothing", "each part names its own layers");
    let checks = laws.run(&Device::flex());
    assert!(checks.iter().all(|check| !check.failed()), "\n{}", table(&checks));
}

/// In a weight's place and in a place without a weight; in two weights, so that it merges.
#[test]
fn a_union_obeys_the_laws() {
    let (up, down) = (lora(), Ia3Config::new(Targets::modules(["down"])));
    let laws = Laws::new(Union::new(BottleneckConfig::pfeiffer(4.0), up.clone()), |_, _| 0, ("parts", json!([])));
    hold(&laws.skip("unaware", "a place is there for adapters alone"));
    hold(&Laws::new(Union::new(up.clone(), down), |_, _| 0, ("parts", json!([]))));
    let prefix = PrefixTuningConfig::new(3).with_projection(4).without_shift();
    let three = Union::new(prefix, Union::new(BottleneckConfig::parallel(4.0), up));
    let laws = Laws::new(three, |_, _| 0, ("parts", json!([])));
    hold(&laws.skip("unaware", "a place is there for adapters alone").skip("identity", "a prefix is read"));
}

/// LoRA+ finds the fields of a part by what holds it.
#[test]
fn fields_of_parts_learn_as_fast_as_alone() {
    type Mixture = MixtureConfig<LoraConfig>;
    assert!(Mixture::is_fast("experts.b") && Mixture::is_fast("shared.1.b") && !Mixture::is_fast("experts.a"));
    assert!(!Mixture::is_fast("router.weight") && !Mixture::is_fast("router.b"));
    assert!(MixLoraConfig::is_fast("down.b") && !MixLoraConfig::is_fast("down.a"));
    type Composed = ComposedConfig<LoraConfig>;
    assert!(Composed::is_fast("parts.0.b") && !Composed::is_fast("parts.0.a") && !Composed::is_fast("fusion.query"));
    type Both = Union<Ia3Config, Union<LoraConfig, Mixture>>;
    assert!(Both::is_fast("second.first.b") && Both::is_fast("second.second.experts.b") && !Both::is_fast("first.l"));
    assert!(!Both::FAST.is_empty() && Ia3Config::FAST.is_empty());
}

#[test]
fn a_place_has_room_for_one_part() {
    let base = Stack::new(&Device::flex(), DType::F32, true);
    let both = Union::new(lora(), Ia3Config::new(Targets::modules(["up", "down"])));
    match base.clone().attach(&both) {
        Err(Error::Attach { method: "UNION", problems }) => {
            let [Problem::Other { path, what }] = &problems[..] else { panic!("{problems:?}") };
            assert!(path == "up" && what.contains("two parts"), "{path}: {what}");
        }
        other => panic!("expected a refusal, found {:?}", other.map(|_| ())),
    }
    // What is wrong with one part and with the other is said at once.
    let wrong = |name: &str| LoraConfig::new(2, Targets::modules([name]));
    let error = base.clone().attach(&Union::new(wrong("uq"), wrong("dwon"))).unwrap_err().to_string();
    assert!(error.contains("uq") && error.contains("dwon"), "{error}");
    let empty = Union::<LoraConfig, Ia3Config>::new(None, None);
    assert!(base.clone().attach(&empty).unwrap_err().to_string().contains("parts"));
    let nested = Union::<_, Ia3Config>::new(Union::<_, Ia3Config>::new(lora(), None), None);
    assert!(base.attach(&nested).unwrap_err().to_string().contains("last place"));
}

/// One list, however a union is nested, of as many parts as there are.
#[test]
fn the_parts_are_one_list() {
    let types = |method: &AnyUnion| {
        let json = serde_json::to_value(method).unwrap();
        assert_eq!(&serde_json::from_value::<AnyUnion>(json.clone()).unwrap(), method);
        let parts = json["parts"].as_array().unwrap();
        parts.iter().map(|part| part["peft_type"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(types(&mam()), ["PREFIX_TUNING", "BOTTLENECK"]);
    assert_eq!(types(&unipelt(Targets::modules(["query"]))), ["PREFIX_TUNING", "BOTTLENECK", "LORA"]);
    let layers =
        Parts { lora: Some(lora()), ia3: Some(Ia3Config::new(Targets::modules(["down"]))), ..Parts::default() };
    assert_eq!(types(&layers.union()), ["LORA", "IA3"]);
    let refused = |parts| serde_json::from_value::<AnyUnion>(json!({ "parts": parts })).unwrap_err().to_string();
    assert!(refused(json!([{ "peft_type": "SSF" }])).contains("SSF"));
    assert!(refused(json!([{ "peft_type": "LORA" }, { "peft_type": "LORA" }])).contains("once"));
    let wrong = refused(json!([{ "peft_type": "LORA", "r": "four" }]));
    assert!(wrong.contains("LORA") && wrong.contains("four"), "{wrong}");
}

fn base() -> Encoder {
    let source = ModelSource::Dir(testdata().join("encoders/bert_seqcls"));
    PretrainedEncoder::load(&source, &Device::flex().autodiff()).unwrap().model
}

/// Small enough for the tests' model, with a head.
fn small() -> AnyUnion {
    let parts = Parts::unipelt(Targets::modules(["query", "value"]));
    let prefix = parts.prefix.map(|prefix| prefix.with_projection(8));
    let lora = parts.lora.map(|lora| {
        let targets = Targets { modules_to_save: Some(vec!["classifier".to_owned()]), ..lora.targets };
        LoraConfig { targets, ..lora }
    });
    Parts { prefix, lora, ..parts }.union()
}

fn input() -> Input {
    let device = Device::flex();
    let tensor = |values: Vec<i64>| Tensor::<2, Int>::from_data(TensorData::new(values, [2, 6]), &device);
    let mask = Some(tensor(vec![1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]));
    Input::Text(Text { ids: tensor((1..=12).collect()), mask, types: None })
}

fn logits(model: &Encoder) -> Vec<f32> {
    model.valid().forward(&input()).into_data().iter().collect()
}

/// The parameters by whether they have a gradient; all of the adapter are to have one.
struct Reached<'a> {
    grads: &'a GradientsParams,
    adapter: usize,
    base: Vec<String>,
}

impl ParamVisitor for Reached<'_> {
    fn float<const D: usize>(&mut self, at: &PathStack, param: &burn::module::Param<Tensor<D>>) {
        let found = self.grads.get::<D>(param.id);
        match at.locate().field {
            Some(_) => {
                let grad = found.unwrap_or_else(|| panic!("{} has no gradient", at.path()));
                assert!(grad.abs().sum().into_scalar::<f32>() > 0.0, "the gradient of {} is zero", at.path());
                self.adapter += 1;
            }
            None if found.is_some() => self.base.push(at.path()),
            None => {}
        }
    }
}

/// Prefix with encoder, bottlenecks and LoRA, with gates, beside a head: trained, saved, loaded and refused to merge as one.
#[test]
fn a_mixture_is_one_adapter() {
    let method = small();
    let model = fill_adapter(base().attach(&method).unwrap());
    let loss = model.forward(&input()).square().sum();
    let grads = GradientsParams::from_grads(loss.backward(), &model);
    let mut reached = Reached { grads: &grads, adapter: 0, base: Vec::new() };
    visit_params(&model, &mut reached);
    // Encoder and gates of the prefix; of 2 blocks bottleneck and gate; of 4 projections LoRA and gate.
    assert_eq!(reached.adapter, (5 + 2 * 2) + 2 * (4 + 2) + 4 * (2 + 2));
    assert!(
        reached.base.len() == 2 && reached.base.iter().all(|path| path.contains("classifier")),
        "{:?}",
        reached.base
    );

    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    save_adapter(&model, &method, None, first.path()).unwrap();
    assert_eq!(peft_type(first.path()).unwrap(), "UNION");
    let (loaded, read) = load_adapter::<_, AnyUnion>(base(), first.path()).unwrap();
    assert_eq!(read, method);
    assert_eq!(logits(&loaded), logits(&model));
    save_adapter(&loaded, &read, None, second.path()).unwrap();
    for name in ["adapter_config.json", TENSOR_FILE, ENCODER_FILE] {
        let bytes = |dir: &Path| std::fs::read(dir.join(name)).unwrap();
        assert_eq!(bytes(first.path()), bytes(second.path()), "{name}");
    }
    // Without its encoder it is the same, with the prefix as the encoder left it.
    std::fs::remove_file(first.path().join(ENCODER_FILE)).unwrap();
    let (loaded, _) = load_adapter::<_, AnyUnion>(base(), first.path()).unwrap();
    let far = logits(&loaded).iter().zip(logits(&model)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(far < 1e-5, "{far}");
    let refused = merge(model.clone(), &method).unwrap_err().to_string();
    assert!(["prompt", "bottleneck", "gate"].iter().all(|part| refused.contains(part)), "{refused}");

    // A head is no part of it in AdapterHub's layout.
    let file = AdapterFile::collect(&model, &method).unwrap();
    let out = tempfile::tempdir().unwrap();
    assert!(file.write_hub("task", out.path()).unwrap_err().to_string().contains("classifier"));
}
