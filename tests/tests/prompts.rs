//! Prompt methods: equality with PEFT, files both ways, encoders, what a prefix is.

use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use peft_core::files::{ENCODER_FILE, peft_type, read_values, write_values};
use peft_core::{AdapterFile, Error, Method, Peft as _, Problem, for_tasks, load_adapter, save_adapter};
use peft_models::encoder::Input;
use peft_models::{CausalLm, Sampling, generate};
use peft_prompt::{
    MultitaskPromptTuningConfig, PTuningConfig, PrefixTuningConfig, PromptAdapter, PromptInit, PromptTuningConfig,
    start_at,
};
use serde::Deserialize;

use crate::encoders::{encoder, real, text};
use crate::golden::{BOUND, deviation, floats, ints, model, testdata};

#[derive(Deserialize)]
struct Case {
    path: String,
    base: String,
}

/// The folders of adapters on decoders whose method is one of these.
fn cases(of: &[&str]) -> Vec<Case> {
    all(of).into_iter().filter(|case| case.base.starts_with("models/")).collect()
}

fn all(of: &[&str]) -> Vec<Case> {
    let cases: Vec<Case> =
        serde_json::from_str(&std::fs::read_to_string(testdata().join("prompts/cases.json")).unwrap()).unwrap();
    let wanted = |case: &Case| of.contains(&peft_type(&testdata().join(&case.path)).unwrap().as_str());
    cases.into_iter().filter(wanted).collect()
}

fn base(case: &Case) -> CausalLm {
    model(case.base.strip_prefix("models/").unwrap())
}

/// The first 16 columns of the logits of the tokens that all cases share, with the tasks of their rows.
fn logits(model: &CausalLm) -> Vec<f32> {
    let inputs = testdata().join("prompts/inputs.safetensors");
    let ((shape, tokens), (_, of)) = (ints(&inputs, "tokens"), ints(&inputs, "task_ids"));
    let ids = Tensor::<2, Int>::from_data(TensorData::new(tokens, shape), &Device::flex());
    let of: Vec<usize> = of.into_iter().map(|task| task as usize).collect();
    for_tasks(&of, || model.forward(ids)).narrow(2, 0, 16).into_data().iter::<f32>().collect()
}

/// The same of the first tokens of each row, behind padding on the left.
fn is_as_far_from_the_right(model: &CausalLm, expected: &[f32], case: &Case) {
    let inputs = testdata().join("prompts/inputs.safetensors");
    let ((shape, tokens), (_, mask)) = (ints(&inputs, "tokens_left"), ints(&inputs, "mask_left"));
    let ids = Tensor::<2, Int>::from_data(TensorData::new(tokens, &shape[..]), &Device::flex());
    let padding: Vec<usize> = mask.chunks(shape[1]).map(|row| row.iter().filter(|seen| **seen == 0).count()).collect();
    let (_, of) = ints(&inputs, "task_ids");
    let of: Vec<usize> = of.into_iter().map(|task| task as usize).collect();
    let found = for_tasks(&of, || model.forward_left_padded(ids, &padding)).narrow(2, 0, 16);
    for (row, padding) in padding.into_iter().enumerate() {
        let real = shape[1] - padding;
        let found: Vec<f32> =
            found.clone().narrow(0, row, 1).narrow(1, padding, real).into_data().iter::<f32>().collect();
        let found = deviation(&found, &expected[row * shape[1] * 16..][..real * 16]);
        assert!(found < BOUND, "{}, row {row}: {found}", case.path);
    }
}

