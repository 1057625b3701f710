//! Encoders on the command line: trained on labels, resumed, measured, used, merged; adapters of PEFT with heads; and what is refused.

use super::*;

/// A folder with a tiny BERT without a head (96 tokens: letters, digits and some words), its tokenizer, and films that are good or bad.
struct Films {
    dir: TempDir,
}

impl Films {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let model = dir.path().join("bert");
        fs::create_dir(&model).unwrap();
        for (from, name) in [
            ("bert_base", "model.safetensors"),
            ("bert_base", "config.json"),
            ("bert_seqcls", "tokenizer.json"),
            ("bert_seqcls", "tokenizer_config.json"),
        ] {
            fs::copy(testdata(&format!("encoders/{from}/{name}")), model.join(name)).unwrap();
        }
        let row = |i: usize| {
            let word = if i.is_multiple_of(2) { "good" } else { "bad" };
            format!("\"the film, {}\",{word}", [word, "was", "the thing", word][i % 3..].join(" "))
        };
        let rows: Vec<String> = (0..32).map(row).collect();
        fs::write(dir.path().join("films.csv"), format!("text,label\n{}\n", rows.join("\n"))).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    fn write(&self, name: &str, text: &str) -> String {
        fs::write(self.path(name), text).unwrap();
        self.path(name)
    }

    /// Arguments of a run on `data` into `out`, with `more` behind.
    fn train(&self, data: &str, out: &str, more: &[&str]) -> Vec<String> {
        let (model, data, out) = (self.path("bert"), self.path(data), self.path(out));
        let fixed = ["train", "--json", "--schedule", "constant", "--warmup", "0"];
        let mut args: Vec<String> = fixed.map(str::to_owned).to_vec();
        args.extend(["--model", &model, "--data", &data, "--out", &out].map(str::to_owned));
        args.extend(more.iter().map(|arg| (*arg).to_owned()));
        args
    }
}

const LORA: [&str; 6] = ["--targets", "query,value", "--rank", "4", "--lr", "0.02"];

#[test]
fn a_classifier_is_trained_resumed_measured_used_and_merged() {
    let shop = Films::new();
    let run = |out: &str, more: &[&str]| json_of(&strs(&shop.train("films.csv", out, &[&LORA, more].concat())));
    let result = run("whole", &["--steps", "24"]);
    assert_eq!(result["data"]["labels"], json!(["bad", "good"]));
    assert!(result["after"]["accuracy"].as_f64().unwrap() > 0.9, "{result}");
    let (model, adapter) = (shop.path("bert"), shop.path("whole"));
    for file in ["adapter_config.json", "task.json", "loss.svg", "confusion.svg", "checkpoint-24/state.json"] {
        assert!(Path::new(&adapter).join(file).is_file(), "{file}");
    }
    let config: Value = serde_json::from_slice(&fs::read(format!("{adapter}/adapter_config.json")).unwrap()).unwrap();
    assert_eq!((&config["task_type"], &config["modules_to_save"]), (&json!("SEQ_CLS"), &json!(["classifier"])));

    run("broken", &["--steps", "11"]);
    json_of(&["train", "--json", "--out", &shop.path("broken"), "--resume", "--steps", "24"]);
    assert!(adapter_bytes(&adapter) == adapter_bytes(&shop.path("broken")));

    let data = shop.path("films.csv");
    let picture = shop.path("matrix.svg");
    let eval = |more: &[&str]| json_of(&[&["eval", "--json", "--data", &data, "--model"], more].concat());
    let found = eval(&[&model, "--adapter", &adapter, "--confusion", &picture]);
    assert!(found["accuracy"].as_f64().unwrap() > 0.9 && found["f1"].as_f64().unwrap() > 0.9, "{found}");
    assert_eq!((&found["rows"], &found["labels"][1]["support"]), (&json!(32), &json!(16)));
    assert!(fs::read_to_string(&picture).unwrap().contains("<svg"));
    let lines = peft(&["eval", "--data", &data, "--model", &model, "--adapter", &adapter]).stdout;
    let lines = String::from_utf8(lines).unwrap();
    assert!(lines.contains("accuracy") && lines.contains("precision") && lines.contains("  good"), "{lines}");

    let predict =
        |more: &[&str]| json_of(&[&["predict", "--json", "--text", "the film was good", "--model"], more].concat());
    let answer = predict(&[&model, "--adapter", &adapter]);
    assert_eq!(answer["label"], "good");
    let parts = answer["all"].as_object().unwrap().values().map(|part| part.as_f64().unwrap()).sum::<f64>();
    assert!((parts - 1.0).abs() < 1e-6 && answer["value"].as_f64().unwrap() > 0.5, "{answer}");

    let merged = shop.path("merged");
    json_of(&["merge", "--json", "--model", &model, "--adapter", &adapter, "--out", &merged]);
    let again = predict(&[&merged]);
    assert!((again["value"].as_f64().unwrap() - answer["value"].as_f64().unwrap()).abs() < 1e-4, "{again} {answer}");
    assert_eq!(eval(&[&merged])["confusion"], found["confusion"]);
    let inspected = json_of(&["inspect", "--json", &merged]);
    assert_eq!((&inspected["architecture"], &inspected["labels"]), (&json!("bert"), &json!(["bad", "good"])));
}

