//! Encoders: logits of `transformers`, its tokenizers and pictures; padding; heads that a checkpoint lacks.

use std::path::{Path, PathBuf};

use burn::module::Param;
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use peft_core::files::{TENSOR_FILE, Values, read_values, write_values};
use peft_core::{
    LayerKind, ParamVisitor, PathStack, Peft, Targets, load_adapter, merge, save_adapter, scan, visit_params,
};
use peft_lora::LoraConfig;
use peft_models::config::Architecture;
use peft_models::encoder::{Input, Naming, Text};
use peft_models::export::{Dtype, save_model};
use peft_models::heads::{Problem, Task};
use peft_models::load::{Packing, Precision};
use peft_models::tokenizer::Tokenizer;
use peft_models::{Encoder, EncoderOptions, Error, ModelSource, Pretrained, PretrainedEncoder};
use peft_quant::{Format, Quantization};

use crate::golden::{BOUND, deviation, floats, ints, testdata};

const TEXTS: [&str; 10] = [
    "bert_base",
    "bert_multi",
    "bert_qa",
    "bert_regression",
    "bert_seqcls",
    "bert_tokcls",
    "distilbert_qa",
    "distilbert_seqcls",
    "roberta_seqcls",
    "roberta_tokcls",
];
const IMAGES: [&str; 2] = ["dinov2_imgcls", "vit_imgcls"];
/// Padded places at the end of the second of two rows of twelve.
const PADDED: usize = 4;
const SEQ: usize = 12;

fn dir(name: &str) -> PathBuf {
    testdata().join("encoders").join(name)
}

fn golden(name: &str) -> PathBuf {
    dir(name).join("logits.safetensors")
}

fn load_dir(dir: &Path, options: &EncoderOptions) -> PretrainedEncoder {
    PretrainedEncoder::load_with(&ModelSource::Dir(dir.to_owned()), options, &Device::flex()).unwrap()
}

pub(crate) fn encoder(name: &str) -> Encoder {
    load_dir(&dir(name), &EncoderOptions::default()).model
}

fn matrix(rows: usize, values: Vec<i64>) -> Tensor<2, Int> {
    let columns = values.len() / rows;
    Tensor::from_data(TensorData::new(values, [rows, columns]), &Device::flex())
}

pub(crate) fn text(name: &str, masked: bool) -> Text {
    let values = |key| matrix(2, ints(&golden(name), key).1);
    Text {
        ids: values("tokens"),
        mask: masked.then(|| values("attention_mask")),
        types: name.starts_with("bert").then(|| values("token_type_ids")),
    }
}