/// Loads the adapter, compares, writes it again and compares the files.
fn hold<M: Method>(case: &Case) {
    let dir = testdata().join(&case.path);
    let expected = floats(&dir.join("logits.safetensors"), "logits");
    let near = |found: &[f32], expected: &[f32]| {
        let found = deviation(found, expected);
        assert!(found < BOUND, "{}: {found}", case.path);
    };
    match case.base.strip_prefix("encoders/") {
        None => {
            let (model, method) = load_adapter::<_, M>(base(case), &dir).unwrap();
            near(&logits(&model), &expected);
            is_as_far_from_the_right(&model, &expected, case);
            goes_back(&model, &method, case);
        }
        Some(name) => {
            let (model, method) = load_adapter::<_, M>(encoder(name), &dir).unwrap();
            let mut text = text(name, true);
            if name == "bert_qa" {
                // PEFT drops the types of tokens there.
                text.types = None;
            }
            let found: Vec<f32> = model.forward(&Input::Text(text)).into_data().iter().collect();
            near(&real(&found, true), &real(&expected, true));
            goes_back(&model, &method, case);
        }
    }
}

/// What is saved of the adapter is what was loaded.
fn goes_back<T: Module, M: Method>(model: &T, method: &M, case: &Case) {
    let dir = testdata().join(&case.path);
    let out = tempfile::tempdir().unwrap();
    let out = written(&case.path, out.path());
    // The type of the model is the caller's to say.
    let task_type = AdapterFile::<M>::read(&dir).unwrap().task_type;
    AdapterFile { task_type, ..AdapterFile::collect(model, method).unwrap() }.write(&out).unwrap();
    let tensors = |dir: &Path| read_values(&dir.join("adapter_model.safetensors")).unwrap();
    assert_eq!(tensors(&out), tensors(&dir), "{}", case.path);
    assert!(!out.join(ENCODER_FILE).exists());
}

/// Where the adapter of a case is written: `scratch`, or, for `tools/golden/prompts_back.py` to load it with PEFT, below the folder in `PROMPTS_BACK`.
pub(crate) fn written(case: &str, scratch: &Path) -> PathBuf {
    match std::env::var_os("PROMPTS_BACK") {
        Some(dir) => Path::new(&dir).join(case.trim_start_matches("prompts/")),
        None => scratch.to_owned(),
    }
}

#[test]
fn prompts_of_peft_give_its_logits_and_go_back() {
    let mut seen = 0;
    for case in all(&["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING"]) {
        match peft_type(&testdata().join(&case.path)).unwrap().as_str() {
            "PROMPT_TUNING" => hold::<PromptTuningConfig>(&case),
            "MULTITASK_PROMPT_TUNING" => hold::<MultitaskPromptTuningConfig>(&case),
            "PREFIX_TUNING" => hold::<PrefixTuningConfig>(&case),
            _ => hold::<PTuningConfig>(&case),
        }
        seen += 1;
    }
    assert_eq!(seen, 32, "a golden prompt is missing");
}

/// The text that PEFT generates, token by token behind a cache that holds the prompt.
#[test]
fn generation_continues_behind_a_prompt_as_in_peft() {
    let inputs = testdata().join("prompts/inputs.safetensors");
    let ((shape, prompts), (_, mask)) = (ints(&inputs, "prompt"), ints(&inputs, "prompt_mask"));
    // A row without padding is that row alone, in whatever way a method counts.
    let row = mask.chunks(shape[1]).position(|row| row.iter().all(|seen| *seen == 1)).unwrap();
    let prompt: Vec<u32> = prompts[row * shape[1]..][..shape[1]].iter().map(|id| *id as u32).collect();
    let mut seen = 0;
    for case in cases(&["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"]) {
        let golden = testdata().join(&case.path).join("logits.safetensors");
        if !read_names(&golden).contains(&"greedy".to_owned()) {
            continue;
        }
        let dir = testdata().join(&case.path);
        let model = match peft_type(&dir).unwrap().as_str() {
            "PROMPT_TUNING" => load_adapter::<_, PromptTuningConfig>(base(&case), &dir).unwrap().0,
            "PREFIX_TUNING" => load_adapter::<_, PrefixTuningConfig>(base(&case), &dir).unwrap().0,
            _ => load_adapter::<_, PTuningConfig>(base(&case), &dir).unwrap().0,
        };
        let found = generate(&model, &prompt, 8, Sampling::default(), &[], &Device::flex(), |_| true).unwrap();
        let (shape, expected) = ints(&golden, "greedy");
        let expected: Vec<u32> = expected[row * shape[1]..][..shape[1]].iter().map(|id| *id as u32).collect();
        assert_eq!(found, expected, "{}", case.path);
        seen += 1;
    }
    assert!(seen >= 9, "{seen} golden generations");
}

