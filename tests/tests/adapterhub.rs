//! Equality with AdapterHub's library: hidden states and logits of adapters and heads that it wrote. The files are made by `tools/golden/adapterhub.py`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use burn::tensor::{Device, Int, Tensor, TensorData};
use peft_adapter::{BottleneckConfig, Ia3Config, read_fusion};
use peft_core::files::{HubFolder, peft_type, read_torch, read_values, write_values};
use peft_core::{AdapterFile, Composition, Error, Method, Peft, Strictness, composed, load_adapter};
use peft_lora::LoraConfig;
use peft_models::encoder::{Input, Text};
use peft_models::{Encoder, ModelSource, PretrainedEncoder};
use peft_prompt::PrefixTuningConfig;
use peft_union::AnyUnion;
use serde_json::json;

use crate::golden::{self, BOUND, deviation, floats, ints, testdata};

/// Parts of AdapterHub's methods that are refused by name: the variant, and the field that the error names.
const NOT_BUILT: [(&str, &str); 7] = [
    ("compacter_own_rule", "factorized_phm_rule"),
    ("compacter_own_weight", "factorized_phm_rule"),
    ("compacter_shared_weight", "shared_W_phm"),
    ("fusion", ""),
    ("fusion_options", ""),
    ("fusion_static", ""),
    ("composition", ""),
];

#[derive(Clone, serde::Deserialize)]
struct Case {
    path: String,
    base: String,
    variant: String,
}

fn cases() -> Vec<Case> {
    let read = |name: &str| -> Vec<Case> {
        serde_json::from_str(&std::fs::read_to_string(testdata().join("adapterhub").join(name)).unwrap()).unwrap()
    };
    [read("cases.json"), read("prompt_cases.json")].concat()
}

fn base(name: &str) -> Encoder {
    let source = ModelSource::Dir(testdata().join("encoders").join(name));
    PretrainedEncoder::load(&source, &Device::flex()).unwrap().model
}