fn pixels(name: &str, key: &str, rows: usize) -> Input {
    let values = floats(&golden(name), key);
    let side = (values.len() / rows / 3).isqrt();
    Input::Pixels(Tensor::from_data(TensorData::new(values, [rows, 3, side, side]), &Device::flex()))
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// The values at real places: all, where there is one place a row.
pub(crate) fn real(values: &[f32], masked: bool) -> Vec<f32> {
    let width = values.len() / (2 * SEQ);
    let padded = masked && values.len().is_multiple_of(2 * SEQ) && width > 0;
    values[..values.len() - if padded { PADDED * width } else { 0 }].to_vec()
}

fn near(found: &[f32], expected: &[f32], what: &str) {
    let found = deviation(found, expected);
    assert!(found < BOUND, "{what}: {found}");
}

#[test]
fn text_encoders_equal_transformers() {
    for name in TEXTS {
        let model = encoder(name);
        let key = if name == "bert_base" { "hidden" } else { "logits" };
        for masked in [true, false] {
            let input = Input::Text(text(name, masked));
            let found = if name == "bert_base" { values(model.hidden(&input)) } else { values(model.forward(&input)) };
            let key = if masked { key.to_owned() } else { format!("{key}_unmasked") };
            let expected = floats(&golden(name), &key);
            near(&real(&found, masked), &real(&expected, masked), &format!("{name}, {key}"));
        }
    }
}

#[test]
fn sentence_vectors_equal_sentence_transformers() {
    let model = encoder("bert_base");
    let input = Input::Text(text("bert_base", true));
    near(&values(model.embedding(&input)), &floats(&golden("bert_base"), "embedding"), "embedding");
    near(&values(model.forward(&input)), &floats(&golden("bert_base"), "embedding"), "without a head");
    let pooled = model.pooled(model.hidden(&input), &input).unwrap();
    near(&values(pooled), &floats(&golden("bert_base"), "pooled"), "pooled");
}

#[test]
fn vision_models_and_their_pictures_equal_transformers() {
    for name in IMAGES {
        let PretrainedEncoder { model, files, .. } = load_dir(&dir(name), &EncoderOptions::default());
        near(&values(model.forward(&pixels(name, "pixels", 2))), &floats(&golden(name), "logits"), name);
        let processor = peft_models::image::ImageProcessor::from_dir(files.origin.weights().path()).unwrap();
        let picture = processor.read(&dir(name).join("image.png"), &Device::flex()).unwrap();
        // Bytes are the same, so nothing but the last bit of a division may differ.
        let found = deviation(&values(picture.clone()), &floats(&golden(name), "processed"));
        assert!(found < 1e-6, "{name}: {found}");
        near(&values(model.forward(&Input::Pixels(picture))), &floats(&golden(name), "processed_logits"), name);
    }
}

/// Logits of `transformers` 5.23 for the pixels `sin(i/10)` in 42 × 35, where the position table is for 28 × 28.
#[test]
fn positions_of_another_size_equal_transformers() {
    let pixels: Vec<f32> = (0..3 * 42 * 35).map(|i| (f64::from(i) * 0.1).sin() as f32).collect();
    let pixels = Tensor::from_data(TensorData::new(pixels, [1, 3, 42, 35]), &Device::flex());
    let found = values(encoder("dinov2_imgcls").forward(&Input::Pixels(pixels)));
    near(&found, &[0.285_728_8, -1.137_241_8, 2.937_276_1, -2.141_155], "42 × 35");
}

/// The rows of `text` one by one, without their padding; or all with it on the left.
fn unpadded(text: &Text, row: usize) -> Text {
    let real = if row == 1 { SEQ - PADDED } else { SEQ };
    let cut = |tensor: &Tensor<2, Int>| tensor.clone().narrow(0, row, 1).narrow(1, 0, real);
    Text { ids: cut(&text.ids), mask: None, types: text.types.as_ref().map(cut) }
}

fn padded_left(text: &Text) -> Text {
    let turn = |tensor: &Tensor<2, Int>| {
        let (first, second) = (tensor.clone().narrow(0, 0, 1), tensor.clone().narrow(0, 1, 1));
        let (real, padding) = (second.clone().narrow(1, 0, SEQ - PADDED), second.narrow(1, SEQ - PADDED, PADDED));
        Tensor::cat(vec![first, Tensor::cat(vec![padding, real], 1)], 0)
    };
    Text { ids: turn(&text.ids), mask: text.mask.as_ref().map(turn), types: text.types.as_ref().map(turn) }
}

#[test]
fn padding_on_either_side_changes_nothing() {
    for name in TEXTS {
        let model = encoder(name);
        let text = text(name, true);
        let out = |text: Text| model.forward(&Input::Text(text));
        let (right, left) = (out(text.clone()), out(padded_left(&text)));
        let places = right.dims()[1];
        let padding = if places == SEQ { PADDED } else { 0 };
        for row in 0..2 {
            let hidden = if row == 1 { padding } else { 0 };
            let alone = values(out(unpadded(&text, row)));
            let of =
                |tensor: &Tensor<3>, start| values(tensor.clone().narrow(0, row, 1).narrow(1, start, places - hidden));
            near(&of(&right, 0), &alone, &format!("{name}, row {row}, right"));
            near(&of(&left, hidden), &alone, &format!("{name}, row {row}, left"));
        }
    }
}

#[derive(serde::Deserialize)]
struct Encoding {
    text: String,
    pair: Option<String>,
    max_length: usize,
    input_ids: Vec<i64>,
    attention_mask: Vec<i64>,
    token_type_ids: Option<Vec<i64>>,
}

fn encodings(name: &str) -> Vec<Encoding> {
    serde_json::from_str(&std::fs::read_to_string(dir(name).join("encodings.json")).unwrap()).unwrap()
}

/// What the tokenizer gives for each golden text, padded as far as this batch needs.
fn same_tokens(tokenizer: &Tokenizer, name: &str) {
    let cases = encodings(name);
    assert!(cases.len() >= 8);
    for case in cases {
        let pairs = tokenizer.pairs(case.max_length).unwrap();
        let encoded = pairs.encode(&case.text, case.pair.as_deref()).unwrap();
        let count = encoded.ids.len();
        let real = case.attention_mask.iter().filter(|mask| **mask == 1).count();
        let ids: Vec<i64> = encoded.ids.iter().map(|id| i64::from(*id)).collect();
        assert_eq!((ids, count), (case.input_ids[..real].to_vec(), real), "{name}: {}", case.text);
        if let Some(types) = &case.token_type_ids {
            let found: Vec<i64> = encoded.types.iter().map(|of| i64::from(*of)).collect();
            assert_eq!(found, types[..real], "{name}: {}", case.text);
        }
        let pieces = encoded.texts.iter().zip(&encoded.offsets).filter_map(|(text, range)| {
            let of = if (*text)? == 0 { &case.text } else { case.pair.as_ref()? };
            of.get(range.clone())
        });
        assert_eq!(pieces.count(), encoded.texts.iter().flatten().count(), "{name}: bytes of {}", case.text);
    }
}

#[test]
fn tokens_equal_transformers() {
    for name in ["bert_seqcls", "roberta_seqcls"] {
        same_tokens(&Tokenizer::from_dir(&dir(name)).unwrap(), name);
    }
}

#[test]
fn a_vocabulary_alone_is_a_tokenizer() {
    let alone = tempfile::tempdir().unwrap();
    std::fs::copy(dir("bert_seqcls").join("vocab.txt"), alone.path().join("vocab.txt")).unwrap();
    let tokenizer = Tokenizer::find(alone.path()).unwrap().unwrap();
    same_tokens(&tokenizer, "bert_seqcls");
    assert_eq!(tokenizer.pad_id(), 0);
    tokenizer.save(alone.path()).unwrap();
    assert!(alone.path().join("tokenizer.json").is_file());
    same_tokens(&Tokenizer::from_dir(alone.path()).unwrap(), "bert_seqcls");
    std::fs::remove_file(alone.path().join("tokenizer.json")).unwrap();
    std::fs::write(alone.path().join("vocab.txt"), "[PAD]\n[UNK]\nfilm\n").unwrap();
    let error = Tokenizer::from_dir(alone.path()).unwrap_err().to_string();
    assert!(error.contains("vocab.txt") && error.contains("[SEP] is not in it"), "{error}");
}

#[test]
fn a_batch_is_padded_on_the_right() {
    let tokenizer = Tokenizer::from_dir(&dir("roberta_seqcls")).unwrap();
    let pairs = tokenizer.pairs(64).unwrap();
    let words = ["Where", "is", "the", "train?"];
    let (row, of) = pairs.encode_words(&words).unwrap();
    assert_eq!(row, pairs.encode("Where is the train?", None).unwrap());
    for (word, range) in of.iter().zip(&row.offsets) {
        let Some(word) = word else { continue };
        let text = "Where is the train?"[range.clone()].trim_start();
        assert!(words[*word].contains(text), "{text} is no part of {}", words[*word]);
    }
    assert_eq!(of.iter().flatten().max(), Some(&3));
    assert_eq!((of[0], *of.last().unwrap()), (None, None));
    let short = pairs.encode("it left", None).unwrap();
    let batch = pairs.batch(&[row.clone(), short.clone()], &Device::flex());
    let (seq, real) = (row.ids.len(), short.ids.len());
    let ids: Vec<i64> = batch.ids.into_data().iter::<i64>().collect();
    assert!(ids[seq + real..].iter().all(|id| *id == 1));
    let mask: Vec<i64> = batch.mask.unwrap().into_data().iter::<i64>().collect();
    assert_eq!(mask.iter().sum::<i64>() as usize, seq + real);
    assert!(batch.types.is_none(), "RoBERTa does not tell the texts of a pair apart");
    assert!(pairs.batch(&[short], &Device::flex()).mask.is_none(), "nothing is padded");
    let error = tokenizer.pairs(4).unwrap().encode("it", Some("left")).unwrap_err().to_string();
    assert!(error.contains("a pair has 4 special tokens"), "{error}");
    let error = tokenizer.pairs(2).unwrap_err().to_string();
    assert!(error.contains("a text has 2 special tokens"), "{error}");
}

fn topics() -> Task {
    Task::classification(["sport", "science", "trade"])
}

#[test]
fn a_new_head_is_reported_and_the_same_for_a_seed() {
    let load = |seed| {
        let options = EncoderOptions { task: Some(topics()), seed, ..EncoderOptions::default() };
        load_dir(&dir("bert_base"), &options)
    };
    let PretrainedEncoder { model, files, unmatched } = load(7);
    assert_eq!(unmatched.fresh, ["classifier.weight", "classifier.bias"]);
    assert_eq!(unmatched.unused, ["embeddings.position_ids"]);
    assert_eq!(files.config["architectures"], serde_json::json!(["BertForSequenceClassification"]));
    let Architecture::Encoder(config) = files.architecture().unwrap() else { panic!("an encoder") };
    assert_eq!((&config, config.task.labels().len()), (model.config(), 3));
    let input = Input::Text(text("bert_base", true));
    near(
        &real(&values(model.hidden(&input)), true),
        &real(&floats(&golden("bert_base"), "hidden"), true),
        "the body is that of the checkpoint",
    );
    let logits = values(model.forward(&input));
    assert_eq!(logits, values(load(7).model.forward(&input)));
    assert!(deviation(&logits, &values(load(8).model.forward(&input))) > 1e-3);
}

#[test]
fn a_head_may_be_left_out_or_exchanged() {
    let input = Input::Text(text("bert_seqcls", true));
    let hidden = values(encoder("bert_seqcls").hidden(&input));
    let with = |task| load_dir(&dir("bert_seqcls"), &EncoderOptions { task: Some(task), ..EncoderOptions::default() });
    let alone = with(Task::Embedding);
    assert_eq!(values(alone.model.hidden(&input)), hidden);
    assert_eq!(alone.unmatched.unused, ["classifier.bias", "classifier.weight"]);
    assert!(alone.unmatched.fresh.is_empty(), "{:?}", alone.unmatched);
    assert!(scan(&alone.model).sites.iter().all(|site| !site.path.starts_with("bert.")));
    let span = with(Task::Span);
    assert_eq!(values(span.model.hidden(&input)), hidden);
    assert_eq!(span.unmatched.fresh, ["qa_outputs.weight", "qa_outputs.bias"]);
    let options = EncoderOptions { task: Some(Task::classification(["a", "b"])), ..EncoderOptions::default() };
    let error = PretrainedEncoder::load_with(&ModelSource::Dir(dir("bert_seqcls")), &options, &Device::flex());
    let error = error.unwrap_err().to_string();
    assert!(error.contains("classifier.weight: expected shape [2, 32], found [3, 32]"), "{error}");
}

#[test]
fn tasks_are_those_of_the_files() {
    let task = |name: &str| encoder(name).config().task.clone();
    assert_eq!(task("bert_seqcls"), Task::classification(["negative", "neutral", "positive"]));
    assert!(matches!(task("bert_multi"), Task::Classification { problem: Problem::MultiLabel, .. }));
    assert!(matches!(task("bert_regression"), Task::Classification { problem: Problem::Regression, .. }));
    assert_eq!(task("roberta_tokcls").labels(), ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]);
    assert_eq!((task("distilbert_qa"), task("bert_base")), (Task::Span, Task::Embedding));
}