fn read_names(path: &Path) -> Vec<String> {
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    file.names().into_iter().map(str::to_owned).collect()
}

/// PEFT's encoders compute here what PEFT saved of them: LSTM in both directions, MLP, projection. They are kept beside the adapter, for training to go on.
#[test]
fn encoders_of_peft_compute_its_prompts() {
    let mut seen = 0;
    for case in cases(&["PREFIX_TUNING", "P_TUNING"]) {
        let dir = testdata().join(&case.path);
        if dir.join("encoder.safetensors").is_file() {
            match peft_type(&dir).unwrap().as_str() {
                "PREFIX_TUNING" => encoded::<PrefixTuningConfig>(&case),
                _ => encoded::<PTuningConfig>(&case),
            }
            seen += 1;
        }
    }
    assert_eq!(seen, 5, "a golden encoder is missing");
}

fn encoded<M: Method<Adapter = PromptAdapter>>(case: &Case) {
    let (from, dir) = (testdata().join(&case.path), tempfile::tempdir().unwrap());
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(from.join(name), dir.path().join(name)).unwrap();
    }
    std::fs::copy(from.join("encoder.safetensors"), dir.path().join(ENCODER_FILE)).unwrap();
    let (model, method) = load_adapter::<_, M>(base(case), dir.path()).unwrap();
    let found = deviation(&logits(&model), &floats(&from.join("logits.safetensors"), "logits"));
    assert!(found < BOUND, "{}: {found}", case.path);
    // All of it is written again, and what the encoder computes is what was stored.
    let out = tempfile::tempdir().unwrap();
    save_adapter(&model, &method, None, out.path()).unwrap();
    let read = |dir: &Path, name: &str| read_values(&dir.join(name)).unwrap();
    assert_eq!(read(out.path(), ENCODER_FILE), read(dir.path(), ENCODER_FILE), "{}", case.path);
    let prompt = |dir: &Path| read(dir, "adapter_model.safetensors")["prompt_embeddings"].values.clone();
    assert!(deviation(&prompt(out.path()), &prompt(&from)) < 1e-5, "{}", case.path);
}

/// The model with a prompt made of `text` says of what follows what it says behind that text.
fn is_that_text(name: &str, prompted: impl FnOnce(CausalLm, Tensor<2, Int>, usize) -> CausalLm) {
    let device = Device::flex();
    let ids = |ids: &[i64]| Tensor::<2, Int>::from_data(TensorData::new(ids.to_vec(), [1, ids.len()]), &device);
    let (text, rest) = ([5, 9, 2, 7], [3, 1, 8]);
    let whole = model(name).forward(ids(&[&text[..], &rest[..]].concat())).narrow(1, text.len(), rest.len());
    let found = prompted(model(name), ids(&text), text.len()).forward(ids(&rest));
    let [found, whole] = [found, whole].map(|logits| logits.into_data().iter::<f32>().collect::<Vec<_>>());
    let found = deviation(&found, &whole);
    assert!(found < 1e-5, "{name}: {found}");
}

/// Keys and values of a text are a prefix that is that text.
#[test]
fn a_prefix_of_a_text_is_that_text() {
    for name in ["llama", "qwen2", "gpt2"] {
        is_that_text(name, |base, text, n| {
            let values: Vec<f32> = base.past_of(text).into_data().iter().collect();
            start_at(base, &PrefixTuningConfig::new(n), &values, 0).unwrap()
        });
    }
}