/// A prefix, bottlenecks and LoRA with gates beside a head, as one adapter.
#[test]
fn a_union_is_trained_measured_and_not_merged() {
    let shop = Films::new();
    let sizes = ["--num-virtual-tokens", "4", "--encoder-hidden-size", "8", "--reduction-factor", "4", "--rank", "2"];
    let run = ["--method", "unipelt", "--targets", "query,value", "--lr", "0.02", "--steps", "24"];
    let result = json_of(&strs(&shop.train("films.csv", "unipelt", &[&run[..], &sizes].concat())));
    assert!(result["after"]["accuracy"].as_f64().unwrap() > 0.9, "{result}");
    let (model, adapter, data) = (shop.path("bert"), shop.path("unipelt"), shop.path("films.csv"));
    let found = json_of(&["eval", "--json", "--model", &model, "--adapter", &adapter, "--data", &data]);
    assert!(found["accuracy"].as_f64().unwrap() > 0.9, "{found}");
    let inspected = json_of(&["inspect", "--json", &adapter]);
    assert_eq!((&inspected["method"], &inspected["known"]), (&json!("UNION"), &json!(true)));
    let (code, message) = refused(&["merge", "--model", &model, "--adapter", &adapter, "--out", &shop.path("merged")]);
    assert!(code == 1 && message.contains("gate") && message.contains("prompt"), "{message}");
    let no_layers = shop.train("films.csv", "none", &["--method", "unipelt", "--steps", "1"]);
    let (code, message) = refused(&strs(&no_layers));
    assert!(code == 2 && message.contains("--targets"), "{message}");
}

/// Texts have prompts of their own, before and after the adapter is saved.
#[test]
fn a_prompt_that_depends_on_the_text_is_trained() {
    let shop = Films::new();
    let own = ["--method", "p-tuning", "--encoder", "lstm", "--input-conditioned", "--encoder-hidden-size", "8"];
    let more = ["--num-virtual-tokens", "4", "--lr", "0.02", "--steps", "24"];
    let result = json_of(&strs(&shop.train("films.csv", "conditioned", &[&own[..], &more].concat())));
    assert!(result["after"]["accuracy"].as_f64().unwrap() > 0.9, "{result}");
    let (model, adapter, data) = (shop.path("bert"), shop.path("conditioned"), shop.path("films.csv"));
    let found = json_of(&["eval", "--json", "--model", &model, "--adapter", &adapter, "--data", &data]);
    assert!(found["accuracy"].as_f64().unwrap() > 0.8, "{found}");
}