#[test]
fn old_names_of_norms_are_read() {
    let old = tempfile::tempdir().unwrap();
    std::fs::copy(dir("bert_seqcls").join("config.json"), old.path().join("config.json")).unwrap();
    let rename = |(key, values): (String, Values)| match key.rsplit_once(".LayerNorm.") {
        Some((module, param)) => {
            (format!("{module}.LayerNorm.{}", if param == "weight" { "gamma" } else { "beta" }), values)
        }
        None => (key, values),
    };
    let tensors = read_values(&dir("bert_seqcls").join("model.safetensors")).unwrap();
    let renamed: Vec<(String, Values)> = tensors.into_iter().map(rename).collect();
    assert!(renamed.iter().filter(|(key, _)| key.ends_with(".gamma")).count() == 5);
    let path = old.path().join("model.safetensors");
    let bytes = write_values(renamed.iter().map(|(key, values)| (key.clone(), values)), &path).unwrap();
    std::fs::write(&path, bytes).unwrap();
    let input = Input::Text(text("bert_seqcls", true));
    let loaded = load_dir(old.path(), &EncoderOptions::default());
    near(&values(loaded.model.forward(&input)), &floats(&golden("bert_seqcls"), "logits"), "gamma and beta");
}

#[test]
fn a_part_of_the_body_that_is_missing_or_unknown_is_an_error() {
    let changed = |change: &dyn Fn(String) -> Option<String>| {
        let to = tempfile::tempdir().unwrap();
        std::fs::copy(dir("vit_imgcls").join("config.json"), to.path().join("config.json")).unwrap();
        let tensors = read_values(&dir("vit_imgcls").join("model.safetensors")).unwrap();
        let tensors: Vec<_> = tensors.into_iter().filter_map(|(key, v)| change(key).map(|key| (key, v))).collect();
        let path = to.path().join("model.safetensors");
        let bytes = write_values(tensors.iter().map(|(key, v)| (key.clone(), v)), &path).unwrap();
        std::fs::write(&path, bytes).unwrap();
        let loaded = PretrainedEncoder::load(&ModelSource::Dir(to.path().to_owned()), &Device::flex());
        loaded.unwrap_err().to_string()
    };
    let missing = changed(&|key| (key != "vit.embeddings.cls_token").then_some(key));
    assert!(missing.contains("vit.embeddings.cls_token: missing; expected shape [1, 1, 32]"), "{missing}");
    let unknown = changed(&|key| Some(key.replace("encoder.layer.1.layernorm_before", "encoder.layer.1.ln")));
    assert!(unknown.contains("vit.encoder.layer.1.ln.weight: not part of this model"), "{unknown}");
    assert!(unknown.contains("vit.encoder.layer.1.layernorm_before.weight: missing"), "{unknown}");
}