/// Virtual tokens with the embeddings of a text are that text.
#[test]
fn a_prompt_of_a_text_is_that_text() {
    for name in ["llama", "gpt2"] {
        is_that_text(name, |base, text, n| {
            let values: Vec<f32> = base.embed(text).into_data().iter().collect();
            start_at(base, &PromptTuningConfig::new(n), &values, 0).unwrap()
        });
    }
}

/// Only what the method trains has gradients, in the number that its documentation gives.
#[test]
fn the_prompt_alone_is_trained() {
    let base = || model("llama").train();
    let ids = Tensor::<2, Int>::zeros([1, 1], &Device::flex().autodiff());
    let (width, blocks) = (base().embed(ids).dims()[2], base().config().num_layers());
    let trained = |model: CausalLm| model.trainable().trainable;
    assert_eq!(trained(base().attach(&PromptTuningConfig::new(7)).unwrap()), 7 * width);
    let prefix = trained(base().attach(&PrefixTuningConfig::new(7)).unwrap());
    // [1, 2·blocks, kv_heads, head_dim]
    let [_, _, kv_heads, head_dim] = base().past_of(Tensor::zeros([1, 1], &Device::flex().autodiff())).dims();
    let kv = kv_heads * head_dim;
    assert_eq!(prefix, 2 * 7 * blocks * kv);
    let e = 5;
    let projected = trained(base().attach(&PrefixTuningConfig::new(7).with_projection(e)).unwrap());
    assert_eq!(projected, 7 * kv + kv * e + e + 2 * blocks * kv * (e + 1));
    let mlp = trained(base().attach(&PTuningConfig::new(7, e)).unwrap());
    assert_eq!(mlp, 7 * width + 2 * width * e + e * e + 2 * e + width);
    let lstm = trained(base().attach(&PTuningConfig::new(7, e).with_lstm(1)).unwrap());
    let memory = 8 * (e * width + e * e + 2 * e);
    assert_eq!(lstm, 7 * width + memory + 4 * e * e + 2 * e + 2 * e * width + width);
}