fn input(golden: &Path, base: &str) -> Input {
    let values = |key: &str| {
        let (shape, values) = ints(golden, key);
        Tensor::<2, Int>::from_data(TensorData::new(values, shape), &Device::flex())
    };
    let types = base.starts_with("bert").then(|| values("token_type_ids"));
    Input::Text(Text { ids: values("tokens"), mask: Some(values("attention_mask")), types })
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// The last hidden states at real places: the second row has four of padding.
fn real(hidden: &[f32]) -> &[f32] {
    const PADDED: usize = 4;
    let width = hidden.len() / (2 * 12);
    &hidden[..hidden.len() - PADDED * width]
}

fn near(found: &[f32], expected: &[f32], what: &str) {
    let found = deviation(found, expected);
    assert!(found < BOUND, "{what}: {found}");
}

/// The adapted model gives what the library gives; written here and read again, the same tensors come back under the same keys.
fn hold<M: Method + PartialEq>(case: &Case) {
    let (dir, named) = (testdata().join(&case.path), &case.path);
    let golden = dir.join("logits.safetensors");
    let (model, _) = load_adapter::<_, M>(base(&case.base), &dir).unwrap_or_else(|e| panic!("{named}: {e}"));
    let input = input(&golden, &case.base);
    // A gate is a mean over all places, the padded ones of the second row among them, whose states are nobody's business and differ.
    let gated = case.variant.contains("gating") || case.variant == "unipelt";
    let told = |values: Vec<f32>| values[..if gated { values.len() / 2 } else { values.len() }].to_vec();
    let (hidden, expected) = (values(model.hidden(&input)), floats(&golden, "hidden"));
    let (hidden, expected) =
        if gated { (told(hidden), told(expected)) } else { (real(&hidden).to_vec(), real(&expected).to_vec()) };
    near(&hidden, &expected, named);
    let model = model.with_hub_head(&dir, &Device::flex()).unwrap();
    near(&told(values(model.forward(&input))), &told(floats(&golden, "logits")), named);

    let file = AdapterFile::<M>::read(&dir).unwrap();
    // `tools/golden/adapterhub_back.py` looks at what is written here, by the library itself.
    let dirs = tempfile::tempdir().unwrap();
    let again = std::env::var_os("ADAPTERHUB_BACK").map_or(dirs.path().to_owned(), Into::into).join(&case.path);
    file.write_hub("task", &again).unwrap_or_else(|e| panic!("{named}: {e}"));
    model.save_hub_head("task", &again).unwrap();
    let read = AdapterFile::<M>::read(&again).unwrap();
    assert!(read.method == file.method && read.tensors == file.tensors, "{named}: written and read again");
    let reread = base(&case.base).with_hub_head(&again, &Device::flex()).unwrap();
    assert_eq!(reread.config().task, model.config().task);
    let keys = |dir: &Path| {
        let keys = HubFolder::read(dir).unwrap().tensors.into_keys();
        // The library finds a prefix without the model's name too.
        let bare =
            |key: String| key.find("prefix_tuning.prefix_tunings.").map_or(key.clone(), |at| key[at..].to_owned());
        keys.map(bare).collect::<BTreeSet<_>>()
    };
    // A rule that all layers share is one in each here.
    let shared =
        |keys: BTreeSet<String>| keys.into_iter().filter(|key| !key.contains("phm_rule")).collect::<BTreeSet<_>>();
    assert_eq!(shared(keys(&again)), shared(keys(&dir)), "{named}");
}

#[test]
fn adapters_of_the_library_give_its_logits_and_go_back() {
    let (mut held, mut refused) = (0, 0);
    for case in cases() {
        if case.variant.starts_with("prompt_tuning") {
            let refusal = peft_type(&testdata().join(&case.path)).unwrap_err().to_string();
            assert!(refusal.contains("is this an adapter?"), "{refusal}");
            refused += 1;
            continue;
        }
        if let Some((_, field)) = NOT_BUILT.iter().find(|(variant, _)| *variant == case.variant) {
            if !field.is_empty() {
                match AdapterFile::<BottleneckConfig>::read(&testdata().join(&case.path)) {
                    Err(Error::Config { field: found, .. }) => assert_eq!(found, *field, "{}", case.path),
                    other => panic!("{}: expected an error that names {field}, found {other:?}", case.path),
                }
            }
            refused += 1;
            continue;
        }
        match peft_type(&testdata().join(&case.path)).unwrap().as_str() {
            "LORA" => hold::<LoraConfig>(&case),
            "IA3" => hold::<Ia3Config>(&case),
            "PREFIX_TUNING" => hold::<PrefixTuningConfig>(&case),
            "UNION" => hold::<AnyUnion>(&case),
            _ => hold::<BottleneckConfig>(&case),
        }
        held += 1;
    }
    assert!(held >= 50 && refused <= 10, "{held} held, {refused} refused");
}

/// What the first versions called the parts of an adapter gives what today's names give.
#[test]
fn files_of_older_libraries_are_read() {
    let now = testdata().join("adapterhub/bert_seq_bn_inv");
    let old = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(now.join("adapter_config.json")).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    json.as_object_mut().unwrap().remove("version").unwrap();
    json["type"] = "text_lang".into();
    let config = json["config"].as_object_mut().unwrap();
    let parts = [config.remove("inv_adapter").unwrap(), config.remove("inv_adapter_reduction_factor").unwrap()];
    config.insert("invertible_adapter".into(), json!({ "block_type": parts[0], "reduction_factor": parts[1] }));
    std::fs::write(old.path().join("adapter_config.json"), json.to_string()).unwrap();
    let tensors = read_values(&now.join("adapter.safetensors")).unwrap().into_iter().map(|(key, values)| {
        let key = key.replace(".output.adapters.", ".output.layer_text_lang_adapters.");
        (key.replace("invertible_adapters", "invertible_lang_adapters"), values)
    });
    let tensors: BTreeMap<_, _> = tensors.collect();
    let bytes = write_values(tensors.iter().map(|(key, values)| (key.clone(), values)), old.path()).unwrap();
    std::fs::write(old.path().join("adapter.safetensors"), bytes).unwrap();
    let read = |dir: &Path| AdapterFile::<BottleneckConfig>::read(dir).unwrap();
    assert_eq!(read(old.path()), read(&now));
    assert_eq!(read(&now).tensors.len(), 2 * 4 + 8);
}

#[test]
fn fusions_of_the_library_give_its_logits() {
    for name in ["bert_fusion", "roberta_fusion"] {
        let dir = testdata().join("adapterhub").join(name);
        let golden = dir.join("logits.safetensors");
        let file = read_fusion(&dir, &[&dir.join("a"), &dir.join("b")]).unwrap();
        let base_name = name.replace("fusion", "seqcls");
        let model = base(&base_name).attach(&file.method).unwrap();
        let model = file.fill(model, &dir, Strictness::default()).unwrap();
        let input = input(&golden, &base_name);
        near(real(&values(model.hidden(&input))), real(&floats(&golden, "hidden")), name);
        let model = model.with_hub_head(&dir, &Device::flex()).unwrap();
        near(&values(model.forward(&input)), &floats(&golden, "logits"), name);
    }
    for name in ["bert_fusion_static", "bert_fusion_options"] {
        let dir = testdata().join("adapterhub").join(name);
        match read_fusion(&dir, &[&dir.join("a"), &dir.join("b")]) {
            Err(Error::Config { .. }) => {}
            other => panic!("{name}: expected an error of the configuration, found {other:?}"),
        }
    }
}

/// Decoders, which go back through an invertible adapter before their head.
#[test]
fn language_models_of_the_library_give_its_logits() {
    fn hold<M: Method>(name: &str, variant: &str) {
        let dir = testdata().join(format!("adapterhub/{name}_{variant}"));
        let (model, _) = load_adapter::<_, M>(golden::model(name), &dir).unwrap();
        let file = dir.join("logits.safetensors");
        near(&golden::logits(&model, &file), &floats(&file, "logits"), name);
        let again = tempfile::tempdir().unwrap();
        AdapterFile::<M>::read(&dir).unwrap().write_hub("task", again.path()).unwrap();
        let tensors = |dir: &Path| HubFolder::read(dir).unwrap().tensors;
        assert_eq!(tensors(again.path()), tensors(&dir));
    }
    hold::<BottleneckConfig>("gpt2", "seq_bn_inv");
    hold::<BottleneckConfig>("llama", "seq_bn_inv");
    hold::<LoraConfig>("llama", "lora_all");
}

/// Compositions of two adapters from files. The library's own average is of no use: it divides by the number of adapters once too often.
#[test]
fn compositions_of_the_library_give_its_hidden_states() {
    let one = Composition::Adapter;
    let average = Composition::Average(vec![(0.3, one(0)), (0.7, one(1))]);
    let stack = || Composition::Stack(vec![one(0), one(1)]);
    let cases = [
        ("composition", "a", one(0)),
        ("composition", "b", one(1)),
        ("composition", "stack", stack()),
        ("composition", "batch_split", Composition::BatchSplit(vec![(1, one(0)), (1, one(1))])),
        ("composition", "split", Composition::Split(vec![(5, one(0)), (7, one(1))])),
        ("composition", "average_exact", average.clone()),
        // The first has an invertible adapter.
        ("language", "stack", stack()),
        ("language", "reverse", Composition::Stack(vec![one(1), one(0)])),
        ("language", "average", average),
    ];
    for (folder, name, composition) in cases {
        let dir = testdata().join(format!("adapterhub/bert_{folder}"));
        let golden = dir.join("composition.safetensors");
        let read = |name: &str| AdapterFile::<BottleneckConfig>::read(&dir.join(name)).unwrap();
        let file = composed(vec![read("a"), read("b")], composition).unwrap();
        let model = base("bert_seqcls").attach(&file.method).unwrap();
        let model = file.fill(model, &dir, Strictness::default()).unwrap();
        let hidden = values(model.hidden(&input(&golden, "bert_seqcls")));
        near(real(&hidden), real(&floats(&golden, name)), &format!("{folder} {name}"));
    }
}

/// A pickle of tensors gives what the same tensors give in safetensors; one that asks for more is refused.
#[test]
fn pickles_are_read_and_nothing_is_run() {
    let dir = testdata().join("adapterhub/bert_seq_bn_bin");
    let tensors = read_torch(&dir.join("pytorch_adapter.bin")).unwrap();
    let like = read_values(&testdata().join("adapterhub/bert_seq_bn/adapter.safetensors")).unwrap();
    assert_eq!(tensors.keys().collect::<Vec<_>>(), like.keys().collect::<Vec<_>>());
    assert!(tensors.values().zip(like.values()).all(|(a, b)| a.shape == b.shape));
    let old = read_torch(&dir.join("legacy/pytorch_adapter.bin")).unwrap_err().to_string();
    assert!(old.contains("PyTorch 1.6"), "{old}");
}