#[test]
fn adapters_attach_by_the_names_of_peft() {
    let paths = |name: &str, targets: Targets| -> Vec<String> {
        let adapted = encoder(name).attach(&LoraConfig::new(2, targets)).unwrap();
        scan(&adapted).adapted.into_iter().collect()
    };
    let found = paths("bert_seqcls", Targets::modules(["attention.self.query"]));
    let expected = [0, 1].map(|layer| format!("bert.encoder.layer.{layer}.attention.self.query"));
    assert_eq!(found, expected);
    assert_eq!(paths("bert_base", Targets::modules(["query"]))[1], "encoder.layer.1.attention.self.query");
    assert_eq!(
        paths("distilbert_qa", Targets::modules(["q_lin"]))[0],
        "distilbert.transformer.layer.0.attention.q_lin"
    );
    assert_eq!(paths("vit_imgcls", Targets::modules(["q_proj"]))[0], "vit.layers.0.attention.q_proj");
    assert_eq!(paths("dinov2_imgcls", Targets::modules(["fc1"]))[0], "dinov2.encoder.layer.0.mlp.fc1");
    assert_eq!(paths("roberta_seqcls", Targets::modules(["classifier.out_proj"])), ["classifier.out_proj"]);
    let linear = Targets { modules_to_save: Some(vec!["classifier".to_owned()]), ..Targets::all_linear() };
    let found = paths("bert_seqcls", linear);
    assert_eq!(found.len(), 2 * 6 + 1, "six in a block, and the pooler: {found:?}");
}