#[test]
fn prompts_that_do_not_fit_are_refused() {
    let refused = |error: Error, with: &str| assert!(error.to_string().contains(with), "{error}");
    let base = || model("gpt2");
    refused(base().attach(&PromptTuningConfig::new(0)).unwrap_err(), "num_virtual_tokens");
    refused(base().attach(&PrefixTuningConfig::new(100_000)).unwrap_err(), "positions of the model");
    refused(start_at(base(), &PromptTuningConfig::new(2), &[0.0; 3], 0).unwrap_err(), "num_virtual_tokens");
    refused(start_at(base(), &PTuningConfig::new(2, 4), &[0.0; 3], 0).unwrap_err(), "encoder");
    let of_text = |text: &str| PromptTuningConfig {
        prompt_tuning_init: PromptInit::Text,
        prompt_tuning_init_text: Some(text.to_owned()),
        ..PromptTuningConfig::new(2)
    };
    refused(base().attach(&of_text("")).unwrap_err(), "prompt_tuning_init_text");
    // A prompt for a model of another width.
    let dir = testdata().join("prompts/llama/prompt_tuning");
    let mut file = AdapterFile::<PromptTuningConfig>::read(&dir).unwrap();
    let wrong = tempfile::tempdir().unwrap();
    let values = file.tensors.get_mut("prompt_embeddings").unwrap();
    values.shape[1] /= 2;
    values.values.truncate(values.shape[0] * values.shape[1]);
    file.write(wrong.path()).unwrap();
    match load_adapter::<_, PromptTuningConfig>(model("llama"), wrong.path()) {
        Err(Error::Tensors { problems, .. }) => {
            assert!(matches!(&problems[..], [Problem::Shape { .. }]), "{problems:?}");
        }
        other => panic!("expected a wrong shape, found {:?}", other.map(|_| ())),
    }
    // The encoder of an earlier adapter does not stay beside the next.
    let dir = tempfile::tempdir().unwrap();
    let encoded = PTuningConfig::new(2, 4);
    save_adapter(&base().attach(&encoded).unwrap(), &encoded, None, dir.path()).unwrap();
    assert!(dir.path().join(ENCODER_FILE).is_file());
    let plain = PromptTuningConfig::new(2);
    save_adapter(&base().attach(&plain).unwrap(), &plain, None, dir.path()).unwrap();
    load_adapter::<_, PromptTuningConfig>(base(), dir.path()).unwrap();
    // A hidden file of nonsense beside an adapter is not mistaken for its encoder.
    let dir = tempfile::tempdir().unwrap();
    let (model, method) = (base().attach(&PTuningConfig::new(2, 4)).unwrap(), PTuningConfig::new(2, 4));
    save_adapter(&model, &method, None, dir.path()).unwrap();
    let empty = write_values([], &dir.path().join(ENCODER_FILE)).unwrap();
    std::fs::write(dir.path().join(ENCODER_FILE), empty).unwrap();
    refused(load_adapter::<_, PTuningConfig>(base(), dir.path()).unwrap_err(), "prompt_encoder.");
    // An encoder beside a prompt that something else has trained since.
    save_adapter(&model, &method, None, dir.path()).unwrap();
    let path = dir.path().join("adapter_model.safetensors");
    let mut tensors = read_values(&path).unwrap();
    tensors.values_mut().for_each(|values| values.values.iter_mut().for_each(|value| *value += 0.5));
    std::fs::write(&path, write_values(tensors.iter().map(|(key, values)| (key.clone(), values)), &path).unwrap())
        .unwrap();
    refused(load_adapter::<_, PTuningConfig>(base(), dir.path()).unwrap_err(), "computes another prompt");
}

/// The dropout of an encoder acts in training, and not on what is saved.
#[test]
fn a_saved_prompt_is_that_of_evaluation() {
    let method = PTuningConfig { encoder_dropout: 0.5, ..PTuningConfig::new(3, 4).with_lstm(2) };
    let model = model("llama").train().attach(&method).unwrap();
    let saved = || AdapterFile::collect(&model, &method).unwrap().tensors["prompt_embeddings"].values.clone();
    assert_eq!(saved(), saved());
    let dir = tempfile::tempdir().unwrap();
    save_adapter(&model, &method, None, dir.path()).unwrap();
    std::fs::remove_file(dir.path().join(ENCODER_FILE)).unwrap();
    let plain = load_adapter::<_, PTuningConfig>(self::model("llama"), dir.path()).unwrap().0;
    assert!(deviation(&logits_of_one(&plain), &logits_of_one(&model.valid())) < 1e-5);
}

fn logits_of_one(model: &CausalLm) -> Vec<f32> {
    let device = model.devices()[0].clone();
    model.forward(Tensor::from_data([[3, 1, 8]], &device)).into_data().iter::<f32>().collect()
}

/// PEFT reads a prompt that started as a text only with the name of a tokenizer, though it needs none then.
#[test]
fn a_prompt_of_a_text_names_a_tokenizer() {
    let method = PromptTuningConfig {
        prompt_tuning_init: PromptInit::Text,
        prompt_tuning_init_text: Some("Be kind.".to_owned()),
        ..PromptTuningConfig::new(2)
    };
    let dir = tempfile::tempdir().unwrap();
    save_adapter(&model("llama").attach(&method).unwrap(), &method, Some("tiny/llama"), dir.path()).unwrap();
    let config = std::fs::read_to_string(dir.path().join("adapter_config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["tokenizer_name_or_path"], "tiny/llama");
    assert_eq!(AdapterFile::<PromptTuningConfig>::read(dir.path()).unwrap().method, method);
}
