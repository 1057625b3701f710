//! Training encoders for labels: on texts, words and pictures; resumed bit for bit; adapters of PEFT with heads, by methods other than LoRA.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use burn::module::Module as _;
use burn::tensor::{Device, Int, Tensor, TensorData};
use peft_adapter::{Ia3Config, LnTuningConfig};
use peft_core::files::TENSOR_FILE;
use peft_core::{Method, Peft as _, Targets, attach, load_adapter, merge};
use peft_lora::LoraConfig;
use peft_models::config::Architecture;
use peft_models::encoder::{Input, Text};
use peft_models::heads::{Problem, Task};
use peft_models::tokenizer::Tokenizer;
use peft_models::{Encoder, EncoderOptions, ModelSource, PretrainedEncoder};
use peft_train::data::{
    BatchOptions, Batches, Content, Label, Labelled, LabelledRow, Picture, Reader, Target, label, task_of,
};
use peft_train::{
    AdapterOf, Labelling, Objective, Outcome, Schedule, Summary, TrainConfig, Trained, WholeModel, task_of_adapter,
    train,
};

use crate::golden::{BOUND, deviation, floats, ints, testdata};

fn dir(name: &str) -> PathBuf {
    testdata().join("encoders").join(name)
}

fn load(name: &str, task: &Task, device: &Device) -> PretrainedEncoder {
    let options = EncoderOptions { task: Some(task.clone()), seed: 5, ..EncoderOptions::default() };
    PretrainedEncoder::load_with(&ModelSource::Dir(dir(name)), &options, device).unwrap()
}

fn text_reader() -> Reader {
    Reader::Text(Tokenizer::from_dir(&dir("bert_seqcls")).unwrap().pairs(24).unwrap())
}

fn text(text: &str, label: Label) -> LabelledRow {
    LabelledRow { content: Content::Text { text: text.to_owned(), pair: None }, label }
}

/// Films that are said to be good or bad, in words of different number.
fn films() -> Vec<LabelledRow> {
    let film = |i: usize| {
        let (word, label) = if i.is_multiple_of(2) { ("good", "yes") } else { ("bad", "no") };
        let words = ["the", "film", "was", "of", "in", "thing"];
        let filler = |at: usize| words[(i * 7 + at * 3) % words.len()];
        let text_of = (0..2 + i % 5).map(filler).chain([word]).chain((0..i % 3).map(filler)).collect::<Vec<_>>();
        text(&text_of.join(" "), Label::One(label.to_owned()))
    };
    (0..48).map(film).collect()
}

fn batches(samples: Vec<Labelled>) -> Batches<Labelled> {
    Batches::new(samples, BatchOptions { batch_size: 4, pack: None, seed: 3, pad: 0 }).unwrap()
}

fn settings(steps: usize) -> TrainConfig {
    TrainConfig { steps, learning_rate: 2e-2, save_every: 8, eval_every: 8, ..TrainConfig::default() }
}

/// The head is trained along with the adapter.
fn lora() -> LoraConfig {
    let targets =
        Targets { modules_to_save: Some(vec!["classifier".to_owned()]), ..Targets::modules(["query", "value"]) };
    LoraConfig::new(4, targets).with_alpha(8.0)
}

struct Job<'a> {
    base: &'a str,
    rows: &'a [LabelledRow],
    reader: Reader,
    method: LoraConfig,
    config: TrainConfig,
}

impl Job<'_> {
    fn task(&self) -> Task {
        task_of(self.rows, None).unwrap()
    }

    fn samples(&self) -> Vec<Labelled> {
        label(self.rows, &self.reader, &self.task()).unwrap().0
    }

    fn objective(&self) -> Labelling {
        Labelling::new(self.reader.clone(), self.task(), 0.0).unwrap()
    }

    fn run(&self, dir: &Path, resume: bool, stop: bool) -> (Encoder, Summary) {
        let device = Device::flex().autodiff();
        let PretrainedEncoder { model, files, .. } = load(self.base, &self.task(), &device);
        let model = attach(model, &self.method, 1).unwrap();
        let trained = AdapterOf::on(self.method.clone(), &files).unwrap();
        let held_out = batches(self.samples());
        let stop = AtomicBool::new(stop);
        let (train_on, config) = (batches(self.samples()), &self.config);
        train(&self.objective(), model, &trained, train_on, Some(&held_out), config, dir, resume, &device, &stop)
            .unwrap()
    }
}