#[derive(serde::Deserialize)]
struct Case {
    path: String,
    base: String,
    variant: String,
}

/// What an adapted model of a golden directory gives for its inputs at real places.
fn outputs(model: &Encoder, name: &str) -> Vec<f32> {
    if IMAGES.contains(&name) {
        return values(model.forward(&pixels(name, "pixels", 2)));
    }
    let mut text = text(name, true);
    if name == "bert_qa" {
        // PEFT's wrapper of models for answers does not hand on the types.
        text.types = None;
    }
    let input = Input::Text(text);
    let found = if name == "bert_base" { model.hidden(&input) } else { model.forward(&input) };
    real(&values(found), true)
}

#[test]
fn adapters_of_peft_give_its_logits_and_merge() {
    let cases = std::fs::read_to_string(testdata().join("peft_heads/cases.json")).unwrap();
    let cases: Vec<Case> = serde_json::from_str(&cases).unwrap();
    let cases: Vec<Case> = cases.into_iter().filter(|case| case.variant.starts_with("lora")).collect();
    assert!(cases.len() >= 9);
    for Case { path, base, variant } in cases {
        let (dir, named) = (testdata().join(path), format!("{base}/{variant}"));
        let load = |model: Encoder, dir: &Path| {
            load_adapter::<_, LoraConfig>(model, dir).unwrap_or_else(|error| panic!("{named}: {error}"))
        };
        let (adapted, method) = load(encoder(&base), &dir);
        let key = if base == "bert_base" { "hidden" } else { "logits" };
        let expected = |key: &str| {
            let values = floats(&dir.join("logits.safetensors"), key);
            if IMAGES.contains(&base.as_str()) { values } else { real(&values, true) }
        };
        near(&outputs(&adapted, &base), &expected(key), &named);
        let again = tempfile::tempdir().unwrap();
        save_adapter(&adapted, &method, Some("base"), again.path()).unwrap();
        let read = |dir: &Path| read_values(&dir.join(TENSOR_FILE)).unwrap();
        assert_eq!(read(again.path()), read(&dir), "{named}, saved again");
        let merged = merge(adapted, &method).unwrap();
        near(&outputs(&merged, &base), &expected(&format!("{key}_merged")), &format!("{named}, merged"));
        if dir.join("v4").is_dir() {
            let (old, _) = load(encoder(&base).renamed(Naming::Files), &dir.join("v4"));
            near(&outputs(&old, &base), &expected(key), &format!("{named}, names of transformers 4"));
        }
    }
}