#[test]
fn a_whole_model_and_a_head_alone_are_trained() {
    let shop = Films::new();
    for (method, lr, trained) in [("full", "0.002", None), ("head", "0.05", Some(32 * 2 + 2))] {
        let more = ["--method", method, "--lr", lr, "--steps", "24"];
        let result = json_of(&strs(&shop.train("films.csv", method, &more)));
        let loss = |of: &str| result[of]["loss"].as_f64().unwrap();
        assert!(loss("after") < 0.95 * loss("before"), "{method}: {result}");
        let parameters = &result["parameters"];
        let expected = trained.map_or_else(|| parameters["total"].clone(), |count: usize| json!(count));
        assert_eq!(parameters["trainable"], expected, "{method}");
        let out = shop.path(method);
        assert!(
            Path::new(&out).join("model.safetensors").is_file() && Path::new(&out).join("tokenizer.json").is_file()
        );
        let query = |dir: &str, prefix: &str| {
            tensor(&format!("{dir}/model.safetensors"), &format!("{prefix}encoder.layer.0.attention.self.query.weight"))
        };
        let unchanged = query(&shop.path("bert"), "") == query(&out, "bert.");
        assert_eq!(unchanged, method == "head");
        let answer = json_of(&["predict", "--json", "--model", &out, "--text", "the film was good"]);
        assert!(["good", "bad"].contains(&answer["label"].as_str().unwrap()));
        // A checkpoint holds the model too, and is gone on from.
        let more = ["train", "--json", "--out", &out, "--resume", "--steps", "26"];
        let resumed = json_of(&more);
        assert_eq!((&resumed["steps"], &resumed["parameters"]["trainable"]), (&json!(26), &parameters["trainable"]));
        let (code, message) =
            refused(&strs(&shop.train("films.csv", "none", &["--method", method, "--rank-pattern", "x=2"])));
        assert!(code == 2 && message.contains("--rank-pattern"), "{message}");
    }
    let full = shop.path("full");
    let again = ["train", "--model", &full, "--data", "none.csv", "--out", &full, "--targets", "query", "--overwrite"];
    let (code, message) = refused(&again);
    assert!(code == 2 && message.contains("this is the folder of the model"), "{message}");
    // An adapter in the same folder leaves nothing of the model there.
    json_of(&strs(&shop.train("films.csv", "full", &[&LORA[..], &["--steps", "1", "--overwrite"]].concat())));
    assert!(!Path::new(&format!("{full}/model.safetensors")).exists());
}

#[test]
fn words_numbers_and_lists_of_labels() {
    let shop = Films::new();
    let rows = |row: &dyn Fn(&str) -> String| {
        let texts = ["the film was good", "a bad film", "the bad thing", "good"];
        (0..16).map(|i| row(texts[i % 4])).collect::<Vec<_>>().join("\n")
    };
    let quality = |text: &str| if text.contains("good") { 0.5 } else { -1.5 };
    let words = rows(&|text| {
        let words: Vec<&str> = text.split(' ').collect();
        let labels: Vec<&str> =
            words.iter().map(|word| if ["good", "bad"].contains(word) { "QUALITY" } else { "O" }).collect();
        json!({ "tokens": words, "labels": labels }).to_string()
    });
    let lists = rows(&|text| {
        let labels: Vec<&str> = ["film", "bad"].into_iter().filter(|word| text.contains(word)).collect();
        json!({ "text": text, "label": labels }).to_string()
    });
    let numbers = rows(&|text| json!({ "text": text, "label": quality(text) }).to_string());
    let run = |name: &str, text: &str| {
        let data = shop.write(&format!("{name}.jsonl"), text);
        let more = [&LORA[..], &["--steps", "60", "--batch-size", "4", "--eval-data", &data]].concat();
        json_of(&strs(&shop.train(&format!("{name}.jsonl"), name, &more)))
    };
    let predict = |adapter: &str, text: &str| {
        let (model, adapter) = (shop.path("bert"), shop.path(adapter));
        json_of(&["predict", "--json", "--model", &model, "--adapter", &adapter, "--text", text])
    };
    assert_eq!(run("words", &words)["data"]["labels"], json!(["O", "QUALITY"]));
    let answer = predict("words", "the film was good");
    let found: Vec<&str> =
        answer["words"].as_array().unwrap().iter().map(|word| word["answer"]["label"].as_str().unwrap()).collect();
    assert_eq!(found, ["O", "O", "O", "QUALITY"]);
    assert!(run("lists", &lists)["after"]["f1_micro"].as_f64().unwrap() > 0.9);
    let answer = predict("lists", "a bad film");
    assert!(answer["all"]["film"].as_f64().unwrap() > 0.5 && answer["all"]["bad"].as_f64().unwrap() > 0.5, "{answer}");
    assert!(run("numbers", &numbers)["after"]["pearson"].as_f64().unwrap() > 0.9);
    let value = |text| predict("numbers", text)["value"].as_f64().unwrap();
    assert!(value("the film was good") > value("a bad film"));
}