#[test]
fn a_classifier_learns_and_comes_back_from_its_files() {
    let (rows, out) = (films(), tempfile::tempdir().unwrap());
    let job = Job { base: "bert_base", rows: &rows, reader: text_reader(), method: lora(), config: settings(48) };
    let (_, summary) = job.run(out.path(), false, false);
    let (before, after) = (summary.before.unwrap(), summary.after.unwrap());
    assert!(after.loss < 0.5 * before.loss, "{before} {after}");
    assert!(after.measures["accuracy"] > 0.9 && after.measures["f1"] > 0.9, "{after}");
    for file in ["loss.svg", "confusion.svg", "task.json", "metrics.jsonl", "checkpoint-48/task.json"] {
        assert!(out.path().join(file).is_file(), "{file}");
    }
    let config = std::fs::read_to_string(out.path().join("adapter_config.json")).unwrap();
    assert!(config.contains("\"SEQ_CLS\""), "{config}");

    let device = Device::flex();
    let Architecture::Encoder(config) = ModelSource::Dir(dir("bert_base")).open().unwrap().architecture().unwrap()
    else {
        panic!("an encoder");
    };
    let task = task_of_adapter(out.path(), &config).unwrap();
    assert_eq!(task, Task::classification(["no", "yes"]));
    let base = load("bert_base", &task, &device).model;
    let (adapted, method) = load_adapter::<_, LoraConfig>(base, out.path()).unwrap();
    let report = job.objective().report(&adapted, &batches(job.samples()), &device).unwrap();
    assert_eq!(report.evaluation, after, "the model that was kept");
    let counts: usize = report.confusion.unwrap().counts().iter().flatten().sum();
    assert_eq!(counts, rows.len());
    let merged = merge(adapted, &method).unwrap();
    let found = job.objective().evaluate(&merged, &batches(job.samples()), &device).unwrap();
    assert!((found.loss - after.loss).abs() < 1e-4, "{found} {after}");
}