#[test]
fn a_merged_encoder_is_written_as_transformers_writes_it() {
    for name in ["roberta_seqcls", "vit_imgcls"] {
        let PretrainedEncoder { model, files, .. } = load_dir(&dir(name), &EncoderOptions::default());
        let to = tempfile::tempdir().unwrap();
        save_model(&model.renamed(Naming::Files), &files.config, None, Dtype::F32, to.path()).unwrap();
        let read = |dir: &Path| read_values(&dir.join("model.safetensors")).unwrap();
        assert_eq!(read(to.path()), read(&dir(name)), "{name}");
        assert_eq!(
            outputs(&load_dir(to.path(), &EncoderOptions::default()).model, name),
            outputs(&encoder(name), name)
        );
    }
}

/// The gradients of every trained parameter, one after the other.
struct Gradients<'a> {
    of: &'a GradientsParams,
    values: Vec<f32>,
}

impl ParamVisitor for Gradients<'_> {
    fn float<const D: usize>(&mut self, _at: &PathStack, param: &Param<Tensor<D>>) {
        self.values.extend(self.of.get::<D>(param.id).map(values).into_iter().flatten());
    }
}

/// Gradients of a LoRA over rows with padding equal those over the same rows alone.
#[test]
fn padding_changes_no_gradient() {
    let device = Device::flex().autodiff();
    let lora = LoraConfig::new(2, Targets::modules(["query", "value"]));
    let model = PretrainedEncoder::load(&ModelSource::Dir(dir("bert_seqcls")), &device).unwrap().model;
    let model = model.attach(&lora).unwrap();
    let on = |tensor: Tensor<2, Int>| Tensor::<2, Int>::from_data(tensor.into_data(), &device);
    let gradient = |texts: Vec<Text>| {
        let square = |Text { ids, mask, types }| {
            let text = Text { ids: on(ids), mask: mask.map(on), types: types.map(on) };
            model.forward(&Input::Text(text)).square().sum()
        };
        let loss = texts.into_iter().map(square).reduce(|a, b| a + b).unwrap();
        let of = GradientsParams::from_grads(loss.backward(), &model);
        let mut gradients = Gradients { of: &of, values: Vec::new() };
        visit_params(&model, &mut gradients);
        gradients.values
    };
    let text = text("bert_seqcls", true);
    let alone = gradient(vec![unpadded(&text, 0), unpadded(&text, 1)]);
    assert!(alone.iter().any(|value| value.abs() > 1e-3), "a gradient arrives");
    near(&gradient(vec![text.clone()]), &alone, "right");
    near(&gradient(vec![padded_left(&text)]), &alone, "left");
}