/// Row 1 of the golden input is not padded here, and has no second text.
#[test]
fn adapters_of_peft_with_heads_give_its_logits() {
    for (case, base, places) in [
        ("bert_seqcls_lora_qv", "bert_seqcls", 1),
        ("bert_seqcls_lora_all_linear", "bert_seqcls", 1),
        ("bert_seqcls_ia3", "bert_seqcls", 1),
        ("bert_seqcls_ln_tuning", "bert_seqcls", 1),
        ("roberta_seqcls_lora_qv", "roberta_seqcls", 1),
        ("roberta_seqcls_ia3", "roberta_seqcls", 1),
        ("bert_tokcls_lora_qv", "bert_tokcls", 12),
        ("bert_qa_lora_qv", "bert_qa", 12),
    ] {
        let path = format!("peft_heads/{case}/logits.safetensors");
        let tokens = ints(&path, "tokens");
        let row: Vec<String> = tokens[tokens.len() / 2..].iter().map(i64::to_string).collect();
        let (model, adapter) = (testdata(&format!("encoders/{base}")), testdata(&format!("peft_heads/{case}")));
        let found = json_of(&["logits", "--model", &model, "--adapter", &adapter, "--tokens", &row.join(",")]);
        let expected = golden(&path, "logits_unmasked");
        let expected: Vec<f64> = expected[expected.len() / 2..].iter().map(|value| f64::from(*value)).collect();
        let logits: Vec<f64> = found["logits"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
        assert!(deviation(&logits, &expected) < 1e-4, "{case}: {}", deviation(&logits, &expected));
        let outputs = expected.len() / places;
        let shape = if places == 1 { json!([1, outputs]) } else { json!([1, places, outputs]) };
        assert_eq!(found["shape"], shape, "{case}");
    }
}

/// A tensor of a file, as its bytes.
fn tensor(path: &str, key: &str) -> (safetensors::Dtype, Vec<u8>) {
    let bytes = fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let view = file.tensor(key).unwrap();
    (view.dtype(), view.data().to_vec())
}

pub(super) fn golden(path: &str, key: &str) -> Vec<f32> {
    let (dtype, bytes) = tensor(&testdata(path), key);
    peft_core::files::decode(dtype, &bytes).unwrap()
}

pub(super) fn ints(path: &str, key: &str) -> Vec<i64> {
    tensor(&testdata(path), key).1.chunks_exact(8).map(|bytes| i64::from_le_bytes(bytes.try_into().unwrap())).collect()
}

/// Adapters by the names of `transformers` 5 and of 4 are one adapter.
#[test]
fn vision_adapters_are_known_by_old_and_new_names() {
    for name in ["vit_imgcls", "dinov2_imgcls"] {
        let (model, image) = (testdata(&format!("encoders/{name}")), testdata(&format!("encoders/{name}/image.png")));
        let logits = |adapter: &[&str]| {
            let json = json_of(&[&["logits", "--model", &model, "--image", &image], adapter].concat());
            assert_eq!((&json["shape"], json.get("tokens")), (&json!([1, 4]), None));
            json["logits"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect::<Vec<_>>()
        };
        let base: Vec<f64> = golden(&format!("encoders/{name}/logits.safetensors"), "processed_logits")
            .into_iter()
            .map(f64::from)
            .collect();
        assert!(deviation(&logits(&[]), &base) < 1e-4, "{name}");
        let adapter = testdata(&format!("peft_heads/{name}_lora_qv"));
        let new = logits(&["--adapter", &adapter]);
        assert!(deviation(&new, &base) > 1e-2, "{name}: the adapter does something");
        assert_eq!(new, logits(&["--adapter", &format!("{adapter}/v4")]), "{name}");
        let answer = json_of(&["predict", "--json", "--model", &model, "--adapter", &adapter, "--image", &image]);
        assert_eq!(answer["all"].as_object().unwrap().len(), 4);
    }
}

#[test]
fn what_does_not_fit_an_encoder_is_refused() {
    let shop = Films::new();
    let (model, data) = (shop.path("bert"), shop.path("films.csv"));
    let train = |data: &str, more: &[&str]| refused(&strs(&shop.train(data, "none", &[&LORA, more].concat())));
    let case = |(code, message): (i32, String), expected: i32, parts: &[&str]| {
        assert_eq!(code, expected, "{message}");
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    };
    case(train("films.csv", &["--pack"]), 2, &["--pack is for language models"]);
    case(train("films.csv", &["--task", "tokens"]), 1, &["labels: expected a label for each word"]);
    case(train("films.csv", &["--label-smoothing", "1.5"]), 2, &["label_smoothing: is 1.5"]);
    case(train("films.csv", &["--max-len", "65"]), 2, &["max_len: is 65", "takes at most 64"]);
    shop.write("one.csv", "text,label\na,yes\nb,yes\n");
    case(train("one.csv", &[]), 1, &["every row has \"yes\""]);
    shop.write("bad.csv", "text,label\na,yes\nb\n");
    case(train("bad.csv", &[]), 1, &["bad.csv, line 3: expected 2 columns, found 1"]);
    shop.write("mixed.jsonl", "{\"text\": \"a\", \"label\": 1}\n{\"tokens\": [\"a\"], \"labels\": [\"O\"]}\n");
    case(train("mixed.jsonl", &[]), 1, &["row 2: a list of words with a label for each word", "a text with one label"]);
    fs::create_dir_all(shop.path("pictures/cat")).unwrap();
    case(train("pictures", &[]), 1, &["cat: no picture for this class"]);
    let no_targets = shop.train("films.csv", "none", &[]);
    case(refused(&strs(&no_targets)), 2, &["--targets is missing", "query x 2"]);

    case(refused(&["predict", "--model", &model, "--text", "a"]), 2, &["no head for labels"]);
    let seqcls = testdata("encoders/bert_seqcls");
    case(refused(&["predict", "--model", &seqcls]), 2, &["there is nothing to read"]);
    case(
        refused(&["eval", "--model", &seqcls, "--data", &data]),
        1,
        &["row 1: the label", "negative, neutral, positive"],
    );
    case(refused(&["predict", "--model", "tiny", "--text", "a"]), 2, &["a language model has no labels"]);
    case(
        refused(&["train", "--model", "tiny", "--data", &data, "--out", "none", "--task", "classify"]),
        2,
        &["--task is for encoders"],
    );
    case(refused(&["generate", "--model", &seqcls, "--prompt", "a"]), 1, &["bert"]);
    let image = testdata("encoders/vit_imgcls/image.png");
    case(refused(&["logits", "--model", &seqcls, "--image", &image]), 1, &["expected a text, found a picture"]);
    case(refused(&["logits", "--model", &seqcls, "--tokens", "96"]), 2, &["96 is out of range"]);
}

#[test]
fn a_trained_head_keeps_its_labels() {
    let shop = Films::new();
    let model = testdata("encoders/bert_seqcls");
    shop.write("scores.csv", "text,label\na good film,2\nthe film was bad,0\nthe film,1\nbad,negative\n");
    let data = shop.path("scores.csv");
    let out = shop.path("out");
    let result = json_of(&[
        "train",
        "--json",
        "--model",
        &model,
        "--data",
        &data,
        "--out",
        &out,
        "--targets",
        "query",
        "--steps",
        "2",
        "--eval-fraction",
        "0",
    ]);
    assert_eq!(result["data"]["labels"], json!(["negative", "neutral", "positive"]));
    let found = json_of(&["eval", "--json", "--model", &model, "--adapter", &out, "--data", &data]);
    assert_eq!(found["labels"][0]["support"], 2);
}