#[test]
fn a_run_on_labels_resumes_bit_for_bit() {
    let (rows, whole, broken) = (films(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let job = Job { base: "bert_base", rows: &rows, reader: text_reader(), method: lora(), config: settings(16) };
    job.run(whole.path(), false, false);
    for step in 1..4 {
        let (_, summary) = job.run(broken.path(), step > 1, true);
        assert_eq!((summary.outcome, summary.steps), (Outcome::Interrupted, step));
    }
    job.run(broken.path(), true, false);
    let read = |dir: &Path| std::fs::read(dir.join("checkpoint-16").join(TENSOR_FILE)).unwrap();
    assert!(read(whole.path()) == read(broken.path()));
}

#[test]
fn words_lists_of_labels_and_numbers_are_learnt() {
    let film = |i: usize| -> &str { ["the film was good", "a bad film", "not good", "the thing was bad ."][i % 4] };
    let good = |text: &str| text.contains("good") && !text.contains("not");
    let words = |i: usize| {
        let words: Vec<String> = film(i).split(' ').map(str::to_owned).collect();
        let label = |word: &String| if ["good", "bad"].contains(&word.as_str()) { "QUALITY" } else { "O" };
        let labels = words.iter().map(label).map(str::to_owned).collect();
        LabelledRow { content: Content::Words(words), label: Label::Each(labels) }
    };
    let lists = |i: usize| {
        let found = ["film", "bad", "good"].into_iter().filter(|word| film(i).contains(word));
        text(film(i), Label::Many(found.map(str::to_owned).collect()))
    };
    let numbers = |i: usize| text(film(i), Label::One(if good(film(i)) { "0.5" } else { "-1.5" }.to_owned()));
    type Make<'a> = &'a dyn Fn(usize) -> LabelledRow;
    let cases: [(Make<'_>, &str, &str); 3] =
        [(&words, "accuracy", "TOKEN_CLS"), (&lists, "f1_micro", "SEQ_CLS"), (&numbers, "pearson", "SEQ_CLS")];
    for (row, measure, kind) in cases {
        let (rows, out) = ((0..16).map(row).collect::<Vec<_>>(), tempfile::tempdir().unwrap());
        let job = Job { base: "bert_base", rows: &rows, reader: text_reader(), method: lora(), config: settings(60) };
        let (_, summary) = job.run(out.path(), false, false);
        let (before, after) = (summary.before.unwrap(), summary.after.unwrap());
        assert!(after.loss < 0.5 * before.loss, "{measure}: {before} {after}");
        assert!(after.measures[measure] > 0.9, "{measure}: {after}");
        let config = std::fs::read_to_string(out.path().join("adapter_config.json")).unwrap();
        assert!(config.contains(kind), "{config}");
        assert_eq!(out.path().join("confusion.svg").exists(), measure == "accuracy");
    }
}

/// Black and white squares in grey, of a size that the processor must change.
#[test]
fn pictures_are_learnt() {
    let square = |i: usize| {
        let grey = if i.is_multiple_of(2) { 30 + i as u8 } else { 220 - i as u8 };
        let picture = Picture::Grey { values: vec![grey; 9 * 7], height: 9, width: 7 };
        let label = if i.is_multiple_of(2) { "black" } else { "white" };
        LabelledRow { content: Content::Picture(picture), label: Label::One(label.to_owned()) }
    };
    let rows: Vec<LabelledRow> = (0..12).map(square).collect();
    let task = task_of(&rows, None).unwrap();
    let device = Device::flex().autodiff();
    let options = EncoderOptions { task: Some(Task::Embedding), ..EncoderOptions::default() };
    let body = PretrainedEncoder::load_with(&ModelSource::Dir(dir("vit_imgcls")), &options, &device).unwrap();
    let reader = Reader::new(&body, None).unwrap();
    // The checkpoint has a head for four labels; a new one takes its place where there is none.
    let error = PretrainedEncoder::load_with(
        &ModelSource::Dir(dir("vit_imgcls")),
        &EncoderOptions { task: Some(task.clone()), ..EncoderOptions::default() },
        &device,
    );
    assert!(error.unwrap_err().to_string().contains("classifier.weight"));
    let task = Task::classification(["black", "white", "c", "d"]);
    let PretrainedEncoder { model, files, .. } = load("vit_imgcls", &task, &device);
    let objective = Labelling::new(reader.clone(), task.clone(), 0.1).unwrap();
    let samples = label(&rows, &reader, &task).unwrap().0;
    let before = objective.evaluate(&model.valid(), &batches(samples.clone()), &device).unwrap();
    let out = tempfile::tempdir().unwrap();
    let trained = WholeModel::of(&files).unwrap();
    let config = TrainConfig { learning_rate: 5e-3, schedule: Schedule::Constant, ..settings(24) };
    let never = AtomicBool::new(false);
    let (model, _) =
        train(&objective, model, &trained, batches(samples.clone()), None, &config, out.path(), false, &device, &never)
            .unwrap();
    let after = objective.evaluate(&model.valid(), &batches(samples.clone()), &device).unwrap();
    assert!(after.measures["accuracy"] > 0.9 && after.loss < before.loss, "{before} {after}");
    // All of it was trained, and all of it is in the folder, as `transformers` names it.
    assert_eq!(model.trainable().trainable, model.trainable().total);
    let again = PretrainedEncoder::load(&ModelSource::Dir(out.path().to_owned()), &Device::flex()).unwrap();
    assert_eq!((&again.model.config().task, again.unmatched.fresh.len()), (&task, 0));
    let found = objective.evaluate(&again.model, &batches(samples), &Device::flex()).unwrap();
    assert!((found.loss - after.loss).abs() < 1e-6, "{found} {after}");
    Reader::new(&again, None).unwrap();
}

/// What was frozen is frozen still after a checkpoint was read.
#[test]
fn a_whole_model_comes_back_with_what_it_trains() {
    let device = Device::flex().autodiff();
    let task = Task::classification(["no", "yes"]);
    let PretrainedEncoder { model, files, .. } = load("bert_base", &task, &device);
    let model = model.no_grad();
    let trained = WholeModel::of(&files).unwrap();
    let out = tempfile::tempdir().unwrap();
    trained.save(&model, out.path()).unwrap();
    let again: Encoder = trained.restore(model.clone(), out.path()).unwrap();
    assert_eq!(again.trainable(), model.trainable());
    assert_eq!(again.trainable().trainable, 0);
}

#[test]
fn a_row_that_does_not_fit_the_model_is_named() {
    let reader = text_reader();
    let refused = |row: LabelledRow, task: &Task| {
        label(&[text("good", Label::One("no".to_owned())), row], &reader, task).unwrap_err().to_string()
    };
    let task = Task::classification(["no", "yes"]);
    let found = refused(text("a film", Label::One("perhaps".to_owned())), &task);
    assert_eq!(found, "row 2: the label \"perhaps\" is none of no, yes");
    let found = refused(text("a film", Label::Many(Vec::new())), &task);
    assert!(found.contains("row 2: its label Many([])") && found.contains("one label a row"), "{found}");
    let picture = Content::Picture(Picture::File("a.png".into()));
    let found = refused(LabelledRow { content: picture, label: Label::One("no".to_owned()) }, &task);
    assert!(found.contains("row 2: input of the model: expected a text, found a picture"), "{found}");
    let numbers = Task::Classification { labels: vec!["score".to_owned()], problem: Problem::Regression };
    let found = refused(text("a film", Label::One("1.5".to_owned())), &numbers);
    assert_eq!(found, "row 1: the label \"no\" is no number");
}

#[test]
fn long_texts_are_cut_and_counted() {
    let reader = Reader::Text(Tokenizer::from_dir(&dir("bert_seqcls")).unwrap().pairs(6).unwrap());
    let rows = ["good", "the film was not good", "a film is bad   "].map(|of| text(of, Label::One("yes".to_owned())));
    let (samples, report) = label(&rows, &reader, &Task::classification(["no", "yes"])).unwrap();
    assert_eq!(report.to_string(), "3 rows, 15 tokens; 1 cut at max_len");
    assert_eq!(samples[1].content.length(), 6);
    assert_eq!(samples[1].target, Target::Class(1));
    let words = ["film", "zzz", "was"].map(str::to_owned).to_vec();
    let row =
        LabelledRow { content: Content::Words(words), label: Label::Each(["A", "B", "A"].map(str::to_owned).to_vec()) };
    let task = Task::Tokens { labels: vec!["A".to_owned(), "B".to_owned()] };
    let (samples, report) = label(&[row], &text_reader(), &task).unwrap();
    assert_eq!((report.rows_cut, report.tokens), (0, 7));
    // [CLS] film z ##z ##z was [SEP]
    assert_eq!(samples[0].target, Target::Each(vec![None, Some(0), Some(1), None, None, Some(0), None]));
}

/// Adapters of PEFT with heads, by methods other than `LoRA`.
fn check<M: Method>(base: &str, variant: &str) {
    let path = testdata().join("peft_heads").join(format!("{base}_{variant}"));
    let golden = path.join("logits.safetensors");
    let matrix = |key: &str| {
        let (shape, values) = ints(&golden, key);
        Tensor::<2, Int>::from_data(TensorData::new(values, shape), &Device::flex())
    };
    let types = base.starts_with("bert").then(|| matrix("token_type_ids"));
    let input = Input::Text(Text { ids: matrix("tokens"), mask: Some(matrix("attention_mask")), types });
    let model = PretrainedEncoder::load(&ModelSource::Dir(dir(base)), &Device::flex()).unwrap().model;
    let logits = |model: &Encoder| model.forward(&input).into_data().iter::<f32>().collect::<Vec<_>>();
    let (adapted, method) = load_adapter::<_, M>(model, &path).unwrap();
    let found = deviation(&logits(&adapted), &floats(&golden, "logits"));
    assert!(found < BOUND, "{base}, {variant}: {found}");
    let merged = merge(adapted, &method).unwrap();
    let found = deviation(&logits(&merged), &floats(&golden, "logits_merged"));
    assert!(found < BOUND, "{base}, {variant}, merged: {found}");
}

#[test]
fn scaled_and_normed_encoders_of_peft_give_its_logits() {
    check::<Ia3Config>("bert_seqcls", "ia3");
    check::<Ia3Config>("roberta_seqcls", "ia3");
    check::<LnTuningConfig>("bert_seqcls", "ln_tuning");
}

/// PEFT's files name no labels: the head says how many there are, and the base what they are called.
#[test]
fn the_task_of_an_adapter_without_names() {
    let config = |name: &str| match ModelSource::Dir(dir(name)).open().unwrap().architecture().unwrap() {
        Architecture::Encoder(config) => config,
        Architecture::Decoder(_) => panic!("an encoder"),
    };
    let task = |adapter: &str, base: &str| {
        task_of_adapter(&testdata().join("peft_heads").join(adapter), &config(base)).unwrap()
    };
    let named = Task::classification(["negative", "neutral", "positive"]);
    assert_eq!(task("bert_seqcls_lora_qv", "bert_seqcls"), named);
    assert_eq!(task("bert_seqcls_lora_qv", "bert_base"), Task::classification(["LABEL_0", "LABEL_1", "LABEL_2"]));
    assert_eq!(task("bert_qa_lora_qv", "bert_base"), Task::Span);
    assert_eq!(task("bert_base_lora_qv", "bert_seqcls"), Task::Embedding);
    assert_eq!(task("vit_imgcls_lora_qv", "vit_imgcls"), config("vit_imgcls").task);
    let Task::Tokens { labels } = task("bert_tokcls_lora_qv", "bert_base") else { panic!("tokens") };
    assert_eq!(labels.len(), config("bert_tokcls").task.labels().len());
}