#[test]
fn packed_and_bfloat16_encoders_are_near() {
    let input = Input::Text(text("bert_seqcls", true));
    let dense = values(encoder("bert_seqcls").hidden(&input));
    let largest = real(&dense, true).iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
    let loaded = |packing, precision| {
        let options = EncoderOptions { packing, precision, ..EncoderOptions::default() };
        load_dir(&dir("bert_seqcls"), &options).model
    };
    let nf4 = loaded(Packing::Quantize(Quantization::new(Format::NF4)), Precision::F32);
    let sites = scan(&nf4).sites;
    assert!(sites.iter().any(|site| site.packed.is_some()));
    assert!(sites.iter().all(|site| site.path != "classifier" || site.packed.is_none()), "the head stays dense");
    let bf16 = loaded(Packing::AsStored, Precision::Bf16);
    for site in scan(&bf16).sites {
        let is_matrix = matches!(site.kind, LayerKind::Linear | LayerKind::Embedding);
        assert_eq!(site.dtype == DType::BF16, is_matrix, "{}: {:?}", site.path, site.dtype);
    }
    for (model, name, bound) in [(nf4, "nf4", 0.25), (bf16, "bf16", 0.05)] {
        let found = deviation(&real(&values(model.hidden(&input)), true), &real(&dense, true)) / largest;
        assert!(found > 1e-5 && found < bound, "{name}: {found}");
    }
}

#[test]
fn what_a_model_cannot_read_is_refused() {
    let text_of = |seq: usize| Text::new(matrix(1, vec![5; seq]));
    let refused = |name: &str, input: Input| match encoder(name).check(&input) {
        Err(error @ Error::Input { .. }) => error.to_string(),
        other => panic!("{name}: {other:?}"),
    };
    for name in ["bert_seqcls", "roberta_seqcls"] {
        encoder(name).check(&Input::Text(text_of(64))).unwrap();
        let found = refused(name, Input::Text(text_of(65)));
        assert!(found.contains("expected 1 to 64 tokens a row, found 65"), "{found}");
    }
    let found = refused("bert_base", Input::Text(Text { mask: Some(matrix(1, vec![1; 3])), ..text_of(4) }));
    assert!(found.contains("mask of shape [1, 4]") && found.contains("[1, 3]"), "{found}");
    let found = refused("bert_base", pixels("vit_imgcls", "pixels", 2));
    assert!(found.contains("expected text, found pixels"), "{found}");
    let found = refused("vit_imgcls", Input::Text(text_of(4)));
    assert!(found.contains("expected pixels, found text"), "{found}");
    let small = Tensor::zeros([1, 3, 7, 40], &Device::flex());
    let found = refused("vit_imgcls", Input::Pixels(small));
    assert!(found.contains("sides of 8 pixels at least") && found.contains("7 × 40"), "{found}");
}

#[test]
fn the_other_kind_of_model_is_named() {
    let decoder = ModelSource::Dir(testdata().join("models/llama"));
    let error = PretrainedEncoder::load(&decoder, &Device::flex()).unwrap_err().to_string();
    assert!(error.contains("a decoder") && error.contains("Pretrained"), "{error}");
    assert!(matches!(decoder.open().unwrap().architecture().unwrap(), Architecture::Decoder(_)));
    let encoder = ModelSource::Dir(dir("bert_base"));
    let error = Pretrained::load(&encoder, &Device::flex()).unwrap_err().to_string();
    assert!(error.contains("\"bert\"") && error.contains("PretrainedEncoder"), "{error}");
}

#[test]
fn hostile_pictures_and_processors_are_refused() {
    use peft_models::image::ImageProcessor;
    let to = tempfile::tempdir().unwrap();
    let write = |json: serde_json::Value| {
        std::fs::write(to.path().join("preprocessor_config.json"), json.to_string()).unwrap();
        ImageProcessor::from_dir(to.path())
    };
    for (json, field) in [
        (serde_json::json!({"resample": 0}), "resample"),
        (serde_json::json!({"size": {"height": 0, "width": 3}}), "size"),
        (serde_json::json!({"size": {"shortest_edge": 1_000_000_000}}), "size"),
        (serde_json::json!({"image_std": [1.0, 0.0, 1.0]}), "image_std"),
        (serde_json::json!({"do_center_crop": true, "crop_size": {"shortest_edge": 3}}), "crop_size"),
        (serde_json::json!({"size": "large"}), "expected a number, height and width, or shortest_edge"),
    ] {
        let error = write(json).unwrap_err().to_string();
        assert!(error.contains("preprocessor_config.json") && error.contains(field), "{error}");
    }
    let crop = serde_json::json!({"do_resize": false, "do_center_crop": true, "crop_size": {"height": 9, "width": 9}});
    let processor = write(crop).unwrap();
    let error = processor.pixels_of(vec![0; 8 * 9 * 3], 8, 9, &Device::flex()).unwrap_err().to_string();
    assert!(error.contains("8 × 9 pixels are too few to cut out 9 × 9"), "{error}");
    let error = processor.pixels_of(vec![0; 5], 9, 9, &Device::flex()).unwrap_err().to_string();
    assert!(error.contains("9 × 9 × 3 bytes") && error.contains("5 bytes"), "{error}");
    let broken = to.path().join("broken.png");
    let whole = std::fs::read(dir("vit_imgcls").join("image.png")).unwrap();
    std::fs::write(&broken, &whole[..whole.len() / 2]).unwrap();
    let error = processor.read(&broken, &Device::flex()).unwrap_err().to_string();
    assert!(error.contains("broken.png"), "{error}");
}
